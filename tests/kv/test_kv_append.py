"""kv_append: places, rotations, norms and 8-bit caches over backends, against loops over rows, heads and codes."""

import itertools

import pytest
import torch

from specdec_ops import Rope, Topology, Tree, build_topology, kv_append, kv_propagate, tree_attention
from tests.harness.close import assert_as_good_as_torch
from tests.kv.append_cases import DEPTHS, HEADS, KV_HEADS, POISON, Append, caches, case, ids, normal, run, tables, trees

OP = "kv_append"
ISAS = ("generic", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def check(append, got):
    """All three results, and that nothing else was written."""
    k_cache, v_cache, q_out = got
    exact, plain = append.expected(double=True), append.expected(double=False)
    for cache, right, torchs in zip((k_cache, v_cache), exact, plain, strict=False):
        written = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for place in right:
            written[place] = True
        if right:
            places = list(right)
            found = torch.stack([cache[place].cpu() for place in places])
            want, theirs = (torch.stack([values[place] for place in places]) for values in (right, torchs))
            assert_as_good_as_torch(found, want, theirs)
        assert (cache.cpu()[~written] == POISON).all()
    assert_as_good_as_torch(q_out, exact[2], plain[2])
    without = [place for place in itertools.product(*map(range, q_out.shape[:2])) if place not in append.places()]
    assert all((q_out[place] == 0).all() for place in without)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(24, 12), (24, 8), (15, 7), (64, 32), (80, 20), (2, 1)])
def test_trees(target, dtype, interleaved, dim, pairs):
    """Ragged trees from a node of their own on, full and partial rotation, dims that fill no vector."""
    rope = tables(20, pairs, target.device)
    append = case(dtype, target.device, dim=dim, rope=rope, interleaved=interleaved)
    check(append, run(append, target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32", "own dtype"])
def test_norms(target, dtype, weights):
    """Of keys and queries, each with its own weight; with a rope and without."""
    for rope, interleaved, dim in ((tables(20, 10, target.device), False, 24), (None, False, 70)):
        append = case(dtype, target.device, dim=dim, rope=rope, interleaved=interleaved)
        for name, seed in (("k_norm_weight", 8), ("q_norm_weight", 9)):
            append.options[name] = (1 + 0.3 * normal(dim, seed=seed)).to(target.device, weights or dtype)
        append.options["norm_eps"] = 1e-6
        check(append, run(append, target))


def test_a_norm_of_keys_alone(target):
    append = case(device=target.device, k_norm_weight=torch.full((24,), 2.0, device=target.device))
    check(append, run(append, target))


def test_every_instruction_set(isa):
    class OnCpu:
        backend = "cpu"

    for dtype, interleaved, (dim, pairs) in itertools.product(DTYPES, (False, True), ((40, 20), (96, 40), (7, 3))):
        append = case(dtype, dim=dim, rope=tables(20, pairs), interleaved=interleaved)
        append.options["k_norm_weight"] = append.options["q_norm_weight"] = 1 + 0.3 * normal(dim, dtype=dtype)
        check(append, run(append, OnCpu))


def test_a_prompt(target):
    """Without a topology rows follow one another: a chunk of a prompt, from its own first row."""
    append = case(torch.bfloat16, target.device, depths=None, query_start=[0, 3, 1], rope=tables(20, 12, target.device))
    check(append, run(append, target))


def test_siblings_share_a_position_not_a_slot(target):
    """The same key in each of three siblings is stored three times, turned alike; a cousin's is turned further."""
    device = target.device
    topology = Tree.from_parents([-1, 0, 0, 0, 2]).to(device)
    k = torch.ones(1, 5, 1, 8, device=device)
    k_cache, v_cache = caches(k, k, 1, 8)
    rope = tables(9, 4, device)
    kv_append(k, k, k_cache, v_cache, topology, 2, rope=rope, backend=target.backend)
    rows = k_cache[0, 2:7, 0]
    assert torch.equal(rows[1], rows[2]) and torch.equal(rows[1], rows[3])
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[4], rows[1])
    assert (k_cache[0, :2] == POISON).all() and (k_cache[0, 7:] == POISON).all()


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_hold_what_a_dense_cache_does(target, page_size):
    device = target.device
    append = case(device=device, rope=tables(20, 12, device))
    dense_k, dense_v, dense_q = run(append, target)
    each = -(-16 // page_size)
    order = torch.randperm(3 * each, generator=torch.Generator().manual_seed(1)) + 1
    table = order.to(device, torch.int32).view(3, each)
    paged = [torch.full((3 * each + 2, page_size, KV_HEADS, 24), POISON, device=device) for _ in range(2)]
    out = kv_append(
        append.k,
        append.v,
        *paged,
        trees(DEPTHS, device),
        ids(append.context_lens, device),
        q=append.q,
        query_start=ids(append.query_start, device),
        page_table=table,
        backend=target.backend,
        **append.options,
    )
    assert torch.equal(out, dense_q)
    for pages, dense in zip(paged, (dense_k, dense_v), strict=True):
        assert torch.equal(pages[table.long()].flatten(1, 2)[:, :16], dense)
        assert (pages[[0, -1]] == POISON).all()


def test_packed_rows_are_padded_rows_in_another_place(target):
    """By offsets, with a request that has no rows, and rows behind the last request."""
    device = target.device
    append = case(device=device, depths=[[0, 1, 1, 2], [0, 1, 2, 3], [0, 1]], query_start=[0])
    append.options["rope"] = tables(20, 12, device)
    padded_k, padded_v, padded_q = run(append, target)
    sizes = [4, 0, 2]
    keep = [(request, row) for request, size in enumerate(sizes) for row in range(size)]
    rows = [torch.stack([part[place] for place in keep] + [part[0, 0]]) for part in (append.k, append.v, append.q)]
    plain = trees(append.depths, device)
    topology = Topology(*(getattr(plain, name) for name in Topology.__slots__[:7]), offsets=ids([0, 4, 4, 6], device))
    pair = caches(append.k, append.v, 3, 16)
    out = kv_append(
        *rows[:2],
        *pair,
        topology,
        ids(append.context_lens, device),
        q=rows[2],
        backend=target.backend,
        **append.options,
    )
    assert torch.equal(out[:6], torch.stack([padded_q[place] for place in keep]))
    assert (out[6] == 0).all()
    for packed, padded in zip(pair, (padded_k, padded_v), strict=True):
        for request, size in enumerate(sizes):
            first = append.context_lens[request]
            assert torch.equal(packed[request, first : first + size], padded[request, first : first + size])
            assert (packed[request, :first] == POISON).all() and (packed[request, first + size :] == POISON).all()


def test_places_of_the_callers_own(target):
    """Packed rows with requests, slots and positions: what is out of range is skipped, and does nobody harm."""
    device = target.device
    k, v, q = (normal(9, heads, 8, dtype=torch.float32, device=device) for heads in (2, 2, 3))
    requests = ids([1, 0, 0, 1, 2, -1, 0, 1, 0], device)
    slots = ids([3, 0, -1, 5, 0, 0, 2**31 - 1, -(2**31), 2], device)
    positions = ids([4, 9, 3, 10, 1, 2, 0, 1, -1], device)  # of 10
    pair, rope = caches(k, v, 2, 6), tables(10, 4, device)
    given = {"requests": requests, "slots": slots, "positions": positions, "q": q, "rope": rope}
    out = kv_append(k, v, *pair, None, None, backend=target.backend, **given)
    stored = {(1, 3): 0, (0, 0): 1}
    for cache, rows in zip(pair, (k, v), strict=True):
        written = (cache != POISON).any(-1).any(-1)
        assert {tuple(place) for place in written.nonzero().tolist()} == set(stored)
        if cache is pair[1]:
            assert all(torch.equal(cache[place], rows[row]) for place, row in stored.items())
    assert [(row == 0).all().item() for row in out] == [False, False, False, True, *[False] * 4, True]
    again = kv_append(k[:1], v[:1], *pair, None, None, backend=target.backend, slots=slots[:1], q=q[:1])
    assert torch.equal(again, q[:1]) and torch.equal(pair[0][0, 3], k[0])  # no requests: all of request 0; no rope


def test_padded_rows_may_name_slots_and_positions_too(target):
    """They count in place of context + node and context + depth; a row without a node stays out."""
    device = target.device
    k = normal(2, 3, 1, 8, dtype=torch.float32, device=device)
    pair, rope = caches(k, k, 2, 6), tables(10, 4, device)
    topology = trees([[0, 1, 1], [0, 1]], device)
    slots, positions = ids([[5, 0, 2], [1, 0, 3]], device), ids([[0, 3, 0], [0, 0, 0]], device)
    out = kv_append(
        k, k, *pair, topology, None, q=k, rope=rope, slots=slots, positions=positions, backend=target.backend
    )
    assert (pair[1] != POISON).any(-1).any(-1).nonzero().tolist() == [[0, 0], [0, 2], [0, 5], [1, 0], [1, 1]]
    torch.testing.assert_close(pair[0][0, [5, 2]], k[0, [0, 2]])  # position 0
    assert not torch.allclose(pair[0][0, 0], k[0, 1])
    assert (out[1, 2] == 0).all()


def test_strides(target):
    """K, V and Q as parts of one projection, a cache with K and V side by side, and queries turned in place."""
    device, dim = target.device, 16
    joined = normal(2, 5, (HEADS + 2 * KV_HEADS) * dim, dtype=torch.bfloat16, device=device)
    q, k, v = (
        part.unflatten(2, (-1, dim)) for part in joined.split([HEADS * dim, KV_HEADS * dim, KV_HEADS * dim], dim=2)
    )
    topology, context_lens = trees([[0, 1, 1, 2, 2]], device), ids([3, 1], device)
    options = {"rope": tables(9, 8, device), "backend": target.backend}
    want = caches(k, v, 2, 9)
    want_q = kv_append(*(x.contiguous() for x in (k, v)), *want, topology, context_lens, q=q.contiguous(), **options)
    store = torch.full((9, 2, 2, KV_HEADS, dim + 3), POISON, dtype=torch.bfloat16, device=device)
    got = [store[:, :, which, :, :dim].transpose(0, 1) for which in range(2)]
    values = v.clone()
    assert kv_append(k, v, *got, topology, context_lens, q=q, q_out=q, **options) is q
    assert torch.equal(q, want_q) and torch.equal(v, values)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert (store[..., dim:] == POISON).all()


def test_values_of_another_dim(target):
    append = case(torch.float16, target.device, dim=24, v_dim=17, rope=tables(20, 12, target.device))
    check(append, run(append, target))


def test_one_tree_for_all_requests_cut_to_several_sizes(target):
    device = target.device
    k = normal(3, 4, 1, 8, dtype=torch.float32, device=device)
    pair = caches(k, k, 3, 8)
    topology = Tree.chain(4).to(device)[: ids([1, 4, 0], device)]
    kv_append(k, k, *pair, topology, 2, backend=target.backend)
    assert (pair[0] != POISON).any(-1).any(-1).sum(1).tolist() == [1, 4, 0]


def test_the_batch_may_be_in_any_order(target):
    """A request's result depends on that request alone, to the last bit: neighbours may be NaN."""
    append = case(torch.bfloat16, target.device, rope=tables(20, 12, target.device))
    append.options["k_norm_weight"] = 1 + normal(24, dtype=torch.bfloat16, device=target.device)
    first = run(append, target)
    order = [2, 0, 1]
    moved = Append(
        *(rows[order].clone() for rows in (append.k, append.v, append.q)),
        [DEPTHS[i] for i in order],
        [append.context_lens[i] for i in order],
        query_start=[append.query_start[i] for i in order],
        **append.options,
    )
    for rows in (moved.k, moved.v, moved.q):
        rows[1] = float("nan")
    again = run(moved, target)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[[2, 1]], other[[0, 2]])


def test_numbers_on_the_device_do_no_harm(target):
    """Lengths below 0 and beyond everything, pages that don't exist, more nodes than there is room for."""
    device = target.device
    k = normal(5, 2, 1, 8, dtype=torch.float32, device=device)
    pages = torch.full((3, 2, 1, 8), POISON, device=device)
    table = ids([[0, 1], [-1, 2], [7, 2], [0, 0], [0, 0]], device)
    topology = build_topology(torch.tensor([[-1, 0]] * 5, device=device), ids([2, 2, 2, 99, 2], device))
    lengths = ids([2**31 - 1, 1, 0, -1, 4], device)
    out = kv_append(k, k, pages, pages.clone(), topology, lengths, q=k, page_table=table, backend=target.backend)
    written = (pages != POISON).any(-1).any(-1)
    assert written.tolist() == [[False, False], [False, False], [True, False]]  # the second row of request 1
    assert torch.equal(pages[2, 0], k[1, 1])
    assert (out == 0).flatten(1).all(1).tolist() == [False, False, False, True, False]
    rope = tables(4, 4, device)
    out = kv_append(
        k, k, pages, pages.clone(), topology, lengths, q=k, rope=rope, page_table=table, backend=target.backend
    )
    assert (out == 0).all(-1).flatten(1).tolist() == [[True] * 2, [False] * 2, [False] * 2, [True] * 2, [True] * 2]


def test_offsets_that_fall_do_no_harm(target):
    device = target.device
    plain = trees([[0, 1], [0, 1]], device)
    k = normal(4, 1, 8, dtype=torch.float32, device=device)
    for offsets in ([3, -7, 2], [0, 9, 4], [-(2**31), 2**31 - 1, 0], [5, 5, 5]):
        topology = Topology(*(getattr(plain, name) for name in Topology.__slots__[:7]), offsets=ids(offsets, device))
        pair = caches(k, k, 2, 4)
        kv_append(k, k, *pair, topology, 1, q=k, rope=tables(4, 4, device), backend=target.backend)


def test_nothing(target):
    """No rows, no requests, no nodes, no queries' heads."""
    device = target.device
    for batch, queries in ((0, 3), (3, 0)):
        k = torch.zeros(batch, queries, 2, 8, device=device)
        pair = caches(k, k, batch, 4)
        assert kv_append(k, k, *pair, None, 0, q=k, backend=target.backend).shape == k.shape
        assert all((cache == POISON).all() for cache in pair)
    k = torch.ones(3, 2, 2, 8, device=device)
    pair = caches(k, k, 3, 4)
    empty = Tree.chain(1).to(device)[:0]
    assert (kv_append(k, k, *pair, empty, 1, q=k, backend=target.backend) == 0).all()
    assert all((cache == POISON).all() for cache in pair)
    headless = kv_append(k, k, *pair, None, 1, q=k[:, :, :0], backend=target.backend)
    assert headless.shape == (3, 2, 0, 8) and (pair[0][:, 1:3] == 1).all()


def test_threads_change_nothing(threads):
    """Enough rows for several of them."""
    rows = normal(1, 300, 4, 128, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        threads(count)
        pair = caches(rows, rows, 1, 300)
        out = kv_append(rows, rows, *pair, None, 0, q=rows, rope=tables(300, 64), backend="cpu")
        results.append((*pair, out))
    for others in results[1:]:
        assert all(torch.equal(*both) for both in zip(results[0], others, strict=True))


def test_attention_sees_what_was_appended(target):
    """A draft that grows level by level: appended rows, then attention; against one pass over the whole sequence."""
    device, dim = target.device, 16
    tree = Tree.from_branching((2, 2), root=True)
    nodes, context = len(tree), 5
    rope = Rope(100.0, dim // 2, 32, device=device)
    k, v, q = (normal(1, context + nodes, heads, dim, dtype=torch.float32, device=device) for heads in (1, 1, 2))
    pair = caches(k, v, 1, 16)
    options = {"rope": rope, "backend": target.backend}
    kv_append(k[:, :context], v[:, :context], *pair, None, 0, **options)
    outs = []
    topology = tree.to(device)
    for begin, end in ((0, 1), (1, 3), (3, 7)):
        level = slice(context + begin, context + end)
        turned = kv_append(
            k[:, level], v[:, level], *pair, topology, context, q=q[:, level], query_start=begin, **options
        )
        outs.append(tree_attention(turned, *pair, topology, context, query_start=begin, backend="torch"))
    got = torch.cat(outs, dim=1)[0].double().cpu()
    for path in tree.paths():
        rows = [*range(context), *(context + node for node in path)]
        positions = torch.arange(len(rows))
        one = caches(k.double().cpu(), v.double().cpu(), 1, len(rows))
        sequence = [x[:, rows].double().cpu() for x in (k, v, q)]
        cpu = Rope(100.0, dim // 2, 32)
        turned = kv_append(*sequence[:2], *one, None, 0, q=sequence[2], rope=cpu, positions=positions[None])
        scores = torch.einsum("qhd,kd->hqk", turned[0], one[0][0, :, 0]) * dim**-0.5
        scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
        want = torch.einsum("hqk,kd->qhd", scores.softmax(-1), one[1][0, :, 0])
        torch.testing.assert_close(got[list(path)], want[context:], rtol=1e-5, atol=1e-5)


def test_float64_is_exact():
    append = case(torch.float64, rope=tables(20, 12))
    k, v, q = append.expected(double=True)
    pair = caches(append.k, append.v, 3, 16)
    rope = tuple(table.double() for table in append.options["rope"])
    out = kv_append(
        append.k, append.v, *pair, trees(DEPTHS, "cpu"), ids(append.context_lens), q=append.q, rope=rope,
        query_start=ids(append.query_start),
    )  # fmt: skip
    torch.testing.assert_close(out, q, rtol=1e-13, atol=1e-13)
    for cache, right in zip(pair, (k, v), strict=True):
        for place, want in right.items():
            torch.testing.assert_close(cache[place], want, rtol=1e-13, atol=1e-13)


def test_kv_propagate_turns_as_kv_append_does(target):
    """One Rope for both: rows through an identity are what kv_append stores."""
    if target.backend == "cuda-emulated":
        pytest.skip("its own file runs kv_propagate there")
    device = target.device
    rope, eye = Rope(500.0, 6, 20, device=device), torch.eye(16, device=device)
    rows = normal(4, 16, dtype=torch.float32, device=device)
    positions, slots = ids([3, 19, 0, 20], device), ids([1, 0, 3, 2], device)
    ours, theirs = ([torch.full((1, 4, 1, 16), POISON, device=device) for _ in range(2)] for _ in range(2))
    options = {"rope": rope, "backend": target.backend}
    kv_append(rows[:, None], rows[:, None], *ours, None, None, positions=positions, slots=slots, **options)
    kv_propagate(rows, [(None, eye, eye)], positions, slots, *([cache] for cache in theirs), **options)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert (one[0, 2] == POISON).all()  # position 20 is not in the tables
