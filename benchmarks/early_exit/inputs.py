"""Hidden rows and heads of exit_confidence, screened_exit and bounded_exit."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness.inputs import DTYPES, fill_random

from .cases import ExitCase


@dataclass
class Inputs:
    case: ExitCase
    hidden: torch.Tensor
    head: torch.Tensor
    norm_weight: torch.Tensor
    screen: specdec_ops.QuantizedHead | None = None
    bounds: specdec_ops.HeadBounds | None = None


@functools.lru_cache(maxsize=1)
def make_screen(vocab: int, dim: int, dtype: str, device: str) -> specdec_ops.QuantizedHead:
    """Of the head that make_inputs makes, which is the same for every number of rows; it takes seconds."""
    return specdec_ops.quantize_head(make_head(vocab, dim, dtype).to(device))


def make_head(vocab: int, dim: int, dtype: str, falling: bool = False) -> torch.Tensor:
    """Rows of length 4, or of lengths from 4 down to 0.1."""
    head = fill_random((vocab, dim), DTYPES[dtype], 1) * (4 / dim**0.5)
    return head.div_(1 + 40 * torch.arange(vocab)[:, None] / vocab) if falling else head


def make_inputs(case: ExitCase, device: str = "cpu") -> Inputs:
    """Rows that point along a row of the head, more or less, so that some are sure and some are not."""
    dtype = DTYPES[case.dtype]
    head = make_head(case.vocab, case.dim, case.dtype, case.bounds == "falling")
    hidden = fill_random((case.rows, case.dim), torch.float32, 2)
    chosen = torch.arange(case.rows) * 37 % case.vocab
    strength = torch.linspace(0, 1, case.rows)[:, None] * case.dim**0.5 / 4
    hidden = (hidden + strength * head[chosen].float()).to(dtype)
    screen = make_screen(case.vocab, case.dim, case.dtype, device) if case.screened else None
    head = head.to(device)
    bounds = specdec_ops.bound_head(head) if case.bounds else None
    return Inputs(case, hidden.to(device), head, torch.ones(case.dim, dtype=dtype, device=device), screen, bounds)
