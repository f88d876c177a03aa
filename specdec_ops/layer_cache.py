"""`LayerCache`: the keys, values and pending rows of a draft whose tokens leave at different layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ._core import alloc
from ._core.checks import INT32_MAX, argument_error, as_int32, device_error, is_int
from ._layer_checks import OP as _OP
from ._layer_checks import ascending, check_heads, check_options, check_rows, counts_of, index_of, items_of
from ._layer_state import State, kept
from ._layer_tables import Tables
from .ops.attention.tree_attention import tree_attention
from .ops.kv.kv_commit import kv_commit
from .topology import Topology

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The rows that one group of layers has to work on, from `LayerCache.run`. Rows of all requests, one after another.

    A run is open until `LayerCache.finish` or `abandon`; `attend` of each layer comes between.

    Attributes:
        group: which group of layers.
        counts: rows per request.
        hidden: of the cache's dtype, `[rows, dim]`: what enters the group. Maybe a view: don't write to it.
        positions: int32 `[rows]`: the position of each row, for rotary embeddings. Siblings in a tree share one.
        slots: int64 `[rows]`: `request * slots + slot` of each row.
        topology: the slots from context_lens on: tokens that lag behind, as a chain, and the tree that hangs from it.
        context_lens: int32 `[batch]`: the slots before, which every row sees.
        query_start: the node of each request's first row: an int, or int32 `[batch]`.
    """

    group: int
    counts: tuple[int, ...]
    hidden: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    topology: Topology
    context_lens: torch.Tensor
    query_start: torch.Tensor | int

    def __reduce__(self) -> tuple[type[Run], tuple[Any, ...]]:
        """For copies and pickles: `hidden` alone, without the cache's memory that it may be a part of."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self), tuple({**values, "hidden": self.hidden.clone()}.values())


class LayerCache:
    """Per-layer K and V of a sorted draft (S2D, Kavehzadeh et al., 2024), with a length of its own per group of layers.

    The layers between two exits are a group: `exits=(6, 9, 12)` makes the groups 0-5, 6-8 and 9-11. A token that exits
    after group g leaves its hidden row pending at boundary g + 1, the entry of group g + 1. The next token that goes
    deeper takes the pending rows along (catch-up), so that all keys and values are those of a full pass, bit for bit up
    to the order of sums. Boundary 0 takes the embeddings.

    All state is a table of lengths: slots `0` to `lengths[0][b]` of request b have been appended, group g has K and V
    for the first `lengths[g + 1][b]` of them, and the slots between two neighbouring lengths are pending at
    the boundary between them. Rejection only lowers lengths.

    Order of calls: a run is open from `run` to `finish`, and each layer of its group attends once, in order, in
    between. `append`, `run`, `crop` and `commit` have to wait for its end. `abandon` gives an open run up, for instance
    after an error of the model. A call that raises changes nothing. Caches can be pickled and deep-copied, an open run
    included.

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
        cache.crop(accepted_length)                   # or commit([path]) after a tree

    With one exit, `exits=(32,)`, no token leaves early: a plain cache of K and V with `append`, `crop` and `commit`, of
    any model of 32 layers, for chains and trees. With the whole target as the last exit it serves self-speculation,
    where the target's leading layers are the draft: `exits=(8, 32)` drafts with group 0. To verify, group 1 takes the
    pending rows of all drafted tokens in one run and gives the target's hidden rows; layers 0-7 are not run again.

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
        backend: of tree_attention, build_topology and kv_commit.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: exits are not ascending from 1, or a size is below 1.

    Attributes:
        k_caches: `[layers, batch, slots, kv_heads, head_dim]`; beyond a group's length it holds anything.
        v_caches: like k_caches.
        exits: as given, like slots, batch, dim and backend.
        device: of all tensors here, with its index.

    Methods raise RuntimeError for a call out of order, and for what requires grad where gradients are recorded.
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
        device: torch.device | str | int = "cpu",
        backend: str = "auto",
    ) -> None:
        sizes = {"slots": slots, "kv_heads": kv_heads, "head_dim": head_dim, "dim": dim, "batch": batch}
        for name, size in sizes.items():
            if not is_int(size):
                raise TypeError(argument_error(_OP, name, "an int", size))
            if not 1 <= size <= INT32_MAX:
                raise ValueError(argument_error(_OP, name, "at least 1" if size < 1 else "below 2**31", size))
        self.exits = tuple(items_of("exits", "ascending ints", exits))
        if not self.exits or not all(map(is_int, self.exits)) or not ascending(self.exits, least=1):
            raise ValueError(f"specdec_ops.{_OP}: exits must be ascending ints from 1 on, got {self.exits}")
        if dtype not in _DTYPES:
            raise TypeError(f"specdec_ops.{_OP}: dtype must be a floating dtype of tree_attention, got {dtype}")
        self.slots, self.batch, self.dim, self.backend = slots, batch, dim, backend
        device = torch.device(device)
        shape = (self.exits[-1], batch, slots, kv_heads, head_dim)
        with torch.inference_mode(False):  # so that the cache may be used inside and outside of that mode
            self.k_caches = alloc.empty(shape, dtype, device)
            self.v_caches = alloc.empty(shape, dtype, device)
            self._hidden = alloc.empty((self.groups, batch * slots, dim), dtype, device)
            self.device = self._hidden.device  # with its index, as tensors have it
            self._tables = Tables(batch, slots, self.device, backend)
        self._state = State.empty(self.exits, slots, batch)

    # ---- what there is

    @property
    def groups(self) -> int:
        """How many groups of layers: as many as exits."""
        return len(self.exits)

    def layers(self, group: int) -> range:
        """The layers of a group."""
        self._state.check_group("group", group)
        return self._state.layers(group)

    @property
    def open_run(self) -> Run | None:
        """The run that is open, if one is. In a copy of the cache: its own copy of that run."""
        return self._state.run

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """[groups + 1][batch]: slots appended, then slots with K and V in each group. Never ascending."""
        return self._state.lengths

    def pending(self, boundary: int, request: int = 0) -> tuple[int, torch.Tensor]:
        """The rows that wait at the entry of group `boundary`: (slot of the first, [rows, dim], a view)."""
        self._state.check_group("boundary", boundary)
        if not is_int(request) or not 0 <= request < self.batch:
            raise ValueError(argument_error(_OP, "request", f"an int from 0 to {self.batch - 1}", request))
        start, stop = self.lengths[boundary + 1][request], self.lengths[boundary][request]
        first = request * self.slots
        return start, self._hidden[boundary, first + start : first + stop]

    # ---- a step

    def append(
        self, rows: torch.Tensor, parents: torch.Tensor | None = None, *, counts: Sequence[int] | None = None
    ) -> None:
        """Add new tokens, or a level of a tree: their embeddings become pending at boundary 0.

        Args:
            rows: `[rows, dim]`, the rows of all requests one after another.
            parents: int32 or int64 `[rows]` on the same device: the parent of each row among the nodes of its request's
                tree, -1 for the context's last token. Node numbers start at 0 with the first level and go on from level
                to level. A parent that is not an earlier node counts as -1. None: the tokens follow each other.
            counts: rows per request; None: the same number for each.

        Raises:
            TypeError, ValueError: rows, parents or counts don't fit, or a chain is appended behind a tree.
            RuntimeError: a run is open, or rows require grad.
        """
        check_rows("rows", rows, None, self._hidden)
        counts = counts_of(counts, rows.shape[0], self.batch)
        if parents is not None:
            parents = as_int32(_OP, "parents", f"[{len(rows)}]", parents)
            if parents.shape != (len(rows),):
                raise ValueError(argument_error(_OP, "parents", f"int32 or int64 [{len(rows)}]", parents))
            if parents.device != self.device:
                raise ValueError(device_error(_OP, "parents", self.device, parents))
        state = self._state.append(counts, tree=parents is not None)
        self._hidden[0].index_copy_(0, self._tables.slot_ids(state.newest, counts), rows)
        if parents is not None:
            self._tables.write_parents(state.contexts, state.newest, counts, parents)
        self._state = state

    def run(self, group: int, *, requests: Sequence[bool] | None = None, most: int | None = None) -> Run:
        """Take the rows that are pending at the entry of a group of layers, the newest included.

        Args:
            group: 0 to `groups - 1`.
            requests: which requests take part; None: all.
            most: take at most the first `most` rows of each request, for prompts in chunks. A run needs
                `rows * rows / 64` words of ancestor sets, so some hundred rows at once are enough.

        Returns:
            A Run, to be passed to `attend` for each layer of the group and then to `finish`. It is open from now on.

        Raises:
            TypeError, ValueError: there is no such group, or requests or most don't fit.
            RuntimeError: a run is open already.
        """
        if requests is not None:
            requests = [bool(request) for request in items_of("requests", f"{self.batch} bools", requests)]
        starts, stops = self._state.pending(group, requests, most)
        counts = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        # Slots from the base on are the nodes of this run's topology.
        contexts = [start if c is None else c for c, start in zip(self._state.contexts, starts, strict=True)]
        bases = [min(start, context) for start, context in zip(starts, contexts, strict=True)]
        nodes = tuple(stop - base for stop, base in zip(stops, bases, strict=True))
        context_lens = self._tables.int32(bases)
        topology = self._tables.topology(nodes, bases, self._state.contexts)
        firsts = [start - base for start, base in zip(starts, bases, strict=True)]
        slots = self._tables.slot_ids(starts, counts)
        room = topology.nodes
        node_ids = self._tables.ranges(
            [r * room + f if topology.batch > 1 else f for r, f in enumerate(firsts)], counts
        )
        positions = topology.depths.reshape(-1)[node_ids] + self._tables.spread(bases, counts)
        if self.batch == 1:
            hidden, query_start = self._hidden[group, starts[0] : stops[0]], firsts[0]
        else:
            offsets = [sum(counts[:request]) for request in range(self.batch + 1)]
            topology = dataclasses.replace(topology, offsets=self._tables.int32(offsets))
            hidden, query_start = self._hidden[group].index_select(0, slots), self._tables.int32(firsts)
        run = Run(group, counts, hidden, positions, slots, topology, context_lens, query_start)
        self._state = self._state.open(run)
        return run

    def attend(
        self, run: Run, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Store a layer's keys and values and let the run's rows attend to all that they may see.

        Args:
            run: the open one.
            layer: the next of its group, counted from the draft's first layer.
            q: `[rows, heads, head_dim]`, rotated already.
            k: `[rows, kv_heads, head_dim]`, rotated already.
            v: like k.
            options: of tree_attention: `scale`, `window`, `softcap`, `sinks`, `alibi_slopes`, `num_splits` and
                `path_invariant`.

        Returns:
            `[rows, heads, head_dim]`.

        Raises:
            TypeError, ValueError: a wrong run, layer, q, k, v or option. The layer may still attend then.
            RuntimeError: q, k or v requires grad.
        """
        state = self._state.attend(run, layer)
        k_cache, v_cache = self.k_caches[layer], self.v_caches[layer]
        check_heads(run.slots.shape[0], q, k, v, k_cache)
        check_options(options)
        for rows, cache in ((k, k_cache), (v, v_cache)):
            cache.flatten(0, 1).index_copy_(0, run.slots, rows)
        q = q.unsqueeze(0) if self.batch == 1 else q
        out = tree_attention(
            q,
            k_cache,
            v_cache,
            run.topology,
            run.context_lens,
            query_start=run.query_start,
            backend=self.backend,
            **options,
        )
        out = out.squeeze(0) if self.batch == 1 else out
        self._state = state
        return out

    def finish(self, run: Run, hidden: torch.Tensor) -> torch.Tensor:
        """End a run: its rows have K and V in the group now, and become pending at the next boundary.

        Args:
            run: the open one, whose layers have all attended.
            hidden: `[rows, dim]`, what left the group's last layer, before the final norm.

        Returns:
            Those of the rows that the latest `append` of their request brought, `[new rows, dim]`: what decides on the
            exit. A view of `hidden` with a batch of 1.

        Raises:
            TypeError, ValueError: the run is not the open one, or hidden doesn't fit.
            RuntimeError: a layer has not attended, or hidden requires grad.
        """
        state = self._state.finish(run)
        check_rows("hidden", hidden, run.slots.shape[0], self._hidden)
        firsts, counts, first = [], [], 0
        for request, count in enumerate(run.counts):
            new = max(0, min(count, state.lengths[run.group + 1][request] - state.newest[request]))
            firsts.append(first + count - new)
            counts.append(new)
            first += count
        if self.batch == 1:
            newest = hidden[firsts[0] : firsts[0] + counts[0]]
        else:
            newest = hidden.index_select(0, self._tables.ranges(firsts, counts))
        if run.group + 1 < self.groups:
            self._hidden[run.group + 1].index_copy_(0, run.slots, hidden)
        self._state = state
        return newest

    def abandon(self) -> None:
        """Give the open run up, if there is one: its rows stay pending, as if it had not been taken."""
        self._state = self._state.abandon()

    # ---- after verification

    def crop(self, lengths: Sequence[int] | torch.Tensor | int) -> None:
        """Forget all slots from a length on, in every layer and at every boundary.

        Args:
            lengths: how many slots each request keeps; one int for all. A tree is dropped; its accepted nodes are kept
                by `commit` instead.

        Raises:
            TypeError, ValueError: a length is no int, below 0, above what was appended, or inside of a tree.
            RuntimeError: a run is open.
        """
        lengths = lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths
        lengths = lengths if hasattr(lengths, "__iter__") else [lengths] * self.batch
        must = f"{self.batch} ints or one"
        self._state = self._state.crop([index_of("lengths", must, item) for item in items_of("lengths", must, lengths)])

    def commit(self, nodes: Sequence[Sequence[int]] | torch.Tensor) -> None:
        """Keep a path of each request's tree as the continuation of its context, and forget the tree's other nodes.

        K and V of accepted nodes move to the slots behind the context in the groups that have them; hidden rows that
        are pending move likewise.

        Args:
            nodes: for each request the accepted nodes from root to leaf, ascending; -1 entries are ignored, so that
                int32 `[batch, depth]` padded with -1 will do (a tensor is read, which waits for its device).

        Raises:
            TypeError, ValueError: nodes are not ascending, there is no such node, or (on CPUs, where looking at the
                tree costs no wait) a node is not a child of the one before it.
            RuntimeError: a run is open.
        """
        must = f"one path of ints for each of {self.batch} requests"
        paths = [
            [node for node in (index_of("nodes", must, item) for item in items_of("nodes", must, path)) if node != -1]
            for path in items_of("nodes", must, nodes)
        ]
        old, state = self._state, self._state.commit(paths)
        for request, path in enumerate(paths):
            if path:
                self._check_path(request, path)
        moves = [move for boundary in range(self.groups) for move in self._hidden_moves(old, boundary, paths)]
        commits = [self._accepted(old, group, paths) for group in range(self.groups)]
        # All that needs memory is done, and a backend that does not serve these caches would not have attended.
        for group, nodes in enumerate(commits):
            if nodes is not None:
                layers = slice(self.layers(group).start, self.layers(group).stop)
                kv_commit(self.k_caches[layers], self.v_caches[layers], *nodes, backend=self.backend)
        for target, rows in moves:
            target.copy_(rows)
        self._state = state

    def _accepted(self, old: State, group: int, paths: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(nodes, context_lens) of what a group has K and V of; None if all of it is in place."""
        nodes = [
            path[: kept(path, context or 0, length)]
            for path, context, length in zip(paths, old.contexts, old.lengths[group + 1], strict=True)
        ]
        if all(path == list(range(len(path))) for path in nodes):
            return None
        steps = max(map(len, nodes))
        table = [path + [-1] * (steps - len(path)) for path in nodes]
        return self._tables.int32(table), self._tables.int32([context or 0 for context in old.contexts])

    def _check_path(self, request: int, path: list[int]) -> None:
        if self.device.type != "cpu":
            return
        context = self._state.contexts[request]
        parents = [
            parent - context for parent in self._tables.parents[request, context : context + path[-1] + 1].tolist()
        ]
        if any(parents[child] != node for node, child in zip([-1, *path], path, strict=False)):
            must = f"a path, each node a child of the one before it, in a tree with parents {parents}"
            raise ValueError(f"specdec_ops.{_OP}: nodes[{request}] must be {must}, got {path}")

    def _hidden_moves(
        self, old: State, boundary: int, paths: list[list[int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(where to, a copy of the rows) of each request whose hidden rows at a boundary are accepted out of place."""
        moves = []
        hidden = self._hidden[boundary].view(self.batch, self.slots, self.dim)
        for request, path in enumerate(paths):
            context = old.contexts[request] or 0
            nodes = path[: kept(path, context, old.lengths[boundary][request])]
            if nodes != list(range(len(nodes))):
                rows = self._tables.int32([context + node for node in nodes])
                moves.append((hidden[request, context : context + len(nodes)], hidden[request].index_select(0, rows)))
        return moves
