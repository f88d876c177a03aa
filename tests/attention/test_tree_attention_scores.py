"""Scores of any size: a row whose greatest score is far above the others gives that slot's value, and a finite sum.

The exponent of the greatest score is 0 by definition. A kernel that rounds the maximum and fuses a product with its
subtraction gives it the product's rounding error instead: 32 at a score of 1e9, 4,096 at 1e11.
"""

import pytest
import torch

from specdec_ops import Tree, tree_attention

ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
CONTEXT, NODES, HEADS, DIM = 150, 20, 4, 64
SCORES = (2.0**13, 2.0**23, 2.0**25, 2.0**30, 2.0**43, 2.0**93, -(2.0**30))


def inputs(score, dtype, device="cpu"):
    """Rows [1, nodes, heads, dim] whose scores are `score` times 1 to 170, and the slot of each row's greatest."""
    slots = CONTEXT + NODES
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randperm(slots, generator=generator) + 1
    q = torch.zeros(1, NODES, HEADS, DIM, dtype=torch.float64)
    k = torch.zeros(1, slots, 2, DIM, dtype=torch.float64)
    q[..., 0], k[0, :, :, 0] = score, ranks[:, None]  # exact in 16 bits as well
    v = torch.randn(1, slots, 2, DIM, generator=generator, dtype=torch.float64)
    order = ranks if score > 0 else -ranks
    best = [int(order[: CONTEXT + node + 1].argmax()) for node in range(NODES)]
    return (*(tensor.to(device, dtype) for tensor in (q, k, v)), best)


def check(score, dtype, backend, device="cpu", rows=NODES, **options):
    q, k, v, best = inputs(score, dtype, device)
    topology = Tree.chain(NODES).to(device)
    lengths = torch.tensor([CONTEXT], dtype=torch.int32, device=device)
    start = NODES - rows
    state = tree_attention(
        q[:, start:], k, v, topology, lengths, query_start=start, scale=1.0, return_lse=True, backend=backend, **options
    )
    wanted = v[0, best[start:]].repeat_interleave(HEADS // 2, dim=1)
    assert torch.equal(state.out[0], wanted)
    assert state.lse.isfinite().all()
    top = (q[0, start:, :1, 0].double() * k[0, best[start:], :1, 0].double()).expand(-1, HEADS)
    torch.testing.assert_close(state.lse[0].double(), top, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("score", SCORES)
def test_great_scores(score, dtype, num_splits, target):
    if target.backend.startswith("cuda") and dtype == torch.float32:
        pytest.skip("the CUDA attention kernel refuses float32, which test_dispatch.py tests")
    check(score, dtype, target.backend, target.device, num_splits=num_splits)


@pytest.mark.parametrize("path_invariant", [False, True])
@pytest.mark.parametrize("rows", [1, 3, NODES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("score", SCORES)
def test_great_scores_on_every_instruction_set(score, dtype, rows, path_invariant, isa):
    check(score, dtype, "cpu", rows=rows, path_invariant=path_invariant)
