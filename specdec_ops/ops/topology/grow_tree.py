"""grow_tree: a level of the trees that a draft grows by its own scores (EAGLE-2)."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core import alloc
from specdec_ops._core.checks import argument_error, as_int32, check_eos, device_error, grad_error
from specdec_ops.vocab_map import VocabMap

from . import contract
from .candidate_pool import CandidatePool, check_int


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
    check_int(op, "level", level, 0, pool.levels - 1)
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
        check_int(op, "width", width, 0, most)
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
