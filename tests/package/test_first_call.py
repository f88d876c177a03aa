"""FirstCall: what a call came down to is repeated with other tensors, and only where it is the same call."""

import weakref

import pytest
import torch

from specdec_ops import linear, rms_norm
from specdec_ops._core.library import FirstCall

WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def kept(x=ROWS, same=WEIGHT, key=("a",), weight=WEIGHT) -> FirstCall:
    first = FirstCall(("x", "residual"))
    with first.kept(same, key, (x, None)):
        linear(x, weight, backend="torch")
    return first


def test_repeats_with_other_tensors():
    (out,) = kept().again(WEIGHT, ("a",), (OTHER, None))
    assert torch.equal(out, linear(OTHER, WEIGHT, backend="torch"))


def test_writes_to_outputs_that_are_given():
    first, out = FirstCall(("x",), ("out",)), torch.zeros(3, 8)
    with first.kept(None, (), (ROWS,)):
        linear(ROWS, WEIGHT, out=torch.empty(3, 8), backend="torch")
    assert first.again(None, (), (OTHER,), (out,)).out is out
    assert torch.equal(out, linear(OTHER, WEIGHT, backend="torch"))


def test_another_call_is_not_repeated():
    assert FirstCall(("x",)).again(WEIGHT, ("a",), (OTHER,)) is None
    first = kept()
    assert first.again(WEIGHT, ("b",), (OTHER, None)) is None
    assert first.again(WEIGHT.clone(), ("a",), (OTHER, None)) is None
    with torch.enable_grad():
        assert first.again(WEIGHT, ("a",), (OTHER, None)) is None
    assert first.again(WEIGHT, ("a",), (OTHER, None)) is not None


def test_nothing_is_repeated_while_someone_watches():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    first = kept()
    with Watching():
        assert first.again(WEIGHT, ("a",), (OTHER, None)) is None
        with first.kept(WEIGHT, ("a",), (ROWS, None)):
            linear(ROWS, WEIGHT, backend="torch")
    assert first.again(WEIGHT, ("a",), (OTHER, None)) is None  # that one went through the dispatcher


def test_what_did_not_go_to_the_implementation_as_it_was_is_not_kept():
    first = FirstCall(("x", "residual"))
    with first.kept(None, (), (ROWS, None)):
        linear(ROWS * 2, WEIGHT, backend="torch")
    assert first.again(None, (), (OTHER, None)) is None
    with first.kept(None, (), (ROWS, None)):
        linear(ROWS, WEIGHT, backend="torch"), linear(ROWS, WEIGHT, backend="torch")
    assert first.again(None, (), (OTHER, None)) is None


def test_an_error_keeps_nothing_and_calls_within_calls_go_to_the_inner_one():
    first, inner = kept(), FirstCall(("x",))
    with pytest.raises(ValueError, match="weight"), first.kept(WEIGHT, ("a",), (ROWS, None)):
        linear(ROWS, WEIGHT[:, :3])
    assert first.again(WEIGHT, ("a",), (OTHER, None)) is None
    with first.kept(WEIGHT, ("a",), (ROWS, None)):
        with inner.kept(None, (), (ROWS,)):
            rms_norm(ROWS, torch.ones(16), backend="torch")
        linear(ROWS, WEIGHT, backend="torch")
    assert first.again(WEIGHT, ("a",), (OTHER, None)).out.shape == (3, 8)
    assert inner.again(None, (), (OTHER,)).out.shape == (3, 16)


def test_tensors_do_not_live_on():
    x = ROWS.clone()
    first, alive = kept(x), weakref.ref(x)
    del x
    assert alive() is None and first.again(WEIGHT, ("a",), (OTHER, None)) is not None
