"""kv_propagate: inputs, the exact result, and the contestants."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, allowed_error, compiled, largest_error, on_backends
from benchmarks.harness.inputs import DTYPES, NORM_EPS, fill_random
from benchmarks.harness.reading import reader

from .cases import KvCase

SLOTS, FIRST_POSITION, THETA = 128, 1000, 5e5


@dataclass
class Propagation:
    """hidden [rows, dim], norms [layers, dim], weights [layers, 2, width, dim], tables [positions, pairs].

    The weights are one tensor, so that PyTorch can multiply by all of them at once.
    """

    case: KvCase
    hidden: torch.Tensor
    norms: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    long_slots: torch.Tensor  # as PyTorch wants them
    tables: tuple[torch.Tensor, torch.Tensor]

    def caches(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[K and V, layers, 1, slots, kv_heads, head_dim], in which an unwritten element shows."""
        shape = (2, len(self.norms), 1, SLOTS, self.case.model.kv_heads, self.case.model.dim)
        return torch.full(shape, float("nan"), dtype=dtype or self.hidden.dtype, device=self.hidden.device)


def make_inputs(case: KvCase, device: str = "cpu") -> Propagation:
    dtype, pairs = DTYPES[case.dtype], case.model.dim // 2
    weights = fill_random((case.layers, 2, case.width, case.hidden), dtype, 1) * case.hidden**-0.5
    positions = torch.arange(FIRST_POSITION, FIRST_POSITION + case.rows, dtype=torch.int32)
    frequencies = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(FIRST_POSITION + case.rows, dtype=torch.float64)[:, None] * frequencies
    slots = torch.arange(SLOTS - case.rows, SLOTS, dtype=torch.int32, device=device)
    return Propagation(
        case,
        fill_random((case.rows, case.hidden), dtype, 2).to(device),
        (1 + 0.1 * fill_random((case.layers, case.hidden), torch.float32, 3)).to(device, dtype),
        weights.to(device),
        positions.to(device),
        slots,
        slots.long(),
        tuple(table.float().to(device) for table in (angles.cos(), angles.sin())),
    )


def ours(inputs: Propagation, backend: str, name: str) -> Contestant:
    caches = inputs.caches()
    k_caches, v_caches = (list(part) for part in caches)
    layers = [(norm, *pair) for norm, pair in zip(inputs.norms, inputs.weights, strict=True)]

    def call():
        i = inputs
        specdec_ops.kv_propagate(
            i.hidden,
            layers,
            i.positions,
            i.slots,
            k_caches,
            v_caches,
            rope=i.tables,
            norm_eps=NORM_EPS,
            backend=backend,
        )
        return caches

    return Contestant(name, "ours", call, reads=(inputs.weights,))


def rotated(k: torch.Tensor, inputs: Propagation) -> torch.Tensor:
    """Keys [..., rows, heads, head_dim], turned half against half."""
    cosines, sines = (table[inputs.positions][:, None] for table in inputs.tables)
    first, second = k.float().chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1).to(k.dtype)


def layer_by_layer(inputs: Propagation, caches: torch.Tensor) -> torch.Tensor:
    """As engines do it: the code of a layer's attention up to the cache."""
    heads = caches.shape[-2:]
    for layer, (norm, (k_weight, v_weight)) in enumerate(zip(inputs.norms, inputs.weights, strict=True)):
        y = torch.nn.functional.rms_norm(inputs.hidden, inputs.hidden.shape[1:], norm, NORM_EPS)
        k, v = ((y @ weight.T).unflatten(1, heads) for weight in (k_weight, v_weight))
        caches[0, layer, 0].index_copy_(0, inputs.long_slots, rotated(k, inputs))
        caches[1, layer, 0].index_copy_(0, inputs.long_slots, v)
    return caches


def stacked(inputs: Propagation, caches: torch.Tensor) -> torch.Tensor:
    """All layers at once, which nothing but the norms' weights forbids: one batched product."""
    hidden, heads = inputs.hidden, caches.shape[-2:]
    normed = hidden.float() * torch.rsqrt(hidden.float().square().mean(1, keepdim=True) + NORM_EPS)
    y = (normed * inputs.norms.float()[:, None]).to(hidden.dtype)
    both = torch.bmm(y, inputs.weights.flatten(1, 2).transpose(1, 2)).unflatten(2, (2, *heads))
    caches[0, :, 0].index_copy_(1, inputs.long_slots, rotated(both[:, :, 0], inputs))
    caches[1, :, 0].index_copy_(1, inputs.long_slots, both[:, :, 1])
    return caches


def expected(inputs: Propagation) -> Expected:
    """Of the first and the last layer."""
    chosen = sorted({0, inputs.case.layers - 1})

    def take(caches: torch.Tensor) -> list[torch.Tensor]:
        return [caches[:, layer, 0, inputs.long_slots] for layer in chosen]

    exact = inputs.caches(torch.float64)
    layers = [(inputs.norms[at].double(), *inputs.weights[at].double()) for at in chosen]
    specdec_ops.kv_propagate(
        inputs.hidden.double(),
        layers,
        inputs.positions,
        inputs.slots,
        *([part[at] for at in chosen] for part in exact),
        rope=tuple(table.double() for table in inputs.tables),
        norm_eps=NORM_EPS,
        backend="torch",
    )
    plain = take(layer_by_layer(inputs, inputs.caches()))
    errors = [largest_error(*both) for both in zip(plain, take(exact), strict=True)]
    bounds = [rounding_bound(inputs, layer) for layer in chosen]
    return Expected(take, take(exact), [allowed_error(*each) for each in zip(take(exact), errors, bounds, strict=True)])


def rounding_bound(inputs: Propagation, layer: int) -> torch.Tensor:
    """[K and V, rows, kv_heads, head_dim] of one layer. The keys are turned after they were rounded."""
    hidden, dtype, width = inputs.hidden.double(), inputs.hidden.dtype, inputs.case.model.dim
    y = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + NORM_EPS) * inputs.norms[layer].double()
    totals = [y @ weight.double().T for weight in inputs.weights[layer]]
    weights = inputs.weights[layer]
    errors = [rounding.product(y, weight, total, dtype) for weight, total in zip(weights, totals, strict=True)]
    (k, v), (k_error, v_error) = ([part.unflatten(1, (-1, width)) for part in parts] for parts in (totals, errors))
    cosines, sines = (table[inputs.positions].double()[:, None] for table in inputs.tables)
    (first, second), (error_first, error_second) = k.chunk(2, dim=-1), k_error.chunk(2, dim=-1)
    turned = [
        rounding.rotated(first, second, cosines, sines, error_first, error_second, dtype),
        rounding.rotated(second, first, cosines, sines, error_second, error_first, dtype),
    ]
    return torch.stack([torch.cat(turned, -1), v_error + rounding.ROUNDOFF[dtype] * v.abs()])


def contestants(inputs: Propagation, options) -> list[Contestant]:
    listed = on_backends(functools.partial(ours, inputs), options)
    forms = [("eager", layer_by_layer), ("stacked", stacked)]
    if inputs.case.compiled:
        forms.append(("compiled", compiled(stacked)))
    for name, form in forms:
        caches = inputs.caches()
        call = lambda form=form, caches=caches: form(inputs, caches)  # noqa: E731
        listed.append(Contestant(name, "pytorch", call, reads=(inputs.weights,)))
    return [*listed, reader().control(inputs.case.bytes)] if inputs.hidden.device.type == "cpu" else listed
