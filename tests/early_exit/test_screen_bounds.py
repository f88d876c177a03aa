"""Bounds of a screened row's statistics are sound, and nothing infinite gets into them."""

import pytest

from tests.early_exit.screen_bound_cases import far_below_is_nothing, library, rows
from tests.emulator import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="module")
def stats_of(tmp_path_factory):
    return library(tmp_path_factory.mktemp("screen_bounds"))


def test_the_whole_heads_statistics_lie_within(stats_of):
    cases, true = rows()
    stats = stats_of(cases).view(-1, 3, 3)
    value, low, high = stats.unbind(2)
    assert (low <= true).all()
    assert (true <= high).all()
    assert ((low <= value) & (value <= high)).all()
    near = high[:, 0] - low[:, 0] < 0.01
    assert near.sum() > 50, "and they say something"


def test_a_tail_that_is_far_below_adds_nothing(stats_of):
    assert far_below_is_nothing(stats_of)


GUARDED = "(tail.fall + gap * tail.weight) * scale;"
LEFT_OUT = {
    "of the value": (
        f"    size_fall = known.fall + {GUARDED}\n  }}\n",
        f"  }}\n  size_fall = known.fall + {GUARDED}\n",
    ),
    "of the bounds": ("if (scale > 0) {", "if (true) {"),
}


@pytest.mark.parametrize("guard", LEFT_OUT)
def test_a_guard_that_is_left_out_is_seen(guard, tmp_path):
    assert not far_below_is_nothing(library(tmp_path, *LEFT_OUT[guard]))
