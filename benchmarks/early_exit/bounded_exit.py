"""bounded_exit: which rows exit, by early_exit with the bounds of a head. The exact result, and the contestants."""

from __future__ import annotations

import functools

import torch

import specdec_ops
from benchmarks.harness.contestant import Contestant, Expected, on_backends
from benchmarks.harness.inputs import NORM_EPS

from . import peers
from .inputs import Inputs

THRESHOLD = 0.9  # of max_prob
PIECE = 4096  # rows of the head, at a time


def ours(inputs: Inputs, backend: str, name: str, bounded: bool = True) -> Contestant:
    """Which rows exit, with the bounds or without."""
    i, bounds = inputs, inputs.bounds if bounded else None

    def call():
        return specdec_ops.early_exit(
            i.hidden, i.head, THRESHOLD, norm_weight=i.norm_weight, norm_eps=NORM_EPS, bounds=bounds, backend=backend
        )

    return Contestant(name, "ours", call, lambda got: [got.exited], (i.head,))


def expected(inputs: Inputs) -> Expected:
    """Which of the rows exit. Those of the cases are clearly above or below the threshold."""
    logits = torch.cat([peers.normalised(inputs).double() @ piece.double().T for piece in inputs.head.split(PIECE)], 1)
    max_prob = torch.softmax(logits, 1).amax(1)
    if ((max_prob - THRESHOLD).abs() < 0.05).any():
        raise ValueError(f"{inputs.case.label}: a row is too near to the threshold to be checked: {max_prob.tolist()}")
    return Expected(lambda result: [result[0].double()], [(max_prob >= THRESHOLD).double()], [0.0])


def contestants(inputs: Inputs, options) -> list[Contestant]:
    """And our own op without the bounds."""
    listed = on_backends(functools.partial(ours, inputs), options)
    listed.append(ours(inputs, "auto", "specdec_ops full head", bounded=False))
    return [*listed, *peers.contestants(inputs, lambda result: [result[0] >= THRESHOLD])]
