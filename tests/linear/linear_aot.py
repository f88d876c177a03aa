"""The kernels of linear and rms_norm as their launches compile them; used by test_triton_aot.py."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
OF_X = ("x", "residual", "out", "bias", "weight")
FLOATS = ("norm_eps", "eps")
NUMBERS = ("dim", "rows", "outputs")
ALIGNED = ("x", "residual", "out", "weight", "dim", "x_stride", "residual_stride", "out_stride", "norm_weight")


@dataclass(frozen=True)
class LinearSpec:
    """One compilation: the weight ("plain", "int8" or a GGUF type; "" is rms_norm), the type of x, an activation."""

    weight: str
    x: str = "bf16"
    activation: str = "none"
    architectures: tuple = (80, 90, 100)

    def __str__(self):
        return f"linear-{self.weight}-{self.x}-{self.activation}" if self.weight else f"rms_norm-{self.x}"


SPECS = [
    LinearSpec("plain"),
    LinearSpec("plain", "fp16", "swiglu", architectures=(90,)),
    LinearSpec("plain", "fp32", architectures=(80,)),
    LinearSpec("int8", architectures=(90,)),
    LinearSpec("q8_0", architectures=(80,)),
    LinearSpec("q4_1", "fp16", "geglu", architectures=(90,)),
    LinearSpec("q4_0", architectures=(100,)),
    LinearSpec("", architectures=(80,)),
]


def compile_linear(spec, arch, compile_typed):
    """With all options, for a dim of 4,096."""
    from specdec_ops.triton_kernels.linear import linear as module
    from specdec_ops.triton_kernels.linear import rms_norm

    if not spec.weight:
        kernel, constants, stages = rms_norm.rms_norm_kernel, {"BLOCK": 4096, "WIDEN": False}, 3
    else:
        dtype = torch.int8 if spec.weight == "int8" else DTYPES[spec.x] if spec.weight == "plain" else torch.uint8
        tensors = {"x": torch.empty(1, 4096, device="meta"), "weight": torch.empty(1, dtype=dtype, device="meta")}
        block, step, stages = module.block_shape(
            SimpleNamespace(**tensors, activation=spec.activation, weight_type=spec.weight)
        )
        kernel = module.linear_kernel
        constants = {
            "ACTIVATION": ("none", "swiglu", "geglu").index(spec.activation),
            "BYTES": BLOCK_BYTES.get(spec.weight, 0),
            **{"ROWS": 16, "BLOCK_N": block, "BLOCK_K": step, "WIDEN": False},
            **({} if spec.weight == "int8" else {"scales": None}),
        }

    def type_of(name):
        if name == "weight" and spec.weight not in ("plain", ""):
            return "*i8" if spec.weight == "int8" else "*u8"
        if name in OF_X:
            return f"*{spec.x}"
        if name in FLOATS:
            return "fp32"
        return "i32" if name in NUMBERS or name.endswith("stride") else "*fp32"

    def is_aligned(name):
        return name in ALIGNED and not (name == "weight" and spec.weight in BLOCK_BYTES)

    return compile_typed(kernel, constants, arch, 4, stages, type_of, is_aligned)
