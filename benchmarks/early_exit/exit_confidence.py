"""exit_confidence: the exact figures, and the contestants."""

from __future__ import annotations

import functools

import torch

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, allowed_error, largest_error, on_backends
from benchmarks.harness.inputs import DTYPES, NORM_EPS

from . import peers
from .inputs import Inputs

CHECKED = 2  # rows computed in float64
PIECE = 4096  # rows of the head, at a time


def ours(inputs: Inputs, backend: str, name: str, **options) -> Contestant:
    """options: what else the op is told, such as a screen."""
    i = inputs

    def call():
        return specdec_ops.exit_confidence(
            i.hidden,
            i.head,
            norm_weight=i.norm_weight,
            norm_eps=NORM_EPS,
            top_k=i.case.top_k,
            **options,
            backend=backend,
        )

    return Contestant(name, "ours", call, figures, (i.head,))


def figures(confidence: specdec_ops.Confidence) -> list[torch.Tensor]:
    return [confidence.max_prob, confidence.logsumexp, confidence.token]


def expected(inputs: Inputs) -> Expected:
    """Probability, log-sum-exp and, in place of the token, the exact logit of the chosen one."""
    rows = sorted({0, inputs.case.rows - 1})[:CHECKED]
    x = inputs.hidden[rows].double()
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + NORM_EPS) * inputs.norm_weight.double()
    dtype, pieces = DTYPES[inputs.case.dtype], inputs.head.split(PIECE)
    logits = [x @ piece.double().T for piece in pieces]
    errors = [rounding.product(x, *both, dtype) for both in zip(pieces, logits, strict=True)]
    logits, errors = torch.cat(logits, 1), torch.cat(errors, 1)
    greatest, total = logits.max(1).values, logits.logsumexp(1)
    exact = [(greatest - total).exp(), greatest, total]

    def take(result) -> list[torch.Tensor]:
        max_prob, logsumexp, token = (figure[rows] for figure in result)
        token = token.long().clamp(0, inputs.case.vocab - 1)[:, None]
        return [max_prob, logits.gather(1, token)[:, 0], logsumexp]

    plain = [largest_error(*both) for both in zip(take(peers.eager(inputs)), exact, strict=True)]
    max_prob, lse, chosen = rounding.exit_figures(logits, errors)
    bounds = [max_prob, chosen, lse]
    return Expected(take, exact, [allowed_error(*each) for each in zip(exact, plain, bounds, strict=True)])


def contestants(inputs: Inputs, options) -> list[Contestant]:
    listed = on_backends(functools.partial(ours, inputs), options)
    return [*listed, *peers.contestants(inputs, list)]
