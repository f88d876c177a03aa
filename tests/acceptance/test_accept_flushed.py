"""Laws do not change where a program has PyTorch make zeros of subnormal numbers (torch.set_flush_denormal).

The number below a cut at 0 is subnormal: where it is flushed, the cut keeps nothing, or too much.
"""

import pytest
import torch

from specdec_ops import Tree, match_accept, sample_tokens, tree_accept

OP = "accept"
REQUESTS = 20_000


@pytest.fixture(params=[False, True], ids=["one thread", "all threads"])
def flushed(request, threads):
    """Before other threads are started, so that they inherit it, or after."""
    if not request.param:
        threads(1)
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def test_a_cut_at_zero(flushed, target):
    """Two tokens are kept, of 73.1% and 26.9%."""
    if target.interpreted:
        pytest.skip("the interpreter computes with NumPy, in the caller's state")
    topology = Tree.from_branching((1,), root=True).to(target.device)
    logits = torch.tensor([1.0, 0.0, -1.0, -2.0], device=target.device).expand(REQUESTS, 2, 4)
    drafted = torch.tensor([[0, 1]], dtype=torch.int32, device=target.device).expand(REQUESTS, 2)
    seeds = torch.arange(REQUESTS, device=target.device)
    options = {"seeds": seeds, "positions": 0, "top_k": 2, "backend": target.backend}
    for accepted in (
        tree_accept(logits, drafted, topology, rule="target_only", **options),
        match_accept(logits, drafted, topology, **options),
    ):
        shares = torch.bincount(accepted.tokens[:, 0].long().cpu(), minlength=4) / REQUESTS
        torch.testing.assert_close(shares, torch.tensor([0.7311, 0.2689, 0.0, 0.0]), atol=0.015, rtol=0)


def test_a_greatest_logit_of_zero(flushed, target):
    if target.interpreted:
        pytest.skip("the interpreter computes with NumPy, in the caller's state")
    logits = torch.tensor([[0.0, -3.0, -1.0, -2.0]], device=target.device)
    tokens = sample_tokens(logits, seeds=1, positions=0, top_k=1, top_p=0.9, backend=target.backend)
    assert tokens.tolist() == [0]
