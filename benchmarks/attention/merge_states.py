"""merge_states: inputs, the exact result, and the contestants."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, allowed_error, largest_error, on_backends
from benchmarks.harness.inputs import DTYPES, fill_random

from .cases import AttentionCase


@dataclass
class States:
    """Two partial results: out [batch, nodes, heads, dim] and lse float32 [batch, nodes, heads] of each."""

    case: AttentionCase
    out_a: torch.Tensor
    lse_a: torch.Tensor
    out_b: torch.Tensor
    lse_b: torch.Tensor

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.out_a, self.lse_a, self.out_b, self.lse_b


def make_inputs(case: AttentionCase, device: str = "cpu") -> States:
    shape = (case.batch, case.nodes, case.model.heads, case.model.dim)
    outs = [fill_random(shape, DTYPES[case.dtype], seed).to(device) for seed in (1, 2)]
    lses = [fill_random(shape[:-1], torch.float32, seed).to(device) for seed in (3, 4)]
    return States(case, outs[0], lses[0], outs[1], lses[1])


def eager(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    weight = torch.exp(lse_a - lse)[..., None].to(out_a.dtype)
    return torch.lerp(out_b, out_a, weight), lse


def expected(states: States) -> Expected:
    exact = list(
        specdec_ops.merge_states(
            states.out_a.double(), states.lse_a, states.out_b.double(), states.lse_b, backend="torch"
        )
    )
    errors = [largest_error(*both) for both in zip(eager(*states.all), exact, strict=True)]
    bounds = rounding.merged_states(*states.all, states.out_a.dtype)
    return Expected(list, exact, [allowed_error(*each) for each in zip(exact, errors, bounds, strict=True)])


def contestants(states: States, options) -> list[Contestant]:
    def ours(backend: str, name: str) -> Contestant:
        def call():
            return specdec_ops.merge_states(*states.all, backend=backend)

        return Contestant(name, "ours", call, lambda state: [state.out, state.lse], states.all)

    plain = Contestant("eager", "pytorch", lambda: eager(*states.all), list, states.all)
    return [*on_backends(ours, options), plain]
