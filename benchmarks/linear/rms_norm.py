"""rms_norm: inputs, the exact result, and the contestants."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, on_backends
from benchmarks.harness.inputs import DTYPES, fill_random

from .cases import RmsNormCase


@dataclass
class Norm:
    """x and residual [rows, dim], weight [dim]."""

    case: RmsNormCase
    x: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.weight, self.residual


def make_inputs(case: RmsNormCase, device: str = "cpu") -> Norm:
    dtype, shape = DTYPES[case.dtype], (case.rows, case.hidden)
    x, residual = (fill_random(shape, dtype, seed).to(device) for seed in (1, 2))
    return Norm(case, x, 1 + 0.1 * fill_random(shape[1:], dtype, 3).to(device), residual)


def eager(x, weight, residual):
    """As Hugging Face's models have it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype) + residual


def fused(x, weight, residual):
    """PyTorch's own op."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6) + residual


def expected(norm: Norm) -> Expected:
    """The scale is off by the rounding of a sum and some steps; then two products, a sum and the result's rounding."""
    x, weight, residual = (tensor.double() for tensor in norm.all)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    exact, unit = normed + residual, rounding.ROUNDOFF[norm.x.dtype]
    scale = rounding.FLOAT * (6 + rounding.SIGMAS * (norm.case.hidden / 3) ** 0.5 / 2)
    allowed = scale * normed.abs() + 2 * unit * (normed.abs() + exact.abs())  # PyTorch rounds the normed row as well
    return Expected(lambda out: [out], [exact], [allowed])


def contestants(norm: Norm, options) -> list[Contestant]:
    out = torch.empty_like(norm.x)

    def ours(backend: str, name: str) -> Contestant:
        def call():
            return specdec_ops.rms_norm(norm.x, norm.weight, residual=norm.residual, out=out, backend=backend)

        return Contestant(name, "ours", call, reads=norm.all)

    peers = [Contestant(f.__name__, "pytorch", lambda f=f: f(*norm.all), reads=norm.all) for f in (eager, fused)]
    return [*on_backends(ours, options), *peers]
