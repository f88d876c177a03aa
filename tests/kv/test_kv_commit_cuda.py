"""kv_commit in CUDA, emulated: launches, bytes, units, orders of blocks, sanitizers, mutants.

Its values are also tested with all other backends', in test_kv_commit.py.
"""

import pytest
import torch

from specdec_ops import kv_commit
from specdec_ops._core import dispatch
from tests.emulator import build, kernels
from tests.emulator.checks import launch_tests, outputs
from tests.kv.cache_cases import bits, committed, equal, ids, numbers

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

PATHS = [[0, 2, 3, 7, -1, -1], [1, 2, 4, 5, 6, 7], [0, 1, -1, -1, -1, -1]]
LENGTHS = [3, 7, 12]


def dense_launch(layers=2, heads=3, dims=(8, 8), dtype=torch.bfloat16, paths=PATHS):
    pair = numbers(layers, (3, 20, heads), dtype, dims=dims)
    return kernels.launch_of(lambda: kv_commit(*pair, ids(paths), ids(LENGTHS)))


def paged_launch(dtype=torch.float16, dims=(16, 8), copies=None, table=None):
    pair = numbers(2, (17, 4, 2), dtype, dims=dims)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    table = order[:15].view(3, 5).int() if table is None else ids(table)
    copies = None if copies is None else ids(copies)
    return kernels.launch_of(lambda: kv_commit(*pair, ids(PATHS), ids(LENGTHS), page_table=table, copies=copies))


COPIES = [[0, 16], [16, 15], [-1, 3], [99, 0], [2, 2]]
LAUNCHES = {
    "16 bytes": dense_launch,
    "4 bytes": lambda: dense_launch(dims=(6, 10)),
    "2 bytes": lambda: dense_launch(dims=(5, 3)),
    "1 byte": lambda: dense_launch(dims=(5, 3), dtype=torch.int8),
    "several blocks": lambda: dense_launch(layers=1, heads=9, dims=(64, 128), dtype=torch.float32),
    "malformed": lambda: dense_launch(paths=[[0, 2, 2, 3], [1, 2**31 - 1, 3, 4], [3, 2, 1, 0]]),
    "paged": paged_launch,
    "copies": lambda: paged_launch(copies=COPIES),
    "pages that do not exist": lambda: paged_launch(table=[[0, 1, -1, 3, 4], [5, 6, 99, 7, 8], [9, 10, 11, -7, 12]]),
}
test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)


def test_a_launch_serves_32_layers(monkeypatch):
    """K and V of all. Copies are one more."""
    monkeypatch.setattr(dispatch, "resolve", lambda *_: kernels.IMPLEMENTATIONS["kv_commit"])
    for layers, copies, launches in ((32, None, 1), (33, None, 2), (2, ids([[0, 2]]), 2), (33, ids([[0, 2]]), 4)):
        pair = numbers(layers, (4, 8, 1), torch.int8, dims=(4, 4))
        table = None if copies is None else ids([[0, 1]])
        nodes = (ids([[0, 2, 3]]), 1) if copies is not None else (ids([[0, 2, 3]] * 4), 1)
        before = kernels.launches("kv_commit")
        kv_commit(*pair, *nodes, page_table=table, copies=copies)
        assert kernels.launches("kv_commit") == before + launches
    pages = numbers(2, (4, 8, 1), torch.int8, dims=(4, 4))
    before = kernels.launches("kv_commit")
    kv_commit(*pages, None, None, copies=ids([[0, 2]]))
    assert kernels.launches("kv_commit") == before + 1


def test_rows_that_move_are_read_once_and_written_once():
    """And nothing else of the caches is touched: of the paths 3, 6 and 0 rows move."""
    launch = dense_launch(layers=2, heads=4, dims=(8, 32))
    traffic = kernels.traffic(launch)
    moved = sum(node not in (-1, rank) for path in PATHS for rank, node in enumerate(path))
    assert moved == 9
    for part, dim in (("k", 8), ("v", 32)):
        for layer in range(2):
            assert traffic[f"{part}_caches[{layer}]"] == (moved * 4 * dim * 2, moved * 4 * dim * 2)


def test_pages_are_read_once_and_written_once():
    pages = numbers(1, (6, 4, 2), torch.float32)
    traffic = kernels.traffic(kernels.launch_of(lambda: kv_commit(*pages, None, None, copies=ids([[0, 2], [1, -1]]))))
    assert traffic["k_caches[0]"] == traffic["v_caches[0]"] == (4 * 2 * 8 * 4, 4 * 2 * 8 * 4)


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8, 16])
def test_units_follow_the_alignment_of_everything(shift):
    """Of addresses too: rows of int8 that begin at any byte."""
    store = torch.randint(0, 99, (2, 20 * 2 * 16 + 16), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    pair = [[row[shift : shift + 20 * 2 * 16].view(1, 20, 2, 16)] for row in store]
    wanted = [committed(part[0], PATHS[:1], LENGTHS[:1]) for part in pair]
    launch = kernels.launch_of(lambda: kv_commit(*pair, ids(PATHS[:1]), 3))
    kernels.run(launch)
    assert all(equal(part[0], want) for part, want in zip(pair, wanted, strict=True))


def wrong(launch, file, old, new):
    """Whether a changed kernel leaves other bits than the definition does."""
    from tests.emulator import mutants

    wanted = outputs(launch, mutants.replay(launch, "plain", file, old, old))
    got = outputs(launch, mutants.replay(launch, "plain", file, old, new))
    return any(not torch.equal(bits(got[name]), bits(wanted[name])) for name in wanted)


# What a line is for: (the launch, the file, the line, what becomes of it). Each changes a result.
MUTANTS = {
    "a path that repeats goes on": ("malformed", "kv/places.h", "if (node <= last_) break;", "if (node < 0) break;"),
    "an earlier page is copied later": (
        "copies",
        "kv_commit.cuh",
        "i = 0; i < p.copy_count; ++i) {\n    const int32_t source = p.copies[2 * i]",
        "j = 0; j < p.copy_count; ++j) {\n    const int32_t i = p.copy_count - 1 - j, source = p.copies[2 * i]",
    ),
    "written to the wrong rank": ("16 bytes", "kv/places.h", "int64_t(start_) + rank)", "int64_t(start_) + rank + 1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_changes_the_result(name):
    case, *change = MUTANTS[name]
    try:
        assert wrong(LAUNCHES[case](), *change)
    except build.CannotRun as reason:
        pytest.skip(str(reason))
