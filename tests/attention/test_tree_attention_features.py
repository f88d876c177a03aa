"""Each feature of tree_attention, and the promises about layout, batch and repeatability."""

import dataclasses
import itertools

import pytest
import torch

from specdec_ops import AttentionState, Topology, Tree, merge_states, tree_attention
from tests.attention.attention_cases import (
    NAN,
    assert_right,
    chain,
    expected,
    forest,
    make_case,
    path_to_root,
    random_tree,
    star,
)
from tests.harness.close import assert_as_good_as_torch

TREES, CONTEXTS = [random_tree(17, seed=1), star(5), forest(7)], [0, 70, 6]


def lengths(*values, device="cpu"):
    """An int32 tensor."""
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "features",
    [
        {"scale": 0.3},
        {"window": 1},
        {"window": 4},
        {"window": 40},
        {"softcap": 1.5},
        {"sinks": True},
        {"alibi": True},
        {"k_scale": 0.5, "v_scale": 3.0},
        {"window": 3, "softcap": 2.0, "sinks": True, "alibi": True, "v_scale": 0.5, "scale": 0.2},
        {"window": 3, "sinks": True, "page_size": 4, "packed": True},
        {"first_nodes": 2, "softcap": 1.5, "page_size": 16},
        {"first_nodes": [3, 0, 5], "alibi": True},
        {"first_nodes": [9, 4, 0], "queries": 8, "window": 2},
        {"first_nodes": [1, 2, 3], "packed": True},
    ],
    ids=lambda features: "-".join(features),
)
def test_feature(features, dtype, target):
    """Options alone and together, and rectangular queries, on a ragged batch."""
    assert_right(make_case(TREES, CONTEXTS, dtype=dtype, device=target.device, **features), target.backend)


@pytest.mark.parametrize(
    "features", [{}, {"window": 5}, {"alibi": True, "softcap": 3.0}, {"sinks": True, "page_size": 8}], ids="-".join
)
def test_without_topology(features, target):
    """Every row sees exactly the context and stands right behind it."""
    case = make_case(None, [0, 70, 6], queries=3, heads=4, kv_heads=2, device=target.device, **features)
    assert_right(case, target.backend)


def test_one_tree_for_the_whole_batch(target):
    """A topology of batch 1 serves every request."""
    trees = [random_tree(9)] * 3
    case = make_case(trees, CONTEXTS, share_tree=True, device=target.device)
    assert case.topology.batch == 1
    assert_right(case, target.backend)


def test_siblings_see_the_same_context(target):
    """Window and ALiBi count depth: siblings with the same q, and the same own key and value, have the same output."""
    case = make_case([star(12)], [30], window=8, alibi=True, device=target.device)
    case.q[:, 1:] = case.q[:, 1:2].clone()
    for cache in (case.k_cache, case.v_cache):
        cache[:, 31:42] = cache[:, 31:32].clone()
    out = case.run(target.backend)
    assert_as_good_as_torch(out[:, 2:], out[:, 1:2].expand_as(out[:, 2:]).double(), out[:, 2:])


def test_window_of_one_sees_only_itself(target):
    """Then the output is the node's own value."""
    case = make_case([random_tree(10)], [20], heads=2, kv_heads=2, window=1, device=target.device)
    out = case.run(target.backend)
    torch.testing.assert_close(out.cpu()[0], case.values[0][20:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks, target):
    """Without a sink 0 and -inf; with one 0 and the sink. A padding row stays 0 and -inf."""
    device = target.device
    nothing = make_case(None, [0, 5], queries=2, sinks=sinks, device=device)
    state = assert_right(nothing, target.backend)
    assert (state.out[0] == 0).all()
    sink_values = nothing.options.get("sinks", torch.full((4,), -torch.inf, device=device))
    torch.testing.assert_close(state.lse[0], sink_values.expand(2, 4))

    padded = make_case([chain(1), chain(4)], [3, 3], sinks=sinks, device=device)
    state = assert_right(padded, target.backend)
    assert (state.out[0, 1:] == 0).all()
    assert (state.lse[0, 1:] == -torch.inf).all()


def test_nodes_nobody_asks_for_may_hold_anything(target):
    """A draft grows level by level: the nodes that are not drafted yet have neither K nor V."""
    tree = Tree.from_branching((2, 2, 2), root=True)  # levels of 1, 2, 4 and 8 nodes
    case = make_case([tree.parents.tolist()] * 2, [9, 64], first_nodes=1, queries=2, device=target.device)
    reference = case.run(target.backend)
    for cache in (case.k_cache, case.v_cache):
        for request, context in enumerate(case.contexts):
            cache[request, context + 3 :] = NAN
    torch.testing.assert_close(case.run(target.backend), reference, rtol=0, atol=0)


def test_growing_a_tree_gives_what_the_whole_tree_gives(target):
    """Asking level by level, with a sliced topology, equals asking for all nodes at once."""
    tree = Tree.from_branching((2, 2, 2), root=True)
    case = make_case([tree.parents.tolist()] * 2, [9, 33], device=target.device)
    whole = case.run(target.backend)
    exact, _ = expected(case, torch.float64)
    offsets = tree.levels.tolist()
    for start, end in itertools.pairwise(offsets):
        level = dataclasses.replace(case, q=case.q[:, start:end], topology=case.topology[:end])
        got = level.run(target.backend, query_start=start)
        assert_as_good_as_torch(got, exact[:, start:end], whole[:, start:end])


def test_shared_tree_cut_to_different_sizes(target):
    """One tree for all, truncated per request on the device."""
    tree = random_tree(12)
    cut = [tree[:12], tree[:4]]
    case = make_case(cut, [5, 20], device=target.device)
    shared = Tree(tree).to(target.device)
    topology = dataclasses.replace(shared, num_nodes=lengths(12, 4, device=target.device))
    assert_right(dataclasses.replace(case, topology=topology), target.backend)


@pytest.mark.parametrize("layout", [{}, {"page_size": 16}], ids=["dense", "paged"])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 256])
def test_num_splits(num_splits, layout, target):
    """Any number of splits is right, and repeats to the last bit."""
    if target.interpreted and num_splits not in (1, 3):
        pytest.skip("covered at other numbers by the interpreter")
    case = make_case(
        TREES, [0, 300, 65], heads=2, kv_heads=1, device=target.device, sinks=True, num_splits=num_splits, **layout
    )
    first = assert_right(case, target.backend)
    again = case.run(target.backend, return_lse=True)
    assert torch.equal(first.out, again.out)
    assert torch.equal(first.lse, again.lse)


@pytest.mark.parametrize("packed", [False, True])
def test_out(packed, target):
    """The given tensor is written and returned, whatever its strides."""
    case = make_case(TREES, CONTEXTS, packed=packed, device=target.device)
    wanted = case.run(target.backend, return_lse=True)

    out = torch.full_like(case.q, NAN)
    assert case.run(target.backend, out=out) is out
    assert torch.equal(out, wanted.out)

    state = AttentionState(torch.full_like(case.q, NAN), torch.full_like(wanted.lse, NAN))
    assert case.run(target.backend, return_lse=True, out=state) is state
    assert torch.equal(state.out, wanted.out)
    assert torch.equal(state.lse, wanted.lse)

    *rows, heads, dim = case.q.shape
    room = torch.full((heads, *rows, 2 * dim), NAN, dtype=case.q.dtype, device=target.device)
    strided = room[..., dim:].movedim(0, -2)
    case.run(target.backend, out=strided)
    assert torch.equal(strided, wanted.out)
    assert room[..., :dim].isnan().all()


@pytest.mark.parametrize("page_size", [None, 8])
def test_strides(page_size, target):
    """Head-major caches, one K/V tensor, and a slice of a fused projection give the same bits as contiguous tensors."""
    case = make_case(TREES, CONTEXTS, page_size=page_size, device=target.device)
    wanted = case.run(target.backend)

    head_major = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (case.k_cache, case.v_cache)]
    fused_cache = torch.stack([case.k_cache, case.v_cache], dim=2)
    fused_projection = torch.cat([torch.full_like(case.q, NAN), case.q, torch.full_like(case.q, NAN)], dim=2)
    q_slice = fused_projection[:, :, 4:8]
    q_transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    for q, (k_cache, v_cache) in (
        (case.q, head_major),
        (case.q, (fused_cache[:, :, 0], fused_cache[:, :, 1])),
        (q_slice, (case.k_cache, case.v_cache)),
        (q_transposed, head_major),
    ):
        assert torch.equal(dataclasses.replace(case, q=q, k_cache=k_cache, v_cache=v_cache).run(target.backend), wanted)


def test_strided_page_table(target):
    """A page table that is a slice of a wider one."""
    case = make_case(TREES, CONTEXTS, page_size=8, device=target.device)
    table = case.options["page_table"]
    wide = torch.full((len(table), 64), -1, dtype=torch.int32, device=target.device)
    wide[:, : table.shape[1]] = table
    assert torch.equal(case.run(target.backend, page_table=wide[:, : table.shape[1]]), case.run(target.backend))


def test_page_sizes_and_orders_agree(target):
    """The bits don't depend on the page size, on the order of the pages, or on paging at all."""
    wanted = make_case(TREES, CONTEXTS, device=target.device).run(target.backend, return_lse=True)
    sizes = (3, 64) if target.interpreted else (1, 3, 16, 64, 256)
    for page_size in sizes:
        case = make_case(TREES, CONTEXTS, page_size=page_size, device=target.device)
        got = case.run(target.backend, return_lse=True)
        assert torch.equal(got.out, wanted.out), page_size
        assert torch.equal(got.lse, wanted.lse), page_size

        order = torch.randperm(len(case.k_cache), device=target.device)
        place = torch.argsort(order).to(torch.int32)
        moved = dataclasses.replace(case, k_cache=case.k_cache[order], v_cache=case.v_cache[order])
        table = place[case.options["page_table"].long()]
        assert torch.equal(moved.run(target.backend, page_table=table), wanted.out), page_size


def test_unused_page_table_entries_may_hold_anything(target):
    """An engine that frees pages leaves their numbers behind."""
    case = make_case(TREES, CONTEXTS, page_size=4, device=target.device)
    wanted = case.run(target.backend)
    table = case.options["page_table"].clone()
    for request, (tree, context) in enumerate(zip(TREES, CONTEXTS, strict=True)):
        table[request, -(-(context + len(tree)) // 4) :] = -(2**31)
    assert torch.equal(case.run(target.backend, page_table=table), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_request_does_not_see_its_neighbours(page_size, dtype, target):
    """Permuting the batch permutes the result, and a request alone gives the same bits as in the batch."""
    trees, contexts = [*TREES, random_tree(40)], [0, 200, 6, 77]
    if target.interpreted:
        trees, contexts = trees[1:], contexts[1:]
    case = make_case(trees, contexts, page_size=page_size, dtype=dtype, sinks=True, device=target.device)
    whole = case.run(target.backend, return_lse=True)
    order = [2, 0, 1] if target.interpreted else [2, 0, 3, 1]
    for chosen in (order, *([request] for request in range(len(trees)))):
        index = torch.tensor(chosen, device=target.device)
        rows = max(len(trees[request]) for request in chosen)
        part = dataclasses.replace(
            case,
            q=case.q[index, :rows],
            topology=Topology.from_trees([Tree(trees[request]) for request in chosen], target.device),
            context_lens=case.context_lens[index],
        )
        options = {}
        if page_size is None:
            part = dataclasses.replace(part, k_cache=case.k_cache[index], v_cache=case.v_cache[index])
        else:
            options["page_table"] = case.options["page_table"][index]
        got = part.run(target.backend, return_lse=True, **options)
        assert torch.equal(got.out, whole.out[index, :rows]), chosen
        assert torch.equal(got.lse, whole.lse[index, :rows]), chosen


@pytest.mark.parametrize("page_size", [None, 5])
def test_packed_equals_padded(page_size, target):
    """To the last bit, row by row."""
    padded = make_case(TREES, CONTEXTS, page_size=page_size, device=target.device)
    case = make_case(TREES, CONTEXTS, page_size=page_size, packed=True, device=target.device)
    for request, rows in enumerate(case.row_indices):
        case.q[rows] = padded.q[request, : len(TREES[request])]
    wanted, got = (c.run(target.backend, return_lse=True) for c in (padded, case))
    for request, rows in enumerate(case.row_indices):
        assert torch.equal(got.out[rows], wanted.out[request, : len(TREES[request])])
        assert torch.equal(got.lse[rows], wanted.lse[request, : len(TREES[request])])
    assert (got.out[-2:] == 0).all()
    assert (got.lse[-2:] == -torch.inf).all()


def test_topology_without_room_for_nodes(target):
    """Every row is padding."""
    case = make_case([chain(3)], [4], device=target.device)
    state = dataclasses.replace(case, topology=Tree([]).to(target.device)).run(target.backend, return_lse=True)
    assert (state.out == 0).all()
    assert (state.lse == -torch.inf).all()


def test_empty_requests_and_batches(target):
    """No request at all, and a request without nodes beside one with nodes."""
    case = make_case([chain(3), chain(2)], [4, 9], device=target.device)
    none = dataclasses.replace(
        case,
        q=case.q[:0],
        k_cache=case.k_cache[:0],
        v_cache=case.v_cache[:0],
        topology=Tree.chain(3).to(target.device),
        context_lens=case.context_lens[:0],
    )
    state = none.run(target.backend, return_lse=True)
    assert state.out.shape == (0, 3, 4, 64)
    assert state.lse.shape == (0, 3, 4)

    topology = dataclasses.replace(case.topology, num_nodes=lengths(0, 2, device=target.device))
    state = dataclasses.replace(case, topology=topology).run(target.backend, return_lse=True)
    assert (state.out[0] == 0).all()
    assert (state.lse[0] == -torch.inf).all()
    assert torch.equal(state.out[1], case.run(target.backend)[1])

    no_rows = dataclasses.replace(case, q=case.q[:, :0]).run(target.backend)
    assert no_rows.shape == (2, 0, 4, 64)


def test_int_arguments_mean_every_request(target):
    """context_lens and query_start as ints."""
    case = make_case([random_tree(9)] * 2, [11, 11], first_nodes=[2, 2], device=target.device)
    wanted = case.run(target.backend)
    assert torch.equal(dataclasses.replace(case, context_lens=11).run(target.backend, query_start=2), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_each_path_alone_is_causal_attention(dtype, target):
    """Unrolled: the path from the root to a leaf, behind the context, is an ordinary causal sequence."""
    context, tree = 37, Tree(random_tree(14, seed=3))
    case = make_case([tree.parents.tolist()], [context], heads=4, kv_heads=2, dtype=dtype, device=target.device)
    out = case.run(target.backend).cpu()
    for leaf in tree.leaves.tolist():
        path = path_to_root(tree.parents.tolist(), leaf)
        slots = [*range(context), *(context + node for node in path)]
        sequence = [part[slots].transpose(0, 1).repeat_interleave(2, dim=0) for part in (case.keys[0], case.values[0])]
        q = case.q[0, path].cpu().transpose(0, 1)
        causal = torch.ones(len(path), len(slots), dtype=torch.bool).tril(context)
        alone = [
            torch.nn.functional.scaled_dot_product_attention(
                *(tensor.to(precision) for tensor in (q, *sequence)), attn_mask=causal
            )
            for precision in (torch.float64, dtype)
        ]
        assert_as_good_as_torch(out[0, path].transpose(0, 1), *alone, what=f"path to {leaf}")


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("context", [0, 3, 66])
def test_visibility_is_exact(context, page_size, target):
    """With q = k = 0 every visible slot weighs the same, and values that are powers of two tell which slots those are.

    Feature c of slot j is 2 ** (j % 20) where j // 20 == c, so that float32 holds each sum exactly; for 16-bit outputs
    it is 3 in place of 20. The output times the number of visible slots is that sum, up to the rounding of one
    division.
    """
    parents = random_tree(70, seed=5)
    case = make_case([parents], [context], heads=2, kv_heads=2, device=target.device, page_size=page_size)
    slots = torch.arange(context + len(parents))
    packed = 20 if case.q.dtype == torch.float32 else 3
    bits = torch.zeros(len(slots), 2, 64, dtype=case.q.dtype)
    bits[slots, :, slots // packed] = (2.0 ** (slots % packed)).to(bits.dtype)[:, None]
    k_cache, v_cache = torch.full_like(case.k_cache, NAN), torch.full_like(case.v_cache, NAN)
    if page_size is None:
        k_cache[0, : len(slots)], v_cache[0, : len(slots)] = 0, bits.to(target.device)
    else:
        pages = case.options["page_table"][0, (slots // page_size).to(target.device)].long()
        k_cache[pages, slots % page_size], v_cache[pages, slots % page_size] = 0, bits.to(target.device)
    zero = dataclasses.replace(case, q=torch.zeros_like(case.q), k_cache=k_cache, v_cache=v_cache)
    state = zero.run(target.backend, return_lse=True)
    count = state.lse.cpu().double().exp().round()
    sums = (state.out.cpu().double() * count[..., None]).round().long()[0]
    for node in range(len(parents)):
        visible = {*range(context), *(context + ancestor for ancestor in path_to_root(parents, node))}
        wanted = torch.tensor([sum(2 ** (j % packed) for j in visible if j // packed == c) for c in range(64)])
        assert torch.equal(sums[node], wanted.expand(2, 64)), f"node {node}"


def test_merging_context_and_tree_equals_the_whole(target):
    """Attention over the context and over the tree alone, merged, is the attention over both."""
    case = make_case([random_tree(12)], [30], heads=4, kv_heads=2, device=target.device)
    whole = case.run(target.backend, return_lse=True)
    context = tree_attention(
        case.q, case.k_cache, case.v_cache, None, case.context_lens, return_lse=True, backend=target.backend
    )
    tree = tree_attention(
        case.q,
        case.k_cache[:, 30:],
        case.v_cache[:, 30:],
        case.topology,
        torch.zeros_like(case.context_lens),
        return_lse=True,
        backend=target.backend,
    )
    merged = merge_states(*context, *tree, backend=target.backend)
    rounding = torch.finfo(case.q.dtype).eps  # of each part, and of what they give
    torch.testing.assert_close(merged.out, whole.out, rtol=8 * rounding, atol=8 * rounding)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page_size", [None, 8])
def test_lengths_beyond_the_cache(page_size, target):
    """On CPU an error that names the request; never a wild read."""
    case = make_case([chain(3), chain(2)], [4, 9], page_size=page_size, device=target.device)
    too_long = dataclasses.replace(case, context_lens=lengths(4, 1_000_000, device=target.device))
    if target.backend in ("cpu", "torch"):
        with pytest.raises(ValueError, match=r"context_lens\[1\]"):
            too_long.run(target.backend)
        with pytest.raises(ValueError, match=r"context_lens\[0\]"):
            dataclasses.replace(case, context_lens=lengths(-1, 9, device=target.device)).run(target.backend)
    else:
        assert torch.equal(too_long.run(target.backend)[0], case.run(target.backend)[0])
