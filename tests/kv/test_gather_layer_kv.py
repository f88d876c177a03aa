"""gather_layer_kv: rows of all layers, over backends, dtypes and layouts, against cat, permute and stack."""

import pytest
import torch

from specdec_ops import gather_layer_kv
from specdec_ops._core import loader
from specdec_ops.ops.kv.contract import MAX_LAYERS
from tests.kv.cache_cases import bits, caches, ids, random_bits, scattered

OP = "gather_layer_kv"
INTERPRETED_SHARE = 2
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2),
)


def stacked(pair, slots, requests):
    """Of dense caches, as bits: cat of K and V in each layer, and a stack of all; zeros for what there is not."""
    layers = []
    for k, v in zip(*pair, strict=True):
        k, v = bits(k), bits(v)
        rows = []
        for slot, request in zip(slots, requests, strict=True):
            there = 0 <= request < len(k) and 0 <= slot < k.shape[1]
            row = torch.cat([k[request, slot], v[request, slot]], dim=-1) if there else None
            rows.append(row if there else torch.zeros(k.shape[2], k.shape[3] + v.shape[3], dtype=k.dtype))
        layers.append(torch.stack(rows).permute(1, 0, 2).permute(1, 0, 2).reshape(len(rows), -1))
    return torch.stack(layers, dim=1)


def gather(pair, slots, requests, target, **options):
    device = pair[0][0].device
    requests = None if requests is None else ids(requests, device)
    return gather_layer_kv(*pair, ids(slots, device), requests=requests, backend=target.backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense(dtype, target):
    """Of every dtype, bit by bit; slots and requests that do not exist give zeros."""
    pair = caches(3, (2, 9, 2), dtype, target.device)
    slots, requests = [0, 8, 3, -1, 9, 3, 2**31 - 1, 4, 4], [0, 1, 1, 0, 1, 0, 0, 2, -1]
    got = gather(pair, slots, requests, target)
    assert got.shape == (9, 3, 2 * 2 * 8) and got.dtype == dtype and got.is_contiguous()
    assert torch.equal(bits(got), stacked(pair, slots, requests))


def test_order_within_a_row(target):
    """One kv head after the other, K before V."""
    k = torch.arange(2 * 3.0).view(1, 1, 2, 3).to(target.device)
    got = gather(([k], [100 + k[..., :2]]), [0], None, target)
    assert got.tolist() == [[[0.0, 1.0, 2.0, 100.0, 101.0, 3.0, 4.0, 5.0, 103.0, 104.0]]]


@pytest.mark.parametrize("dims", [(5, 3), (16, 1), (1, 8), (33, 20)], ids=str)
def test_dims_of_their_own(dims, target):
    pair = caches(2, (1, 7, 3), torch.bfloat16, target.device, dims=dims)
    slots = [6, 0, 3, 3]
    assert torch.equal(bits(gather(pair, slots, None, target)), stacked(pair, slots, [0] * 4))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17, 40])
def test_tiles_of_rows(rows, target):
    pair = caches(2, (2, 50, 2), torch.float16, target.device)
    slots, requests = [(7 * row) % 50 for row in range(rows)], [row % 2 for row in range(rows)]
    assert torch.equal(bits(gather(pair, slots, requests, target)), stacked(pair, slots, requests))


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_pages(page_size, target):
    """Of any order; a page that does not exist gives zeros in its layer alone, whose table is its own."""
    dense = caches(2, (3, 11, 2), torch.bfloat16, target.device)
    slots, requests = [0, 10, 4, 5, -1, 2, 999], [2, 0, 1, 1, 0, 3, 0]
    wanted = stacked(dense, slots, requests)
    made = [[scattered(cache, page_size, layer) for layer, cache in enumerate(part)] for part in dense]
    pages, tables = [[pages for pages, _ in part] for part in made], [table for _, table in made[0]]
    assert torch.equal(bits(gather(pages, slots, requests, target, page_table=tables)), wanted)
    tables[1] = tables[1].clone()
    tables[1][1, 4 // page_size] = -1
    wanted[2, 1] = 0
    wanted[3, 1] = 0 if 5 // page_size == 4 // page_size else wanted[3, 1]
    assert torch.equal(bits(gather(pages, slots, requests, target, page_table=tables)), wanted)
    tables[1][1, 4 // page_size] = 2**31 - 1
    assert torch.equal(bits(gather(pages, slots, requests, target, page_table=tables)), wanted)


def test_more_slots_than_32_bits_count(target):
    """Four pages of 2^30 slots each, all of which are one row in memory."""
    rows = random_bits((2, 2, 1, 2, 8), torch.float32, 5, target.device)
    pair = [[part.expand(2, 2**30, 2, 8)] for part in rows]
    table, slots = ids([[1, 0, 0, 1]], target.device), [0, 2**30, 2**31 - 1, -(2**31)]
    wanted = stacked([[part[[1, 0, 0], 0][None]] for part in rows], [0, 1, 2, -1], [0] * 4)
    assert torch.equal(bits(gather(pair, slots, None, target, page_table=table)), wanted)


def test_one_table_and_layers_in_one_tensor(target):
    device = target.device
    k, v = (random_bits((4, 6, 4, 2, 8), torch.float16, seed, device) for seed in (0, 1))
    table = ids([[5, 0, 2], [1, 1, 3]], device)
    slots, requests = [0, 11, 5, 6, 12], [0, 1, 1, 0, 0]
    dense = [[part[layer][table.long()].flatten(1, 2) for layer in range(4)] for part in (k, v)]
    wanted = stacked(dense, slots, requests)
    for pair in ((k, v), (list(k), list(v)), (k, list(v))):
        assert torch.equal(bits(gather(pair, slots, requests, target, page_table=table)), wanted)


def test_dense_and_paged_layers(target):
    dense = caches(2, (2, 8, 1), torch.float32, target.device)
    slots, requests = [3, 7, 0], [1, 0, 1]
    wanted = stacked(dense, slots, requests)
    (k, table), (v, _) = (scattered(part[1], 4) for part in dense)
    pair = [dense[0][0], k], [dense[1][0], v]
    assert torch.equal(bits(gather(pair, slots, requests, target, page_table=[None, table])), wanted)


@pytest.mark.parametrize("count", [MAX_LAYERS + 1, 70])
@pytest.mark.parametrize("as_one", [False, True])
def test_more_layers_than_a_launch_has(count, as_one, target):
    pair = caches(count, (1, 4, 1), torch.int8, target.device, dims=(2, 4))
    wanted = stacked(pair, [3, 0], [0, 0])
    pair = [torch.stack(part) for part in pair] if as_one else pair
    assert torch.equal(bits(gather(pair, [3, 0], None, target)), wanted)


def test_strided_caches_and_out(target):
    """Heads before slots, parts of longer rows; into rows that are apart, between which nothing is written."""
    stored = [random_bits((2, 3, 12, 20), torch.bfloat16, seed, target.device) for seed in (0, 1)]
    pair = [[cache[..., 2:10].transpose(1, 2)] for cache in stored]
    slots, requests = [3, 11, 0, -1], [0, 1, 1, 0]
    room = random_bits((4, 2, 48), torch.bfloat16, 2, target.device)
    before = bits(room)
    got = gather(pair, slots, requests, target, out=room[:, 1:])
    assert got.data_ptr() == room[:, 1:].data_ptr()
    assert torch.equal(bits(room)[:, 1:], stacked(pair, slots, requests))
    assert torch.equal(bits(room)[:, :1], before[:, :1])


def test_a_row_depends_on_its_slot_alone(target):
    """Not on what other slots hold."""
    pair = caches(2, (2, 9, 2), torch.float32, target.device)
    alone = bits(gather(pair, [4], [1], target))
    for part in pair:
        for cache in part:
            cache[0] = float("nan")
            cache[1, :4] = float("inf")
    assert torch.equal(bits(gather(pair, [2, 4, 8], [1, 1, 0], target))[1:2], alone)


def test_empty(target):
    pair = caches(2, (2, 9, 2), torch.float32, target.device)
    assert gather(pair, [], None, target).shape == (0, 2, 32)
    nothing = caches(2, (2, 0, 2), torch.float32, target.device)
    assert (bits(gather(nothing, [0, 1], None, target)) == 0).all()
    table = ids([[], []], target.device)
    assert (bits(gather(pair, [0, 1], None, target, page_table=table)) == 0).all()


def test_threads(threads):
    """The CPU kernel with as much to read as several threads share."""
    if (reason := loader.load()[1]) is not None:
        pytest.skip(reason)
    pair = caches(3, (1, 90, 8), torch.bfloat16, "cpu", dims=(64, 64))
    slots = list(range(89, -1, -1))
    wanted = stacked(pair, slots, [0] * 90)
    for count in (1, 2, 3, 8):
        threads(count)
        assert torch.equal(bits(gather_layer_kv(*pair, ids(slots), backend="cpu")), wanted)


K, V = caches(2, (2, 8, 2), torch.float32, "cpu")
SLOTS = ids([3, 1, 0])


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"k_caches": [K[0], K[1].half()]}, TypeError, "k_caches[1] must be of k_caches[0]'s dtype float32, got float"),
        ({"v_caches": [V[0], V[1].int()]}, TypeError, "v_caches[1] must be of k_caches[0]'s dtype float32, got int32"),
        ({"v_caches": [V[0], V[1][..., :4]]}, ValueError, "v_caches[1] must be of 2 kv_heads and a dim of 8, as all l"),
        ({"slots": SLOTS.float()}, TypeError, "slots must be int32 or int64 [rows], got float32 [3]"),
        ({"slots": SLOTS[None]}, ValueError, "slots must be int32 or int64 [rows], got int32 [1, 3]"),
        ({"requests": SLOTS[:2]}, ValueError, "requests must be int32 or int64 [3], got int32 [2]"),
        ({"requests": 0}, TypeError, "requests must be int32 or int64 [3], got 0"),
        ({"out": torch.zeros(3, 2, 31)}, ValueError, "out must be float32 [3, 2, 32], got float32 [3, 2, 31]"),
        ({"out": torch.zeros(3, 2, 32).half()}, TypeError, "out must be float32 [3, 2, 32], got float16 [3, 2, 32]"),
        ({"out": torch.zeros(3, 32, 2).mT}, ValueError, "out must be contiguous but for its rows, got float32 [3, 2, "),
        ({"out": torch.zeros(3, 2, 32, device="meta")}, ValueError, "out must be on cpu, got a tensor on meta"),
    ],
    ids=str,
)
def test_errors(changed, kind, message):
    with pytest.raises(kind) as raised:
        gather_layer_kv(**{"k_caches": K, "v_caches": V, "slots": SLOTS, **changed})
    assert str(raised.value).startswith("specdec_ops.gather_layer_kv: ") and message in str(raised.value)


def test_compiles_without_a_break():
    torch._dynamo.reset()
    pair = torch.stack(K), torch.stack(V)
    compiled = torch.compile(lambda k, v, s: gather_layer_kv(k, v, s) * 2, fullgraph=True, backend="aot_eager")
    for given in (pair, (K, V)):
        assert torch.equal(bits(compiled(*given, SLOTS)), bits(gather_layer_kv(K, V, SLOTS) * 2))


def test_opcheck():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    numbers = [[torch.ones(2, 8, 2, 4) * layer for layer in range(2)] for _ in "kv"]
    arguments = (SLOTS, None, [], [-1, -1], *numbers, "auto")
    torch.library.opcheck(torch.ops.specdec_ops.gather_layer_kv.default, arguments, test_utils=checks)
    out = {"out": torch.zeros(3, 2, 16)}
    torch.library.opcheck(torch.ops.specdec_ops.gather_layer_kv.out, arguments, out, test_utils=checks)
