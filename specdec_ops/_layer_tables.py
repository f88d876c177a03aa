"""Numbers of a `LayerCache`'s requests as tensors: slots of rows, parents of tree nodes, topologies of runs.

All are made on the device or copied there from pinned memory: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._core import alloc
from .topology import Topology, build_topology

_MAX_CHAINS = 64


class Tables:
    """Makes them for one cache.

    Attributes:
        parents: int32 `[batch, slots]`: the parent slot of every tree node. Slots outside of trees have the slot before
            as their parent, whatever is here.
    """

    def __init__(self, batch: int, slots: int, device: torch.device, backend: str) -> None:
        self.batch, self.slots, self.device, self.backend = batch, slots, device, backend
        self.parents = alloc.empty((batch, slots), torch.int32, device)
        self._chains: dict[tuple[int, ...], Topology] = {}

    def __getstate__(self) -> dict:
        """For copies and pickles: everything but the topologies that can be made again."""
        return {**self.__dict__, "_chains": {}}

    # ---- numbers

    def int32(self, values: Sequence) -> torch.Tensor:
        """int32 of these numbers, or of rows of them: filled there if they are one, else copied."""
        if isinstance(values[0], int) and len(set(values)) == 1:
            return torch.full((len(values),), values[0], dtype=torch.int32, device=self.device)
        return self._sent(torch.tensor(values, dtype=torch.int32, device="cpu"))

    def _sent(self, table: torch.Tensor) -> torch.Tensor:
        return table.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else table

    def ranges(self, starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """int64: `counts[b]` numbers from `starts[b]` on, for each request."""
        parts = [
            torch.arange(start, start + count, device=self.device)
            for start, count in zip(starts, counts, strict=True)
            if count or self.batch == 1
        ]
        if not parts:
            return torch.arange(0, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def slot_ids(self, starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """int64: `request * slots + slot` of `counts[b]` slots from `starts[b]` on, for each request."""
        return self.ranges([request * self.slots + start for request, start in enumerate(starts)], counts)

    def spread(self, values: Sequence[int], counts: Sequence[int]) -> torch.Tensor | int:
        """A value per request as a value per row."""
        if self.batch == 1:
            return values[0]
        return torch.cat(
            [
                torch.full((count,), value, dtype=torch.int32, device=self.device)
                for value, count in zip(values, counts, strict=True)
            ]
        )

    # ---- trees

    def write_parents(
        self,
        contexts: Sequence[int | None],
        starts: Sequence[int],
        counts: Sequence[int],
        parents: torch.Tensor,
    ) -> None:
        """The parent slots of a new level of trees. What is no earlier node becomes the context's last slot."""
        first = 0
        for request, (start, count) in enumerate(zip(starts, counts, strict=True)):
            if count:
                context, given = contexts[request], parents[first : first + count]
                node_ids = torch.arange(start - context, start - context + count, dtype=torch.int32, device=self.device)
                earlier = (given >= 0) & (given < node_ids)
                level = self.parents[request, start : start + count]
                torch.add(torch.where(earlier, given, -1), context, out=level)
            first += count

    def topology(self, nodes: tuple[int, ...], bases: Sequence[int], contexts: Sequence[int | None]) -> Topology:
        """The topology of `nodes[b]` slots from `bases[b]` on. Chains of known sizes are made once.

        Args:
            nodes: for each request.
            bases: for each request.
            contexts: for each request the slot in which its tree begins, None without a tree.
        """
        chain = all(context is None for context in contexts)
        if chain and nodes in self._chains:
            return self._chains[nodes]
        room = max(1, *nodes)
        if chain:
            parents = torch.arange(-1, room - 1, dtype=torch.int32, device=self.device).expand(self.batch, room)
        else:
            parents = self._tree_parents(room, bases, contexts)
        topology = build_topology(parents, self.int32(nodes), backend=self.backend)
        if chain:
            if len(self._chains) >= _MAX_CHAINS:
                self._chains.clear()
            self._chains[nodes] = topology
        return topology

    def _tree_parents(self, room: int, bases: Sequence[int], contexts: Sequence[int | None]) -> torch.Tensor:
        """int32 [batch, room]: the parent of each slot from `bases[b]` on, as a node from there on."""
        base = self.int32(bases).unsqueeze(1)
        columns = base + torch.arange(room, dtype=torch.int32, device=self.device)
        parents = self.parents.gather(1, columns.clamp(max=self.slots - 1).long()) - base
        if tuple(bases) == contexts:
            return parents
        starts = [self.slots if context is None else context for context in contexts]
        before_tree = columns < self.int32(starts).unsqueeze(1)
        return torch.where(before_tree, columns - base - 1, parents)
