"""What linear refuses, in one sentence that names the argument, what it must be and what it was."""

import pytest
import torch

from specdec_ops import GgufWeight, QuantizedHead, QuantizedWeight, linear

X, WEIGHT = torch.ones(3, 64), torch.ones(10, 64)
VALUES, SCALES = torch.ones(10, 64, dtype=torch.int8), torch.ones(10)
BLOCKS = GgufWeight(torch.ones(10, 68, dtype=torch.uint8), "q8_0")
HALF = X.half()
ROWS_MUST = "x must be [rows, dim] with a dim of at least 1 and sizes below 2**31, got float32"
WEIGHT_MUST = "[outputs, 64], a specdec_ops.QuantizedWeight or a specdec_ops.GgufWeight, got"

CASES = [
    ({"x": 1}, TypeError, "x must be float32, bfloat16 or float16 [rows, dim], got 1"),
    ({"x": X.int()}, TypeError, "x must be float32, bfloat16 or float16 [rows, dim], got int32 [3, 64]"),
    ({"x": X.numpy()}, TypeError, "torch.from_dlpack makes a tensor of it, and specdec_ops.dlpack takes it"),
    ({"x": X[0]}, ValueError, f"{ROWS_MUST} [64]"),
    ({"x": X[:, :0]}, ValueError, f"{ROWS_MUST} [3, 0]"),
    ({"x": torch.ones(64, 3).t()}, ValueError, "x must be contiguous in its last dimension, got float32 [3, 64] with"),
    ({"x": X[:1].expand(2**31, 64)}, ValueError, "sizes below 2**31, got float32 [2147483648, 64]"),
    ({"weight": None}, TypeError, f"float32 or bfloat16 or float16 {WEIGHT_MUST} None"),
    ({"weight": torch.nn.Linear(64, 10)}, TypeError, "got Linear, a module; its weight may be meant"),
    ({"weight": WEIGHT.double()}, TypeError, f"float32 or bfloat16 or float16 {WEIGHT_MUST} float64 [10, 64]"),
    ({"x": HALF}, TypeError, f"weight must be float16 {WEIGHT_MUST} float32 [10, 64]"),
    ({"x": HALF, "weight": WEIGHT.bfloat16()}, TypeError, f"weight must be float16 {WEIGHT_MUST} bfloat16 [10, 64]"),
    ({"weight": VALUES}, TypeError, f"{WEIGHT_MUST} int8 [10, 64]"),
    ({"weight": torch.ones(10, 32)}, ValueError, "[outputs, 64], got float32 [10, 32]"),
    ({"weight": torch.ones(64, 10)}, ValueError, "got float32 [64, 10]; weight.T.contiguous() fits"),
    ({"weight": torch.ones(64, 10).t()}, ValueError, "weight must be contiguous, got float32 [10, 64] with strides"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, got a tensor on meta"),
    ({"weight": QuantizedWeight(VALUES[:, :32].contiguous(), SCALES)}, ValueError, "weight must be [outputs, 64], got"),
    ({"weight": QuantizedWeight(VALUES, SCALES).to("meta")}, ValueError, "weight.values must be on cpu, got a tensor"),
    ({"weight": QuantizedHead(VALUES.t().contiguous(), *[torch.ones(64)] * 3, torch.ones(1))}, ValueError, "[64, 10]"),
    ({"x": X[:, :32]}, ValueError, "weight must be float32 or bfloat16 or float16 [outputs, 32], got float32 [10, 64]"),
    ({"x": X[:, :32], "weight": BLOCKS}, ValueError, "weight must be [outputs, 32], got [10, 64]"),
    ({"weight": BLOCKS.to("meta")}, ValueError, "weight.blocks must be on cpu, got a tensor on meta"),
    ({"bias": 1.0}, TypeError, "bias must be float32 [10], got 1.0"),
    ({"bias": torch.ones(9)}, ValueError, "bias must be float32 [10], got float32 [9]"),
    ({"bias": torch.ones(10).half()}, TypeError, "bias must be float32 [10], got float16 [10]"),
    ({"bias": torch.ones(20)[::2]}, ValueError, "bias must be contiguous, got float32 [10] with strides [2]"),
    ({"norm_weight": torch.ones(10)}, ValueError, "norm_weight must be float32 [64], got float32 [10]"),
    ({"norm_weight": torch.ones(64, device="meta")}, ValueError, "norm_weight must be on cpu, got a tensor on meta"),
    ({"norm_eps": float("nan")}, ValueError, "norm_eps must be a finite number of at least 0, got nan"),
    ({"norm_eps": -1}, ValueError, "norm_eps must be a finite number of at least 0, got -1"),
    ({"norm_eps": torch.ones(1)}, ValueError, "norm_eps must be a finite number of at least 0, got float32 [1]"),
    ({"activation": "relu"}, ValueError, "activation must be 'swiglu', 'geglu' or None, got 'relu'"),
    ({"activation": "none"}, ValueError, "activation must be 'swiglu', 'geglu' or None, got 'none'"),
    ({"activation": 1}, TypeError, "activation must be 'swiglu', 'geglu' or None, got 1"),
    ({"weight": WEIGHT[:9], "activation": "swiglu"}, ValueError, "of an even number of rows with activation='swiglu'"),
    ({"residual": torch.ones(3, 9)}, ValueError, "residual must be float32 [3, 10], got float32 [3, 9]"),
    ({"residual": torch.ones(3, 10), "activation": "geglu"}, ValueError, "residual must be float32 [3, 5], got"),
    ({"residual": torch.ones(3, 10).half()}, TypeError, "residual must be float32 [3, 10], got float16 [3, 10]"),
    ({"residual": torch.ones(10, 3).t()}, ValueError, "residual must be contiguous in its last dimension, got"),
    ({"out": torch.ones(3, 9)}, ValueError, "out must be float32 [3, 10], got float32 [3, 9]"),
    ({"out": torch.ones(3, 10, device="meta")}, ValueError, "out must be on cpu, got a tensor on meta"),
    ({"out": torch.ones(1, 10).expand(3, 10)}, ValueError, "out must be of rows that do not overlap, got"),
    ({"weight": torch.ones(64, 64), "out": X}, ValueError, "out must be another tensor than x, got x"),
    ({"x": X.clone().requires_grad_()}, RuntimeError, "an input requires grad, but this op has no backward"),
    ({"weight": torch.nn.Parameter(WEIGHT)}, RuntimeError, "an input requires grad, but this op has no backward"),
    ({"backend": "gpu"}, ValueError, "backend must be one of auto, cuda, triton, cpu, torch, got 'gpu'"),
    ({"backend": "cuda"}, RuntimeError, "backend='cuda' is unavailable: "),
]


@pytest.mark.parametrize(("changed", "kind", "message"), CASES, ids=range(len(CASES)))
def test_errors(changed, kind, message):
    with pytest.raises(kind) as raised:
        linear(**{"x": X, "weight": WEIGHT, **changed})
    text = str(raised.value)
    assert text.startswith("specdec_ops.linear: ") and message in text and "\n" not in text


def test_without_gradients_nothing_is_refused():
    with torch.no_grad():
        assert torch.equal(linear(X, torch.nn.Parameter(WEIGHT)), linear(X, WEIGHT))


def test_kernels_refuse_float64():
    with pytest.raises(RuntimeError, match=r"its kernels take float32, bfloat16 and float16, not float64"):
        linear(X.double(), WEIGHT.double(), backend="cpu")
