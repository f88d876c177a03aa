"""Trees that a draft grows level by level by its own scores (EAGLE-2): their candidates, and which of them stay."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core import alloc
from specdec_ops._core.checks import (
    INT32_MAX,
    argument_error,
    as_int32,
    check_eos,
    device_error,
    grad_error,
    is_int,
)
from specdec_ops.topology import Topology
from specdec_ops.vocab_map import VocabMap

from . import contract

MAX_LEVELS = 64
MAX_WIDTH = 256
MAX_BRANCHING = 64
MAX_PRUNED_NODES = 2048


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False, init=False)
class CandidatePool:
    """What a draft has considered in one round, and the tree of what it has run. `grow_tree` writes it level by level.

    Candidates lie level by level, within a level row by row, within a row as `grow_tree` gets them. Level 0 has one
    row, the root's; every other level has `width` rows, one for each node that the level before it expands. A place
    that holds no candidate has token -1 and score -inf.

    The draft's own tree has the root as node 0 and then `width` nodes for each level but the last, in fixed places: row
    r of level l is node `query_start(l) + r`, its K and V lie in slot `context_lens[b] + node` of the draft's cache,
    and its position is `context_lens[b] + l`. So sizes never depend on what the draft says, and one CUDA graph serves
    all rounds. A place without a node is blank in `topology`: no parent, depth 0, an empty ancestor set. Its row of
    attention sees the context alone, and nobody sees it.

    Made by `CandidatePool.empty`, once for all rounds: `grow_tree(level=0)` begins a new one.

    Attributes:
        tokens: int32 `[batch, candidates]`: target ids, or -1.
        scores: float32 like tokens: sums of logprobs from the root, at most 0; -inf beside -1.
        parents: int32 like tokens: the candidate that each one follows, -1 for the root.
        expanded: int32 like tokens: the draft's node that a candidate has become, -1 where the draft has not run it.
        candidates: int32 `[batch, nodes]`: the reverse: the candidate that is each node of the draft, -1 for the root.
        topology: the draft's tree, for `tree_attention` and whatever else runs it. Its tensors are written in place.
        status: int32 `[batch]`: 0, or `GrowStatus` bits.
        levels: how many levels there are: passes of the draft, the root's included.
        width: the most nodes that a level expands.
        branching: candidates per row.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    parents: torch.Tensor
    expanded: torch.Tensor
    candidates: torch.Tensor
    topology: Topology
    status: torch.Tensor
    levels: int
    width: int
    branching: int

    def __init__(self) -> None:
        raise TypeError("specdec_ops.CandidatePool: a pool must be made by CandidatePool.empty(batch, ...)")

    @classmethod
    def empty(
        cls, batch: int, *, levels: int, width: int, branching: int, device: torch.device | str | int = "cpu"
    ) -> CandidatePool:
        """A pool without candidates, for `branching * (1 + (levels - 1) * width)` of them per request.

        Args:
            batch: requests.
            levels: passes of the draft, the root's included, 1 to 64. A tree has at most so many levels below the root.
            width: the most nodes that a level expands, 1 to 256. (EAGLE calls it top_k, as it does branching.)
            branching: candidates per row, 1 to 64.
            device: a torch device.

        Raises:
            TypeError: a size is not an int.
            ValueError: it is out of range.
        """
        op = "CandidatePool.empty"
        _check_int(op, "batch", batch, 0, INT32_MAX)
        _check_int(op, "levels", levels, 1, MAX_LEVELS)
        _check_int(op, "width", width, 1, MAX_WIDTH)
        _check_int(op, "branching", branching, 1, MAX_BRANCHING)
        size, nodes = branching * (1 + (levels - 1) * width), 1 + (levels - 1) * width

        def filled(value, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full((batch, *shape), value, dtype=dtype, device=device)

        ancestors = filled(0, nodes, (nodes + 63) // 64, dtype=torch.int64)
        ancestors[:, 0, 0] = 1
        topology = Topology(
            parents=filled(-1, nodes),
            depths=filled(0, nodes),
            ancestors=ancestors,
            first_child=filled(-1, nodes),
            next_sibling=filled(-1, nodes),
            num_nodes=filled(1),
            status=filled(0),
        )
        pool = object.__new__(cls)
        pool._set(
            tokens=filled(-1, size),
            scores=filled(float("-inf"), size, dtype=torch.float32),
            parents=filled(-1, size),
            expanded=filled(-1, size),
            candidates=filled(-1, nodes),
            topology=topology,
            status=filled(0),
            levels=levels,
            width=width,
            branching=branching,
        )
        return pool

    @property
    def batch(self) -> int:
        """Requests."""
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        """Candidates per request that there is room for."""
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tokens.device

    def query_start(self, level: int) -> int:
        """The draft's node that row 0 of a level is: 0, then `1 + (level - 1) * width`."""
        return 0 if level == 0 else 1 + (level - 1) * self.width

    def to(self, device: torch.device | str | int) -> CandidatePool:
        """The same on another device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor | Topology)}
        other = object.__new__(CandidatePool)
        other._set(**{**values, **tensors})
        return other

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        sizes = f"{self.levels} levels, width {self.width}, branching {self.branching}"
        return f"<CandidatePool of {self.batch} requests, {sizes}, on {self.device}>"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """The nodes that the draft runs next, best first, on the pool's device.

    Attributes:
        tokens: int32 `[batch, width]`: target ids, or -1 where there is no node. An embedding refuses -1: give it
            `tokens.clamp(min=0)`. What is computed for such a row is not looked at.
        parent_rows: int32 `[batch, width]`: which row of the level just run each one follows, to gather hidden states;
            -1 beside -1.
        scores: float32 `[batch, width]`: as in the pool, in falling order; -inf beside -1.
    """

    tokens: torch.Tensor
    parent_rows: torch.Tensor
    scores: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PrunedTree:
    """The drafted tree that the target is to judge, on the pool's device. Node 0 is the root, the last committed token.

    Attributes:
        tokens: int32 `[batch, nodes]`: target ids, as `tree_accept` takes them; -1 from num_nodes on.
        topology: of these nodes, in level order; `topology.num_nodes` says how many each request has. Its status is
            not 0 where a candidate stayed whose parent did not, which `grow_tree` never leaves: it became a root.
        pool_ids: int32 `[batch, nodes]`: the candidate in the pool that each node is; -1 for the root and where there
            is no node.
        expanded: int32 `[batch, nodes]`: the draft's node that each node is, which says where its K and V lie in the
            draft's cache; 0 for the root; -1 where the draft has not run it, or there is no node.
    """

    tokens: torch.Tensor
    topology: Topology
    pool_ids: torch.Tensor
    expanded: torch.Tensor

    def draft_path(self, nodes: torch.Tensor) -> torch.Tensor:
        """An accepted path as nodes of the draft, for `kv_commit` of the draft's cache.

        Only the last node of a path can be one that the draft has not run: what follows a node is known because the
        draft has run it. So the draft's cache has the whole path, or is one row short.

        Args:
            nodes: int32 or int64 `[batch, depth + 1]`: `Acceptance.nodes`, padded with -1.

        Returns:
            int32 like nodes: ascending nodes of `CandidatePool.topology`, then -1.
        """
        path = self.expanded.gather(1, nodes.clamp(0, self.expanded.shape[1] - 1).long())
        return torch.where((nodes >= 0) & (nodes < self.expanded.shape[1]), path, -1)


def grow_tree(
    pool: CandidatePool,
    top_tokens: torch.Tensor,
    top_logprobs: torch.Tensor,
    *,
    level: int,
    width: int | None = None,
    eos: int | tuple[int, ...] | list[int] | None = None,
    vocab_map: VocabMap | None = None,
    active: torch.Tensor | None = None,
    backend: str = "auto",
) -> Frontier:
    """Take what the draft says after one level, and choose the nodes that it runs next. One launch on a GPU.

    A candidate's score is its parent's plus its own logprob: the draft's log-probability of the path from the root. The
    frontier is the best `width` candidates of this level, by (score falling, index rising), without those that end the
    text. All candidates stay in the pool for `prune_tree`.

    A round, with a draft that takes `(tokens, rows, query_start)`; the rows of parents are for drafts that feed on
    hidden states, as EAGLE's and those of Mixture of Attentions do:

        for level in range(pool.levels):
            hidden = draft(tokens, parent_rows, pool.query_start(level))  # with tree_attention over pool.topology
            found = exit_confidence(hidden.flatten(0, 1), head, top_k=pool.branching)
            shape = (pool.batch, -1, pool.branching)
            frontier = grow_tree(pool, found.top_tokens.view(shape), found.top_logprobs.view(shape), level=level)
            tokens, parent_rows = frontier.tokens.clamp(min=0), frontier.parent_rows.clamp(min=0)
        tree = prune_tree(pool, 60, root_tokens=root_tokens)

    Levels come in order, from 0, which empties the pool. The loop may end early: then the pool has fewer levels. Rows
    that follow no node (beside tokens of -1) are not looked at, and may hold anything.

    Args:
        pool: where the candidates go. It and its topology are written in place.
        top_tokens: int32 or int64 `[batch, rows, branching]`: each row's most likely tokens, as `exit_confidence` and
            `sample_children` give them; target ids, or with vocab_map the draft's entries. -1 is none. There is 1 row
            at level 0, then one for each column of the last frontier.
        top_logprobs: float32 like top_tokens: their log-probabilities. Above 0 they count as 0. -inf is no candidate;
            nor are NaN and +inf, which `pool.status` tells of.
        level: which pass of the draft this was, from 0.
        width: columns of the frontier, at most `pool.width`, which None stands for. The last level has no frontier: it
            has no columns.
        eos: ids of the tokens that end a text: an int or up to 8. They stay candidates and are never expanded.
        vocab_map: which target tokens the entries of a reduced draft vocabulary are. `sample_children` and
            `exit_confidence` with a map of their own give target ids already.
        active: bool `[batch]`: requests that still draft. The others get no candidates here and an empty frontier,
            also at later levels; their rows are not looked at. None: all do.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("grow_tree")`.

    Returns:
        The Frontier. Nothing waits for the device; a request's results depend on that request alone, and are the same
        to the last bit on every backend.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range or device.
        RuntimeError: the named backend is not available, or an input requires grad.

    EAGLE-2's expansion (Li et al., 2024), with an order that says what happens among equals.
    """
    op = "grow_tree"
    if not isinstance(pool, CandidatePool):
        raise TypeError(argument_error(op, "pool", "a specdec_ops.CandidatePool", pool))
    _check_int(op, "level", level, 0, pool.levels - 1)
    tokens, topology = pool.tokens, pool.topology
    batch, device = tokens.shape[0], tokens.device
    rows = _check_rows(op, pool, level, top_logprobs)
    if not isinstance(top_tokens, torch.Tensor) or top_tokens.dtype != torch.int32:
        top_tokens = as_int32(op, "top_tokens", f"[{batch}, {rows}, {pool.branching}]", top_tokens)
    if top_tokens.shape != top_logprobs.shape:
        must = f"int32 or int64 [{batch}, {rows}, {pool.branching}] like top_logprobs"
        raise ValueError(argument_error(op, "top_tokens", must, top_tokens))
    if top_tokens.device != device:
        raise ValueError(device_error(op, "top_tokens", device, top_tokens))
    most = pool.width if level + 1 < pool.levels else 0
    if width is None:
        width = most
    else:
        _check_int(op, "width", width, 0, most)
    draft_to_target = None
    if vocab_map is not None:
        if not isinstance(vocab_map, VocabMap):
            raise TypeError(argument_error(op, "vocab_map", "a specdec_ops.VocabMap or None", vocab_map))
        draft_to_target = vocab_map.draft_to_target
        if draft_to_target.device != device:
            raise ValueError(device_error(op, "vocab_map", device, draft_to_target))
    if active is not None:
        if not isinstance(active, torch.Tensor) or active.dtype != torch.bool:
            raise TypeError(argument_error(op, "active", f"bool [{batch}] or None", active))
        if active.shape != (batch,):
            raise ValueError(argument_error(op, "active", f"bool [{batch}] or None", active))
        if active.device != device:
            raise ValueError(device_error(op, "active", device, active))
        active = active.contiguous()
    first_parent = pool.query_start(level)
    arguments = contract.GrowTreeArguments(
        top_logprobs.contiguous(),
        top_tokens.contiguous(),
        active,
        draft_to_target,
        check_eos(op, eos),
        level,
        first_parent,
        first_parent * pool.branching,
        pool.query_start(level + 1),
    )
    table = (batch, width)
    frontier = Frontier(
        alloc.empty(table, torch.int32, device),
        alloc.empty(table, torch.int32, device),
        alloc.empty(table, torch.float32, device),
    )
    outputs = contract.GrowTreeOutputs(
        frontier.tokens,
        frontier.parent_rows,
        frontier.scores,
        tokens,
        pool.scores,
        pool.parents,
        pool.expanded,
        pool.candidates,
        topology.parents,
        topology.depths,
        topology.ancestors,
        topology.first_child,
        topology.next_sibling,
        topology.num_nodes,
        pool.status,
    )
    contract.grow_tree(arguments, backend, outputs)
    return frontier


def _check_rows(op: str, pool: CandidatePool, level: int, top_logprobs) -> int:
    """Check what decides the number of rows; return it."""
    batch, branching = pool.tokens.shape[0], pool.branching
    rows = "1" if level == 0 else "rows"
    if not isinstance(top_logprobs, torch.Tensor) or top_logprobs.dtype != torch.float32:
        raise TypeError(argument_error(op, "top_logprobs", f"float32 [{batch}, {rows}, {branching}]", top_logprobs))
    shape, most = top_logprobs.shape, 1 if level == 0 else pool.width
    if len(shape) != 3 or shape[0] != batch or shape[2] != branching or not 1 <= shape[1] <= most:
        must = f"float32 [{batch}, {rows}, {branching}]"
        must += " at level 0" if level == 0 else f" with 1 to {most} rows"
        raise ValueError(argument_error(op, "top_logprobs", must, top_logprobs))
    if top_logprobs.device != pool.tokens.device:
        raise ValueError(device_error(op, "top_logprobs", pool.tokens.device, top_logprobs))
    if top_logprobs.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(op))
    return shape[1]


def prune_tree(pool: CandidatePool, nodes: int, *, root_tokens: torch.Tensor, backend: str = "auto") -> PrunedTree:
    """Keep the root and the best `nodes - 1` candidates of a round: the tree that the target judges. One launch.

    Best by (score falling, index rising), and in the order of the pool, so parents come first and levels lie one after
    the other. They are a tree, because a score is at most its parent's (logprobs are at most 0, and a float32 sum is
    rounded without changing that order) and a parent's index is lower: whatever is kept, its parent was before it in
    the order, and is kept too. EAGLE's code takes the unordered top-k, which may drop the parent of a child of
    probability 1, and then looks the parent up by bisection and silently finds another.

    Its `tokens` and `topology` are what `greedy_accept` and `tree_accept` (without draft_logits) take, and of the
    accepted path `draft_path` makes what commits the draft's cache:

        accepted = greedy_accept(target_logits, tree.tokens, tree.topology)
        kv_commit(target_k_caches, target_v_caches, accepted.nodes, context_lens)
        kv_commit(draft_k_caches, draft_v_caches, tree.draft_path(accepted.nodes), context_lens)

    Args:
        pool: as `grow_tree` has left it.
        nodes: of every tree, the root included, 1 to 2048. A request with fewer candidates gets fewer nodes:
            `topology.num_nodes` says how many. Among equals a tree keeps those of the lower index.
        root_tokens: int32 or int64 `[batch]`: the last committed tokens.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("prune_tree")`.

    Returns:
        The PrunedTree. Nothing waits for the device.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range or device.
        RuntimeError: the named backend is not available.

    EAGLE-2's reranking (Li et al., 2024).
    """
    op = "prune_tree"
    if not isinstance(pool, CandidatePool):
        raise TypeError(argument_error(op, "pool", "a specdec_ops.CandidatePool", pool))
    _check_int(op, "nodes", nodes, 1, MAX_PRUNED_NODES)
    batch, device = pool.tokens.shape[0], pool.tokens.device
    if not isinstance(root_tokens, torch.Tensor) or root_tokens.dtype != torch.int32:
        root_tokens = as_int32(op, "root_tokens", f"[{batch}]", root_tokens)
    if root_tokens.shape != (batch,):
        raise ValueError(argument_error(op, "root_tokens", f"int32 or int64 [{batch}]", root_tokens))
    if root_tokens.device != device:
        raise ValueError(device_error(op, "root_tokens", device, root_tokens))
    arguments = contract.PruneTreeArguments(
        pool.scores, pool.tokens, pool.parents, pool.expanded, root_tokens.contiguous(), nodes
    )
    tokens, pool_ids, expanded, *topology = contract.prune_tree(arguments, backend)
    return PrunedTree(tokens, Topology(*topology), pool_ids, expanded)


def _check_int(op: str, name: str, value, low: int, high: int) -> None:
    must = f"an int from {low} to {high}"
    if not is_int(value):
        raise TypeError(argument_error(op, name, must, value))
    if not low <= value <= high:
        raise ValueError(argument_error(op, name, must, value))
