"""The CUDA kernel of kv_append, emulated: bytes, launches, schedules, sanitizers, and what its tests find out.

Its values are also tested with all other backends', in test_kv_append.py.
"""

import pytest
import torch

from specdec_ops import kv_append
from tests.emulator import build, kernels
from tests.emulator.checks import (
    SANITIZERS,
    assert_order_changes_nothing,
    assert_sanitizer_finds_nothing,
    reveals,
)
from tests.kv.append_cases import ids, normal, tables, trees

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

DEPTHS = [[0, 1, 1, 2], [0, 1]]


def launch(dtype=torch.bfloat16, *, dim=20, pairs=8, cache_dtype=None, in_place=False, **options):
    """Ragged trees over pages, some of which do not exist, with norms and queries; and rows in twos or not, by dim."""
    k, v, q = (normal(2, 4, heads, dim, seed=heads, dtype=dtype) for heads in (2, 2, 9))
    caches = [torch.zeros(6, 4, 2, dim).to(cache_dtype or dtype) for _ in range(2)]
    options = {
        "rope": tables(16, pairs),
        "q_norm_weight": normal(dim, dtype=torch.float32),
        "k_norm_weight": normal(dim, dtype=dtype),
        "page_table": ids([[5, 0, 3], [1, -1, 9]]),
        "q_out": q if in_place else torch.zeros_like(q),
        **options,
    }
    return kernels.launch_of(lambda: kv_append(k, v, *caches, trees(DEPTHS, "cpu"), ids([6, 3]), q=q, **options))


LAUNCHES = {
    "bfloat16": {},
    "in place": {"in_place": True},
    "float32, odd": {"dtype": torch.float32, "dim": 15, "pairs": 7, "interleaved": True},
    "float16, fp8": {
        "dtype": torch.float16,
        "cache_dtype": torch.float8_e4m3fn,
        "k_scale": torch.tensor([0.5, 0.7]),
        "v_scale": 0.1,
    },
    "int8": {"cache_dtype": torch.int8, "k_scale": 0.05, "v_scale": torch.tensor([0.1, 0.2]), "interleaved": True},
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_orders(name):
    """Of threads and blocks: where queries are turned in place, each starts from the same ones."""
    assert_order_changes_nothing(launch(**LAUNCHES[name]), 3)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name != "in place"])
def test_sanitizers(name, sanitizer):
    assert_sanitizer_finds_nothing(launch(**LAUNCHES[name]), sanitizer)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_packed_rows_of_hostile_places(sanitizer):
    """Every number that a kernel reads is out of range somewhere; offsets that fall."""
    k = normal(7, 1, 8, dtype=torch.float32)
    wild = ids([2**31 - 1, -(2**31), 0, 1, -1, 5, 2])
    pair = [torch.zeros(2, 4, 1, 8) for _ in range(2)]
    given = {"q": k, "rope": tables(3, 4), "slots": wild, "positions": wild.roll(2), "requests": wild.roll(4)}
    assert_sanitizer_finds_nothing(kernels.launch_of(lambda: kv_append(k, k, *pair, None, None, **given)), sanitizer)
    plain = trees(DEPTHS, "cpu")
    for offsets in ([0, 9, 3], [-5, 2**31 - 1, 2], [3, 3, 3]):
        topology = type(plain)(*(getattr(plain, name) for name in type(plain).__slots__[:7]), offsets=ids(offsets))
        topology.num_nodes.copy_(ids([99, -4]))
        call = kernels.launch_of(lambda topology=topology: kv_append(k, k, *pair, topology, ids([2, -7]), q=k))
        assert_sanitizer_finds_nothing(call, sanitizer)


def test_one_launch_that_moves_every_byte_once():
    """Of rows that are stored; with norms k and q are read twice, and the tables once for each turned head."""
    k, v, q = (normal(1, 5, heads, 32, dtype=torch.bfloat16) for heads in (2, 2, 3))
    pair = [torch.zeros(1, 8, 2, 32, dtype=torch.bfloat16) for _ in range(2)]
    rope, slots = tables(9, 16), ids([[0, 1, -1, 3, 9]])
    for norm in (None, torch.ones(32)):
        options = {"q": q, "rope": rope, "slots": slots, "q_norm_weight": norm, "k_norm_weight": norm}
        call = kernels.launch_of(lambda options=options: kv_append(k, v, *pair, None, 0, **options))
        before = kernels.launches("kv_append")
        kernels.run(call)
        assert kernels.launches("kv_append") == before + 1
        moved = kernels.traffic(call)
        times = 1 if norm is None else 2
        assert moved["k"].read == times * k.nbytes * 3 // 5 and moved["v"].read == v.nbytes * 3 // 5
        assert moved["q"].read == times * q.nbytes and moved["q_out"].written == q.nbytes
        assert moved["k_cache"] == moved["v_cache"] == (0, k.nbytes * 3 // 5)
        assert moved["cosines"].read == (3 * 5 + 2 * 3) * 16 * 4


# What one line of a kernel may have wrong: (file, the line, what becomes of it).
MUTANTS = {
    "siblings by slot": ("append_row.h", "context + depth", "context + node"),
    "slots by depth": ("append_row.h", ": context + node", ": context + depth"),
    "the other sine": ("kv_append.cuh", "before * cosine - x[i + 2] * sine", "before * cosine + x[i + 2] * sine"),
    "a page too far": ("append_row.h", "page >= p.pages", "page > p.pages + 9"),
    "no weights": ("kv_append.cuh", "x[i] *= inverse_root *", "x[i] *= inverse_root + 0 *"),
    "odd codes": ("cache_code.h", "+ (magnitude >> kShift & 1)", "+ 1"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name):
    options = LAUNCHES["float16, fp8"] if name == "odd codes" else {}
    if name == "odd codes":  # ties: halves between codes, unscaled
        options = {"cache_dtype": torch.float8_e4m3fn, "rope": None, "k_norm_weight": None}
    call = launch(**options)
    if name == "odd codes":
        call.tensors["k"].copy_(torch.arange(call.tensors["k"].numel()).view_as(call.tensors["k"]) % 24 + 16.5)
    assert reveals(call, *MUTANTS[name])
