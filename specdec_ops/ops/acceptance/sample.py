"""Sampling with the noise that acceptance uses: tokens of the target, and children of draft nodes."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core import alloc
from specdec_ops._core.checks import argument_error
from specdec_ops.vocab_map import VocabMap

from . import contract
from .checks import (
    MAX_DRAWS,
    MAX_NODES,
    check_count,
    check_ids,
    check_law,
    check_logits,
    check_noise,
    check_vocab_map,
    check_written,
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Children:
    """Sampled draft tokens, on the draft's device.

    Attributes:
        tokens: int32 `[batch, rows, count]`: target ids in the order drawn; -1 where a row has fewer, or is invalid.
        logprobs: float32 like tokens: the natural log of each token's probability in its row's distribution (after
            temperature, top_k and top_p), not conditioned on the tokens before it; -inf beside -1.
        logsumexp: float32 `[batch, rows]`: of logits / temperature over the kept tokens; -inf for an invalid row. So
            any kept token's log-probability is its logit / temperature less this.
        status: int32 `[batch]`: 0, or `AcceptStatus` bits: DRAFT_INVALID if a row held NaN or +inf, or only -inf, and
            SETTING_INVALID.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    status: torch.Tensor


def sample_tokens(
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    count: int | None = None,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Sample one token per row, or `count` different ones: from the target, at positions where nothing was drafted.

    A loop of it is the plain decoding that `match_accept` reproduces token for token. There positions are those of node
    0, the last committed token; here they are of the token drawn, one further on:

        >>> logits, length = torch.randn(2, 50), 7  # the 7 tokens so far have the positions 0 to 6
        >>> drawn = sample_tokens(logits, seeds=3, positions=length)
        >>> node_0, root = torch.zeros(2, 1, dtype=torch.int32), Tree.chain(1).to("cpu")
        >>> accepted = match_accept(logits[:, None], node_0, root, seeds=3, positions=length - 1)
        >>> torch.equal(drawn, accepted.next_token)
        True

    Tokens race: each gets an exponential variable from Philox4x32-10, keyed by seed, position and token, and the one
    with the greatest ratio of probability to variable wins. So a token depends on its row, seed and position alone,
    and tails are right down to a probability of about 2^-32. With `count`, the race's first ones come out in order of
    finish: draws without replacement, of which the first is the plain sample.

        >>> roots = sample_tokens(logits, seeds=3, positions=length, count=4)  # of a forest, say
        >>> roots.shape, torch.equal(roots[:, 0], drawn)
        (torch.Size([2, 4]), True)

    This noise is shared with no other op than `match_accept`. For several candidates from the target, such as the roots
    of `longest_path_accept`, take `count`, not `sample_children`: its noise is that of a draft's children, and roots
    drawn with it at the positions of node 0 would be those that node 0's children race for, too.

    Args:
        logits: float32, bfloat16 or float16 `[rows, vocab]`, any strides with a contiguous last dimension. float64 runs
            with the torch backend.
        seeds: int64 `[rows]` (uint64, int32 or uint32 too), or an int for all rows.
        positions: int32 or int64 `[rows]`, or an int: the absolute position of the token to be drawn.
        count: tokens per row, from 1. None: one, without a dimension of its own.
        temperature: float32 `[rows]` or a number of at least 0; at 0 the row's argmax, the lowest id among equals, or
            with `count` its greatest logits.
        top_k: int32 or int64 `[rows]` or an int: keep the k most likely tokens; 0 is off.
        top_p: float32 `[rows]` or a number: of these, keep the most likely ones that together have at least this share,
            and at least one; 1 is off.
        out: int32 `[rows]`, with `count` `[rows, count]`, contiguous: where to write.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("sample_tokens")`.

    Returns:
        int32 `[rows]`, with `count` `[rows, count]`; `out` where given. -1 where a row has fewer tokens whose
        probability is above 0. A row that holds NaN or +inf, or only -inf, gives one token: its first +inf, else its
        argmax without NaN, else 0. What odd values of temperature, top_k and top_p tensors count as, `match_accept`
        tells.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    Philox is that of Salmon et al., 2011; racing exponentials is the Gumbel-max trick on another scale, and the first
    ones of a race are the Gumbel-top-k trick (Kool et al., 2019).
    """
    op = "sample_tokens"
    rows, _ = check_logits(op, "logits", "[rows, vocab]", logits)
    device = logits.device
    drawn, shape = 1, (rows,)
    if count is not None:
        drawn = check_count(op, "count", count, 1, MAX_DRAWS)
        shape = (rows, count)
    law = check_law(op, temperature, top_k, top_p, rows, device)
    noise = check_noise(op, seeds, positions, rows, device)
    arguments = contract.SampleArguments(logits.unsqueeze(1), None, drawn, False, None, 0, "sample", *law, *noise)
    if out is None:
        return contract.sample(arguments, backend, with_law=False).tokens.view(shape)
    check_written(op, "out", out, shape, device)
    status = alloc.empty((rows,), torch.int32, device)
    contract.sample(arguments, backend, contract.SampleOutputs(out.view(rows, 1, drawn), None, None, status))
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

    For children of draft nodes alone. Tokens of the target, such as the roots of a forest, come from `sample_tokens`
    with its `count`: drawn here they would share their noise with the children of the node that they are drawn for.

    Args:
        draft_logits: float32, bfloat16 or float16 `[batch, rows, vocab]` (`draft_vocab` with vocab_map), any strides
            with a contiguous last dimension: one row for each node that is to have children.
        count: children per row, from 1.
        replacement: whether a row's children may repeat. Without, all of them come from one race, in order of finish.
        seeds: int64 `[batch]` (uint64, int32 or uint32 too), or an int for all requests: those that acceptance gets.
        positions: int32 or int64 `[batch]`, or an int: the absolute position of node 0, as acceptance gets it. Not that
            of the row.
        parents: int32 or int64 `[batch, rows]`: the node whose children each row draws. Nodes of one round must get
            different noise, so no node may be drawn for twice.
        first_parent: where parents is None, row r is node `first_parent + r`.
        temperature: float32 `[batch]` or a number of at least 0. At 0 the most likely tokens in order (with
            replacement: the argmax each time).
        top_k: int32 or int64 `[batch]` or an int: keep the k most likely tokens; 0 is off.
        top_p: float32 `[batch]` or a number: of these, keep the most likely ones that together have at least this
            share, and at least one; 1 is off.
        vocab_map: the tokens that the entries of draft_logits stand for.
        out: a Children to write into, with contiguous tensors.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("sample_children")`.

    Returns:
        Children, `out` where given. At temperature 0 its logprobs and logsumexp are those of temperature 1 without
        filters. What odd values of temperature, top_k and top_p tensors count as, `match_accept` tells.

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
        raise TypeError(argument_error(op, "replacement", "a bool", replacement))
    if parents is not None:
        parents = check_ids(op, "parents", parents, batch, rows, device)
    check_count(op, "first_parent", first_parent, 0, MAX_NODES)
    if rows > MAX_NODES + 1 - first_parent:
        must = f"of at most {MAX_NODES + 1 - first_parent} rows per request, first_parent being {first_parent}"
        raise ValueError(argument_error(op, "draft_logits", must, draft_logits))
    draft_to_target = None
    if vocab_map is not None:
        check_vocab_map(op, vocab_map, device)
        draft_to_target = vocab_map.draft_to_target
        if draft_to_target.shape[0] != draft_vocab:
            must = f"of {draft_vocab} draft entries like draft_logits"
            raise ValueError(f"specdec_ops.{op}: vocab_map must be {must}, got {draft_to_target.shape[0]}")
    law = check_law(op, temperature, top_k, top_p, batch, device)
    noise = check_noise(op, seeds, positions, batch, device)
    arguments = contract.SampleArguments(
        draft_logits, draft_to_target, count, replacement, parents, first_parent, "draft", *law, *noise
    )
    if out is None:
        return Children(*contract.sample(arguments, backend, with_law=True))
    if not isinstance(out, Children):
        raise TypeError(argument_error(op, "out", "a specdec_ops.Children", out))
    check_written(op, "out.tokens", out.tokens, (batch, rows, count), device)
    check_written(op, "out.logprobs", out.logprobs, (batch, rows, count), device, torch.float32)
    check_written(op, "out.logsumexp", out.logsumexp, (batch, rows), device, torch.float32)
    check_written(op, "out.status", out.status, (batch,), device)
    contract.sample(arguments, backend, contract.SampleOutputs(out.tokens, out.logprobs, out.logsumexp, out.status))
    return out
