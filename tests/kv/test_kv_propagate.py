"""kv_propagate: keys and values of skipped layers, over backends, layouts and rotations."""

import itertools

import pytest
import torch

from specdec_ops import kv_propagate
from specdec_ops._core import loader
from specdec_ops.ops.kv import reference_kv_propagate as definition
from tests.harness.close import assert_as_good_as_torch

OP = "kv_propagate"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
LAYERS, DIM, KV_HEADS, HEAD_DIM = 3, 48, 2, 16
POISON = 7.5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def weights(dtype, device, *, norm=True):
    """Layers that differ."""
    width = KV_HEADS * HEAD_DIM
    return [
        (
            (1 + 0.3 * normal(DIM, seed=10 * layer)).to(device, dtype) if norm else None,
            (normal(width, DIM, seed=10 * layer + 1) / DIM**0.5).to(device, dtype),
            (normal(width, DIM, seed=10 * layer + 2) / DIM**0.5).to(device, dtype),
        )
        for layer in range(LAYERS)
    ]


def caches(dtype, device, *leading):
    return [torch.full((*leading, KV_HEADS, HEAD_DIM), POISON, dtype=dtype, device=device) for _ in range(LAYERS)]


def ids(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def by_hand(hidden, layer, position, theta, interleaved):
    """One row in complex numbers: each rotated pair is multiplied by e^(i angle). float64, or the dtype of the row.

    As engines do: the norm at least in float32, products in the row's dtype.
    """
    norm, k_weight, v_weight = layer
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean() + 1e-6) * norm.to(x.dtype)
    x = x.to(hidden.dtype)
    k, v = (weight @ x for weight in (k_weight, v_weight))
    k = k.double().view(KV_HEADS, HEAD_DIM)
    if theta is not None:
        pairs = k.view(KV_HEADS, -1, 2) if interleaved else k.view(KV_HEADS, 2, -1).transpose(1, 2)
        turn = torch.polar(
            torch.ones(HEAD_DIM // 2, dtype=torch.float64),
            position / theta ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM),
        )
        pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        k = (pairs if interleaved else pairs.transpose(1, 2)).reshape(KV_HEADS, HEAD_DIM)
    return k.to(hidden.dtype), v.view(KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_dense(target, dtype, interleaved, norm):
    """Every row against complex arithmetic in float64; slots that no row names stay as they are."""
    positions, slots = [5, 0, 1000, 31], [3, 0, 6, 4]
    layers = weights(dtype, target.device, norm=norm)
    hidden = (3 * normal(4, DIM)).to(target.device, dtype)
    k_caches, v_caches = caches(dtype, target.device, 1, 8), caches(dtype, target.device, 1, 8)
    places = ids(positions, target.device), ids(slots, target.device)
    kv_propagate(
        hidden, layers, *places, k_caches, v_caches, rope=500.0, interleaved=interleaved, backend=target.backend
    )
    for layer in range(LAYERS):
        exact_layer = tuple(None if w is None else w.double().cpu() for w in layers[layer])
        plain_layer = tuple(None if w is None else w.cpu() for w in layers[layer])
        for got, part in ((k_caches[layer], 0), (v_caches[layer], 1)):
            rows = [(hidden[i].cpu(), positions[i], 500.0, interleaved) for i in range(4)]
            exact = torch.stack([by_hand(x.double(), exact_layer, *rest)[part] for x, *rest in rows])
            plain = torch.stack([by_hand(x, plain_layer, *rest)[part] for x, *rest in rows])
            assert_as_good_as_torch(got[0, slots], exact, plain, what=f"layer {layer}, {'kv'[part]}")
            untouched = [slot for slot in range(8) if slot not in slots]
            assert (got[0, untouched] == POISON).all()


def test_every_instruction_set(isa):
    """Of the CPU kernel, with few rows and with many."""
    for dtype, rows in itertools.product(DTYPES, (1, 13, 66)):
        hidden, layers = normal(rows, DIM).to(dtype), weights(dtype, "cpu")
        places = ids(list(range(rows)), "cpu"), ids(list(reversed(range(rows))), "cpu")
        pairs = [[caches(kind, "cpu", 1, rows) for _ in range(2)] for kind in (dtype, dtype, torch.float64)]
        for pair, backend in zip(pairs, ("cpu", "torch", "torch"), strict=True):
            exact = pair is pairs[2]
            given = [tuple(w.double() for w in layer) for layer in layers] if exact else layers
            kv_propagate(hidden.double() if exact else hidden, given, *places, *pair, rope=1e4, backend=backend)
        for got, plain, right in zip(*(pair[0] + pair[1] for pair in pairs), strict=True):
            assert_as_good_as_torch(got, right, plain, slack=4)  # engines round what they multiply


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest(dtype):
    """By the CPU kernel: products of two numbers, exact in float32, from subnormal to infinite."""
    if (reason := loader.load()[1]) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-13, 10, (900, 1), generator=generator)
    hidden = torch.ldexp(torch.randn(900, 1, generator=generator), exponents).to(dtype)
    weight = torch.ldexp(torch.randn(8, 1, generator=generator), torch.arange(-8, 8, 2)[:, None]).to(dtype)
    hidden[:3, 0] = torch.tensor([float("inf"), float("nan"), 0.0])
    pair = [[torch.zeros(1, 900, 8, 1, dtype=dtype)] for _ in range(2)]
    rows = ids(list(range(900)), "cpu")
    kv_propagate(hidden, [(None, weight, weight)], rows, rows, *pair, rope=None, backend="cpu")
    for cache in pair:
        want = (hidden.float() * weight[:, 0].float()).to(dtype)
        assert torch.equal(cache[0][0, :, :, 0].nan_to_num(7.0), want.nan_to_num(7.0))


def test_float64_is_exact():
    layers, hidden = weights(torch.float64, "cpu"), normal(2, DIM)
    k_caches, v_caches = caches(torch.float64, "cpu", 1, 4), caches(torch.float64, "cpu", 1, 4)
    kv_propagate(hidden, layers, ids([9, 2], "cpu"), ids([1, 3], "cpu"), k_caches, v_caches, rope=1e4)
    for layer in range(LAYERS):
        for row, position, slot in ((0, 9, 1), (1, 2, 3)):
            k, v = by_hand(hidden[row], layers[layer], position, 1e4, False)
            torch.testing.assert_close(k_caches[layer][0, slot], k, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(v_caches[layer][0, slot], v, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_paged_ragged_rows_equal_dense_ones(target, page_size):
    """Rows of three requests in no order, with padding and rows that have no place."""
    requests = ids([2, 0, 2, 1, 0, 0, 3, 1, 1, -1], target.device)
    slots = ids([0, 5, 7, 2, -1, 8, 0, 1, -5, 1], target.device)  # the 5th, 6th, 7th, 9th and 10th have no place
    positions = ids(list(range(10)), target.device)
    hidden = normal(10, DIM).float().to(target.device)
    layers = weights(torch.float32, target.device)
    dense = [caches(torch.float32, target.device, 3, 8) for _ in range(2)]
    options = {"rope": 1e4, "requests": requests, "backend": target.backend}
    kv_propagate(hidden, layers, positions, slots, *dense, **options)

    pages_each = -(-8 // page_size)
    order = torch.randperm(3 * pages_each, generator=torch.Generator().manual_seed(0)) + 1
    table = order.to(target.device, torch.int32).view(3, pages_each)
    paged = [caches(torch.float32, target.device, 3 * pages_each + 2, page_size) for _ in range(2)]
    slots[5] = -1  # a slot of the last page, if 8 is no multiple of page_size
    kv_propagate(hidden, layers, positions, slots, *paged, page_table=table, **options)
    for flat, pages in zip(dense[0] + dense[1], paged[0] + paged[1], strict=True):
        assert (flat != POISON).any(-1).any(-1).sum() == 5
        gathered = pages[table.long()].flatten(1, 2)[:, :8]
        torch.testing.assert_close(gathered, flat, rtol=1e-5, atol=1e-6)
        assert (pages[[0, -1]] == POISON).all()


def test_pages_that_do_not_exist_are_not_written(target):
    hidden, layers = normal(3, DIM).float().to(target.device), weights(torch.float32, target.device)
    paged = [caches(torch.float32, target.device, 2, 4) for _ in range(2)]
    table = ids([[-1, 7, 1]], target.device)
    places = ids([0, 1, 2], target.device), ids([0, 4, 8], target.device)
    kv_propagate(hidden, layers, *places, *paged, rope=None, page_table=table, backend=target.backend)
    for cache in paged[0] + paged[1]:
        assert (cache != POISON).any(-1).any(-1).nonzero().tolist() == [[1, 0]]


def test_tables_equal_a_base(target):
    """Full tables are the same as theta; half of the pairs leave the rest of each head alone."""
    hidden, layers = normal(3, DIM).float().to(target.device), weights(torch.float32, target.device)
    places = ids([4, 0, 9], target.device), ids([0, 1, 2], target.device)
    angles = torch.arange(10)[:, None] * 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    tables = angles.cos().to(target.device), angles.sin().to(target.device)
    half = tuple(table[:, : HEAD_DIM // 4].contiguous() for table in tables)
    results = []
    for rope in (1e4, tables, half, None):
        pair = [caches(torch.float32, target.device, 1, 3) for _ in range(2)]
        kv_propagate(hidden, layers, *places, *pair, rope=rope, backend=target.backend)
        results.append(pair)
    by_base, by_tables, partial, plain = results
    for layer in range(LAYERS):
        torch.testing.assert_close(by_tables[0][layer], by_base[0][layer], rtol=1e-5, atol=1e-5)
        kept = slice(HEAD_DIM // 2, None)
        assert torch.equal(partial[0][layer][..., kept], plain[0][layer][..., kept])
        assert not torch.allclose(partial[0][layer][:, 0], plain[0][layer][:, 0])
        torch.testing.assert_close(plain[0][layer][:, 1], by_base[0][layer][:, 1])  # position 0 is not turned


def test_positions_outside_of_the_tables_are_not_stored(target):
    hidden, layers = normal(3, DIM).float().to(target.device), weights(torch.float32, target.device)
    tables = torch.ones(4, 8, device=target.device), torch.zeros(4, 8, device=target.device)
    pair = [caches(torch.float32, target.device, 1, 3) for _ in range(2)]
    places = ids([4, 3, -1], target.device), ids([0, 1, 2], target.device)
    kv_propagate(hidden, layers, *places, *pair, rope=tables, backend=target.backend)
    assert (pair[0][0] != POISON).any(-1).any(-1).tolist() == [[False, True, False]]


def test_strided_caches_and_rows(target):
    """Caches that are parts of one tensor [slots, kv, batch, heads, dim], and rows inside of wider ones."""
    layers = weights(torch.bfloat16, target.device)
    wide = normal(4, DIM + 5).to(target.device, torch.bfloat16)
    hidden, places = wide[:, 2 : 2 + DIM], (ids([0, 1, 2, 3], target.device), ids([2, 0, 1, 3], target.device))
    store = torch.zeros(LAYERS, 5, 2, 1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=target.device)
    strided = [[store[layer, :, kv].transpose(0, 1) for layer in range(LAYERS)] for kv in range(2)]
    plain = [caches(torch.bfloat16, target.device, 1, 5) for _ in range(2)]
    for pair in (strided, plain):
        kv_propagate(hidden, layers, *places, *pair, rope=1e4, backend=target.backend)
    for got, want in zip(strided[0] + strided[1], plain[0] + plain[1], strict=True):
        assert torch.equal(got[:, :4], want[:, :4])


def test_no_rows(target):
    layers, pair = weights(torch.float32, target.device), [caches(torch.float32, target.device, 1, 3) for _ in "kv"]
    nothing = ids([], target.device)
    kv_propagate(
        torch.empty(0, DIM, device=target.device), layers, nothing, nothing, *pair, rope=None, backend=target.backend
    )
    assert all((cache == POISON).all() for cache in pair[0] + pair[1])


def arguments(**changes):
    given = {
        "hidden": torch.zeros(2, DIM),
        "layers": weights(torch.float32, "cpu"),
        "positions": ids([0, 1], "cpu"),
        "slots": ids([0, 1], "cpu"),
        "k_caches": caches(torch.float32, "cpu", 1, 4),
        "v_caches": caches(torch.float32, "cpu", 1, 4),
        "rope": 1e4,
        **changes,
    }
    return given


def swapped(layer, part, value):
    layers = weights(torch.float32, "cpu")
    layers[layer] = (*layers[layer][:part], value, *layers[layer][part + 1 :])
    return layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden": torch.zeros(2, DIM, dtype=torch.int32)},
            r"hidden must be float32, bfloat16 or float16 \[rows, d",
        ),
        ({"layers": []}, "layers must be 3, one per cache, got 0"),
        ({"layers": swapped(1, 0, None)}, r"layers\[1\]\[0\] must be None in all layers or in none, got None"),
        ({"layers": swapped(2, 1, torch.zeros(3, DIM))}, r"layers\[2\]\[1\] must be \[32, 48\], got float32 \[3, 48\]"),
        (
            {"layers": swapped(0, 2, torch.zeros(32, DIM).half())},
            r"layers\[0\]\[2\] must be float32 \[32, 48\], got float16",
        ),
        ({"positions": torch.zeros(2)}, r"positions must be int32 or int64 \[2\], got float32 \[2\]"),
        ({"slots": ids([1], "cpu")}, r"slots must be int32 or int64 \[2\], got int32 \[1\]"),
        ({"k_caches": []}, "k_caches and v_caches must be of one length of at least 1, got 0, 3"),
        (
            {"v_caches": caches(torch.float32, "cpu", 1, 5)},
            r"v_caches\[0\] must be \[batch, slots, kv_heads, head_dim\] w",
        ),
        ({"rope": -1.0}, "rope must be a finite base above 0, got -1.0"),
        ({"rope": (torch.ones(4, 9), torch.ones(4, 9))}, r"rope\[0\] must be two tables .* of at most 8 pairs"),
        ({"rope": "yes"}, r"rope must be a Rope, \(cos, sin\), a number or None, got 'yes'"),
        ({"norm_eps": -1}, "norm_eps must be a finite number of at least 0, got -1"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number of at least 0, got nan"),
        ({"page_table": torch.zeros(1, 2)}, r"page_table must be int32 or int64 \[batch, max_pages\], got float32"),
        (
            {"k_caches": caches(torch.float32, "cpu", 2, 4), "v_caches": caches(torch.float32, "cpu", 2, 4)},
            "requests must be given with a batch of 2, got None",
        ),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises((TypeError, ValueError), match="specdec_ops.kv_propagate: " + message):
        kv_propagate(**arguments(**changes))


def test_no_backward():
    with pytest.raises(RuntimeError, match="requires grad, but this op has no backward"):
        kv_propagate(**arguments(hidden=torch.zeros(2, DIM, requires_grad=True)))


def test_float64_runs_with_torch(target):
    double, device = torch.float64, target.device
    given = {
        "hidden": torch.zeros(2, DIM, dtype=double, device=device),
        "layers": weights(double, device),
        "positions": ids([0, 1], device),
        "slots": ids([0, 1], device),
        "k_caches": caches(double, device, 1, 4),
        "v_caches": caches(double, device, 1, 4),
        "rope": 1e4,
    }
    if target.backend == "torch":
        kv_propagate(**given, backend="torch")
    elif target.backend != "cuda-emulated":
        with pytest.raises(RuntimeError, match="its kernels take float32, bfloat16 and float16, not float64"):
            kv_propagate(**given, backend=target.backend)


def test_the_operator():
    """Schema, fake and functionalisation; and in a compiled function, whose caches the caller sees changed."""
    given = arguments(hidden=normal(2, DIM).float())
    norms, keys, values = (list(part) for part in zip(*given["layers"], strict=True))
    cosines, sines = torch.ones(2, 8), torch.zeros(2, 8)
    schema = (norms, keys, values, 1e-6, cosines, sines, False, None, given["slots"], None)
    torch.library.opcheck(
        torch.ops.specdec_ops.kv_propagate.default,
        (given["hidden"], *schema, given["k_caches"], given["v_caches"], "auto"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    kv_propagate(**given)
    again = arguments(hidden=given["hidden"])
    torch.compile(kv_propagate, backend="eager", fullgraph=True)(**again)
    for got, want in zip(again["k_caches"] + again["v_caches"], given["k_caches"] + given["v_caches"], strict=True):
        torch.testing.assert_close(got, want)


def test_rotation_conventions_of_the_definition():
    """A quarter turn of the first pair only: rotate-half moves element 0 to `pairs`, interleaved to 1."""
    x = torch.zeros(1, 1, 8)
    x[..., 0] = 1
    cosines, sines = torch.ones(1, 4), torch.zeros(1, 4)
    cosines[0, 0], sines[0, 0] = 0, 1
    assert definition.rotate(x, cosines, sines, False).flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert definition.rotate(x, cosines, sines, True).flatten().tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
