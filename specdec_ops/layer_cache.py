"""`LayerCache`: the keys, values and pending rows of a draft whose tokens leave at different layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from . import _alloc
from ._checks import is_int, wrong, wrong_device
from .topology import Topology, build_topology
from .tree_attention import tree_attention

_OP = "LayerCache"
_MAX_CHAINS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The rows that one group of layers has to work on, from `LayerCache.run`. Rows of all requests, one after another.

    A run is over with `LayerCache.finish`, before anything else of the cache is called but `attend`.
    """

    group: int
    """Which group of layers."""
    counts: tuple[int, ...]
    """Rows per request."""
    hidden: torch.Tensor
    """[rows, dim]: what enters the group's first layer. It may share the cache's memory: don't write to it."""
    positions: torch.Tensor
    """int32 [rows]: the position of each row, for rotary embeddings. Siblings in a tree share one."""
    slots: torch.Tensor
    """int64 [rows]: `request * slots + slot` of each row."""
    topology: Topology
    """The slots from context_lens on: tokens that lag behind, as a chain, and the tree that hangs from it."""
    context_lens: torch.Tensor
    """int32 [batch]: the slots before, which every row sees."""
    query_start: torch.Tensor | int
    """The node of each request's first row."""


class LayerCache:
    """Per-layer K and V of a sorted draft (S2D, Kavehzadeh et al., 2024), with a length of its own per group of layers.

    The layers between two exits are a group: `exits=(6, 9, 12)` makes the groups 0-5, 6-8 and 9-11. A token that exits
    after group g leaves its hidden row pending at boundary g + 1, the entry of group g + 1. The next token that goes
    deeper takes the pending rows along (catch-up), so that all keys and values are those of a full pass, bit for bit up
    to the order of sums. Boundary 0 takes the embeddings.

    All state is a table of lengths: slots `0` to `lengths[0][b]` of request b have been appended, group g has K and V
    for the first `lengths[g + 1][b]` of them, and the slots between two neighbouring lengths are pending at
    the boundary between them. Rejection only lowers lengths.

    A step of decoding, where `layer_of(...)` stands for the model's own norms, projections and MLP::

        cache.append(embed(tokens))                   # or append(rows, parents) for a level of a tree
        for group in range(cache.groups):
            run = cache.run(group)                    # pending rows and the new ones
            hidden = run.hidden
            for layer in cache.layers(group):         # q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim]
                hidden = layer_of(hidden, run.positions, lambda q, k, v: cache.attend(run, layer, q, k, v))
            newest = cache.finish(run, hidden)        # [new rows, dim], before the final norm
            if group == cache.groups - 1 or sure(newest):
                break
        cache.crop(accepted_length)                   # or commit(path) after a tree

    Trees: node n of a request's tree lies in slot `context + n`, where context is the request's length when the first
    level came. Levels may leave at different depths; a deeper level takes earlier ones along, and each row still sees
    exactly its ancestors, through a Topology and `query_start`. No mask is built.

    Waiting: lengths are Python ints, since whoever decodes has read the exit decision and the accepted length already.
    `append`, `run`, `attend`, `finish` and `crop` never wait for the device, and tables of a ragged batch go up from
    pinned memory. `commit` and `crop` wait only if they are given tensors on a device. (On CPU nothing applies.)

    Memory: `2 * layers * batch * slots * kv_heads * head_dim` elements for K and V, `groups * batch * slots * dim` for
    the boundaries.

    Args:
        exits: the layer counts after which a token may leave, ascending; the last one is the number of layers.
        slots: room per request, in tokens and tree nodes.
        kv_heads: of K and V.
        head_dim: of K and V.
        dim: of the hidden rows.
        batch: requests. They append, run and exit independently of each other.
        dtype: of hidden rows, K and V: float32, bfloat16, float16 or float64.
        device: where everything lies.
        backend: of tree_attention and build_topology.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: exits are not ascending from 1, or a size is below 1.
    """

    def __init__(
        self,
        exits: Sequence[int],
        slots: int,
        kv_heads: int,
        head_dim: int,
        dim: int,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device="cpu",
        backend: str = "auto",
    ) -> None:
        sizes = {"slots": slots, "kv_heads": kv_heads, "head_dim": head_dim, "dim": dim, "batch": batch}
        for name, size in sizes.items():
            if not is_int(size):
                raise TypeError(wrong(_OP, name, "an int", size))
            if size < 1:
                raise ValueError(wrong(_OP, name, "at least 1", size))
        self.exits = tuple(exits)
        if not self.exits or not all(map(is_int, self.exits)) or not _ascending(self.exits, least=1):
            raise ValueError(f"specdec_ops.{_OP}: exits must be ascending ints from 1 on, got {self.exits}")
        if dtype not in _DTYPES:
            raise TypeError(f"specdec_ops.{_OP}: dtype must be a floating dtype of tree_attention, got {dtype}")
        self.slots, self.batch, self.dim, self.backend = slots, batch, dim, backend
        self.device = torch.device(device)
        shape = (self.exits[-1], batch, slots, kv_heads, head_dim)
        self.k_caches = _alloc.empty(shape, dtype, self.device)
        self.v_caches = _alloc.empty(shape, dtype, self.device)
        self._hidden = _alloc.empty((self.groups, batch * slots, dim), dtype, self.device)
        # The parent slot of every slot: the one before, but in a tree.
        self._chain = torch.arange(-1, slots - 1, dtype=torch.int32, device=self.device)
        self._parents = self._chain.repeat(batch, 1)
        self._lengths = [[0] * batch for _ in range(self.groups + 1)]
        self._contexts: list[int | None] = [None] * batch  # where the request's tree starts, if it has one
        self._newest = [0] * batch
        self._chains: dict[tuple[int, ...], Topology] = {}

    # ---- what there is

    @property
    def groups(self) -> int:
        """How many groups of layers: as many as exits."""
        return len(self.exits)

    def layers(self, group: int) -> range:
        """The layers of a group."""
        return range(0 if group == 0 else self.exits[group - 1], self.exits[group])

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """[groups + 1][batch]: slots appended, then slots with K and V in each group. Never ascending."""
        return tuple(tuple(row) for row in self._lengths)

    def pending(self, boundary: int, request: int = 0) -> tuple[int, torch.Tensor]:
        """The rows that wait at the entry of group `boundary`: (slot of the first, [rows, dim], a view)."""
        start, stop = self._lengths[boundary + 1][request], self._lengths[boundary][request]
        first = request * self.slots
        return start, self._hidden[boundary, first + start : first + stop]

    # ---- a step

    def append(
        self, rows: torch.Tensor, parents: torch.Tensor | None = None, *, counts: Sequence[int] | None = None
    ) -> None:
        """Add new tokens, or a level of a tree: their embeddings become pending at boundary 0.

        Args:
            rows: `[rows, dim]`, the rows of all requests one after another.
            parents: int32 `[rows]` on the same device: the parent of each row among the nodes of its request's tree, -1
                for the context's last token. Node numbers start at 0 with the first level and go on from level to
                level. A parent that is not an earlier node counts as -1. None: the tokens follow each other.
            counts: rows per request; None: the same number for each.

        Raises:
            TypeError, ValueError: rows, parents or counts don't fit, or a chain is appended behind a tree.
        """
        self._check_rows("rows", rows, None)
        counts = self._counts(counts, len(rows))
        if parents is not None:
            if not isinstance(parents, torch.Tensor) or parents.dtype != torch.int32:
                raise TypeError(wrong(_OP, "parents", f"int32 [{len(rows)}]", parents))
            if parents.shape != (len(rows),):
                raise ValueError(wrong(_OP, "parents", f"int32 [{len(rows)}]", parents))
            if parents.device != self.device:
                raise ValueError(wrong_device(_OP, "parents", self.device, parents))
        starts = self._lengths[0]
        for request, count in enumerate(counts):
            if starts[request] + count > self.slots:
                must = f"at most {self.slots - starts[request]} for request {request} ({self.slots} slots in all)"
                raise ValueError(wrong(_OP, "rows", must, count))
            if parents is None and count and self._contexts[request] is not None:
                raise ValueError(
                    f"specdec_ops.{_OP}: parents must be given while request {request} has a tree, got None"
                )
        self._hidden[0].index_copy_(0, self._slot_ids(starts, counts), rows)
        first = 0
        for request, count in enumerate(counts):
            start = starts[request]
            if parents is not None and count:
                if self._contexts[request] is None:
                    self._contexts[request] = start
                context = self._contexts[request]
                level = self._parents[request, start : start + count]
                given = parents[first : first + count]
                earlier = (given >= 0) & (given < torch.arange(start - context, start - context + count).to(given))
                torch.add(torch.where(earlier, given, -1), context, out=level)
            first += count
            self._newest[request] = start
            starts[request] = start + count

    def run(self, group: int, *, requests: Sequence[bool] | None = None, most: int | None = None) -> Run:
        """Take the rows that are pending at the entry of a group of layers, the newest included.

        Args:
            group: 0 to `groups - 1`.
            requests: which requests take part; None: all.
            most: take at most the first `most` rows of each request, for prompts in chunks. A run needs
                `rows * rows / 64` words of ancestor sets, so some hundred rows at once are enough.

        Returns:
            A Run, to be passed to `attend` for each layer of the group and then to `finish`.
        """
        if not is_int(group) or not 0 <= group < self.groups:
            raise ValueError(wrong(_OP, "group", f"from 0 to {self.groups - 1}", group))
        starts, stops = list(self._lengths[group + 1]), list(self._lengths[group])
        for request in range(self.batch):
            if requests is not None and not requests[request]:
                stops[request] = starts[request]
            elif most is not None:
                stops[request] = min(stops[request], starts[request] + most)
        counts = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        # Slots from the base on are the nodes of this run's topology.
        contexts = [start if c is None else c for c, start in zip(self._contexts, starts, strict=True)]
        bases = [min(start, context) for start, context in zip(starts, contexts, strict=True)]
        nodes = tuple(stop - base for stop, base in zip(stops, bases, strict=True))
        context_lens = self._int32(bases)
        topology = self._topology(nodes, context_lens)
        firsts = [start - base for start, base in zip(starts, bases, strict=True)]
        slots = self._slot_ids(starts, counts)
        room = topology.nodes
        node_ids = self._ranges([r * room + f if topology.batch > 1 else f for r, f in enumerate(firsts)], counts)
        positions = topology.depths.reshape(-1)[node_ids] + self._spread(bases, counts)
        if self.batch == 1:
            hidden = self._hidden[group, starts[0] : stops[0]]
            return Run(group, counts, hidden, positions, slots, topology, context_lens, firsts[0])
        offsets = [sum(counts[:request]) for request in range(self.batch + 1)]
        topology = dataclasses.replace(topology, offsets=self._int32(offsets))
        hidden = self._hidden[group].index_select(0, slots)
        return Run(group, counts, hidden, positions, slots, topology, context_lens, self._int32(firsts))

    def attend(
        self, run: Run, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options
    ) -> torch.Tensor:
        """Store a layer's keys and values and let the run's rows attend to all that they may see.

        Args:
            run: of the group that the layer belongs to.
            layer: counted from the draft's first layer.
            q: `[rows, heads, head_dim]`, rotated already.
            k: `[rows, kv_heads, head_dim]`, rotated already.
            v: like k.
            options: of tree_attention, such as `scale`, `window`, `softcap` or `sinks`.

        Returns:
            `[rows, heads, head_dim]`.
        """
        if layer not in self.layers(run.group):
            raise ValueError(wrong(_OP, "layer", f"in {self.layers(run.group)}, the run's group", layer))
        caches = (self.k_caches[layer], self.v_caches[layer])
        for name, rows, cache in (("k", k, caches[0]), ("v", v, caches[1])):
            if rows.shape != (len(run.slots), *cache.shape[2:]) or rows.dtype != cache.dtype:
                must = f"{str(cache.dtype).removeprefix('torch.')} {[len(run.slots), *cache.shape[2:]]}"
                raise ValueError(wrong(_OP, name, must, rows))
            cache.view(-1, *cache.shape[2:]).index_copy_(0, run.slots, rows)
        q = q.unsqueeze(0) if self.batch == 1 else q
        out = tree_attention(
            q,
            *caches,
            run.topology,
            run.context_lens,
            query_start=run.query_start,
            backend=self.backend,
            **options,
        )
        return out.squeeze(0) if self.batch == 1 else out

    def finish(self, run: Run, hidden: torch.Tensor) -> torch.Tensor:
        """End a run: its rows have K and V in the group now, and become pending at the next boundary.

        Args:
            run: whose layers have all attended.
            hidden: `[rows, dim]`, what left the group's last layer, before the final norm.

        Returns:
            Those of the rows that the latest `append` of their request brought, `[new rows, dim]`: what decides on the
            exit. A view of `hidden` with a batch of 1.
        """
        self._check_rows("hidden", hidden, len(run.slots))
        if run.group + 1 < self.groups:
            self._hidden[run.group + 1].index_copy_(0, run.slots, hidden)
        lengths, firsts, counts, first = self._lengths[run.group + 1], [], [], 0
        for request, count in enumerate(run.counts):
            lengths[request] += count
            new = max(0, min(count, lengths[request] - self._newest[request]))
            firsts.append(first + count - new)
            counts.append(new)
            first += count
        if self.batch == 1:
            return hidden[firsts[0] : firsts[0] + counts[0]]
        return hidden.index_select(0, self._ranges(firsts, counts))

    # ---- after verification

    def crop(self, lengths: Sequence[int] | torch.Tensor | int) -> None:
        """Forget all slots from a length on, in every layer and at every boundary.

        Args:
            lengths: how many slots each request keeps; one int for all. A tree is dropped; its accepted nodes are kept
                by `commit` instead.

        Raises:
            ValueError: a length below 0, above what was appended, or inside of a tree.
        """
        if is_int(lengths):
            lengths = [lengths] * self.batch
        lengths = [int(length) for length in lengths]
        if len(lengths) != self.batch:
            raise ValueError(f"specdec_ops.{_OP}: lengths must be {self.batch} ints or one, got {len(lengths)}")
        for request, length in enumerate(lengths):
            context = self._contexts[request]
            limit = self._lengths[0][request] if context is None else context
            if not 0 <= length <= limit:
                raise ValueError(wrong(_OP, f"lengths[{request}]", f"from 0 to {limit}", length))
        for request, length in enumerate(lengths):
            self._drop_tree(request)
            self._newest[request] = min(self._newest[request], length)
            for row in self._lengths:
                row[request] = min(row[request], length)

    def commit(self, nodes: Sequence[Sequence[int]] | torch.Tensor) -> None:
        """Keep a path of each request's tree as the continuation of its context, and forget the tree's other nodes.

        K and V of accepted nodes move to the slots behind the context in the groups that have them; hidden rows that
        are pending move likewise.

        Args:
            nodes: for each request the accepted nodes from root to leaf, ascending; -1 entries are ignored, so that
                int32 `[batch, depth]` padded with -1 will do (a tensor is read, which waits for its device).

        Raises:
            ValueError: nodes are not ascending, or there is no such node.
        """
        nodes = nodes.tolist() if isinstance(nodes, torch.Tensor) else nodes
        if len(nodes) != self.batch:
            raise ValueError(
                f"specdec_ops.{_OP}: nodes must be one path for each of {self.batch} requests, got {len(nodes)}"
            )
        paths = [[int(node) for node in path if node != -1] for path in nodes]
        for request, path in enumerate(paths):
            context = self._contexts[request]
            size = 0 if context is None else self._lengths[0][request] - context
            if not _ascending(path, least=0) or (path and path[-1] >= size):
                raise ValueError(
                    f"specdec_ops.{_OP}: nodes[{request}] must be ascending nodes below {size}, got {path}"
                )
        for request, path in enumerate(paths):
            self._commit(request, path)

    def _commit(self, request: int, path: list[int]) -> None:
        context = self._contexts[request]
        if context is None:
            return
        moved = next((rank for rank, node in enumerate(path) if rank != node), len(path))  # a leading part is in place
        path_slots = torch.tensor(path[moved:], dtype=torch.int64)
        if self.device.type == "cuda":
            path_slots = path_slots.pin_memory().to(self.device, non_blocking=True)
        path_slots = path_slots + context
        kept = [sum(context + node < row[request] for node in path) for row in self._lengths]
        for boundary in range(self.groups + 1):
            count = kept[boundary] - moved
            if count > 0:
                source, target = path_slots[:count], slice(context + moved, context + moved + count)
                if boundary < self.groups:
                    hidden = self._hidden[boundary].view(self.batch, self.slots, self.dim)[request]
                    hidden[target] = hidden[source]
                if boundary > 0:
                    layers = self.layers(boundary - 1)
                    for caches in (self.k_caches, self.v_caches):
                        group = caches[layers.start : layers.stop, request]
                        group[:, target] = group[:, source]
            row = self._lengths[boundary]
            row[request] = min(row[request], context + kept[boundary])
        self._newest[request] = self._lengths[0][request]
        self._drop_tree(request)

    def _drop_tree(self, request: int) -> None:
        context = self._contexts[request]
        if context is not None:
            self._parents[request, context:] = self._chain[context:]
            self._contexts[request] = None

    # ---- tables

    def _topology(self, nodes: tuple[int, ...], bases: torch.Tensor) -> Topology:
        """The topology of `nodes[b]` slots from `bases[b]` on. Chains of known sizes are made once."""
        chain = all(context is None for context in self._contexts)
        if chain and nodes in self._chains:
            return self._chains[nodes]
        room = max(1, *nodes)
        columns = bases.unsqueeze(1).long() + torch.arange(room, device=self.device)
        parents = self._parents.gather(1, columns.clamp_(max=self.slots - 1))
        parents = (parents - bases.unsqueeze(1)).clamp_(min=-1)
        topology = build_topology(parents, self._int32(nodes), backend=self.backend)
        if chain:
            if len(self._chains) >= _MAX_CHAINS:
                self._chains.clear()
            self._chains[nodes] = topology
        return topology

    def _int32(self, values: Sequence[int]) -> torch.Tensor:
        """int32 on the device without waiting: filled there, or copied from pinned memory."""
        if len(set(values)) == 1:
            return torch.full((len(values),), values[0], dtype=torch.int32, device=self.device)
        table = torch.tensor(values, dtype=torch.int32)
        return table.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else table

    def _ranges(self, starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """int64: `counts[b]` numbers from `starts[b]` on, for each request."""
        parts = [
            torch.arange(start, start + count, device=self.device)
            for start, count in zip(starts, counts, strict=True)
            if count or self.batch == 1
        ]
        if not parts:
            return torch.arange(0, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slot_ids(self, starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        return self._ranges([request * self.slots + start for request, start in enumerate(starts)], counts)

    def _spread(self, values: Sequence[int], counts: Sequence[int]) -> torch.Tensor | int:
        """A value per request as a value per row."""
        if self.batch == 1:
            return values[0]
        return torch.cat(
            [
                torch.full((count,), value, dtype=torch.int32, device=self.device)
                for value, count in zip(values, counts, strict=True)
            ]
        )

    # ---- checks

    def _check_rows(self, name: str, rows, count: int | None) -> None:
        dtype = str(self._hidden.dtype).removeprefix("torch.")
        must = f"{dtype} [{'rows' if count is None else count}, {self.dim}]"
        if not isinstance(rows, torch.Tensor) or rows.dtype != self._hidden.dtype:
            raise TypeError(wrong(_OP, name, must, rows))
        if rows.dim() != 2 or rows.shape[1] != self.dim or (count is not None and len(rows) != count):
            raise ValueError(wrong(_OP, name, must, rows))
        if rows.device != self.device:
            raise ValueError(wrong_device(_OP, name, self.device, rows))

    def _counts(self, counts: Sequence[int] | None, rows: int) -> tuple[int, ...]:
        if counts is None:
            if rows % self.batch:
                raise ValueError(wrong(_OP, "rows", f"a multiple of the batch of {self.batch}, without counts", rows))
            return (rows // self.batch,) * self.batch
        counts = tuple(counts)
        if len(counts) != self.batch or any(not is_int(c) or c < 0 for c in counts) or sum(counts) != rows:
            raise ValueError(f"specdec_ops.{_OP}: counts must be {self.batch} ints that sum to {rows}, got {counts}")
        return counts


def _ascending(values: Sequence[int], least: int) -> bool:
    """Whether every value is above the one before it, from `least` on."""
    return all(low < high for low, high in itertools.pairwise((least - 1, *values)))
