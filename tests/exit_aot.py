"""The early exit kernels as their launches compile them; used by test_triton_aot.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i8": torch.int8}
INT_POINTERS = ("token_map", "token", "top_tokens", "status", "active_rows", "inverse", "num_active", "counters",
                "rechecked", "entries", "requests", "slots", "page_table")  # fmt: skip
FLOATS = ("temperature", "norm_eps", "sums", "threshold", "tolerance")
ALIGNED = ("head", "y", "state", "hidden", "dim", "y_stride", "hidden_stride", "norm_weight", "values", "approximate")


@dataclass(frozen=True)
class ExitSpec:
    """One compilation of a kernel: which one, hidden rows, type of the hidden rows and of the head, listed logits."""

    kernel: str
    rows: int = 4
    hidden: str = "bf16"
    head: str = "bf16"
    top_k: int = 0
    even: bool = True
    architectures: tuple = (80, 90, 100)

    def __str__(self):
        even = "" if self.even else "-tails"
        return f"{self.kernel}-rows{self.rows}-{self.hidden}-{self.head}-top{self.top_k}{even}"


SPECS = [
    ExitSpec("rows", architectures=(80,)),
    ExitSpec("head"),
    ExitSpec("head", rows=32, hidden="fp16", head="fp16", top_k=10, architectures=(80,)),
    ExitSpec("head", rows=64, top_k=16, even=False),
    ExitSpec("head", head="i8", architectures=(90,)),
    ExitSpec("head", rows=64, head="i8", architectures=(80,)),
    ExitSpec("head", hidden="fp32", head="fp32", architectures=(100,)),
    ExitSpec("head", rows=64, hidden="fp32", head="i8", architectures=(90,)),
    ExitSpec("merge", top_k=16, architectures=(90,)),
]


def plan_of(spec):
    from specdec_ops.triton_kernels import exit_confidence as module

    multiplied = module.multiplied_type(DTYPES[spec.hidden], DTYPES[spec.head])
    shape = module.block_shape(spec.rows, multiplied, DTYPES[spec.head])
    return module.Plan(shape, multiplied, 264, max(2, spec.top_k), 4096)


def multiplies(spec):
    return spec.kernel == "head"


def compile_exit(spec, arch, compile_typed):
    from specdec_ops.triton_kernels import exit_kernels as kernels

    plan = plan_of(spec)
    shape = plan.shape
    kernel = {"rows": kernels.rows_kernel, "head": kernels.head_kernel, "merge": kernels.merge_kernel}[spec.kernel]
    blocks = {"ROWS": shape.rows, "BLOCK_V": shape.entries, "BLOCK_K": shape.dims, "EVEN": spec.even, "WIDEN": False}
    lists = {"LISTED": plan.listed, "LIST": plan.list, "PROGRAMS": 512}
    if spec.kernel == "rows":
        constants, warps, stages = {"BLOCK": 4096}, 8, 3
    elif spec.kernel == "head":
        constants, warps, stages = blocks | {"LIST": plan.list}, shape.warps, shape.stages
        if spec.head != "i8":
            constants["scales"] = None
    else:
        constants, warps, stages = (
            lists | {"MEASURE": "entropy", "LEVEL": "any", "BLOCK": 256},
            4 + 4 * (plan.list > 4),
            3,
        )
        if not spec.top_k:
            constants |= {"top_tokens": None, "top_logprobs": None}
    return compile_typed(
        kernel, constants, arch, warps, stages, lambda name: argument_type(name, spec, plan), ALIGNED.__contains__
    )


def argument_type(name, spec, plan):
    if name in ("hidden", "norm_weight"):
        return f"*{spec.hidden}"
    if name == "head":
        return f"*{spec.head}"
    if name == "y":
        return "*" + next(short for short, dtype in DTYPES.items() if dtype == plan.multiplied)
    if name == "exited":
        return "*i8"
    if name in INT_POINTERS:
        return "*i32"
    if name in FLOATS:
        return "fp32"
    if name in ("rows", "vocab", "programs", "top_k", "dim") or name.endswith("stride"):
        return "i32"
    return "*fp32"
