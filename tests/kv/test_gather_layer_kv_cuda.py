"""gather_layer_kv in CUDA, emulated: launches, bytes, orders of blocks, sanitizers, a race that is planted.

Its values are also tested with all other backends', in test_gather_layer_kv.py.
"""

import pytest
import torch

from specdec_ops import gather_layer_kv
from specdec_ops._core import dispatch
from tests.emulator import build, kernels
from tests.emulator.checks import assert_race, launch_tests
from tests.kv.cache_cases import ids, numbers

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

SLOTS, REQUESTS = [0, 9, 3, -1, 12, 3, 7, 7, 1, 5, 2**31 - 1], [0, 1, 1, 0, 1, 0, 2, -1, 1, 0, 0]


def dense_launch(layers=2, heads=3, dims=(8, 8), dtype=torch.bfloat16):
    pair = numbers(layers, (2, 10, heads), dtype, dims=dims)
    return kernels.launch_of(lambda: gather_layer_kv(*pair, ids(SLOTS), requests=ids(REQUESTS)))


def paged_launch():
    pair = numbers(2, (7, 4, 2), torch.float16, dims=(16, 8))
    table = ids([[5, 0, 2], [1, -1, 99]])
    return kernels.launch_of(lambda: gather_layer_kv(*pair, ids(SLOTS), requests=ids(REQUESTS), page_table=table))


LAUNCHES = {
    "16 bytes": dense_launch,
    "4 bytes": lambda: dense_launch(dims=(6, 10)),
    "2 bytes": lambda: dense_launch(dims=(5, 3)),
    "1 byte": lambda: dense_launch(dims=(5, 3), dtype=torch.int8),
    "several blocks": lambda: dense_launch(layers=1, heads=9, dims=(64, 128), dtype=torch.float32),
    "paged": paged_launch,
}
test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)


def test_a_launch_serves_32_layers(monkeypatch):
    monkeypatch.setattr(dispatch, "resolve", lambda *_: kernels.IMPLEMENTATIONS["gather_layer_kv"])
    for layers, launches in ((32, 1), (33, 2)):
        pair = numbers(layers, (1, 8, 1), torch.int8, dims=(4, 4))
        before = kernels.launches("gather_layer_kv")
        gather_layer_kv(*pair, ids([3, 0]))
        assert kernels.launches("gather_layer_kv") == before + launches


def test_every_slot_is_read_once_and_every_row_written_once():
    launch = dense_launch(layers=2, heads=4, dims=(8, 32))
    traffic = kernels.traffic(launch)
    there = sum(0 <= s < 10 and 0 <= r < 2 for s, r in zip(SLOTS, REQUESTS, strict=True))
    assert there == 6
    for part, dim in (("k", 8), ("v", 32)):
        for layer in range(2):
            assert traffic[f"{part}_caches[{layer}]"] == (there * 4 * dim * 2, 0)
    assert traffic["out"] == (0, launch.tensors["out"].nbytes)


def test_places_without_a_barrier_are_a_race():
    assert_race(LAUNCHES["16 bytes"](), "gather_layer_kv.cuh", "  block_sync();\n", "")
