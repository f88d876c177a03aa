"""Topology and build_topology on trees that hypothesis thinks of."""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_ops import Topology, build_topology
from tests.harness.trees import level_ordered
from tests.topology.test_build_topology import TABLES, assert_same, check_build, leading
from tests.topology.tree_strategies import trees

OP = "build_topology"
some = settings(max_examples=40, deadline=None, derandomize=True)


def test_ragged_batches(target):
    @settings(some, max_examples={"cpu": 60, "torch": 15}.get(target.backend, 8))
    @given(st.lists(trees(max_nodes=140 if target.interpreted else 300), min_size=1, max_size=5))
    def check(batch):
        check_build(batch, target)

    check()


@some
@given(st.lists(trees(max_nodes=100), min_size=1, max_size=4), st.integers(0, 110))
def test_a_slice_equals_a_rebuild(batch, size):
    topology = Topology.from_trees(batch, packed=True)
    part = topology[:size]
    counts = torch.tensor([min(len(tree), size) for tree in batch], dtype=torch.int32)
    assert_same(leading(part), build_topology(topology.parents, counts, backend="torch"))
    assert part.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert all(getattr(part, name) is getattr(topology, name) for name in TABLES)


@some
@given(st.lists(trees(max_nodes=100), min_size=1, max_size=4), st.integers(-1, 12))
def test_truncation_equals_the_truncated_trees(batch, depth):
    batch = [level_ordered(tree) for tree in batch]
    part = Topology.from_trees(batch, packed=True).truncate(depth)
    shorter = [tree.truncate(depth) for tree in batch]
    assert part.num_nodes.tolist() == [len(tree) for tree in shorter]
    assert part.offsets.tolist() == Topology.from_trees(shorter, packed=True).offsets.tolist()
