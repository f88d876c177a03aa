"""Bounds of a screened row's statistics in Triton are those in C++."""

import pytest
import torch

from tests.early_exit.screen_bound_cases import NUMBERS, STATS, edges, far_below_is_nothing, library, rows
from tests.emulator import build

pytest.importorskip("triton")
import triton
import triton.language as tl
from specdec_ops.triton_kernels.early_exit.screen_stats import stats as stats_in_triton

# 0 times infinity is what some cases are about.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@triton.jit
def stats_kernel(numbers, stats, cases, BLOCK: tl.constexpr):
    case = tl.arange(0, BLOCK)
    there = case < cases
    at = numbers + case * 19
    first = tl.load(at, mask=there, other=1.0)
    second = tl.load(at + 1, mask=there, other=1.0)
    size = tl.load(at + 2, mask=there, other=1.0)
    fall = tl.load(at + 3, mask=there, other=1.0)
    upper = tl.load(at + 4, mask=there, other=1.0)
    lower = tl.load(at + 5, mask=there, other=1.0)
    weight = tl.load(at + 6, mask=there, other=1.0)
    squares = tl.load(at + 7, mask=there, other=1.0)
    peak = tl.load(at + 8, mask=there, other=1.0)
    error = tl.load(at + 9, mask=there, other=1.0)
    noise = tl.load(at + 10, mask=there, other=1.0)
    upper_fall = tl.load(at + 11, mask=there, other=1.0)
    lower_fall = tl.load(at + 12, mask=there, other=1.0)
    tail_fall = tl.load(at + 13, mask=there, other=1.0)
    turns = tl.load(at + 14, mask=there, other=1.0)
    peak_fall = tl.load(at + 15, mask=there, other=1.0)
    reference = tl.load(at + 16, mask=there, other=1.0)
    temperature = tl.load(at + 17, mask=there, other=1.0)
    spread = tl.load(at + 18, mask=there, other=1.0)
    found = stats_in_triton(
        size, fall, upper, lower, weight, squares, peak, error, noise, upper_fall, lower_fall, tail_fall, turns,
        peak_fall, first, second, reference, temperature, spread,
    )  # fmt: skip
    for i in tl.static_range(9):
        tl.store(stats + case * 9 + i, found[i], mask=there)


def triton_stats(cases):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = cases.to(device)
    stats = torch.empty(len(cases), len(STATS), dtype=torch.float64, device=device)
    stats_kernel[(1,)](numbers, stats, len(cases), BLOCK=triton.next_power_of_2(len(cases)))
    return stats.cpu()


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.parametrize("make", [edges, lambda: rows()[0]], ids=["edges", "rows"])
def test_the_same_as_in_cpp(make, tmp_path):
    cases = make()
    want, got = library(tmp_path)(cases), triton_stats(cases)
    wrong = ~torch.isclose(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert not wrong.any(), [(dict(zip(NUMBERS, cases[i].tolist(), strict=True)), STATS[j]) for i, j in wrong.nonzero()]


def test_a_tail_that_is_far_below_adds_nothing():
    assert far_below_is_nothing(triton_stats)
