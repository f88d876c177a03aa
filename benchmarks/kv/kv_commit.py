"""kv_commit: inputs, the exact result, and the contestants."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness.contestant import Contestant, Expected, on_backends
from benchmarks.harness.reading import reader

from .cases import CommitCase
from .layers import Layers, make_layers


@dataclass
class Commit:
    """Caches with a tree behind each context, and what of the trees is accepted: nodes [batch, steps]."""

    case: CommitCase
    caches: Layers
    nodes: torch.Tensor
    context_lens: torch.Tensor
    moved: tuple[
        tuple, tuple
    ]  # places in a layer: from, to; ready made for PyTorch, [batch, steps] of two indices each
    tree: tuple  # all places of the trees
    rows: torch.Tensor  # what lies there

    def put_back(self) -> None:
        """The trees' rows as they were before the first call."""
        self.caches.both[(slice(None), slice(None), *self.tree)] = self.rows


def make_inputs(case: CommitCase, device: str = "cpu") -> Commit:
    caches, path = make_layers(case, device), torch.tensor(case.path, device=device)
    requests = torch.arange(case.batch, device=device)[:, None]

    def places(nodes: torch.Tensor) -> tuple:
        return caches.places(requests.expand(-1, len(nodes)), case.context + nodes.expand(case.batch, -1))

    tree = places(torch.arange(case.tree_nodes, device=device))
    return Commit(
        case,
        caches,
        path.int().repeat(case.batch, 1),
        torch.full((case.batch,), case.context, dtype=torch.int32, device=device),
        (places(path), places(torch.arange(len(path), device=device))),
        tree,
        caches.both[(slice(None), slice(None), *tree)].clone(),
    )


def ours(inputs: Commit, backend: str, name: str) -> Contestant:
    caches = inputs.caches
    pair = (caches.both[0], caches.both[1]) if inputs.case.layout == "one tensor" else caches.lists

    def call():
        options = {"page_table": caches.page_table, "backend": backend}
        specdec_ops.kv_commit(*pair, inputs.nodes, inputs.context_lens, **options)

    return Contestant(name, "ours", call, functools.partial(in_place, inputs), before=inputs.put_back)


def in_place(inputs: Commit, _) -> list[torch.Tensor]:
    """What lies at the accepted places, [K and V, layers, batch, steps, kv_heads, dim]."""
    return [inputs.caches.both[(slice(None), slice(None), *inputs.moved[1])]]


def layer_by_layer(inputs: Commit) -> None:
    """index_select of the accepted rows, and a copy to where the context ends."""
    if inputs.case.batch == 1 and inputs.caches.page_table is None:
        (_, source), _ = inputs.moved
        source, context, steps = source[0], inputs.case.context, source.shape[1]
        for caches in inputs.caches.lists:
            for cache in caches:
                cache[0, context : context + steps] = cache[0].index_select(0, source)
        return
    source, target = inputs.moved
    for caches in inputs.caches.lists:
        for cache in caches:
            cache[target] = cache[source]


def indexed(inputs: Commit) -> None:
    """The same in one expression, for layers in one tensor."""
    source, target = inputs.moved
    if inputs.case.batch == 1:
        context, steps = inputs.case.context, source[1].shape[1]
        rows = inputs.caches.both[:, :, 0].index_select(2, source[1][0])
        inputs.caches.both[:, :, 0, context : context + steps] = rows
    else:
        everything = (slice(None), slice(None))
        inputs.caches.both[(*everything, *target)] = inputs.caches.both[(*everything, *source)]


def joined(inputs: Commit) -> list[list[torch.Tensor]]:
    """Caches that are tensors of their own length: what stays and what is accepted, joined."""
    path, context = inputs.nodes[0].long(), inputs.case.context
    return [
        [torch.cat([cache[:, :context], cache.index_select(1, context + path)], dim=1) for cache in caches]
        for caches in inputs.caches.lists
    ]


def expected(inputs: Commit) -> Expected:
    rows = inputs.rows[:, :, :, inputs.case.path]
    return Expected(lambda result: result, [rows], [0.0])


def contestants(inputs: Commit, options) -> list[Contestant]:
    listed, case = on_backends(functools.partial(ours, inputs), options), inputs.case
    forms = [("indexed", indexed)] if case.layout == "one tensor" else []
    for name, form in [("eager", layer_by_layer), *forms]:
        call, taken = functools.partial(form, inputs), functools.partial(in_place, inputs)
        listed.append(Contestant(name, "pytorch", call, taken, before=inputs.put_back))
    if case.layout != "pages":
        call, context = functools.partial(joined, inputs), case.context

        def taken(result):
            return [torch.stack([torch.stack([cache[:, context:] for cache in part]) for part in result])]

        listed.append(Contestant("cat", "pytorch", call, taken, before=inputs.put_back))
    return [*listed, reader().control(case.bytes)] if inputs.nodes.device.type == "cpu" else listed
