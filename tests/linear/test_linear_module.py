"""`Linear`, in the place of torch.nn.Linear."""

import copy

import pytest
import torch

from specdec_ops import GgufWeight, Linear, linear, quantize_linear
from tests.linear.linear_cases import make_blocks, make_rows, make_weight


def torch_linear(inputs, outputs, bias=True, dtype=torch.float32):
    torch.manual_seed(inputs + outputs)
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)], ids=str)
def test_as_torch_has_it(shape, bias):
    theirs, x = torch_linear(64, 10, bias), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(Linear.from_module(theirs)(x), theirs(x))


def test_a_single_weight_is_shared():
    theirs = torch_linear(64, 10)
    ours = Linear.from_module(theirs)
    assert ours.weight.data_ptr() == theirs.weight.data_ptr() and ours.bias.data_ptr() == theirs.bias.data_ptr()
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours(make_rows(2, 64, torch.float32)).shape == (2, 10)  # with gradients on


def test_state_goes_back_and_forth():
    theirs, ours = torch_linear(64, 10), Linear(torch.zeros(10, 64), torch.zeros(10))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight) and set(ours.state_dict()) == {"weight", "bias"}


def test_in_the_place_of_modules():
    """A model whose layers are replaced computes the same."""
    model = torch.nn.Sequential(torch_linear(64, 32), torch.nn.ReLU(), torch_linear(32, 8)).requires_grad_(False)
    x = make_rows(5, 64, torch.float32)
    expected = model(x)
    for place in (0, 2):
        model[place] = Linear.from_module(model[place])
    torch.testing.assert_close(model(x), expected)
    assert "weight=float32, bias=True" in repr(model)


def test_joined_modules():
    """q, k and v in one product; gate and up with their activation."""
    parts, x = [torch_linear(64, size).requires_grad_(False) for size in (24, 8, 8)], make_rows(3, 64, torch.float32)
    together = Linear.from_module(*parts)(x)
    torch.testing.assert_close(together, torch.cat([part(x) for part in parts], dim=1))
    gate, up = (torch_linear(64, 20, bias=False).requires_grad_(False) for _ in range(2))
    norm, residual = torch.rand(64), make_rows(3, 20, torch.float32)
    module = Linear.from_module(gate, up, norm_weight=norm, norm_eps=0.1, activation="swiglu")
    y = torch.nn.functional.rms_norm(x, (64,), norm, 0.1)
    torch.testing.assert_close(module(x, residual), torch.nn.functional.silu(gate(y)) * up(y) + residual)
    assert "norm_eps=0.1, activation='swiglu'" in repr(module)


def test_residual_of_any_shape():
    module, x = Linear(make_weight(10, 64, torch.float32, "plain")), torch.randn(2, 3, 64)
    residual = torch.randn(2, 3, 10)
    torch.testing.assert_close(module(x, residual), module(x) + residual)


@pytest.mark.parametrize("kind", ["int8", "q8_0", "q4_0", "q4_1"])
def test_quantised(kind):
    """Kept as they are where a model changes its dtype; saved and loaded; copied."""
    weight, x = make_weight(12, 64, torch.float32, kind), make_rows(3, 64, torch.bfloat16)
    module = Linear(weight, torch.ones(12)).to(torch.bfloat16)
    expected = linear(x, weight, bias=torch.ones(12, dtype=torch.bfloat16))
    assert torch.equal(module(x), expected)
    if kind == "int8":
        assert module.scales.dtype == torch.float32
        empty = quantize_linear(torch.ones(12, 64))
    else:
        empty = GgufWeight(torch.zeros_like(make_blocks(12, 64, kind)), kind)
    other = Linear(empty, torch.zeros(12, dtype=torch.bfloat16))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected) and torch.equal(copy.deepcopy(module)(x), expected)
    assert f"weight={kind}, bias=True" in repr(module)
    assert all(buffer.is_meta for buffer in module.to("meta").buffers())


def test_from_module_quantised():
    theirs, x = torch_linear(64, 10).requires_grad_(False), make_rows(3, 64, torch.float32)
    module = Linear.from_module(theirs, quantized=True)
    expected = linear(x, quantize_linear(theirs.weight), bias=theirs.bias)
    assert torch.equal(module(x), expected) and not hasattr(module, "weight")


def test_backend_is_passed_on():
    module = Linear(torch.ones(4, 8), backend="cuda")
    with pytest.raises(RuntimeError, match="backend='cuda' is unavailable"):
        module(torch.ones(1, 8))


def test_compiles_without_a_break():
    module, x = Linear.from_module(torch_linear(64, 10), quantized=True), torch.randn(2, 3, 64)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: Linear(3),
            TypeError,
            "Linear: weight must be a tensor, a specdec_ops.Quant",
        ),
        (lambda: Linear.from_module(), TypeError, "modules must be one torch.nn.Linear or several, got None"),
        (lambda: Linear.from_module(torch.nn.ReLU()), TypeError, "one torch.nn.Linear or several, got ReLU, a module"),
        (
            lambda: Linear.from_module(torch_linear(8, 2), torch_linear(9, 2)),
            ValueError,
            "modules must be of the same in_features, got [8, 9]",
        ),
        (
            lambda: Linear.from_module(torch_linear(8, 2), torch_linear(8, 2, bias=False)),
            ValueError,
            "modules must all have a bias or none, got 1 with one",
        ),
    ],
)
def test_errors(make, kind, message):
    with pytest.raises(kind) as raised:
        make()
    assert str(raised.value).startswith("specdec_ops.Linear") and message in str(raised.value)
