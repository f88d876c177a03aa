"""Whether counted outcomes follow a law."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

FEWEST = 5  # that have to be expected of an outcome of its own; rarer ones share one


def against_law(counts: Counter, law: Mapping[Hashable, float]) -> tuple[float, float]:
    """The statistic over outcomes, and the value that is exceeded once in about 10^5 tests."""
    runs = counts.total()
    assert all(law.get(outcome, 0) > 0 for outcome in counts), "an outcome that can't be"
    statistic, rare, rare_expected, freedom = 0.0, 0, 0.0, -1
    for outcome, probability in law.items():
        if runs * probability < FEWEST:
            rare, rare_expected = rare + counts[outcome], rare_expected + runs * probability
            continue
        statistic += (counts[outcome] - runs * probability) ** 2 / (runs * probability)
        freedom += 1
    if rare_expected >= 1:
        statistic, freedom = statistic + (rare - rare_expected) ** 2 / rare_expected, freedom + 1
    third = 2 / (9 * freedom)  # Wilson and Hilferty's approximation
    return statistic, freedom * (1 - third + 4.3 * third**0.5) ** 3
