"""merge_states against attention over the union, and its edge cases."""

import pytest
import torch

from specdec_ops import AttentionState, merge_states
from tests.harness.close import assert_as_good_as_torch

OP = "merge_states"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Two random partial results; lse spread widely enough that either side may vanish."""
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2)]
    lses = [(8 * torch.randn(shape[:-1], generator=generator)).to(device) for _ in range(2)]
    return outs[0], lses[0], outs[1], lses[1]


def weighted_average(out_a, lse_a, out_b, lse_b, dtype):
    """Softmax over the two log denominators, in `dtype` (float32 at least inside)."""
    inside = torch.promote_types(dtype, torch.float32)
    lses = torch.stack([lse_a, lse_b]).cpu().to(inside)
    weights = lses.softmax(0)[..., None].to(dtype)
    return weights[0] * out_a.cpu().to(dtype) + weights[1] * out_b.cpu().to(dtype), lses.logsumexp(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 3, 4, 128), (5, 8, 80), (7, 256), (3, 2, 5, 2, 96)], ids=str)
def test_values(shape, dtype, target):
    """Padded, packed and any other leading dimensions."""
    inputs = states(*shape, dtype=dtype, device=target.device)
    merged = merge_states(*inputs, backend=target.backend)
    exact, exact_lse = weighted_average(*inputs, torch.float64)
    plain, plain_lse = weighted_average(*inputs, dtype)
    assert_as_good_as_torch(merged.out, exact, plain, what="out")
    assert_as_good_as_torch(merged.lse, exact_lse, plain_lse, what="lse")


def test_a_part_that_saw_nothing_changes_nothing(target):
    """Whatever its out holds. Nothing on both sides gives 0 and -inf."""
    out_a, lse_a, out_b, lse_b = states(4, 2, 64, device=target.device)
    lse_b[0], out_b[0] = -torch.inf, float("nan")
    lse_a[1], out_a[1] = -torch.inf, float("nan")
    lse_a[2], out_a[2], lse_b[2], out_b[2] = -torch.inf, float("nan"), -torch.inf, float("nan")
    merged = merge_states(out_a, lse_a, out_b, lse_b, backend=target.backend)
    assert torch.equal(merged.out[0], out_a[0])
    assert torch.equal(merged.lse[0], lse_a[0])
    assert torch.equal(merged.out[1], out_b[1])
    assert torch.equal(merged.lse[1], lse_b[1])
    assert (merged.out[2] == 0).all()
    assert (merged.lse[2] == -torch.inf).all()
    assert merged.out[3].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_denominator_that_is_none(bad, target):
    """NaN or +inf on either side makes that row NaN, and no other."""
    out_a, lse_a, out_b, lse_b = states(4, 1, 64, device=target.device)
    lse_a[0], lse_b[1], lse_a[2], lse_b[2] = bad, bad, bad, -torch.inf
    merged = merge_states(out_a, lse_a, out_b, lse_b, backend=target.backend)
    assert merged.out[:3].isnan().all()
    assert merged.lse[:3].isnan().all()
    assert merged.out[3].isfinite().all()
    assert merged.lse[3].isfinite().all()


def test_a_part_of_weight_0_is_not_read(target):
    """What lies so far below the other part that its weight is 0 may be NaN."""
    out_a, lse_a, out_b, lse_b = states(2, 1, 64, device=target.device)
    lse_a[:, 0], lse_b[:, 0] = torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0])
    out_a[0] = out_b[1] = float("nan")
    merged = merge_states(out_a, lse_a, out_b, lse_b, backend=target.backend)
    assert torch.equal(merged.out, torch.stack([out_b[0], out_a[1]]))


def test_far_apart_and_very_large(target):
    """No overflow: the heavier part wins."""
    out_a, lse_a, out_b, lse_b = states(2, 1, 64, device=target.device)
    lse_a[:, 0] = torch.tensor([1e4, -1e4])
    lse_b[:, 0] = torch.tensor([-1e4, 1e4])
    merged = merge_states(out_a, lse_a, out_b, lse_b, backend=target.backend)
    assert torch.equal(merged.out, torch.stack([out_a[0], out_b[1]]))
    assert torch.equal(merged.lse, torch.full_like(lse_a, 1e4))


def test_out_and_in_place(target):
    """A given state is written and returned; it may be an input."""
    inputs = states(3, 4, 64, device=target.device)
    wanted = merge_states(*inputs, backend=target.backend)
    into = AttentionState(torch.full_like(wanted.out, float("nan")), torch.full_like(wanted.lse, float("nan")))
    assert merge_states(*inputs, out=into, backend=target.backend) is into
    assert torch.equal(into.out, wanted.out)
    assert torch.equal(into.lse, wanted.lse)

    out_a, lse_a, out_b, lse_b = inputs
    merge_states(out_a, lse_a, out_b, lse_b, out=AttentionState(out_a, lse_a), backend=target.backend)
    assert torch.equal(out_a, wanted.out)
    assert torch.equal(lse_a, wanted.lse)


def test_empty(target):
    """No rows."""
    merged = merge_states(*states(0, 4, 64, device=target.device), backend=target.backend)
    assert merged.out.shape == (0, 4, 64)
    assert merged.lse.shape == (0, 4)


def test_order_does_not_matter(target):
    """Up to rounding."""
    out_a, lse_a, out_b, lse_b = states(6, 4, 64, device=target.device)
    one = merge_states(out_a, lse_a, out_b, lse_b, backend=target.backend)
    other = merge_states(out_b, lse_b, out_a, lse_a, backend=target.backend)
    torch.testing.assert_close(one.out, other.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.lse, other.lse, rtol=1e-6, atol=1e-6)


def test_float64_runs_on_the_definition():
    """Automatically."""
    out_a, lse_a, out_b, lse_b = states(6, 4, 64)
    merged = merge_states(out_a.double(), lse_a, out_b.double(), lse_b)
    exact, _ = weighted_average(out_a, lse_a, out_b, lse_b, torch.float64)
    torch.testing.assert_close(merged.out, exact, rtol=1e-14, atol=1e-14)


def test_outputs_that_overlap_are_refused():
    """In place is legal, a row further is not: later rows would be read after they are written."""
    state = torch.randn(9, 2, 64), torch.randn(9, 2)
    (out_a, lse_a), other = (part[:8] for part in state), (torch.randn(8, 2, 64), torch.randn(8, 2))
    expected = merge_states(out_a, lse_a, *other)
    with pytest.raises(ValueError, match=r"merge_states: out\.out must be out_a or share no memory with it"):
        merge_states(out_a, lse_a, *other, out=AttentionState(state[0][1:], torch.empty(8, 2)))
    with pytest.raises(ValueError, match=r"merge_states: out\.lse must be lse_b or share no memory with it"):
        merge_states(*other, out_a, lse_a, out=AttentionState(torch.empty(8, 2, 64), state[1][1:]))
    with pytest.raises(ValueError, match=r"merge_states: out\.out must not share memory with out\.lse"):
        merge_states(out_a, lse_a, *other, out=AttentionState(other[0], other[0].view(-1)[:16].view(8, 2)))
    in_place = merge_states(out_a, lse_a, *other, out=AttentionState(out_a, lse_a))
    assert torch.equal(in_place.out, expected.out) and torch.equal(in_place.lse, expected.lse)
