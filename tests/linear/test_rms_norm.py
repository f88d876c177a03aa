"""rms_norm against NumPy's float64, on every backend."""

import numpy as np
import pytest
import torch

from specdec_ops import linear, rms_norm
from tests.harness.close import assert_as_good_as_torch
from tests.linear.linear_cases import DTYPES, make_rows

OP = "rms_norm"
ISAS = ("generic", "avx2", "avx512")
SHAPES = ((1, 1), (3, 64), (5, 77), (2, 1500), (9, 4104))


def exact(x, weight, eps=1e-6, residual=None):
    y = x.cpu().double().numpy()
    y = y / np.sqrt((y**2).mean(axis=1, keepdims=True) + eps) * weight.cpu().double().numpy()
    return torch.from_numpy(y if residual is None else y + residual.cpu().double().numpy())


def in_torch(x, weight, eps=1e-6, residual=None):
    """As Hugging Face's models have it."""
    x, weight = x.cpu(), weight.cpu()
    wide = x.float()
    y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (y if residual is None else y + residual.cpu()).to(x.dtype)


def check(x, weight, backend, **options):
    got = rms_norm(x, weight, backend=backend, **options)
    assert got.dtype == x.dtype and got.is_contiguous()
    expected = exact(x, weight, **options)
    try:
        assert_as_good_as_torch(got, expected, in_torch(x, weight, **options))
    except AssertionError:  # PyTorch was lucky: three roundings of float32, and one of the result's dtype
        allowed = (4 * torch.finfo(torch.float32).eps + torch.finfo(got.dtype).eps) * expected.abs().max()
        if not (got.cpu().double() - expected).abs().max() <= allowed:
            raise


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, wide_weight, target):
    x = make_rows(*shape, dtype, target.device)
    weight = make_rows(1, shape[1], torch.float32 if wide_weight else dtype, target.device)[0]
    check(x, weight, target.backend)
    check(x, weight, target.backend, eps=0.5, residual=make_rows(*shape, dtype, target.device).flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_every_instruction_set(dtype, isa):
    for shape in SHAPES:
        for weight in (make_rows(1, shape[1], dtype)[0], make_rows(1, shape[1], torch.float32)[0]):
            check(make_rows(*shape, dtype), weight, "cpu", residual=make_rows(*shape, dtype).flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_that_row_alone(dtype, target):
    x, weight = make_rows(3, 200, dtype, target.device), make_rows(1, 200, dtype, target.device)[0]
    alone = [rms_norm(x[row : row + 1], weight, backend=target.backend) for row in range(3)]
    assert torch.equal(rms_norm(x, weight, backend=target.backend), torch.cat(alone))
    x[1] = float("nan")
    got = rms_norm(x, weight, backend=target.backend)
    assert torch.equal(got[::2], torch.cat(alone)[::2]) and got[1].isnan().all()


def test_any_number_of_threads(threads):
    x, weight = make_rows(70, 2000, torch.bfloat16), make_rows(1, 2000, torch.bfloat16)[0]
    threads(1)
    expected = rms_norm(x, weight, backend="cpu")
    threads(3)
    assert torch.equal(rms_norm(x, weight, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_apart_in_and_out(dtype, target):
    wide = torch.full((3, 80), float("nan"), dtype=dtype, device=target.device)
    x = wide[:, 3:67]
    x.copy_(make_rows(3, 64, dtype, target.device))
    weight = make_rows(1, 64, dtype, target.device)[0]
    expected = rms_norm(x.contiguous(), weight, residual=x.contiguous(), backend=target.backend)
    out = torch.full((3, 70), 7.5, dtype=dtype, device=target.device)
    rms_norm(x, weight, residual=x, out=out[:, 2:66], backend=target.backend)
    assert torch.equal(out[:, 2:66], expected) and (out[:, :2] == 7.5).all() and (out[:, 66:] == 7.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, target):
    x, weight = make_rows(3, 64, dtype, target.device), make_rows(1, 64, dtype, target.device)[0]
    residual = make_rows(3, 64, dtype, target.device).flip(0)
    expected = rms_norm(x, weight, residual=residual, backend=target.backend)
    kept = residual.clone()
    assert rms_norm(x, weight, residual=residual, out=residual, backend=target.backend) is residual
    assert torch.equal(residual, expected)
    rms_norm(x, weight, residual=kept, out=x, backend=target.backend)
    assert torch.equal(x, expected)


def test_a_row_of_zeros(target):
    zeros = torch.zeros(2, 64, device=target.device)
    assert torch.equal(rms_norm(zeros, torch.ones(64, device=target.device), backend=target.backend), zeros)


def test_empty(target):
    assert rms_norm(torch.zeros(0, 8, device=target.device), torch.ones(8, device=target.device)).shape == (0, 8)


def test_float64_runs_on_the_definition():
    x, weight = make_rows(3, 64, torch.float64), make_rows(1, 64, torch.float64)[0]
    assert torch.allclose(rms_norm(x, weight), exact(x, weight), rtol=1e-14)


def test_it_is_the_norm_that_linear_takes_along(target):
    """An identity as the weight shows the normed rows."""
    x, weight = make_rows(5, 64, torch.float32, target.device), make_rows(1, 64, torch.float32, target.device)[0]
    through = linear(x, torch.eye(64, device=target.device), norm_weight=weight, norm_eps=0.1, backend=target.backend)
    torch.testing.assert_close(through, rms_norm(x, weight, eps=0.1, backend=target.backend), rtol=1e-6, atol=1e-7)


X, WEIGHT = torch.ones(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"x": 1}, TypeError, "x must be float32, bfloat16 or float16 [rows, dim], got 1"),
        ({"x": X[0]}, ValueError, "x must be [rows, dim] with a dim of at least 1 and sizes below 2**31, got"),
        ({"x": X.t()}, ValueError, "x must be contiguous in its last dimension, got float32 [8, 3] with strides"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be float32 [8], got float16 [8]"),
        ({"weight": WEIGHT[:7]}, ValueError, "weight must be float32 [8], got float32 [7]"),
        ({"weight": torch.ones(16)[::2]}, ValueError, "weight must be contiguous, got float32 [8] with strides [2]"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, got a tensor on meta"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number of at least 0, got -1.0"),
        ({"eps": "1"}, ValueError, "eps must be a finite number of at least 0, got '1'"),
        ({"residual": X[:2]}, ValueError, "residual must be float32 [3, 8], got float32 [2, 8]"),
        ({"residual": X.half()}, TypeError, "residual must be float32 [3, 8], got float16 [3, 8]"),
        ({"out": X.to("meta")}, ValueError, "out must be on cpu, got a tensor on meta"),
        ({"out": torch.ones(1, 8).expand(3, 8)}, ValueError, "out must be of rows that do not overlap, got"),
        ({"x": X.clone().requires_grad_()}, RuntimeError, "an input requires grad, but this op has no backward"),
    ],
    ids=str,
)
def test_errors(changed, kind, message):
    with pytest.raises(kind) as raised:
        rms_norm(**{"x": X, "weight": WEIGHT, **changed})
    assert str(raised.value).startswith("specdec_ops.rms_norm: ") and message in str(raised.value)


def test_compiles_without_a_break():
    compiled = torch.compile(lambda x: rms_norm(x, WEIGHT, residual=x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), rms_norm(X, WEIGHT, residual=X))


def test_opcheck():
    arguments = (X.clone(), WEIGHT, 1e-6, 2 * X, "cpu")
    torch.library.opcheck(torch.ops.specdec_ops.rms_norm.default, arguments)
    torch.library.opcheck(torch.ops.specdec_ops.rms_norm.out, arguments, {"out": torch.empty(3, 8)})
