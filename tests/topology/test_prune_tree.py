"""prune_tree on pools that grow_tree has left, and on others: which candidates stay, and what they are told to be.

That every tree is right, whatever the pool, is tested with every round of test_grow_tree.py.
"""

import math

import numpy as np
import pytest
import torch

from specdec_ops import CandidatePool, TopologyStatus, prune_tree
from tests.topology.grow_cases import TORCH, Round, assert_round, grown, pruned, random_round

OP = "prune_tree"
NAN = math.nan
POOL = CandidatePool.empty(2, levels=3, width=4, branching=3)


def test_more_nodes_than_candidates(target):
    case = random_round(2, 2, 3, 4)
    _, tree = assert_round(case, target, 100)
    assert tree.topology.num_nodes.tolist() == [17, 17]


def test_a_child_of_probability_1_does_not_lose_its_parent(target):
    """EAGLE's unordered top-k may keep the child and drop the parent, and its look-up then names another node."""
    tokens = [torch.tensor([[[10, 11]]]), torch.tensor([[[20, 21], [22, 23]]])]
    logprobs = [torch.tensor([[[-1.0, -0.5]]]), torch.tensor([[[-3.0, -4.0], [-0.5, -9.0]]])]
    case = Round(list(zip((part.int() for part in tokens), logprobs, strict=True)), 2)
    # Rows of level 1 follow tokens 11 (score -0.5) and 10 (-1.0): token 22 has -1.5 and token 20 -3.5.
    logprobs[1][0, 1, 0] = 0.0  # now 22 is certain: it ties with its parent, 10
    _, tree = assert_round(case, target, 3)
    assert tree.tokens.tolist() == [[500, 10, 11]]
    _, tree = assert_round(case, target, 4)
    assert tree.tokens.tolist() == [[500, 10, 11, 22]]
    assert tree.topology.parents.tolist() == [[-1, 0, 0, 1]]
    # What EAGLE makes of a top-k that prefers the child among equals: kept are 11, 22, whose parent's place in the
    # pool, 0, is looked up among the places 1 and 4, and found to be that of 11.
    kept, parent_of_22 = [1, 4], 0
    assert int(np.searchsorted(kept, parent_of_22)) == 0


def test_trees_are_closed_under_ancestors_whatever_their_size(target):
    case = random_round(1, 5, 6, 5, vocab=30)
    case.levels[2][1][:, :, 0] = 0.0
    case.levels[3][1][:, :, 1] = 0.0
    pool, _ = grown(case, target)
    for nodes in range(1, pool.size + 2, 7 if target.interpreted else 1):
        tree = pruned(pool, nodes, target)
        kept = tree.pool_ids[0, 1:].tolist()
        above = pool.parents[0][kept].tolist()
        assert set(above) <= {-1, *kept}
        assert tree.topology.status.tolist() == [0]
        assert all(parent < node for node, parent in enumerate(tree.topology.parents[0].tolist()))


def test_a_pool_that_someone_else_has_written_does_no_harm(target):
    """Parents that have not stayed, lie behind or nowhere: the node becomes a root, and the status says so."""
    case = random_round(4, 3, 4, 4, vocab=30)
    pool, _ = grown(case, target)
    parents = pool.parents
    parents[0, 5], parents[1, 5], parents[2, 0] = 2**31 - 1, -(2**31), 3
    pool.scores[3, 0] = NAN  # a parent that goes
    assert pruned(pool, 30, target).topology.num_nodes.tolist() == [30] * 4
    tree = pruned(pool, 37, target)
    bits = (TopologyStatus.PARENT_OUT_OF_RANGE,) * 2 + (TopologyStatus.PARENT_NOT_BEFORE,)
    bits += (TopologyStatus.PARENT_OUT_OF_RANGE,)
    assert tree.topology.status.tolist() == list(bits)
    assert tree.topology.parents[:2, 6].tolist() == [-1, -1]


def test_draft_paths():
    case = random_round(2, 3, 2, 3, vocab=30)
    pool, _ = grown(case, TORCH)
    tree = pruned(pool, 10, TORCH)
    nodes = torch.tensor([[0, 1, -1, -1], [0, -1, -1, 99]])
    path = tree.draft_path(nodes)
    assert path.dtype == torch.int32
    assert path.tolist() == [[0, int(tree.expanded[0, 1]), -1, -1], [0, -1, -1, -1]]
    assert torch.equal(tree.draft_path(nodes.int()), path)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"pool": None}, TypeError, "pool must be a specdec_ops.CandidatePool, got None"),
        ({"nodes": 0}, ValueError, "nodes must be an int from 1 to 2048, got 0"),
        ({"nodes": 2049}, ValueError, "nodes must be an int from 1 to 2048, got 2049"),
        ({"nodes": "9"}, TypeError, "nodes must be an int from 1 to 2048, got '9'"),
        ({"root_tokens": 5}, TypeError, "root_tokens must be int32 or int64 [2], got 5"),
        ({"root_tokens": torch.zeros(3).int()}, ValueError, "root_tokens must be int32 or int64 [2], got int32 [3]"),
        ({"root_tokens": torch.zeros(2).int().to("meta")}, ValueError, "root_tokens must be on cpu, got a tensor on"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda' is unavailable"),
    ],
    ids=str,
)
def test_errors_of_pruning(changed, kind, message):
    arguments = {"pool": POOL, "nodes": 4, "root_tokens": torch.zeros(2).int(), **changed}
    with pytest.raises(kind) as raised:
        prune_tree(arguments.pop("pool"), **arguments)
    assert str(raised.value).startswith("specdec_ops.prune_tree: ")
    assert message in str(raised.value)
