"""The Triton kernel's own edges: block rungs, splits and their merge, pages, ancestor words that straddle tiles.

Without a GPU this runs in Triton's interpreter: shapes are small. The cases common to all backends are elsewhere.
"""

import pytest
import torch

from specdec_ops import Topology, Tree
from specdec_ops.ops.attention.contract import TreeAttentionArguments, TreeAttentionOutputs, tree_attention
from specdec_ops.ops.attention.reference_tree_attention import tree_attention as reference
from tests.attention.attention_cases import random_tree
from tests.harness.close import assert_as_good_as_torch

pytest.importorskip("triton")
from specdec_ops.triton_kernels.attention import tree_attention as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
NAN = float("nan")


def make(contexts, trees, *, group=1, kv_heads=1, dim=16, dtype=torch.float32, page_size=0, spare=0, **options):
    """Arguments by name. `trees`: parents per request, or None. Whatever must not be read is NaN."""
    batch = len(contexts)
    topology = None if trees is None else Topology.from_trees([Tree.from_parents(t) for t in trees], device=DEVICE)
    sizes = [0] * batch if trees is None else [len(tree) for tree in trees]
    slots = max(c + n for c, n in zip(contexts, sizes, strict=True)) + spare
    rows = options.pop("queries", None) or (max(sizes) if trees is not None else 3)
    filled = torch.full((2, batch, slots, kv_heads, dim), NAN, dtype=dtype)
    for request in range(batch):
        length = contexts[request] + sizes[request]
        filled[:, request, :length] = torch.randn(2, length, kv_heads, dim).to(dtype)
    page_table = None
    if page_size:
        per_request = -(-slots // page_size)
        page_table = torch.randperm(batch * per_request + 2)[: batch * per_request].view(batch, per_request).int()
        dense, filled = filled, torch.full((2, batch * per_request + 2, page_size, kv_heads, dim), NAN, dtype=dtype)
        for request in range(batch):
            where = torch.arange(slots)
            filled[:, page_table[request, where // page_size].long(), where % page_size] = dense[:, request]
        page_table = page_table.to(DEVICE)
    caches = filled.to(DEVICE)
    arguments = dict(
        q=torch.randn(batch, rows, kv_heads * group, dim).to(DEVICE, dtype), k_cache=caches[0], v_cache=caches[1],
        ancestors=getattr(topology, "ancestors", None), depths=getattr(topology, "depths", None),
        num_nodes=getattr(topology, "num_nodes", None), offsets=None,
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=DEVICE), page_table=page_table,
        query_starts=None, query_start=0, scale=dim**-0.5, window=0, softcap=0.0, sinks=None,
        alibi_slopes=None, out_scale=1.0, num_splits=0, path_invariant=False,
    )  # fmt: skip
    return arguments | options


def run(implementation, arguments, dtype=None):
    """Out and lse, from memory that was NaN."""
    if dtype is not None:
        arguments = arguments | {name: arguments[name].to(dtype) for name in ("q", "k_cache", "v_cache")}
    out = torch.full_like(arguments["q"], NAN)
    outputs = TreeAttentionOutputs(out, torch.full(out.shape[:-1], NAN, dtype=torch.float32, device=DEVICE))
    implementation(TreeAttentionArguments(**arguments), outputs)
    return outputs


def check(arguments):
    """Compare with the definition in float64; give back what the kernel wrote."""
    got, exact, torch_same = (
        run(kernels.tree_attention, arguments),
        run(reference, arguments, torch.float64),
        run(reference, arguments),
    )
    assert_as_good_as_torch(got.out, exact.out, torch_same.out, what="out")
    assert_as_good_as_torch(got.lse, exact.lse.double(), torch_same.lse, what="lse")
    return got


def features(heads):
    return dict(
        window=40, softcap=3.0, sinks=torch.randn(heads, device=DEVICE),
        alibi_slopes=torch.rand(heads, device=DEVICE), out_scale=0.5,
    )  # fmt: skip


@pytest.mark.parametrize(("nodes", "group"), [(1, 1), (16, 1), (17, 1), (11, 3), (32, 2), (13, 5), (43, 3), (5, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_rung_of_the_block_ladder(nodes, group, dtype):
    check(make([70], [random_tree(nodes)], group=group, kv_heads=2, dtype=dtype))


@pytest.mark.parametrize("nodes", [63, 64, 65, 129])
@pytest.mark.parametrize("context", [0, 1, 63, 64, 65, 100])
def test_ancestor_words_straddle_tiles(nodes, context):
    """Tiles of 64 slots (16-bit) and of 32 (float32) against words that start at the context's end."""
    check(make([context], [random_tree(nodes, seed=context)], dtype=torch.float16))
    check(make([context], [random_tree(nodes, seed=context)]))


@pytest.mark.parametrize("dim", [48, 80, 96, 112, 192, 256])
@pytest.mark.parametrize("nodes", [5, 65])
def test_dims_in_one_and_two_pieces(dim, nodes):
    check(make([40], [random_tree(nodes)], dim=dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("page_size", [1, 3, 64, 128])
def test_page_sizes(page_size):
    trees = [random_tree(9), random_tree(40)]
    check(make([70, 130], trees, page_size=page_size, dtype=torch.float16, kv_heads=2))
    check(make([70, 130], trees, page_size=page_size, group=3, **features(3)))


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 20])
def test_splits(num_splits):
    trees = [random_tree(4), random_tree(20), random_tree(1), random_tree(2)]
    check(make([0, 600, 257, 31], trees, group=2, num_splits=num_splits))
    check(make([0, 600, 257, 31], trees, group=2, num_splits=num_splits, **features(2)))


def test_splits_without_a_tree():
    check(make([0, 600, 257], None, group=2))
    check(make([0, 600, 257], None, sinks=torch.randn(1, device=DEVICE), window=300, num_splits=3))


@pytest.mark.parametrize("feature", ["window", "softcap", "sinks", "alibi_slopes", "out_scale"])
def test_each_feature_alone(feature):
    check(make([90, 0], [random_tree(20), random_tree(3)], group=2, **{feature: features(2)[feature]}))


@pytest.mark.parametrize("window", [1, 2, 64, 65, 500])
def test_window_with_splits(window):
    trees = [[*range(-1, 7)], random_tree(20)]
    check(make([330, 3], trees, window=window, num_splits=3, dtype=torch.bfloat16))


def test_soft_cap_saturates():
    arguments = make([40], [random_tree(5)], softcap=5.0)
    arguments["q"] *= 1e4
    check(arguments)


def test_rectangular_rows_and_padding():
    """Rows beyond the tree, before it and after it, are written as padding."""
    starts = torch.tensor([3, -2], dtype=torch.int32, device=DEVICE)
    got = check(make([30, 30], [random_tree(12), random_tree(7)], queries=9, query_starts=starts, query_start=1))
    assert (got.out[1, 0] == 0).all() and (got.lse[1, 0] == float("-inf")).all()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_packed_rows_nobody_owns(num_splits):
    """A request without rows, one with more rows than nodes, and rows after the last request."""
    arguments = make([70, 5, 140], [random_tree(6), random_tree(4), random_tree(3)], group=2, num_splits=num_splits)
    offsets = torch.tensor([0, 9, 9, 14], dtype=torch.int32, device=DEVICE)
    q = torch.randn(20, *arguments["q"].shape[2:], device=DEVICE)
    got = check(arguments | dict(q=q, offsets=offsets))
    assert (got.out[14:] == 0).all()


def test_strided_caches():
    arguments = make([50], [random_tree(10)], kv_heads=2)
    heads_first = arguments["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    expected = run(kernels.tree_attention, arguments)
    got = run(kernels.tree_attention, arguments | dict(k_cache=heads_first, q=arguments["q"].clone()))
    assert torch.equal(got.out, expected.out)


def test_a_request_does_not_see_its_neighbours():
    """Same bits alone and in a batch, whatever the capacity of the cache and the size of the scratch."""
    contexts, trees = [700, 40, 300], [random_tree(8), random_tree(8, seed=1), random_tree(8, seed=2)]
    arguments = make(contexts, trees, dtype=torch.bfloat16, group=2, spare=500)
    together = run(kernels.tree_attention, arguments)
    for request, context in enumerate(contexts):
        alone = dict(arguments)
        for name in ("q", "ancestors", "depths", "num_nodes", "context_lens", "k_cache", "v_cache"):
            alone[name] = arguments[name][request : request + 1]
        for name in ("k_cache", "v_cache"):
            alone[name] = alone[name][:, : context + 8]
        got = run(kernels.tree_attention, alone)
        assert torch.equal(got.out[0], together.out[request]) and torch.equal(got.lse[0], together.lse[request])


def test_a_batch_too_large_for_the_scratch_is_served_in_turns(monkeypatch):
    arguments = make([600, 40, 300], [random_tree(5)] * 3, group=2)
    at_once = run(kernels.tree_attention, arguments)
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)
    in_turns = run(kernels.tree_attention, arguments)
    assert torch.equal(at_once.out, in_turns.out) and torch.equal(at_once.lse, in_turns.lse)


@pytest.mark.parametrize("page_size", [0, 16])
def test_lengths_beyond_the_cache_are_not_read(page_size):
    """Not an answer anybody wants, but no wild read: the slots that exist are seen, the others are not."""
    arguments = make([60, 10], [random_tree(4), random_tree(4)], page_size=page_size)
    capacity = 64
    arguments["context_lens"] = torch.tensor([1000, -5], dtype=torch.int32, device=DEVICE)
    got = run(kernels.tree_attention, arguments)
    clamped = arguments | dict(context_lens=torch.tensor([capacity, 0], dtype=torch.int32, device=DEVICE))
    assert torch.equal(got.out[0], run(kernels.tree_attention, clamped).out[0])
    assert torch.equal(got.lse, run(kernels.tree_attention, clamped).lse)


def test_empty_calls():
    """Which the operator answers without a launch."""

    def called(arguments, outputs):
        tree_attention(arguments, "triton", outputs)

    arguments = make([5], [random_tree(3)])
    nothing = arguments | dict(q=arguments["q"][:0], context_lens=arguments["context_lens"][:0])
    assert run(called, nothing).out.shape[0] == 0
    offsets = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows = dict(q=arguments["q"][0], offsets=offsets, context_lens=arguments["context_lens"][:0])
    assert (run(called, arguments | rows).out == 0).all()


def test_splits_follow_the_capacity_and_the_heads():
    shape = kernels.block_shape(64, 128, 2, 9, False)
    assert kernels.max_splits(8, 300, 0, 0, shape) == 1
    assert kernels.max_splits(8, 10**6, 0, 0, shape) == 32
    assert kernels.max_splits(1, 10**6, 0, 0, shape) == 128
    assert kernels.max_splits(32, 10**6, 0, 0, shape) == 16
    assert kernels.max_splits(8, 10**6, 1000, 0, shape) == 3
    assert kernels.max_splits(8, 300, 0, 100, shape) == 5


@pytest.mark.parametrize(
    ("dim", "rows", "pieces"), [(64, 64, (64, 0)), (80, 64, (64, 16)), (80, 16, (128, 0)), (96, 128, (64, 32)),
                                (112, 64, (128, 0)), (192, 64, (256, 0)), (48, 64, (32, 16)), (16, 16, (16, 0))]
)  # fmt: skip
def test_pieces_of_the_dim(dim, rows, pieces):
    assert kernels.split_dim(dim, rows) == pieces
