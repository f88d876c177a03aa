"""kv_commit: accepted rows, in place, over backends, dtypes and layouts, against index_select and cat."""

import pytest
import torch

from specdec_ops import Tree, greedy_accept, kv_commit, tree_attention
from specdec_ops._core import dispatch, loader
from specdec_ops.ops.kv import contract
from tests.kv.cache_cases import (
    bits,
    caches,
    committed,
    equal,
    gathered,
    ids,
    random_bits,
    random_path,
    scattered,
)

OP = "kv_commit"
INTERPRETED_SHARE = 2
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
)
PATHS = {
    "one gap": [0, 2, 3],
    "every second": [0, 2, 4, 6],
    "all stay": [0, 1, 2, 3],
    "the first is dropped": [1, 2, 3, 7],
    "the last only": [7],
    "stay, then move": [0, 1, 5],
    "neighbours": [3, 4, 5, 6, 7],
}


def padded(paths, steps=6):
    return [path + [-1] * (steps - len(path)) for path in paths]


def check(pair, nodes, context_lens, target, **options):
    """Of dense caches: every bit is where the naive code puts it."""
    wanted = [[committed(cache, nodes, context_lens) for cache in part] for part in pair]
    device = pair[0][0].device
    kv_commit(*pair, ids(nodes, device), ids(context_lens, device), backend=target.backend, **options)
    for part, parts in zip(pair, wanted, strict=True):
        assert all(equal(cache, want) for cache, want in zip(part, parts, strict=True))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths(path, target):
    pair = caches(2, (2, 14, 2), torch.float32, target.device)
    check(pair, padded([path, [-1]]), [3, 5], target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_moved(dtype, target):
    """Of every dtype, NaN's payload too. Bools are bytes of any content here as well."""
    pair = caches(1, (2, 12, 3), dtype, target.device, dims=(8, 5))
    check(pair, padded([[0, 2, 5], [1, 3]]), [3, 0], target)


def test_k_and_v_of_different_dtypes(target):
    k, v = random_bits((1, 9, 2, 4), torch.float8_e4m3fn, 0), random_bits((1, 9, 2, 6), torch.bfloat16, 1)
    check(([k.to(target.device)], [v.to(target.device)]), [[0, 2, 3]], [2], target)


@pytest.mark.parametrize("seed", range(4))
def test_random_paths_of_ragged_requests(seed, target):
    batch, nodes, slots = 5, 9, 30
    context_lens = [(7 * request + 5 * seed) % (slots - nodes) for request in range(batch)]
    paths = [random_path(nodes, 5, 31 * seed + request) for request in range(batch)]
    check(caches(2, (batch, slots, 2), torch.bfloat16, target.device, seed), paths, context_lens, target)


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("seed", range(2))
def test_pages(page_size, seed, target):
    """Paths that cross pages, in tables of any order; what no request has keeps its bits."""
    batch, nodes, slots = 3, 8, 21
    dense = caches(2, (batch, slots, 2), torch.float16, target.device, seed)
    context_lens = [2, 7, 13]
    paths = [random_path(nodes, 5, 17 * seed + request) for request in range(batch)]
    wanted = [[committed(cache, paths, context_lens) for cache in part] for part in dense]
    made = [[scattered(cache, page_size, seed) for cache in part] for part in dense]
    pages, table = [[each[0] for each in part] for part in made], made[0][0][1]
    before = [[bits(cache) for cache in part] for part in pages]
    kv_commit(
        *pages, ids(paths, target.device), ids(context_lens, target.device), page_table=table, backend=target.backend
    )
    unused = [page for page in range(len(before[0][0])) if page not in table.flatten().tolist()]
    assert unused
    for part, parts, old in zip(pages, wanted, before, strict=True):
        for cache, want, was in zip(part, parts, old, strict=True):
            assert torch.equal(gathered(cache, table, slots), want)
            assert torch.equal(bits(cache)[unused], was[unused])


def test_layers_of_their_own_sizes_and_tables(target):
    """Dense and paged layers in one call, with their own heads, dims, slots, page sizes and tables."""
    device, paths, context_lens = target.device, padded([[0, 2, 3], [1, 4], [-1]]), [5, 2, 9]
    shapes = [((3, 20, 2), (8, 8), None), ((3, 16, 1), (5, 3), 4), ((3, 24, 4), (4, 16), None), ((3, 20, 2), (8, 2), 3)]
    dense = [
        caches(1, shape, torch.bfloat16, device, 10 * index, dims) for index, (shape, dims, _) in enumerate(shapes)
    ]
    wanted = [[committed(part[0], paths, context_lens) for part in layer] for layer in dense]
    k_caches, v_caches, tables = [], [], []
    for index, ((k,), (v,)) in enumerate(dense):
        page_size, table = shapes[index][2], None
        if page_size is not None:
            (k, table), (v, _) = scattered(k, page_size, index), scattered(v, page_size, index)
        k_caches.append(k), v_caches.append(v), tables.append(table)
    nodes = ids(paths, device), ids(context_lens, device)
    kv_commit(k_caches, v_caches, *nodes, page_table=tables, backend=target.backend)
    for index, want in enumerate(wanted):
        for cache, right in zip((k_caches[index], v_caches[index]), want, strict=True):
            got = bits(cache) if tables[index] is None else gathered(cache, tables[index], right.shape[1])
            assert torch.equal(got, right), index


def test_layers_in_one_tensor(target):
    """The same result as in lists; also as parts of a larger tensor, [layers, 2, ...], and with a table for each."""
    device, paths, context_lens = (
        target.device,
        ids(padded([[0, 3, 4], [2]]), target.device),
        ids([4, 0], target.device),
    )
    store = random_bits((3, 2, 2, 15, 2, 8), torch.float16, 3, device)
    k, v = store[:, 0], store[:, 1]
    wanted = [[committed(cache, paths.tolist(), [4, 0]) for cache in part] for part in (k, v)]
    lists = [list(part.clone()) for part in (k, v)]
    mixed = [k.clone(), list(v.clone())]
    for pair in ([k, v], lists, mixed):
        kv_commit(*pair, paths, context_lens, backend=target.backend)
        for part, parts in zip(pair, wanted, strict=True):
            assert all(equal(cache, want) for cache, want in zip(part, parts, strict=True))
    pages = [random_bits((3, 6, 4, 2, 8), torch.float16, seed, device) for seed in (4, 5)]
    tables = [ids([[layer, 5], [3, 4]], device) for layer in range(3)]
    each = [[cache.clone() for cache in part] for part in pages]
    nodes = ids([[1, 5], [0, 2]], device), ids([1, 2], device)
    kv_commit(*pages, *nodes, page_table=tables, backend=target.backend)
    for layer in range(3):
        one = [[part[layer]] for part in each]
        kv_commit(*one, *nodes, page_table=tables[layer], backend="torch")
        assert all(equal(part[layer], bits(own[0])) for part, own in zip(pages, one, strict=True))


@pytest.mark.parametrize("count", [contract.MAX_LAYERS, contract.MAX_LAYERS + 1, 70])
@pytest.mark.parametrize("stacked", [False, True])
def test_more_layers_than_a_launch_has(count, stacked, target):
    pair = caches(count, (1, 6, 1), torch.int8, target.device, dims=(2, 4))
    if stacked:
        pair = tuple(torch.stack(part) for part in pair)
    check(pair, [[0, 2, 3]], [1], target)


def test_heads_before_slots(target):
    """As Hugging Face's caches lie, [batch, kv_heads, slots, dim]; and rows that are parts of longer ones."""
    stored = [random_bits((2, 3, 12, 20), torch.bfloat16, seed, target.device) for seed in (0, 1)]
    pair = [[cache[..., 2:10].transpose(1, 2)] for cache in stored]
    before = [bits(cache) for cache in stored]
    check(pair, padded([[0, 3, 5], [2, 4]]), [4, 1], target)
    for cache, was in zip(stored, before, strict=True):
        assert torch.equal(bits(cache)[..., :2], was[..., :2]) and torch.equal(bits(cache)[..., 10:], was[..., 10:])


MALFORMED = {
    "descends": [0, 3, 2, 4],
    "repeats": [0, 2, 2, 3],
    "below its rank": [3, 0, 1, 2],
    "beyond the cache": [0, 2, 9, 10],
    "far beyond": [0, 2, 2**31 - 1, 3],
    "negative": [0, 2, -7, 4],
    "the least": [2, -(2**31), 5, 6],
}


@pytest.mark.parametrize("path", MALFORMED.values(), ids=MALFORMED)
def test_malformed_paths_do_no_harm(path, target):
    """That move and what follows is skipped; the other request is not concerned."""
    check(caches(1, (2, 12, 2), torch.float32, target.device), [path, [0, 2, 4, -1]], [3, 1], target)


@pytest.mark.parametrize("start", [-1, -(2**31), 11, 12, 2**31 - 1])
def test_contexts_that_do_not_fit(start, target):
    check(caches(1, (2, 12, 2), torch.float32, target.device), [[0, 2, 3], [1, 2, 4]], [start, 2], target)


@pytest.mark.parametrize("page", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", ["from", "to"])
def test_pages_that_do_not_exist(page, place, target):
    """In one of two layers: there the path ends before the row that is not there, or has nowhere to go."""
    device = target.device
    pages = caches(2, (5, 2, 1), torch.float32, device)
    table = [[0, 1, 2, 3]]
    other = [row.copy() for row in table]
    # Nodes 1, 3 and 5 of a request with one slot before them: rows 2, 4 and 6 go to 1, 2 and 3.
    other[0][3 if place == "from" else 0] = page
    moved = [(2, 1), (4, 2)] if place == "from" else []
    wanted = [[bits(cache) for cache in part] for part in pages]
    for part in wanted:
        for layer, moves in enumerate(([(2, 1), (4, 2), (6, 3)], moved)):
            flat = part[layer].view(10, 1, -1)
            for source, to in moves:
                flat[to] = flat[source].clone()
    tables = [ids(table, device), ids(other, device)]
    kv_commit(*pages, ids([[1, 3, 5]], device), ids([1], device), page_table=tables, backend=target.backend)
    for part, parts in zip(pages, wanted, strict=True):
        assert all(equal(cache, want) for cache, want in zip(part, parts, strict=True))


def test_pages_of_rows_that_stay_are_not_looked_at(target):
    """A window's table may have -1 for what it has dropped, and for rows that need not move."""
    pages = caches(1, (3, 2, 1), torch.float32, target.device)
    table = ids([[-1, -1, 1, 2]], target.device)
    kv_commit(
        *pages, ids([[0, 1, 3]], target.device), ids([2], target.device), page_table=table, backend=target.backend
    )
    fresh = caches(1, (3, 2, 1), torch.float32, "cpu")
    for part, was in zip(pages, fresh, strict=True):
        want = bits(was[0])
        want[1, 0] = want[1, 1].clone()  # node 3, slot 5 to slot 4
        assert equal(part[0], want)


@pytest.mark.filterwarnings("ignore:Use of index_put_ on expanded tensors")
def test_more_slots_than_32_bits_count(target):
    """A table of four pages of 2^30 slots; a context near 2^31, whose nodes lie behind it, in a page of a few rows."""
    device = target.device
    store = [random_bits((1, 6, 1, 4), torch.float32, seed, device) for seed in (0, 1)]
    # Slots of a page are 0 elements apart, but for the way from page to page: each page is one row.
    pair = [[part.as_strided((6, 2**30, 1, 4), (4, 0, 4, 1))] for part in store]
    before = [bits(part) for part in store]
    table = ids([[0, 1, 2, 3]], device)
    nodes = ids([[2**30, 2**31 - 2]], device)  # from 2^31 - 1: slots 3 * 2^30 - 1, in page 2, and 2^32 - 3, in page 3
    # The implementation itself: the public op refuses caches that overlap themselves.
    arguments = contract.KvCommitArguments(nodes, ids([2**31 - 1], device), [table], [0], None)
    dispatch.resolve("kv_commit", target.backend, pair[0][0])(arguments, contract.KvCommitOutputs(*pair))
    for part, was in zip(store, before, strict=True):
        want = was.clone()
        want[0, 1], want[0, 2] = was[0, 2], was[0, 3]  # ranks 0 and 1: slots 2^31 - 1 and 2^31, of pages 1 and 2
        assert equal(part, want)


def ring_table(batch, ring_pages, max_pages, device):
    """Pages that repeat: slot j of request b lies at j % ring of its ring."""
    columns = torch.arange(max_pages, device=device) % ring_pages
    return (torch.arange(batch, device=device)[:, None] * ring_pages + columns).int()


def test_a_ring_is_pages_that_repeat(target):
    """A dense ring [batch, ring, ...] of a sliding layer, seen as pages, equals a cache that keeps everything."""
    device, batch, ring, page_size, steps, slots = target.device, 2, 16, 4, 6, 64
    whole = caches(1, (batch, slots, 2), torch.float32, device)
    rings = [torch.zeros(batch, ring, *part[0].shape[2:], device=device) for part in whole]
    pages = [[cache.view(batch * ring // page_size, page_size, *cache.shape[2:])] for cache in rings]
    table = ring_table(batch, ring // page_size, slots // page_size, device)
    lengths = [3, 9]
    for part, cache in zip(whole, rings, strict=True):
        for request, length in enumerate(lengths):
            cache[request, :length] = part[0][request, :length]
    for step in range(8):
        paths = [random_path(7, steps, 5 * step + request) for request in range(batch)]
        for request, start in enumerate(lengths):
            for part, cache in zip(whole, rings, strict=True):  # the tree's rows come into both
                for slot in range(start, start + 7):
                    cache[request, slot % ring] = part[0][request, slot]
        nodes = ids(paths, device), ids(lengths, device)
        kv_commit(*whole, *nodes, backend="torch")
        kv_commit(*pages, *nodes, page_table=table, backend=target.backend)
        lengths = [start + sum(node >= 0 for node in path) for start, path in zip(lengths, paths, strict=True)]
        for request, length in enumerate(lengths):
            for slot in range(max(0, length - 9), length):  # what a window of 9 sees
                for part, cache in zip(whole, rings, strict=True):
                    got, want = cache[request, slot % ring], part[0][request, slot]
                    assert torch.equal(bits(got), bits(want)), (step, request, slot)
    assert min(lengths) > ring, "the rings have turned"


def test_copies_keep_shared_pages(target):
    """Requests 0 and 1 share pages 0 and 1. Each gets a page of its own to write to, and page 1 stays as it was."""
    device = target.device
    pages = caches(2, (6, 4, 2), torch.bfloat16, device)
    before = [[bits(cache) for cache in part] for part in pages]
    table = ids(
        [[0, 2, 3], [0, 4, 5]], device
    )  # both were [0, 1, ...]; 5 slots of context, so page 1 is half of a tree
    copies = ids([[1, 2], [1, 4]], device)
    kv_commit(
        *pages, ids([[0, 2], [1, 2]], device), ids([5, 5], device), page_table=table, copies=copies,
        backend=target.backend,
    )  # fmt: skip
    for part, old in zip(pages, before, strict=True):
        for cache, was in zip(part, old, strict=True):
            now = bits(cache)
            assert torch.equal(now[[0, 1, 3, 5]], was[[0, 1, 3, 5]])
            # Slot 5 is the second of page 1, and node 0. Request 0 moves node 2 to rank 1, request 1 nodes 1 and 2.
            want = was[1].clone()
            want[2] = was[1, 3]
            assert torch.equal(now[2], want)
            want = was[1].clone()
            want[1], want[2] = was[1, 2], was[1, 3]
            assert torch.equal(now[4], want)


def test_copies_alone_and_in_their_order(target):
    """Without nodes, before an append. A copy sees what the one before it has made; -1 and the like are skipped."""
    device = target.device
    pages = caches(3, (6, 3, 2), torch.float16, device, dims=(8, 3))
    wanted = [[bits(cache) for cache in part] for part in pages]
    for part in wanted:
        for cache in part:
            cache[2], cache[3], cache[5] = cache[0].clone(), cache[0].clone(), cache[1].clone()
    copies = [[0, 2], [-1, 1], [2, 3], [1, -1], [6, 0], [0, 6], [1, 5], [4, 4], [-(2**31), 2**31 - 1]]
    kv_commit(*pages, None, None, copies=ids(copies, device), backend=target.backend)
    for part, parts in zip(pages, wanted, strict=True):
        assert all(equal(cache, want) for cache, want in zip(part, parts, strict=True))


def test_copies_leave_dense_layers_alone(target):
    """And a layer that has fewer pages takes those that it has."""
    device = target.device
    shapes = ((2, 6, 1), (5, 3, 1), (3, 3, 1))
    layers = [caches(1, shape, torch.int8, device, 7 * index) for index, shape in enumerate(shapes)]
    k, v = ([layer[part][0] for layer in layers] for part in range(2))
    wanted = [[bits(cache) for cache in part] for part in (k, v)]
    tables = [None, ids([[0, 1], [2, 3]], device), ids([[0, 1], [2, 2]], device)]
    for part in wanted:
        part[1][4], part[1][1] = part[1][0].clone(), part[1][3].clone()
    kv_commit(
        k, v, ids([[0], [0]], device), 2, page_table=tables, copies=ids([[0, 4], [3, 1]], device),
        backend=target.backend,
    )  # fmt: skip
    for part, parts in zip((k, v), wanted, strict=True):
        assert all(equal(cache, want) for cache, want in zip(part, parts, strict=True))


def test_a_permuted_batch_permutes_the_result(target):
    device, order = target.device, [2, 0, 3, 1]
    pair = caches(1, (4, 15, 2), torch.float32, device)
    paths, lengths = ids([random_path(6, 4, request) for request in range(4)], device), ids([1, 8, 3, 5], device)
    permuted = [[part[0][order].clone()] for part in pair]
    kv_commit(*pair, paths, lengths, backend=target.backend)
    kv_commit(*permuted, paths[order], lengths[order], backend=target.backend)
    for part, other in zip(pair, permuted, strict=True):
        assert equal(other[0], bits(part[0])[order])


def test_nothing_to_do(target):
    """No requests, no steps, no copies, no slots."""
    device = target.device
    for batch, steps, slots in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        pair = caches(1, (batch, slots, 1), torch.float32, device)
        before = bits(pair[0][0])
        nodes = torch.zeros(batch, steps, dtype=torch.int32, device=device)
        kv_commit(*pair, nodes, 0, backend=target.backend)
        assert equal(pair[0][0], before)
    pages = caches(1, (3, 2, 1), torch.float32, device)
    before = bits(pages[0][0])
    kv_commit(*pages, None, None, copies=ids([], device).view(0, 2), backend=target.backend)
    kv_commit(*pages, ids([[0, 2]], device), 0, page_table=ids([[]], device), backend=target.backend)
    assert equal(pages[0][0], before)


def test_lengths_of_all_requests_at_once(target):
    device, paths = target.device, [[0, 2, -1], [1, 2, 3]]
    wanted = [committed(part[0], paths, [4, 4]) for part in caches(1, (2, 12, 1), torch.float32, "cpu")]
    for lengths in (
        4,
        torch.tensor(4, device=device),
        torch.tensor([4, 4], device=device),
        ids([4, 9, 4], device)[::2],
    ):
        pair = caches(1, (2, 12, 1), torch.float32, device)
        kv_commit(*pair, torch.tensor(paths, device=device), lengths, backend=target.backend)
        assert all(equal(part[0], want) for part, want in zip(pair, wanted, strict=True))


def test_threads_and_large_rows(threads):
    """The CPU kernel with as much to move as several threads share."""
    if (reason := loader.load()[1]) is not None:
        pytest.skip(reason)
    paths, lengths = [[0, 2, 3, 7], [1, 2, 5, 6], [-1] * 4], [40, 3, 17]
    wanted = [
        committed(part[0], paths, lengths) for part in caches(1, (3, 60, 8), torch.float32, "cpu", dims=(128, 128))
    ]
    for count in (1, 2, 3, 8):
        threads(count)
        pair = caches(1, (3, 60, 8), torch.float32, "cpu", dims=(128, 128))
        pair = [part * 6 for part in pair]
        pair = [[cache.clone() for cache in part] for part in pair]
        kv_commit(*pair, ids(paths), ids(lengths), backend="cpu")
        assert all(equal(cache, want) for part, want in zip(pair, wanted, strict=True) for cache in part)


def test_after_an_acceptance(target):
    """Attention over the committed cache is attention over the accepted path alone."""
    device, context = target.device, 9
    tree = Tree.from_branching((2, 2), root=True)  # nodes 0; 1, 2; 3, 4, 5, 6
    draft = ids([[0, 11, 12, 13, 14, 15, 16]], device)
    target_ids = ids([[12, 0, 16, 0, 0, 0, 5]], device)  # 0 -> node 2 -> node 6 -> 5
    accepted = greedy_accept(target_ids, draft, tree.to(device))
    assert accepted.nodes.tolist() == [[0, 2, 6, -1, -1, -1, -1]]
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 24, 2, 64, generator=generator).to(device) for _ in range(2))
    q = torch.randn(1, 1, 4, 64, generator=generator).to(device)
    rows = [*range(context), context, context + 2, context + 6]
    lengths = ids([len(rows)], device)
    wanted = tree_attention(q, k[:, rows].contiguous(), v[:, rows].contiguous(), None, lengths, backend="torch")
    kv_commit([k], [v], accepted.nodes, ids([context], device), backend=target.backend)
    for cache in (k, v):
        cache[:, len(rows) :] = float("nan")
    got = tree_attention(q, k, v, None, ids([context], device) + accepted.num_accepted + 1, backend="torch")
    assert torch.equal(got, wanted)
