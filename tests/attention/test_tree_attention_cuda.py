"""The CUDA kernels, emulated, under sanitizers and in many orders. Their values are tested with all other backends'."""

import dataclasses

import pytest
import torch

from specdec_ops import Topology, Tree, build_topology, merge_states, tree_attention
from specdec_ops.ops.attention.contract import MergeStatesArguments, MergeStatesOutputs
from tests.attention.attention_cases import chain, expected, make_case
from tests.attention.attention_cases import random_tree as random_parents
from tests.attention.test_merge_states import DTYPES, states
from tests.emulator import build, kernels
from tests.emulator.checks import RACE, assert_same, launch_tests, outputs, reveals
from tests.harness.close import assert_as_good_as_torch
from tests.harness.trees import random_tree
from tests.topology.test_build_topology import MALFORMED, lengths, padded

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)


def topology_launch(parents, num_nodes):
    return kernels.launch_of(lambda: build_topology(parents, num_nodes))


def trees_launch(*trees):
    return topology_launch(padded(list(trees), max(map(len, trees))), lengths(list(trees)))


def malformed_launch():
    parents = torch.tensor([row for row, _, _ in MALFORMED.values()], dtype=torch.int32)
    return topology_launch(parents, torch.tensor([4, 5, -1, 3] + [4] * (len(parents) - 4), dtype=torch.int32))


def merge_launch(*shape, dtype):
    out_a, lse_a, out_b, lse_b = states(*shape, dtype=dtype)
    lse_a[0], lse_b[-1] = -torch.inf, -torch.inf
    return kernels.launch_of(lambda: merge_states(out_a, lse_a, out_b, lse_b))


def merge_in_place_launch(dtype):
    launch = merge_launch(5, 3, 64, dtype=dtype)
    launch.tensors.update(out=launch.tensors["out_b"], lse=launch.tensors["lse_b"])
    return launch


def attention_launch(case):
    return kernels.launch_of(lambda: case.run("auto", return_lse=True))


def attention(nodes, context, *, dtype=torch.bfloat16, float8=False, **options):
    """A launch over one request that fills the cache's capacity and a short one without context."""
    case = make_case([random_parents(nodes), chain(2)], [context, 0], kv_heads=1, dtype=dtype, **options)
    if float8:
        caches = [cache.to(torch.float8_e4m3fn) for cache in (case.k_cache, case.v_cache)]
        case = dataclasses.replace(case, k_cache=caches[0], v_cache=caches[1])
    return attention_launch(case)


FEATURES = {"window": 30, "alibi": True, "softcap": 2.0, "sinks": True, "packed": True}
ATTENTION = {
    "dim 64, three parts": lambda: attention(9, 160, heads=1, num_splits=3),
    "dim 64, 32 rows, features, pages": lambda: attention(9, 100, heads=3, num_splits=2, page_size=16, **FEATURES),
    "dim 64, 128 rows": lambda: attention(70, 70, heads=1),
    "dim 80": lambda: attention(5, 70, dim=80, heads=2, num_splits=2),
    "dim 128, pages": lambda: attention(5, 70, dim=128, heads=4, page_size=7),
    "dim 128, 64 rows": lambda: attention(20, 40, dim=128, heads=3, num_splits=2),
    "dim 192": lambda: attention(7, 40, dim=192, heads=1, num_splits=2),
    "dim 192, 128 rows": lambda: attention(66, 20, dim=192, heads=1, num_splits=2),
    "dim 256, 128 rows": lambda: attention(66, 20, dim=256, heads=1),
    "dim 256, 64 rows": lambda: attention(33, 20, dim=256, heads=1, num_splits=2),
    "fp8, dim 64": lambda: attention(5, 70, heads=1, float8=True, num_splits=2),
    "fp8, dim 112, pages": lambda: attention(20, 40, dim=112, heads=1, float8=True, page_size=3),
}

LAUNCHES = {
    **ATTENTION,
    "one node": lambda: trees_launch(Tree.chain(1)),
    "ragged": lambda: trees_launch(random_tree(64, 0), random_tree(3, 1), Tree([]), random_tree(65, 2), Tree.chain(33)),
    "many nodes": lambda: trees_launch(random_tree(300, 3), Tree.chain(257)),
    "malformed": malformed_launch,
    **{f"packs, {dtype}": lambda dtype=dtype: merge_launch(5, 3, 64, dtype=dtype) for dtype in DTYPES},
    **{f"singles, {dtype}": lambda dtype=dtype: merge_launch(7, 1, 37, dtype=dtype) for dtype in DTYPES},
    "in place": lambda: merge_in_place_launch(torch.bfloat16),
    "several blocks": lambda: merge_launch(50, 256, dtype=torch.bfloat16),
}
test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES, seeds=6)


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


def test_the_driver_is_asked_once_for_a_kernel_s_shared_memory():
    """Only where a launch needs more than the ones before it: longer ancestor sets, here."""
    launches = [attention(nodes, 70, dim=192, heads=4) for nodes in (30, 30, 31, 300, 30)]  # one kernel: 128 rows
    before, asked = kernels.permissions_asked("tree_attention"), []
    for launch in launches:
        kernels.run(launch)
        asked.append(kernels.permissions_asked("tree_attention") - before)
    assert asked[0] <= 1 and asked[0] == asked[1] == asked[2]
    assert asked[3] == asked[4] == asked[0] + 1


def test_a_join_without_fences_is_a_race():
    """So the sanitizer can see what hands the parts to the block that joins them."""
    launch = LAUNCHES["dim 64, three parts"]()
    try:
        with pytest.raises(RuntimeError, match=RACE):
            kernels.replay(launch, "thread", "tree_attention_unfenced")
    except build.CannotRun as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", ATTENTION)
def test_counters_are_left_at_zero(case):
    """In every order of the blocks; and a launch with what the one before has left gives the same."""
    launch = LAUNCHES[case]()
    kernels.run(launch)
    expected = {name: launch.tensors[name].clone() for name in ("out", "lse")}
    assert not launch.tensors["counters"].any()
    kernels.run(launch, "random", 7)
    assert not launch.tensors["counters"].any()
    assert_same(launch.tensors, expected)


def test_a_small_device_gives_the_same_in_more_blocks():
    """Dim 256 with 128 rows in a block needs more shared memory than every device has."""
    large, small = (attention(130, 90, dim=256, heads=1, num_splits=2) for _ in range(2))
    kernels.run(large)
    with kernels.small_device("tree_attention"):
        kernels.run(small)
    assert_same(small.tensors, {name: large.tensors[name] for name in ("out", "lse")})


def test_a_batch_too_large_for_its_scratch_goes_in_slices():
    """2,048 rows in 256 parts, of which few are real, need more than half of what a launch may use."""
    options = {"heads": 1, "kv_heads": 1, "queries": 2048, "num_splits": 256, "dtype": torch.bfloat16}
    case = make_case([chain(2), chain(3)], [300, 10], **options)
    launch = attention_launch(case)
    assert launch.tensors["counters"].shape == (2048 // 128,)
    kernels.run(launch)
    exact, plain = (expected(case, dtype)[0] for dtype in (torch.float64, torch.bfloat16))
    assert_as_good_as_torch(launch.tensors["out"], exact, plain)


def attention_needs(batch, nodes, heads, kv_heads, dim, slots, num_splits=None, cache=torch.bfloat16):
    """Bytes of scratch, and counters."""
    q = torch.empty(batch, nodes, heads, dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(batch, slots, kv_heads, dim, dtype=cache, device="meta")
    return kernels.needs_of(lambda: tree_attention(q, k, k, None, 0, num_splits=num_splits))


def test_attention_scratch():
    """None for a request that is never split; else kRows rows of dim + 2 numbers for each part."""
    assert attention_needs(3, 4, 8, 2, 128, 256) == (0, 0)
    assert attention_needs(3, 4, 8, 2, 128, 257) == (6 * 2 * 16 * 130 * 4, 6)
    assert attention_needs(1, 100, 8, 2, 80, 100_000, 7) == (2 * 4 * 7 * 128 * 98 * 4, 8)
    assert attention_needs(1, 100, 1, 1, 80, 1000, 2, torch.float8_e4m3fn) == (2 * 128 * 130 * 4, 1)
    # Blocks of 128 rows or, where a device has no room for them, of 64.
    assert attention_needs(1, 100, 1, 1, 256, 1000, 2) == (2 * 128 * 258 * 4, 2)
    assert attention_needs(1, 130, 1, 1, 256, 1000, 2) == (2 * 256 * 258 * 4, 3)


def test_attention_scratch_is_bounded():
    """A large batch goes in slices of 256 MiB at most; a single request takes what it needs."""
    scratch, counters = attention_needs(1000, 64, 32, 8, 128, 100_000)
    assert scratch <= 256 * 2**20 < scratch + scratch // (counters // 16)
    assert attention_needs(9, 10_000, 32, 8, 128, 100_000, 256)[1] == 8 * 313


def test_topology_of_a_named_tree():
    """The launch itself is right, and not only like its replay."""
    tree = random_tree(70, 5)
    launch = trees_launch(tree)
    kernels.run(launch)
    got = Topology(*outputs(launch).values())
    expected = Topology.from_trees([tree])
    for name in ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes", "status"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("nodes", [40, 200])
def test_topology_moves_each_byte_once(nodes):
    launch = trees_launch(random_tree(nodes, 0), random_tree(nodes, 1))
    moved = kernels.traffic(launch)
    written = outputs(launch)
    for name in ("parents", *written):
        tensor = launch.tensors[name]
        expected = (0, kernels.extent(tensor)) if name in written else (kernels.extent(tensor), 0)
        assert moved[name] == expected, name


@pytest.mark.parametrize(
    ("nodes", "heads", "dim", "options"),
    [
        (3, 4, 128, {}),
        (8, 4, 128, {"page_size": 16}),
        (16, 4, 64, {"num_splits": 3}),
        (32, 4, 128, {}),
        (128, 1, 64, {}),
        (40, 1, 192, {}),
        (60, 1, 256, {}),
        (120, 1, 256, {}),
        (9, 2, 128, {"float8": True}),
    ],
)
def test_attention_reads_keys_and_values_once(nodes, heads, dim, options):
    """For up to 128 rows of a KV head. And masks cost nothing over the context, however long it is."""
    masks = []
    for context in (64, 320):
        options = {"num_splits": 2, **options}
        launch = attention(nodes, context, heads=heads, dim=dim, **options)
        moved = kernels.traffic(launch)
        least = (context + nodes + 2) * dim * launch.tensors["k_cache"].element_size()
        assert moved["k_cache"].read <= 1.02 * least
        assert moved["v_cache"].read <= 1.02 * least
        assert moved["k_cache"].written == moved["v_cache"].written == 0
        assert moved["q"].read <= options["num_splits"] * (nodes + 2) * heads * dim * 2  # once in each part
        assert moved["out"].written == kernels.extent(launch.tensors["out"])
        masks.append((moved["ancestors"].read, moved["depths"].read))
    assert masks[0] == masks[1]


@pytest.mark.parametrize(("nodes", "heads"), [(1, 4), (5, 4), (9, 2), (20, 1)])
@pytest.mark.parametrize("parts", [2, 3, 17])
def test_padding_moves_no_byte_of_scratch(nodes, heads, parts):
    """A part writes the sums of its real rows, and they are read once, with what each lane asks of maxima and totals.

    Blocks have 16 or 32 rows, and the call two queries that are no nodes.
    """
    launch = attention(nodes, 17 * 64, heads=heads, num_splits=parts)
    dim, rows = launch.tensors["q"].shape[-1], parts * (nodes * heads)
    kv_heads = launch.tensors["k_cache"].shape[2]
    moved = kernels.traffic(launch)["scratch"]
    assert moved.written == kv_heads * rows * (dim + 2) * 4
    assert moved.read == kv_heads * rows * (dim * 4 + dim // 4 * 4 + 3 * 4)


@pytest.mark.parametrize(("nodes", "heads"), [(1, 4), (4, 4), (16, 4), (40, 4), (3, 1)])
def test_scratch_is_a_quarter_of_keys_and_values(nodes, heads):
    """At most, written and read, however many rows there are: a split has eight slots or more for each.

    In 16 bits, without the maxima and totals, which a dim of 64 makes a thirtieth.
    """
    launch = attention(nodes, 2048, heads=heads, dim=64)
    moved = kernels.traffic(launch)
    cache = kernels.extent(launch.tensors["k_cache"]) + kernels.extent(launch.tensors["v_cache"])
    assert moved["scratch"].written + moved["scratch"].read <= (0.25 + 0.03) * cache
    assert (moved["scratch"].written > 0) == (nodes * heads * 8 * 2 <= 2048)


def launch_beside(others):
    """Of a request with 4 nodes, which has four splits, beside that many with 120 nodes."""
    trees = [random_tree(4, 0), *(random_tree(120, seed) for seed in range(others))]
    rows, batch = 120 if others else 4, len(trees)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 120, 2, 64, generator=generator).bfloat16()[:batch, :rows]
    k, v = torch.randn(2, 2, 1200, 1, 64, generator=generator).bfloat16()[:, :batch]
    contexts = torch.tensor([1024, 700], dtype=torch.int32)[:batch]
    topology = Topology.from_trees(trees)
    return kernels.launch_of(lambda: tree_attention(q, k, v, topology, contexts, return_lse=True))


def test_splits_are_the_request_s_own():
    """Neighbours with more rows, and padding, do not change a bit."""
    alone, beside = launch_beside(0), launch_beside(1)
    kernels.run(alone)
    kernels.run(beside)
    assert torch.equal(alone.tensors["out"][0], beside.tensors["out"][0, :4])


def test_planted_bug_in_the_splits():
    """Rows of the call in place of the request's."""
    changed = ("attention/cuda/tree_attention.cuh", "at_least(end_row - first_row, 0) * launch.group", "p.queries * 2")
    assert reveals(launch_beside(1), *changed, only="tree_attention_bf16_64")


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
        kernels.IMPLEMENTATIONS["merge_states"](
            MergeStatesArguments(values, lse, other, lse), MergeStatesOutputs(out, merged_lse)
        )
        right = (0.5 * values.float() + 0.5 * other.float()).to(dtype)
        assert torch.equal(out, right)
        assert torch.equal(merge_states(values, lse, other, lse, backend="torch").out, right)
