"""`SortedCache`: the paged keys and values of a draft whose tokens leave at different layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence as Ordered

import torch

from specdec_ops.decode.cache import Cache, Sequence
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.kv.kv_commit import kv_commit
from specdec_ops.topology import Topology, build_topology

from .model_draft import chains

_CHUNK = 256  # rows of a pass over a text


class SortedSequence(Sequence):
    """The pages of one request, and how far each group of layers has got in its text.

    Attributes:
        lengths: of each group, how many slots have keys and values in its layers. Never ascending.
        pending: of each group but the first, what enters it next: [rows, dim] in pieces, of the slots from the group's
            length to that of the group before.
        root: the slot of the last committed token in the round that goes on; drafted tokens come behind it.
    """

    __slots__ = ("lengths", "pending", "root")

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.lengths = [0] * groups
        self.pending: list[list[torch.Tensor]] = [[] for _ in range(groups)]
        self.root = 0

    def rows(self, group: int) -> torch.Tensor | None:
        """[rows, dim]: all that is pending before a group; None if nothing is."""
        parts = self.pending[group]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        return parts[0] if parts else None

    def take(self, group: int, count: int) -> torch.Tensor:
        """[count, dim]: the first rows that are pending before a group, which are not so any more."""
        rows = self.rows(group)
        self.pending[group] = [rows[count:]] if count < len(rows) else []
        return rows[:count]

    def crop(self, length: int) -> None:
        """Forget all slots from a length on, in every group."""
        old, self.lengths = self.lengths, [min(own, length) for own in self.lengths]
        for group in range(1, len(old)):
            kept = self.lengths[group - 1] - self.lengths[group]
            if kept < old[group - 1] - old[group]:
                self.pending[group] = [self.rows(group)[:kept]] if kept else []

    def commit(self, path: Ordered[int]) -> None:
        """Keep these nodes of the round's tree behind the text, and forget the others.

        Keys and values are not moved here.

        Args:
            path: the accepted nodes that group 0 has run, from the root, node 0, on.
        """
        old, root, slots = self.lengths, self.root, [self.root + node for node in path]
        self.lengths = [min(own, root + sum(slot < own for slot in slots)) for own in old]
        for group in range(1, len(old)):
            start, stop = old[group], old[group - 1]
            kept = [*range(start, min(root, stop)), *(slot for slot in slots if start <= slot < stop)]
            if len(kept) < stop - start:
                index = torch.tensor([slot - start for slot in kept], dtype=torch.int64)
                rows = self.rows(group)
                self.pending[group] = [rows.index_select(0, index.to(rows.device))] if kept else []


@dataclasses.dataclass(frozen=True)
class Part:
    """Some requests of a round.

    Attributes:
        sequences: of each.
        page_table: int32 [requests, max_pages].
        parents: int32 [requests, nodes]: the trees so far, -1 for the root and where no node is. None: chains.
    """

    sequences: list[SortedSequence]
    page_table: torch.Tensor
    parents: torch.Tensor | None = None

    def only(self, places: list[int]) -> Part:
        """Those of the requests."""
        if len(places) == len(self.sequences):
            return self
        index = torch.tensor(places).to(self.page_table.device)
        parents = None if self.parents is None else self.parents.index_select(0, index)
        return Part([self.sequences[place] for place in places], self.page_table.index_select(0, index), parents)


class SortedCache:
    """Keys and values of a sorted draft in pages, with a length of its own for each request and group of layers.

    The layers between two exits are a group: exits (6, 9, 12) make the groups of layers 0-5, 6-8 and 9-11. A token that
    leaves after a group leaves its row, before the final norm, pending before the next one. When a later token of its
    request goes deeper, all that is pending goes along (catch-up): so each row of each layer is that of a full pass, on
    a CPU to the last bit, and no layer runs a row that no deeper exit has asked for. `specdec_ops.LayerCache` does the
    same for a fixed batch without pages.

    Args:
        model: the draft.
        exits: the layer counts after which tokens may leave.
        pages: of all layers up to the last exit.

    Attributes:
        pages: the keys and values.
        layer_rows: rows times layers that have been run, prompts included.
        layer_passes: layers that have been run, whatever the number of rows.
    """

    def __init__(self, model: Decoder, exits: tuple[int, ...], pages: Cache) -> None:
        self._model, self.pages = model, pages
        self._layers = list(itertools.pairwise((0, *exits)))
        self.layer_rows = self.layer_passes = 0

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.pages.device

    def read(self, sequences: list[SortedSequence], texts: list[list[int]], page_table: torch.Tensor) -> torch.Tensor:
        """Run group 0 over what it does not have yet of some texts, and let their last tokens be the roots.

        Args:
            sequences: of the requests.
            texts: ids; at least the last one of each is new.
            page_table: int32 [requests, max_pages].

        Returns:
            [requests, dim]: the rows of the last tokens.
        """
        for place, (sequence, ids) in enumerate(zip(sequences, texts, strict=True)):
            while len(ids) - sequence.lengths[0] > _CHUNK:  # a prompt; chunks are the same whoever is beside it
                self._read([sequence], [ids], (_CHUNK,), page_table[place : place + 1])
            sequence.root = len(ids) - 1
        sizes = tuple(len(ids) - own.lengths[0] for own, ids in zip(sequences, texts, strict=True))
        return _last_of_each(self._read(sequences, texts, sizes, page_table), sizes, 1)

    def _read(self, sequences, texts, sizes: tuple[int, ...], page_table: torch.Tensor) -> torch.Tensor:
        parts = zip(sequences, texts, sizes, strict=True)
        tokens = [ids[own.lengths[0] :][:size] for own, ids, size in parts]
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        tokens = torch.tensor(tokens, dtype=torch.int32).to(self.device)
        rows = Rows(tokens, chains(sizes, self.device), self._int32([own.lengths[0] for own in sequences]), page_table)
        return self.run(0, sequences, rows, sizes)

    def run(self, group: int, sequences: list[SortedSequence], rows: Rows, sizes: Ordered[int]) -> torch.Tensor:
        """Run a group of layers over the next rows of each request.

        Args:
            group: which one. Group 0 takes the tokens of `rows`, others what is pending.
            sequences: of the requests.
            rows: where the rows stand.
            sizes: rows of each request.

        Returns:
            [rows, dim]: what left the group's last layer.
        """
        hidden = None
        if group:
            taken = [own.take(group, size) for own, size in zip(sequences, sizes, strict=True)]
            hidden = taken[0] if len(taken) == 1 else torch.cat(taken)
        layers = self._layers[group]
        hidden = self._model.forward(rows, self.pages, layers=layers, hidden=hidden, want=False).hidden
        self.layer_rows += len(hidden) * (layers[1] - layers[0])
        self.layer_passes += layers[1] - layers[0]
        has_next = group + 1 < len(self._layers)
        for sequence, part in zip(sequences, hidden.split(list(sizes)), strict=True):
            sequence.lengths[group] += len(part)
            if has_next:
                sequence.pending[group + 1].append(part)
        return hidden

    def deeper(self, group: int, part: Part, newest: int) -> torch.Tensor:
        """Run a group over all that is pending before it.

        Args:
            group: from 1.
            part: the requests.
            newest: how many rows of each request to return, the last ones: those that decide on the next exit.

        Returns:
            [requests * newest, dim].
        """
        for place, own in enumerate(part.sequences):
            while own.lengths[group - 1] - own.lengths[group] > _CHUNK and own.root - own.lengths[group] >= _CHUNK:
                self._run_chains(group, [own], (_CHUNK,), part.page_table[place : place + 1])
        sizes = tuple(own.lengths[group - 1] - own.lengths[group] for own in part.sequences)
        if part.parents is None:
            hidden = self._run_chains(group, part.sequences, sizes, part.page_table)
        else:
            hidden = self.run(group, part.sequences, self._tree_rows(group, part, sizes), sizes)
        return _last_of_each(hidden, sizes, newest)

    def _run_chains(self, group: int, sequences, sizes: tuple[int, ...], page_table: torch.Tensor) -> torch.Tensor:
        shape = (sum(sizes),) if len(set(sizes)) > 1 else (len(sizes), sizes[0])
        lengths = self._int32([own.lengths[group] for own in sequences])
        rows = Rows(self._no_tokens(shape), chains(sizes, self.device), lengths, page_table)
        return self.run(group, sequences, rows, sizes)

    def _tree_rows(self, group: int, part: Part, sizes: tuple[int, ...]) -> Rows:
        """Text that lags behind as a chain, and the tree that hangs from its last token, for each request."""
        starts = [own.lengths[group] for own in part.sequences]
        bases = [min(start, own.root) for start, own in zip(starts, part.sequences, strict=True)]
        lags = [own.root - base for own, base in zip(part.sequences, bases, strict=True)]
        firsts = [start - base for start, base in zip(starts, bases, strict=True)]
        ends = [first + size for first, size in zip(firsts, sizes, strict=True)]
        lag, nodes = self._int32(lags)[:, None], torch.arange(max(ends), dtype=torch.int32, device=self.device)
        in_tree = nodes - lag  # 0 is the root
        parents = part.parents.gather(1, in_tree.clamp(0, part.parents.shape[1] - 1).long())
        parents = torch.where(in_tree > 0, torch.where(parents >= 0, parents + lag, -1), nodes - 1)
        topology: Topology = build_topology(parents, self._int32(ends))
        offsets = self._int32([0, *itertools.accumulate(sizes)])
        topology = dataclasses.replace(topology, offsets=offsets)
        tokens = self._no_tokens((sum(sizes),))
        return Rows(tokens, topology, self._int32(bases), part.page_table, query_start=self._int32(firsts))

    def commit(self, part: Part, paths: list[list[int]]) -> None:
        """Keep accepted paths of trees: keys and values move behind the text, in the groups that have them.

        Args:
            part: all requests of the round.
            paths: of each, the accepted nodes that group 0 has run, from node 0 on.
        """
        if any(path != list(range(len(path))) for path in paths):
            table = torch.full((len(paths), max(map(len, paths))), -1, dtype=torch.int32)
            for group, (first, last) in enumerate(self._layers):
                for row, (own, path) in enumerate(zip(part.sequences, paths, strict=True)):
                    known = [node if own.root + node < own.lengths[group] else -1 for node in path]
                    table[row, : len(path)] = torch.tensor(known, dtype=torch.int32)
                kv_commit(
                    self.pages.k_caches[first:last],
                    self.pages.v_caches[first:last],
                    table.to(self.device),
                    self._int32([own.root for own in part.sequences]),
                    page_table=part.page_table,
                )
        for sequence, path in zip(part.sequences, paths, strict=True):
            sequence.commit(path)

    def _no_tokens(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Of rows that are no tokens any more: their shape alone is looked at."""
        return torch.zeros((), dtype=torch.int32, device=self.device).expand(shape)

    def _int32(self, values: Ordered[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device)


def _last_of_each(hidden: torch.Tensor, sizes: tuple[int, ...], count: int) -> torch.Tensor:
    """[requests * count, dim]: the last `count` of the rows of each request."""
    if all(size == count for size in sizes):
        return hidden
    if len(sizes) == 1:
        return hidden[-count:]
    ends = torch.tensor(sizes).cumsum(0)[:, None] - count + torch.arange(count)
    return hidden.index_select(0, ends.view(-1).to(hidden.device))
