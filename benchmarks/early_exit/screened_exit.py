"""screened_exit: the token and its probability, by exit_confidence with an int8 copy of the head.

The head is quantised before the clock starts.
"""

from __future__ import annotations

import functools

from benchmarks.harness.contestant import Contestant, Expected, on_backends

from . import exit_confidence, peers
from .inputs import Inputs

TOLERANCE = 0.01  # of the probability: the op's default


def ours(inputs: Inputs, backend: str, name: str) -> Contestant:
    contestant = exit_confidence.ours(inputs, backend, name, screen=inputs.screen, tolerance=TOLERANCE)
    contestant.reads = (inputs.screen.values, inputs.head)
    return contestant


def expected(inputs: Inputs) -> Expected:
    """The probability, within the tolerance, and the logit of the chosen token; the log-sum-exp is not asked for."""
    whole = exit_confidence.expected(inputs)
    max_prob, chosen, _ = whole.allowed
    return Expected(lambda result: whole.take(result)[:2], whole.exact[:2], [max_prob + TOLERANCE, chosen])


def contestants(inputs: Inputs, options) -> list[Contestant]:
    """And our own op without the screen."""
    listed = on_backends(functools.partial(ours, inputs), options)
    listed.append(exit_confidence.ours(inputs, "auto", "specdec_ops full head"))
    return [*listed, *peers.contestants(inputs, list)]
