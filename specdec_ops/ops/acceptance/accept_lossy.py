"""Acceptance rules that change the target's distribution, for more accepted tokens. Never a default of anything."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core.checks import argument_error, check_eos
from specdec_ops.topology import Topology
from specdec_ops.vocab_map import VocabMap

from . import contract
from .accept import MAX_DEPTH, Acceptance, accepted
from .checks import (
    MAX_DRAWS,
    check_count,
    check_draft_law,
    check_draft_logits,
    check_fraction,
    check_law,
    check_links,
    check_noise,
    check_target,
    check_tokens,
    check_written,
)
from .contract import AcceptArguments


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LongestPath:
    """What longest_path_accept gives each request, on the target's device.

    Attributes:
        tokens: int32 `[batch, max_depth + 1]`: the accepted path's tokens, its root first, then -1. Without the next
            tokens.
        nodes: int32 `[batch, max_depth + 1]`: the accepted path from its root to its last node, then -1.
        num_accepted: int32 `[batch]`: nodes of the path. At least 1, since the root is counted.
        next_tokens: int32 `[batch, width]`: different candidates for what follows, the roots of the next round; -1
            where fewer are possible, and everywhere if the path ends with a token in `eos`.
        status: int32 `[batch]`: 0, or `AcceptStatus` bits of the rows that the walk has read.
        finished: bool `[batch]`: whether the path ends with a token in `eos`; then there are no next tokens. An id of
            `eos` among next_tokens ends nothing yet: those are candidates, and it does if it is the root of a later
            round's path.
    """

    tokens: torch.Tensor
    nodes: torch.Tensor
    num_accepted: torch.Tensor
    next_tokens: torch.Tensor
    status: torch.Tensor
    finished: torch.Tensor


def typical_accept(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    topology: Topology,
    *,
    epsilon: float = 0.3,
    delta: float = 0.09,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    eos: int | tuple[int, ...] | None = None,
    max_depth: int | None = None,
    out: Acceptance | None = None,
    backend: str = "auto",
) -> Acceptance:
    """Medusa's typical acceptance. **Lossy**: the text does not follow the target's distribution.

    A node is accepted if its parent is and its probability is above `min(epsilon, delta * exp(-H))`, H being the
    entropy of its parent's row in nats. The deepest accepted node wins; among equals the more likely path, then the
    lowest node. The next token is sampled from the tokens that pass the same threshold after it.

    Args:
        target_logits: float32, bfloat16 or float16 `[batch, nodes, vocab]`. Row n scores what follows node n.
        draft_tokens: int32 or int64 `[batch, nodes]`; that of node 0 is not read. -1 is padding: no token.
        topology: the trees; see match_accept.
        epsilon: the threshold where the target is sure, from 0 to 1.
        delta: scales the threshold where it is not, from 0 to 1.
        seeds: see match_accept, as for all that follow. Only the next token is drawn; acceptance itself is
            deterministic.
        positions: the absolute position of node 0.
        temperature: of the target; at 0 the rule is greedy_accept.
        top_k: of the target.
        top_p: of the target.
        eos: ids that end a sequence.
        max_depth: the most draft tokens to accept; nodes - 1 by default.
        out: an Acceptance to write into.
        backend: as in match_accept.

    Returns:
        An Acceptance, `out` where given.

    Raises:
        TypeError, ValueError, RuntimeError: as in match_accept.

    After Medusa (Cai et al., 2024), whose defaults these are.
    """
    op = "typical_accept"
    batch, nodes, _ = check_target(op, target_logits)
    device = target_logits.device
    check_fraction(op, "epsilon", epsilon)
    check_fraction(op, "delta", delta)
    law = check_law(op, temperature, top_k, top_p, batch, device)
    arguments = AcceptArguments(
        *("typical", target_logits, check_tokens(op, draft_tokens, batch, nodes, device), None, None),
        *(*check_links(op, topology, batch, nodes, device), *law, *law),
        *check_noise(op, seeds, positions, batch, device),
        eos=check_eos(op, eos), thresholds=(epsilon, delta), replacement=False, child_rows=False,
    )  # fmt: skip
    return accepted(op, arguments, nodes - 1, max_depth, out, backend)


def longest_path_accept(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    topology: Topology,
    draft_logits: torch.Tensor,
    *,
    width: int,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    draft_temperature: torch.Tensor | float | None = None,
    draft_top_k: torch.Tensor | int | None = None,
    draft_top_p: torch.Tensor | float | None = None,
    vocab_map: VocabMap | None = None,
    eos: int | tuple[int, ...] | None = None,
    max_depth: int | None = None,
    out: LongestPath | None = None,
    backend: str = "auto",
) -> LongestPath:
    """The rule of improved MCSD for a forest whose roots the target has drawn. **Lossy**.

    The roots are candidates for one position, drawn from the target in the round before (`next_tokens`). Every other
    node is accepted on its own with probability `min(1, p / q)`, p and q of its parent. The deepest node whose whole
    path is accepted wins, the lowest among equals; its root is the first token emitted. If no path gets beyond its
    root, the lowest root wins. The next round's roots are drawn without replacement: from what is left of p
    after q where the winner has children, from p where it has none or is a root. From p every token that the filters
    keep can be drawn; from a difference p - q those that it gives more than 0 in float32.

    Args:
        target_logits: float32, bfloat16 or float16 `[batch, nodes, vocab]`. Row n scores what follows node n.
        draft_tokens: int32 or int64 `[batch, nodes]`, target ids, the roots' among them. -1 is padding: no token, and
            no sibling behind it. A root outside of the vocabulary is left out, with
            `AcceptStatus.DRAFT_TOKEN_IMPOSSIBLE`; node 0 is a root also then.
        topology: the forests; see match_accept. Node 0 and its siblings are the roots. No node stands for the last
            committed token.
        draft_logits: `[batch, nodes, vocab]`, or `[batch, nodes, draft_vocab]` with vocab_map: row n is what the
            children of node n were sampled from.
        width: how many next tokens to draw, from 1.
        seeds: see match_accept, as for all that follow and are not explained.
        positions: the absolute position of the roots.
        temperature: of the target. At 0 a node is accepted if it is the argmax, and the next tokens are the most
            likely.
        top_k: of the target.
        top_p: of the target.
        draft_temperature: that with which the draft tokens were sampled; the target's by default. The same for the next
            two.
        draft_top_k: see above.
        draft_top_p: see above.
        vocab_map: the tokens that the entries of draft_logits stand for, where the draft's vocabulary is a part of the
            target's.
        eos: ids that end a sequence.
        max_depth: nodes deeper than this are not accepted; roots have depth 0. nodes - 1 by default.
        out: a LongestPath to write into, with contiguous tensors.
        backend: as in match_accept.

    Returns:
        A LongestPath, `out` where given.

    Raises:
        TypeError, ValueError, RuntimeError: as in match_accept.

    After Lu et al., 2024 (improved multi-candidate speculative decoding).
    """
    op = "longest_path_accept"
    batch, nodes, vocab = check_target(op, target_logits)
    device = target_logits.device
    draft_tokens = check_tokens(op, draft_tokens, batch, nodes, device)
    links = check_links(op, topology, batch, nodes, device)
    target_to_draft = check_draft_logits(op, draft_logits, nodes, vocab_map, batch, vocab, target_logits)
    law = check_law(op, temperature, top_k, top_p, batch, device)
    draft_law = check_draft_law(op, draft_temperature, draft_top_k, draft_top_p, batch, device, law)
    noise = check_noise(op, seeds, positions, batch, device)
    arguments = AcceptArguments(
        *("longest", target_logits, draft_tokens, draft_logits, target_to_draft, *links, *law, *draft_law, *noise),
        eos=check_eos(op, eos), thresholds=(1.0, 1.0), replacement=False, child_rows=False,
    )  # fmt: skip
    check_count(op, "width", width, 1, MAX_DRAWS)
    max_depth = nodes - 1 if max_depth is None else check_count(op, "max_depth", max_depth, 0, MAX_DEPTH)
    if out is None:
        return LongestPath(*contract.accept(arguments, backend, max_depth=max_depth, width=width))
    if not isinstance(out, LongestPath):
        raise TypeError(argument_error(op, "out", "a specdec_ops.LongestPath", out))
    path, each = (batch, max_depth + 1), (batch,)
    shapes = {"tokens": path, "nodes": path, "num_accepted": each, "next_tokens": (batch, width), "status": each}
    for name, shape in shapes.items():
        check_written(op, f"out.{name}", getattr(out, name), shape, device)
    check_written(op, "out.finished", out.finished, each, device, torch.bool)
    written = contract.AcceptOutputs(
        out.tokens, out.nodes, out.num_accepted, out.next_tokens, status=out.status, finished=out.finished
    )
    contract.accept(arguments, backend, written)
    return out
