"""exit_mlp: inputs, the exact result, and the contestants."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, allowed_error, compiled, largest_error, on_backends
from benchmarks.harness.inputs import DTYPES, fill_random
from benchmarks.harness.reading import reader

from .cases import MlpCase

THRESHOLD = 0.4  # of improved MCSD's decision model


@dataclass
class Decision:
    """features [rows, inputs], and a weight and a bias for each layer."""

    case: MlpCase
    features: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def weights(self) -> list[torch.Tensor]:
        return [weight for weight, _ in self.layers]


def make_inputs(case: MlpCase, device: str = "cpu") -> Decision:
    dtype, layers = DTYPES[case.dtype], []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(case.sizes)):
        weight = (fill_random((outputs, inputs), torch.float32, 2 * index) * (2 / inputs) ** 0.5).to(device, dtype)
        layers.append((weight, 0.1 * fill_random((outputs,), torch.float32, 2 * index + 1, device)))
    return Decision(case, fill_random((case.rows, case.sizes[0]), dtype, 99).to(device), layers)


def ours(inputs: Decision, backend: str, name: str) -> Contestant:
    def call():
        return specdec_ops.exit_mlp(inputs.features, inputs.layers, THRESHOLD, backend=backend)

    return Contestant(name, "ours", call, list, inputs.weights)


def linear_layers(features: torch.Tensor, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """The biases are of the weights' dtype already."""
    x = features
    for index, (weight, bias) in enumerate(layers):
        x = torch.nn.functional.linear(torch.relu(x) if index else x, weight, bias)
    score = torch.sigmoid(x[:, 0])
    return [score, ~(score > THRESHOLD).any(0, keepdim=True)]


def expected(inputs: Decision) -> Expected:
    layers = [(weight.double(), bias) for weight, bias in inputs.layers]
    exact = list(specdec_ops.exit_mlp(inputs.features.double(), layers, THRESHOLD, backend="torch"))
    cast = [(weight, bias.to(weight.dtype)) for weight, bias in inputs.layers]
    plain, _ = linear_layers(inputs.features, cast)
    score, bound = rounding.decision_score(inputs.features, inputs.layers, inputs.features.dtype)
    near = ((score - THRESHOLD).abs() <= bound).any()  # rounding may decide it either way
    return Expected(list, exact, [allowed_error(exact[0], largest_error(plain, exact[0]), bound), float(near)])


def contestants(inputs: Decision, options) -> list[Contestant]:
    listed = on_backends(functools.partial(ours, inputs), options)
    layers = [(weight, bias.to(weight.dtype)) for weight, bias in inputs.layers]
    forms = [("eager", linear_layers)]
    if inputs.case.compiled:
        forms.append(("compiled", compiled(linear_layers)))
    for name, form in forms:
        call = lambda form=form: form(inputs.features, layers)  # noqa: E731
        listed.append(Contestant(name, "pytorch", call, list, inputs.weights))
    return [*listed, reader().control(inputs.case.bytes)] if inputs.features.device.type == "cpu" else listed
