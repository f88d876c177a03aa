"""linear against NumPy's float64, on every backend; its options, its layouts, and its edge cases."""

import pytest
import torch

import specdec_ops
from specdec_ops import GgufWeight, QuantizedWeight, linear, quantize_head
from specdec_ops.ops.linear import linear as linear_module
from specdec_ops.ops.linear.linear import MAX_FEW_ROWS
from tests.linear.linear_cases import (
    COMBINATIONS,
    DTYPES,
    KINDS,
    OPTIONS,
    assert_right,
    exact,
    make_rows,
    make_weight,
    options_of,
    rounds_rows,
)

OP = "linear"
ISAS = ("generic", "avx2", "avx512 without vnni", "avx512", "avx512_bf16")
SHAPES = ((1, 32, 1), (3, 96, 34), (17, 288, 40), (33, 512, 66))
"""rows, dim, outputs"""
ODD_SHAPES = ((1, 1, 1), (2, 7, 3), (4, 77, 131), (2, 1000, 65))
"""Of plain and int8 weights, whose dim may be any."""


def check(x, weight, backend, **options):
    got = linear(x, weight, backend=backend, **options)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert_right(got, x, weight, rounds_rows(backend), **options)


@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, kind, target):
    rows, dim, outputs = shape
    if target.interpreted and rows > 17:
        pytest.skip("the same programs again, slowly")
    check(make_rows(rows, dim, dtype, target.device), make_weight(outputs, dim, dtype, kind, target.device), target[0])


@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_any_dim(shape, dtype, kind, target):
    rows, dim, outputs = shape
    check(make_rows(rows, dim, dtype, target.device), make_weight(outputs, dim, dtype, kind, target.device), target[0])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_options(dtype, kind, name, target):
    rows, dim, outputs = 5, 160, 36
    halves = 2 if name in ("swiglu", "geglu", "all") else 1
    x = make_rows(rows, dim, dtype, target.device)
    weight = make_weight(halves * outputs, dim, dtype, kind, target.device)
    check(x, weight, target.backend, **options_of(name, x, outputs, halves * outputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_outputs_of_an_activation(dtype, target):
    """Gate and up rows lie far from each other."""
    x = make_rows(2, 64, dtype, target.device)
    check(x, make_weight(2 * 75, 64, dtype, "plain", target.device), target.backend, activation="swiglu")


@pytest.mark.parametrize("kind", KINDS)
def test_values_on_every_instruction_set(kind, isa):
    for dtype, of_kind in COMBINATIONS:
        if of_kind == kind:
            for rows, dim, outputs in ((1, 64, 130), (7, 352, 69), (33, 96, 65)):
                x = make_rows(rows, dim, dtype)
                check(x, make_weight(outputs, dim, dtype, kind), "cpu")
                halves = make_weight(2 * outputs, dim, dtype, kind)
                check(x, halves, "cpu", **options_of("all", x, outputs, 2 * outputs))


def test_rows_may_be_apart(target):
    x = make_rows(4, 96, torch.float32, target.device)
    check(x[::2, 16:80], make_weight(9, 64, torch.float32, "plain", target.device), target.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_no_vector_load_may_touch(dtype, target):
    """Rows and weights that start at no multiple of 16 bytes, between NaN."""
    wide = torch.full((3, 71), float("nan"), dtype=dtype, device=target.device)
    wide[:, 3:67] = make_rows(3, 64, dtype, target.device)
    memory = torch.full((5 * 64 + 2,), float("nan"), dtype=dtype, device=target.device)
    memory[1:-1] = make_weight(5, 64, dtype, "plain", target.device).flatten()
    check(wide[:, 3:67], memory[1:-1].view(5, 64), target.backend)


@pytest.mark.parametrize("kind", ["int8", "q8_0", "q4_0", "q4_1"])
def test_quantised_weights_at_odd_addresses(kind, target):
    x = make_rows(3, 256, torch.bfloat16, target.device)
    weight = make_weight(6, 256, torch.bfloat16, kind, target.device)
    stored = weight.values if kind == "int8" else weight.blocks
    memory = torch.full((stored.numel() + 2,), 0x7F, dtype=stored.dtype, device=target.device)
    memory[1:-1] = stored.flatten()
    moved = memory[1:-1].view(stored.shape)
    moved = QuantizedWeight(moved, weight.scales) if kind == "int8" else GgufWeight(moved, kind)
    expected = linear(x, weight, backend=target.backend)
    assert torch.equal(linear(x, moved, backend=target.backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_with_rows_apart(dtype, target):
    x, weight = make_rows(3, 64, dtype, target.device), make_weight(10, 64, dtype, "plain", target.device)
    expected = linear(x, weight, backend=target.backend)
    wide = torch.full((3, 14), 7.5, dtype=dtype, device=target.device)
    out = wide[:, 2:12]
    assert linear(x, weight, out=out, backend=target.backend) is out
    assert torch.equal(out, expected)
    assert (wide[:, :2] == 7.5).all() and (wide[:, 12:] == 7.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_residual(dtype, target):
    x, weight = make_rows(5, 64, dtype, target.device), make_weight(70, 64, dtype, "plain", target.device)
    residual = make_rows(5, 100, dtype, target.device)[:, 10:80]
    expected = linear(x, weight, residual=residual, backend=target.backend)
    linear(x, weight, residual=residual, out=residual, backend=target.backend)
    assert torch.equal(residual, expected)


def test_the_residual_is_added_unrounded(target):
    """1 + 2**-9 is no bfloat16: had the product been rounded first, the sum would be 0."""
    x = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16, device=target.device)
    residual = torch.tensor([[-1.0]], dtype=torch.bfloat16, device=target.device)
    got = linear(x, torch.ones_like(x), residual=residual, backend=target.backend)
    assert got.item() == 2.0**-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros_has_a_norm(dtype, target):
    x = torch.zeros(2, 64, dtype=dtype, device=target.device)
    weight = make_weight(5, 64, dtype, "plain", target.device)
    ones = torch.ones(64, dtype=dtype, device=target.device)
    assert (linear(x, weight, norm_weight=ones, backend=target.backend) == 0).all()


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_gates_far_from_zero(activation, target):
    """Neither end overflows: one side of the gate's function is 0, the other the gate."""
    x = torch.tensor([[1.0], [-1.0]], device=target.device)
    weight = torch.tensor([[3e4], [2.0]], device=target.device)
    got = linear(x, weight, activation=activation, backend=target.backend)
    assert got.flatten().tolist() == [6e4, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_row_gets_into_another(kind, target):
    """NaN and infinity of a row stay there, and so do those of a row of the weight."""
    x = make_rows(4, 64, torch.float32, target.device)
    weight = make_weight(40, 64, torch.float32, kind, target.device)
    expected = linear(x, weight, backend=target.backend)
    x[1], x[2] = float("nan"), float("inf")
    got = linear(x, weight, backend=target.backend)
    assert torch.equal(got[::3], expected[::3]) and got[1].isnan().all() and not got[2].isfinite().any()
    if isinstance(weight, torch.Tensor):
        weight[7] = float("nan")
        got = linear(x, weight, backend=target.backend)
        others = torch.arange(40) != 7
        assert got[0, 7].isnan() and torch.equal(got[0, others], expected[0, others])


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [2, 2, 2, 2]])
def test_permuted_rows(order, target):
    x = make_rows(4, 96, torch.bfloat16, target.device)
    weight = make_weight(20, 96, torch.bfloat16, "plain", target.device)
    residual = make_rows(4, 20, torch.bfloat16, target.device)
    got = linear(x[order], weight, residual=residual[order], backend=target.backend)
    assert torch.equal(got, linear(x, weight, residual=residual, backend=target.backend)[order])


@pytest.mark.parametrize(("rows", "outputs"), [(0, 5), (3, 0)])
def test_empty(rows, outputs, target):
    x = make_rows(rows, 64, torch.float32, target.device)
    weight = torch.zeros(outputs, 64, device=target.device)
    assert linear(x, weight, backend=target.backend).shape == (rows, outputs)


def test_a_quantised_head_is_a_weight(target):
    head = make_weight(50, 64, torch.float32, "plain", target.device)
    x = make_rows(3, 64, torch.float32, target.device)
    quantised = quantize_head(head)
    only_values = QuantizedWeight(quantised.values, quantised.scales)
    assert torch.equal(linear(x, quantised, backend=target.backend), linear(x, only_values, backend=target.backend))


def test_float64_runs_on_the_definition():
    x, weight = make_rows(3, 64, torch.float64), make_weight(5, 64, torch.float64, "plain")
    assert torch.allclose(linear(x, weight), exact(x, weight), rtol=1e-13)


@pytest.mark.parametrize("name", ("", *OPTIONS))
@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_many_rows_may_be_handed_over(dtype, kind, name, monkeypatch):
    """Above 64 rows the product is PyTorch's own where that is faster; what is around it stays."""
    rows, dim, outputs = MAX_FEW_ROWS + 1, 96, 20
    halves = 2 if name in ("swiglu", "geglu", "all") else 1
    x, weight = make_rows(rows, dim, dtype), make_weight(halves * outputs, dim, dtype, kind)
    options = options_of(name, x, outputs, halves * outputs)
    check(x, weight, "auto", **options)
    # what a GPU hands over
    monkeypatch.setattr(linear_module, "_is_handed_over", lambda x, weight: x.shape[0] > MAX_FEW_ROWS)
    check(x, weight, "auto", **options)
    out = torch.full((rows, outputs), float("nan"), dtype=dtype)
    expected = linear(x, weight, **options)
    assert linear(x, weight, out=out, **options) is out and torch.equal(out, expected)
    if name == "" and kind == "plain":
        assert torch.equal(expected, torch.nn.functional.linear(x, weight))


def test_a_named_backend_hands_nothing_over(target, monkeypatch):
    x, weight = make_rows(70, 64, torch.float32, target.device), make_weight(9, 64, torch.float32, "plain")
    weight = weight.to(target.device)
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    got = linear(x, weight, backend=target.backend)
    monkeypatch.undo()
    assert_right(got, x, weight)


@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_a_cpu_keeps_many_rows(dtype, kind, monkeypatch):
    """PyTorch's product is the faster one in 16 bits alone; all else keeps the promise for a prompt's rows as well."""
    if reason := specdec_ops.backends(OP)["cpu"]:
        pytest.skip(reason)
    x, weight = make_rows(MAX_FEW_ROWS + 1, 352, dtype), make_weight(70, 352, dtype, kind)
    ours = linear(x, weight, backend="cpu")
    handed_over = []
    monkeypatch.setattr(linear_module, "_product_of_many_rows", lambda *_: handed_over.append(1) or ours)
    got = linear(x, weight)
    assert bool(handed_over) == (kind == "plain" and dtype != torch.float32)
    assert torch.equal(got, ours) and torch.equal(got[-1:], linear(x[-1:], weight))


@pytest.mark.parametrize("kind", ["plain", "int8", "q4_1"])
@pytest.mark.parametrize("rows", [3, 70])
def test_compiles_without_a_break(rows, kind):
    x, weight = make_rows(rows, 64, torch.bfloat16), make_weight(24, 64, torch.bfloat16, kind)
    norm = torch.ones(64)

    def call(x):
        return linear(x, weight, norm_weight=norm, activation="swiglu")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))


def test_opcheck():
    x, weight = make_rows(3, 64, torch.float32), make_weight(24, 64, torch.float32, "int8")
    residual = make_rows(3, 12, torch.float32)
    arguments = (x, weight.values, weight.scales, "int8", None, x[0].clone(), 1e-6, "geglu", residual, "cpu")
    torch.library.opcheck(torch.ops.specdec_ops.linear.default, arguments)
    torch.library.opcheck(torch.ops.specdec_ops.linear.out, arguments, {"out": torch.empty(3, 12)})
