"""Sampling with the noise that acceptance uses: tokens of the target, and children of draft nodes."""

from __future__ import annotations

import dataclasses

import torch

from . import _alloc, _library_accept
from ._accept_checks import (
    MAX_DRAWS,
    MAX_NODES,
    check_count,
    check_law,
    check_logits,
    check_noise,
    check_vocab_map,
    check_written,
)
from ._checks import wrong, wrong_device, wrong_strides
from .vocab_map import VocabMap


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Children:
    """Sampled draft tokens, on the draft's device."""

    tokens: torch.Tensor
    """int32 [batch, rows, count]: target ids in the order drawn; -1 where a row has fewer, or is invalid."""
    logprobs: torch.Tensor
    """float32 like tokens: the natural log of each token's probability in its row's distribution (after temperature,
    top_k and top_p), not conditioned on the tokens before it; -inf beside -1."""
    logsumexp: torch.Tensor
    """float32 [batch, rows]: of logits / temperature over the kept tokens; -inf for an invalid row. So any kept token's
    log-probability is its logit / temperature less this."""
    status: torch.Tensor
    """int32 [batch]: 0, or specdec_ops.accept.STATUS_DRAFT_INVALID if a row held NaN or +inf, or only -inf."""


def sample_tokens(
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Sample one token per row. A loop of it is the plain decoding that `match_accept` reproduces token for token.

    Tokens race: each gets an exponential variable from Philox4x32-10, keyed by seed, position and token, and the one
    with the greatest ratio of probability to variable wins. So a token depends on its row, seed and position alone,
    and tails are right down to a probability of about 2^-32.

    Args:
        logits: float32, bfloat16 or float16 `[rows, vocab]`, any strides with a contiguous last dimension. float64 runs
            with the torch backend.
        seeds: int64 `[rows]`, or an int for all rows.
        positions: int32 `[rows]`, or an int: the absolute position of the token to be drawn.
        temperature: float32 `[rows]` or a number of at least 0; at 0 the row's argmax, the lowest id among equals.
        top_k: int32 `[rows]` or an int: keep the k most likely tokens; 0 is off.
        top_p: float32 `[rows]` or a number: of these, keep the most likely ones that together have at least this share,
            and at least one; 1 is off.
        out: int32 `[rows]`, contiguous: where to write.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("sample")`.

    Returns:
        int32 `[rows]`, `out` where given. A row that holds NaN or +inf, or only -inf, gives its first +inf, else its
        argmax without NaN, else 0.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    Philox is that of Salmon et al., 2011; racing exponentials is the Gumbel-max trick on another scale.
    """
    op = "sample_tokens"
    rows, _ = check_logits(op, "logits", "[rows, vocab]", logits)
    device = logits.device
    law = check_law(op, temperature, top_k, top_p, rows, device)
    noise = check_noise(op, seeds, positions, rows, device)
    arguments = (logits.unsqueeze(1), None, 1, False, None, 0, "sample", *law, *noise)
    if out is None:
        return _library_accept.sample(arguments, False, backend)[0].view(rows)
    check_written(op, "out", out, (rows,), device)
    status = _alloc.empty((rows,), torch.int32, device)
    _library_accept.sample(arguments, False, backend, (out.view(rows, 1, 1), None, None, status))
    return out


def sample_children(
    draft_logits: torch.Tensor,
    count: int,
    *,
    replacement: bool = False,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    parents: torch.Tensor | None = None,
    first_parent: int = 0,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    vocab_map: VocabMap | None = None,
    out: Children | None = None,
    backend: str = "auto",
) -> Children:
    """Sample the children of draft nodes, so that `tree_accept` and `chain_accept` can be told what was sampled.

    Acceptance is lossless only if the distribution it is told is the one the tokens came from: give it these same
    draft_logits, temperature, top_k, top_p, vocab_map and replacement.

    Args:
        draft_logits: float32, bfloat16 or float16 `[batch, rows, vocab]` (`draft_vocab` with vocab_map), any strides
            with a contiguous last dimension: one row for each node that is to have children.
        count: children per row, from 1.
        replacement: whether a row's children may repeat. Without, all of them come from one race, in order of finish.
        seeds: int64 `[batch]`, or an int for all requests: those that acceptance gets.
        positions: int32 `[batch]`, or an int: the absolute position of node 0, as acceptance gets it. Not that of the
            row.
        parents: int32 `[batch, rows]`: the node whose children each row draws. Nodes of one round must get different
            noise, so no node may be drawn for twice.
        first_parent: where parents is None, row r is node `first_parent + r`.
        temperature: float32 `[batch]` or a number of at least 0. At 0 the most likely tokens in order (with
            replacement: the argmax each time).
        top_k: int32 `[batch]` or an int: keep the k most likely tokens; 0 is off.
        top_p: float32 `[batch]` or a number: of these, keep the most likely ones that together have at least this
            share, and at least one; 1 is off.
        vocab_map: the tokens that the entries of draft_logits stand for.
        out: a Children to write into, with contiguous tensors.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("sample")`.

    Returns:
        Children, `out` where given. At temperature 0 its logprobs and logsumexp are those of temperature 1 without
        filters.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    Sampling without replacement by one race is the Gumbel-top-k trick (Kool et al., 2019), as in Sequoia. Every token
    that the filters keep can be drawn, however unlikely it is next to those before it: -1 means that none is left.
    """
    op = "sample_children"
    batch, rows, draft_vocab = check_logits(op, "draft_logits", "[batch, rows, vocab]", draft_logits)
    device = draft_logits.device
    check_count(op, "count", count, 1, MAX_DRAWS)
    if type(replacement) is not bool:
        raise TypeError(wrong(op, "replacement", "a bool", replacement))
    if parents is not None:
        parents = _check_parents(op, parents, batch, rows, device)
    check_count(op, "first_parent", first_parent, 0, MAX_NODES)
    draft_to_target = None
    if vocab_map is not None:
        check_vocab_map(op, vocab_map, device)
        draft_to_target = vocab_map.draft_to_target
        if draft_to_target.shape[0] != draft_vocab:
            must = f"of {draft_vocab} draft entries like draft_logits"
            raise ValueError(f"specdec_ops.{op}: vocab_map must be {must}, got {draft_to_target.shape[0]}")
    law = check_law(op, temperature, top_k, top_p, batch, device)
    noise = check_noise(op, seeds, positions, batch, device)
    arguments = (draft_logits, draft_to_target, count, replacement, parents, first_parent, "draft", *law, *noise)
    if out is None:
        return Children(*_library_accept.sample(arguments, True, backend))
    if not isinstance(out, Children):
        raise TypeError(wrong(op, "out", "a specdec_ops.Children", out))
    check_written(op, "out.tokens", out.tokens, (batch, rows, count), device)
    check_written(op, "out.logprobs", out.logprobs, (batch, rows, count), device, torch.float32)
    check_written(op, "out.logsumexp", out.logsumexp, (batch, rows), device, torch.float32)
    check_written(op, "out.status", out.status, (batch,), device)
    _library_accept.sample(arguments, True, backend, (out.tokens, out.logprobs, out.logsumexp, out.status))
    return out


def _check_parents(op: str, parents, batch: int, rows: int, device) -> torch.Tensor:
    if not isinstance(parents, torch.Tensor) or parents.dtype != torch.int32:
        raise TypeError(wrong(op, "parents", f"int32 [{batch}, {rows}]", parents))
    if parents.shape != (batch, rows):
        raise ValueError(wrong(op, "parents", f"int32 [{batch}, {rows}]", parents))
    if parents.device != device:
        raise ValueError(wrong_device(op, "parents", device, parents))
    if not parents.is_contiguous():
        raise ValueError(wrong_strides(op, "parents", "contiguous", parents))
    return parents
