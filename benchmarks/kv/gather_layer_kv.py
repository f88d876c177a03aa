"""gather_layer_kv: inputs, the exact result, and the contestants."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness.contestant import Contestant, Expected, compiled, on_backends
from benchmarks.harness.reading import reader

from .cases import GatherCase
from .layers import Layers, make_layers


@dataclass
class Gather:
    """Caches, and slots of request 0: its last ones."""

    case: GatherCase
    caches: Layers
    slots: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor]  # in a layer, ready made for PyTorch

    def room(self) -> torch.Tensor:
        """For a result, [rows, layers, 2 * kv_heads * dim]."""
        width = 2 * self.case.model.kv_heads * self.case.model.dim
        return torch.zeros(
            self.case.rows, self.case.layers, width, dtype=self.caches.both.dtype, device=self.slots.device
        )


def make_inputs(case: GatherCase, device: str = "cpu") -> Gather:
    caches = make_layers(case, device)
    slots = torch.arange(case.context - case.rows, case.context, device=device)
    return Gather(case, caches, slots.int(), caches.places(torch.zeros_like(slots), slots))


def ours(inputs: Gather, backend: str, name: str) -> Contestant:
    caches, out = inputs.caches, inputs.room()
    pair = (caches.both[0], caches.both[1]) if inputs.case.layout == "one tensor" else caches.lists

    def call():
        options = {"page_table": caches.page_table, "backend": backend}
        return specdec_ops.gather_layer_kv(*pair, inputs.slots, out=out, **options)

    return Contestant(name, "ours", call)


def rows_of(inputs: Gather, cache: torch.Tensor) -> torch.Tensor:
    """[rows, kv_heads, dim] of a layer."""
    return cache[0].index_select(0, inputs.places[1]) if inputs.caches.page_table is None else cache[inputs.places]


def layer_by_layer(inputs: Gather) -> torch.Tensor:
    """Cat of K and V in each layer, stack of all layers."""
    layers = zip(*inputs.caches.lists, strict=True)
    joined = [torch.cat([rows_of(inputs, k), rows_of(inputs, v)], dim=-1).flatten(1) for k, v in layers]
    return torch.stack(joined, dim=1)


def into_slices(inputs: Gather, out: torch.Tensor) -> torch.Tensor:
    """Each layer's rows into a result that is there: nothing is joined."""
    view = out.unflatten(2, (inputs.case.model.kv_heads, 2, inputs.case.model.dim))
    for part, caches in enumerate(inputs.caches.lists):
        for layer, cache in enumerate(caches):
            view[:, layer, :, part] = rows_of(inputs, cache)
    return out


def permuted(both: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Of layers in one tensor [K and V, layers, 1, slots, kv_heads, dim]: all selected at once, then put in order."""
    rows = both[:, :, 0].index_select(2, slots)
    return rows.permute(2, 1, 3, 0, 4).flatten(2)


def expected(inputs: Gather) -> Expected:
    """Written another way than any of them: an index for each figure."""
    both, (first, slot) = inputs.caches.both, inputs.places
    exact = torch.stack([both[:, layer, first, slot].transpose(0, 1) for layer in range(inputs.case.layers)], dim=1)
    return Expected(lambda result: [result], [exact.transpose(2, 3).flatten(2)], [0.0])


def contestants(inputs: Gather, options) -> list[Contestant]:
    listed, case = on_backends(functools.partial(ours, inputs), options), inputs.case
    listed.append(Contestant("eager", "pytorch", functools.partial(layer_by_layer, inputs)))
    listed.append(Contestant("slices", "pytorch", functools.partial(into_slices, inputs, inputs.room())))
    if case.layout == "one tensor":
        forms = [("permuted", permuted)] + ([("compiled", compiled(permuted))] if case.compiled else [])
        for name, form in forms:
            listed.append(Contestant(name, "pytorch", functools.partial(form, inputs.caches.both, inputs.places[1])))
    return [*listed, reader().control(case.bytes)] if inputs.slots.device.type == "cpu" else listed
