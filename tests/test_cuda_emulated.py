"""The CUDA kernels, emulated, under sanitizers and in many orders. Their values are tested with all other backends'."""

import pytest
import torch

from conftest import poisoned_empty
from emulator import build, kernels
from specdec_ops import Topology, Tree, merge_states
from test_merge_states import DTYPES, states
from test_topology import MALFORMED, lengths, padded
from trees import random_tree

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

TOPOLOGY_OUT = ["parents_out", "depths", "ancestors", "first_child", "next_sibling", "num_nodes_out", "status"]
SANITIZERS = [sanitizer for sanitizer in build.SANITIZERS if sanitizer != "plain"]


def topology_launch(parents, num_nodes):
    batch, nodes = parents.shape
    table, words = (batch, nodes), max(1, (nodes + 63) // 64)
    shapes = (table, table, (*table, words), table, table, (batch,), (batch,))
    out = [poisoned_empty(shape, torch.int64 if len(shape) == 3 else torch.int32, "cpu") for shape in shapes]
    return kernels.build_topology_launch(parents, num_nodes, *out)


def trees_launch(*trees):
    return topology_launch(padded(list(trees), max(map(len, trees))), lengths(list(trees)))


def malformed_launch():
    parents = torch.tensor([row for row, _, _ in MALFORMED.values()], dtype=torch.int32)
    return topology_launch(parents, torch.tensor([4, 5, -1, 3] + [4] * (len(parents) - 4), dtype=torch.int32))


def merge_launch(*shape, dtype):
    out_a, lse_a, out_b, lse_b = states(*shape, dtype=dtype)
    lse_a[0], lse_b[-1] = -torch.inf, -torch.inf
    out, lse = poisoned_empty(shape, dtype, "cpu"), poisoned_empty(shape[:-1], torch.float32, "cpu")
    return kernels.merge_states_launch(out_a, lse_a, out_b, lse_b, out, lse)


def merge_in_place_launch(dtype):
    launch = merge_launch(5, 3, 64, dtype=dtype)
    launch.tensors.update(out=launch.tensors["out_b"], lse=launch.tensors["lse_b"])
    return launch


LAUNCHES = {
    "one node": lambda: trees_launch(Tree.chain(1)),
    "ragged": lambda: trees_launch(random_tree(64, 0), random_tree(3, 1), Tree([]), random_tree(65, 2), Tree.chain(33)),
    "many nodes": lambda: trees_launch(random_tree(300, 3), Tree.chain(257)),
    "malformed": malformed_launch,
    **{f"packs, {dtype}": lambda dtype=dtype: merge_launch(5, 3, 64, dtype=dtype) for dtype in DTYPES},
    **{f"singles, {dtype}": lambda dtype=dtype: merge_launch(7, 1, 37, dtype=dtype) for dtype in DTYPES},
    "in place": lambda: merge_in_place_launch(torch.bfloat16),
    "several blocks": lambda: merge_launch(50, 256, dtype=torch.bfloat16),
}


def outputs(launch, tensors):
    names = TOPOLOGY_OUT if launch.op == "build_topology" else ["out", "lse"]
    return {name: tensors[name] for name in names}


def assert_same(got, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("case", LAUNCHES)
def test_sanitizers_find_nothing(case, sanitizer):
    """No race, no access outside of an array, nothing undefined, and the result of the plain build in every order."""
    launch = LAUNCHES[case]()
    try:
        after = kernels.replay(launch, sanitizer)
    except build.CannotRun as reason:
        pytest.skip(str(reason))
    kernels.run(launch)
    assert_same(outputs(launch, after), outputs(launch, launch.tensors))


@pytest.mark.parametrize("case", LAUNCHES)
def test_every_order_gives_the_same(case):
    """Of warps, of threads in them, and of blocks."""
    launch = LAUNCHES[case]()
    kernels.run(launch)
    expected = outputs(launch, launch.tensors)
    for order, seed in [("reverse", 0), *(("random", seed) for seed in range(6))]:
        again = LAUNCHES[case]()
        kernels.run(again, order, seed)
        assert_same(outputs(again, again.tensors), expected)


def test_a_sanitizer_finds_an_output_that_is_too_small():
    """So the replay really gives every tensor memory of its own size."""
    launch = trees_launch(random_tree(20, 0))
    launch.tensors["depths"] = launch.tensors["depths"][:, :19].contiguous()
    try:
        with pytest.raises(RuntimeError, match="AddressSanitizer: heap-buffer-overflow"):
            kernels.replay(launch, "address")
    except build.CannotRun as reason:
        pytest.skip(str(reason))


def test_launch_errors_are_those_of_cuda():
    launch = topology_launch(torch.zeros(1, 2049, dtype=torch.int32), torch.tensor([2049], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"build_topology on the emulator: CUDA error 1$"):
        kernels.run(launch)


def test_topology_of_a_named_tree():
    """The launch itself is right, and not only like its replay."""
    tree = random_tree(70, 5)
    launch = trees_launch(tree)
    kernels.run(launch)
    got = Topology(*(launch.tensors[name] for name in TOPOLOGY_OUT))
    expected = Topology.from_trees([tree])
    for name in ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes", "status"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("nodes", [40, 200])
def test_topology_moves_each_byte_once(nodes):
    launch = trees_launch(random_tree(nodes, 0), random_tree(nodes, 1))
    moved = kernels.traffic(launch)
    for name in ("parents", *TOPOLOGY_OUT):
        tensor = launch.tensors[name]
        expected = (0, kernels.extent(tensor)) if name in TOPOLOGY_OUT else (kernels.extent(tensor), 0)
        assert moved[name] == expected, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [128, 37])
def test_merge_moves_each_byte_once(dim, dtype):
    launch = merge_launch(6, 4, dim, dtype=dtype)
    moved = kernels.traffic(launch)
    out, lse = (kernels.extent(launch.tensors[name]) for name in ("out", "lse"))
    unseen = out // 6  # rows of a part that saw nothing
    assert moved["out_a"] == moved["out_b"] == (out - unseen, 0)
    assert moved["out"] == (0, out)
    assert moved["lse"] == (0, lse)


def halves(dtype):
    """Every finite value of a 16-bit type, in rows of 64."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.where(values.isfinite(), values, 0).view(-1, 64)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_conversions_round_as_pytorch_does(dtype):
    """Averages of two neighbours are ties; those of two random values are not. Equal weights are exactly 1/2."""
    values = halves(dtype)
    lse = torch.zeros(values.shape[0])
    for other in (values.flatten().roll(1).view_as(values), values.flatten()[torch.randperm(2**16)].view_as(values)):
        out, merged_lse = torch.empty_like(values), torch.empty_like(lse)
        kernels.merge_states(values, lse, other, lse, out, merged_lse)
        right = (0.5 * values.float() + 0.5 * other.float()).to(dtype)
        assert torch.equal(out, right)
        assert torch.equal(merge_states(values, lse, other, lse, backend="torch").out, right)
