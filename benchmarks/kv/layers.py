"""Caches of all layers, in the layouts that kv_commit and gather_layer_kv are measured in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness.inputs import DTYPES, fill_random

from .cases import SPARE_SLOTS, LayersCase

PAGE_SIZE = 16


@dataclass
class Layers:
    """both [K and V, layers, batch, slots, kv_heads, dim], or [..., pages, page_size, kv_heads, dim] with a table."""

    both: torch.Tensor
    page_table: torch.Tensor | None

    @property
    def lists(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return list(self.both[0]), list(self.both[1])

    def places(self, requests: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first two indices of slots in a layer's cache."""
        if self.page_table is None:
            return requests, slots
        return self.page_table[requests, slots // PAGE_SIZE].long(), slots % PAGE_SIZE


def make_layers(case: LayersCase, device: str) -> Layers:
    """With pages in any order."""
    slots = -(-(case.context + SPARE_SLOTS) // PAGE_SIZE) * PAGE_SIZE
    shape = (2, case.layers, case.batch, slots, case.model.kv_heads, case.model.dim)
    both = fill_random(shape, DTYPES[case.dtype], 1).to(device)
    if case.layout != "pages":
        return Layers(both, None)
    pages = case.batch * slots // PAGE_SIZE
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(2)).to(device, torch.int32)
    return Layers(both.view(2, case.layers, pages, PAGE_SIZE, *shape[4:]), order.view(case.batch, -1))
