"""Topology and build_topology: every backend against Tree, malformed parents, slices, positions, compilation."""

import dataclasses

import numpy as np
import pytest
import torch

from specdec_ops import Topology, TopologyStatus, Tree, build_topology
from tests.conftest import poisoned_empty
from tests.harness.trees import EDGE_SIZES, level_ordered, random_tree, trees_of_size

OP = "build_topology"
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
TABLES = ("parents", "depths", "ancestors", "first_child", "next_sibling")


def assert_same(topology: Topology, expected: Topology) -> None:
    for name in (*TABLES, "num_nodes", "status"):
        got, right = getattr(topology, name), getattr(expected, name)
        assert got.dtype == right.dtype, name
        assert got.shape == right.shape, name
        torch.testing.assert_close(got.cpu(), right.cpu(), rtol=0, atol=0, msg=name)


def padded(batch: list[Tree], nodes: int, filler: int = INT_MAX) -> torch.Tensor:
    """Parents [batch, nodes] with something awkward where no node is."""
    parents = torch.full((len(batch), nodes), filler, dtype=torch.int32)
    for row, tree in enumerate(batch):
        parents[row, : len(tree)] = torch.from_numpy(tree.parents.copy())
    return parents


def lengths(batch: list[Tree]) -> torch.Tensor:
    return torch.tensor([len(tree) for tree in batch], dtype=torch.int32)


def check_build(batch: list[Tree], target) -> None:
    nodes = max(len(tree) for tree in batch)
    parents, num_nodes = padded(batch, nodes).to(target.device), lengths(batch).to(target.device)
    built = build_topology(parents, num_nodes, backend=target.backend)
    assert_same(built, Topology.from_trees(batch))


@pytest.mark.parametrize("nodes", EDGE_SIZES)
def test_every_kind_of_tree(target, nodes):
    kinds = trees_of_size(nodes)
    if target.interpreted and nodes > 256:
        kinds = {name: kinds[name] for name in ("forest", "level-ordered")}  # a long walk takes seconds there
    check_build(list(kinds.values()), target)


def test_ragged_batches(target):
    sizes = (65, 1, 128, 17) if target.interpreted else (300, 1, 65, 128, 17)
    check_build([random_tree(nodes, seed=nodes, roots=0.05) for nodes in sizes], target)


def test_more_words_than_one_tile(target, monkeypatch):
    nodes = 1100
    if target.backend == "triton":
        from specdec_ops.triton_kernels.topology import build_topology as kernels

        monkeypatch.setattr(kernels, "_MAX_WORDS_PER_TILE", 1)  # small tiles reach the second walk with fewer nodes
        nodes = 130
    check_build([level_ordered(random_tree(nodes, 3)), Tree.fork(30, 3)], target)


def test_num_nodes_defaults_to_all(target):
    trees_ = [random_tree(40, seed) for seed in range(3)]
    assert_same(
        build_topology(padded(trees_, 40).to(target.device), backend=target.backend), Topology.from_trees(trees_)
    )


@pytest.mark.parametrize(("batch", "nodes"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_build(target, batch, nodes):
    built = build_topology(torch.empty(batch, nodes, dtype=torch.int32, device=target.device), backend=target.backend)
    assert built.ancestors.shape == (batch, nodes, 1)
    assert built.num_nodes.tolist() == built.status.tolist() == [0] * batch


MALFORMED = {
    "cycle": ([-1, 2, 1, 1], TopologyStatus.PARENT_NOT_BEFORE, [-1, -1, 1, 1]),
    "itself": ([-1, 1, 1, 0], TopologyStatus.PARENT_NOT_BEFORE, [-1, -1, 1, 0]),
    "first node": ([0, 0, 1, 2], TopologyStatus.PARENT_NOT_BEFORE, [-1, 0, 1, 2]),
    "child before parent": ([-1, 3, 0, 0], TopologyStatus.PARENT_NOT_BEFORE, [-1, -1, 0, 0]),
    "too large": ([-1, 0, 4, 2], TopologyStatus.PARENT_OUT_OF_RANGE, [-1, 0, -1, 2]),
    "largest": ([-1, 0, INT_MAX, 2], TopologyStatus.PARENT_OUT_OF_RANGE, [-1, 0, -1, 2]),
    "below -1": ([-1, -2, 1, 0], TopologyStatus.PARENT_OUT_OF_RANGE, [-1, -1, 1, 0]),
    "smallest": ([-1, INT_MIN, 1, 0], TopologyStatus.PARENT_OUT_OF_RANGE, [-1, -1, 1, 0]),
    "both": ([1, -9, 7, 2], TopologyStatus.PARENT_NOT_BEFORE | TopologyStatus.PARENT_OUT_OF_RANGE, [-1, -1, -1, 2]),
}


def test_malformed_parents_give_a_status_and_spare_the_neighbours(target):
    sound = Tree([-1, 0, 0, 1])
    rows, expected, status = [sound.parents.tolist()], [sound], [0]
    for parents, bits, repaired in MALFORMED.values():
        rows += [parents, sound.parents.tolist()]
        expected += [Tree(repaired), sound]
        status += [bits, 0]
    right = Topology.from_trees(expected)
    right = dataclasses.replace(right, status=torch.tensor(status, dtype=torch.int32))
    parents = torch.tensor(rows, dtype=torch.int32, device=target.device)
    assert_same(build_topology(parents, backend=target.backend), right)


def test_num_nodes_out_of_range(target):
    tree = random_tree(70, 1)
    counts = torch.tensor([70, 71, -1, INT_MAX, INT_MIN, 0, 30], dtype=torch.int32)
    parents = padded([tree] * len(counts), 70)
    built = build_topology(parents.to(target.device), counts.to(target.device), backend=target.backend)
    bad = TopologyStatus.NUM_NODES_OUT_OF_RANGE
    right = Topology.from_trees([tree[: max(0, int(count))] for count in counts])
    assert_same(built, dataclasses.replace(right, status=torch.tensor([0, bad, bad, bad, bad, 0, 0]).int()))


def test_a_parent_beyond_num_nodes_is_out_of_range(target):
    parents = torch.tensor([[-1, 0, 1, 5, 4, 4]], dtype=torch.int32)
    built = build_topology(
        parents.to(target.device), torch.tensor([5], dtype=torch.int32, device=target.device), backend=target.backend
    )
    assert built.status.tolist() == [TopologyStatus.PARENT_OUT_OF_RANGE | TopologyStatus.PARENT_NOT_BEFORE]
    assert built.parents.tolist() == [[-1, 0, 1, -1, -1, -1]]


def test_random_garbage_agrees_with_the_definition(target):
    generator = np.random.default_rng(0)
    for nodes in (1, 7, 64, 100):
        parents = generator.integers(-3, nodes + 3, (6, nodes))
        wild = generator.random((6, nodes)) < 0.1
        parents = np.where(wild, generator.integers(INT_MIN, INT_MAX, (6, nodes)), parents)
        parents = torch.from_numpy(parents.astype(np.int32))
        counts = torch.from_numpy(generator.integers(-2, nodes + 3, 6).astype(np.int32))
        built = build_topology(parents.to(target.device), counts.to(target.device), backend=target.backend)
        assert_same(built, build_topology(parents, counts, backend="torch"))
        assert (built.parents.cpu() < torch.arange(nodes)).all()


def test_out_is_written_in_full(target):
    batch = [random_tree(65, 0), random_tree(20, 1)]
    into = Topology(
        *(
            poisoned_empty(shape, torch.int64 if len(shape) == 3 else torch.int32, target.device)
            for shape in ((2, 65), (2, 65), (2, 65, 2), (2, 65), (2, 65), (2,), (2,))
        )
    )
    parents, num_nodes = padded(batch, 65).to(target.device), lengths(batch).to(target.device)
    assert build_topology(parents, num_nodes, out=into, backend=target.backend) is into
    assert_same(into, Topology.from_trees(batch))


def test_strided_parents_are_taken(target):
    batch = [random_tree(33, seed) for seed in range(4)]
    parents = padded(batch, 33).to(target.device).T.contiguous().T
    assert_same(build_topology(parents, backend=target.backend), Topology.from_trees(batch))


def test_to_and_from_trees():
    tree = Tree([-1, 0, 0, 1])
    topology = tree.to(batch=3)
    assert (topology.batch, topology.nodes, topology.words) == (3, 4, 1)
    assert topology.device == torch.device("cpu")
    assert_same(topology, Topology.from_trees([tree] * 3))
    assert topology.ancestors[1].tolist() == [[1], [3], [5], [11]]
    assert tree.to().batch == 1
    assert topology.offsets is None
    packed = Topology.from_trees([tree, Tree([]), Tree.chain(70)], packed=True)
    assert packed.offsets.tolist() == [0, 4, 4, 74]
    assert packed.num_nodes.tolist() == [4, 0, 70]
    assert packed.words == 2
    assert repr(packed) == "<Topology of 3 trees of up to 70 nodes on cpu, packed>"
    assert_same(packed.to("cpu"), packed)
    assert Tree.chain(64).to().ancestors[0, 63, 0] == -1
    with pytest.raises(TypeError, match=r"trees must be a sequence of at least one specdec_ops\.Tree, got list"):
        Topology.from_trees([])


def leading(topology: Topology) -> Topology:
    """A topology as its readers must see it: nothing from num_nodes on, no link to there."""
    exists = torch.arange(topology.nodes) < topology.num_nodes[:, None]
    count = topology.num_nodes[:, None]
    return Topology(
        torch.where(exists, topology.parents, -1),
        torch.where(exists, topology.depths, 0),
        torch.where(exists[..., None], topology.ancestors, 0),
        torch.where(exists & (topology.first_child < count), topology.first_child, -1),
        torch.where(exists & (topology.next_sibling < count), topology.next_sibling, -1),
        topology.num_nodes,
        topology.status,
    )


def test_cuts_may_be_tensors():
    shared = Tree.fork(3, 4).to()
    part = shared.truncate(torch.tensor([0, 2, 9]))
    assert part.num_nodes.tolist() == [3, 9, 15]
    assert_same(leading(part), leading(Topology.from_trees([Tree.fork(3, 4)] * 3)[: torch.tensor([3, 9, 20])]))
    assert shared[: torch.tensor([-4])].num_nodes.tolist() == [0]
    assert shared[:4].batch == 1
    assert shared[:] is shared


def test_truncation_without_level_order_keeps_a_leading_part():
    topology = Tree([-1, 0, 1, 0, 3]).to()
    assert topology.truncate(1).num_nodes.tolist() == [2]


@pytest.mark.parametrize("part", [slice(1, None), slice(0, 4, 2), slice(None, -1)])
def test_wrong_slices(part):
    with pytest.raises(ValueError, match=r"specdec_ops\.Topology: a slice must be \[:n\] with n of 0 or more, got"):
        _ = Tree.chain(4).to()[part]
    with pytest.raises(TypeError, match=r"the index must be a slice \[:n\] with an int or a tensor, got 2"):
        _ = Tree.chain(4).to()[2]


def test_position_ids():
    batch = [Tree([-1, 0, 0, 1]), Tree([-1, 0])]
    positions = Topology.from_trees(batch).position_ids(torch.tensor([10, 500], dtype=torch.int32))
    assert positions.dtype == torch.int32
    assert positions.tolist() == [[10, 11, 11, 12], [500, 501, -1, -1]]
    assert batch[0].to()[:3].position_ids(torch.tensor([0, 7])).tolist() == [[0, 1, 1, -1], [7, 8, 8, -1]]
    assert batch[0].to().position_ids(3).tolist() == [[3, 4, 4, 5]]


@pytest.mark.parametrize(
    ("error", "arguments", "options", "message"),
    [
        (TypeError, ([[-1]],), {}, r"parents must be int32 or int64 \[batch, nodes\], got list"),
        (TypeError, (torch.zeros(1, 2),), {}, r"parents must be int32 or int64 .*, got float32 \[1, 2\]"),
        (ValueError, (torch.zeros(2).int(),), {}, r"parents must be int32 or int64 \[batch, nodes\], got int32 \[2\]"),
        (TypeError, (torch.zeros(1, 2).int(), 2), {}, r"num_nodes must be int32 or int64 \[1\], got 2"),
        (
            ValueError,
            (torch.zeros(1, 2).int(), torch.zeros(2).int()),
            {},
            r"num_nodes must be int32 or int64 \[1\], got int32 \[2\]",
        ),
        (ValueError, (torch.zeros(1, 2).int(),), {"backend": "best"}, r"backend must be one of auto, .*, got 'best'"),
        (TypeError, (torch.zeros(1, 2).int(),), {"out": 3}, r"out must be a Topology, got 3"),
        (
            ValueError,
            (torch.zeros(1, 2).int(),),
            {"out": Tree.chain(3).to()},
            r"out\.parents must be contiguous int32 \[1, 2\], got int32 \[1, 3\] with strides \[3, 1\]",
        ),
    ],
)
def test_errors(error, arguments, options, message):
    with pytest.raises(error, match=rf"specdec_ops\.build_topology: {message}"):
        build_topology(*arguments, **options)


def test_out_must_not_be_the_input():
    topology = Tree.chain(3).to()
    with pytest.raises(ValueError, match=r"out\.parents must not share memory with parents"):
        build_topology(topology.parents, out=topology)
    within = topology.ancestors.view(-1).view(torch.int32)[1:4].view(1, 3)
    with pytest.raises(ValueError, match=r"out\.ancestors must not share memory with parents"):
        build_topology(within, out=topology)


def test_a_compiled_graph_holds_topologies():
    """fullgraph: nothing reads a value back, and the class is traced through, in and out of the graph."""

    def step(topology, parents, num_nodes, depth, context_lens):
        built = build_topology(parents, num_nodes, backend="torch").truncate(depth)
        return topology[:5].truncate(1), built, built.position_ids(context_lens)

    topology = Topology.from_trees([Tree.chain(3), Tree.fork(3, 2)], packed=True)
    depth, context_lens = torch.tensor([1, 0]), torch.tensor([10, 20], dtype=torch.int32)
    arguments = (topology, topology.parents, topology.num_nodes, depth, context_lens)
    expected = step(*arguments)
    cut, built, positions = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert_same(cut, expected[0])
    assert_same(built, expected[1])
    assert cut.offsets.tolist() == expected[0].offsets.tolist() == [0, 2, 7]
    assert torch.equal(positions, expected[2])
