"""Which acceptance rules are lossless for which proposals, and how each is called."""

from __future__ import annotations

import torch

from specdec_ops.drafts.base import Draft, Drafted
from specdec_ops.ops.acceptance.accept import Acceptance, chain_accept, greedy_accept, match_accept, tree_accept
from specdec_ops.ops.acceptance.accept_lossy import longest_path_accept, typical_accept

from .batch import Batch

LOSSLESS = {
    "deterministic": ("match", "recursive", "traversal", "target_only", "token", "block"),
    "distinct": ("match", "recursive", "traversal", "token", "block"),
    "repeated": ("match", "recursive", "traversal", "kseq"),
}
LOSSY = ("typical", "longest_path")
_SAMPLED = ("distinct", "repeated")
_CHAIN_RULES = ("token", "block")


def choose(rule: str, draft: Draft | None) -> str:
    """The rule that the engine uses.

    "auto" takes one that is lossless for the draft and accepts most: "match" for deterministic proposals, which it
    accepts as often as any rule, "block" for sampled chains, "traversal" for sampled trees.

    A draft with several target roots has to be given "longest_path" by name: lossless rules keep the first root
    whatever is below the others, so with them one root does the same.

    Raises:
        ValueError: the rule is unknown, or would change the target's distribution with this draft.
    """
    if draft is None:
        if rule not in ("auto", "match"):
            raise ValueError(f"specdec_ops.Engine: rule must be 'auto' or 'match' without a draft, got {rule!r}")
        return "match"
    if draft.target_roots > 1:
        if rule == "longest_path":
            return rule
        raise ValueError(
            f"specdec_ops.Engine: rule must be 'longest_path', which is lossy, for {draft.target_roots} target roots, "
            f"got {rule!r}; lossless rules never keep another root than the first, so take target_roots=1 for them"
        )
    allowed = [name for name in LOSSLESS[draft.proposals] if draft.is_chain or name not in _CHAIN_RULES]
    if rule == "auto":
        if draft.proposals == "deterministic":
            return "match"
        return "block" if draft.is_chain and draft.proposals == "distinct" else "traversal"
    lossy = [name for name in LOSSY if name != "longest_path" or draft.proposals in _SAMPLED]
    if rule not in (*allowed, *lossy):
        shape = "chains" if draft.is_chain else "trees"
        raise ValueError(
            f"specdec_ops.Engine: rule must be 'auto' or one that is lossless for {draft.proposals} {shape} "
            f"({', '.join(allowed)}) or lossy by name ({', '.join(lossy)}), got {rule!r}"
        )
    return rule


def accept(
    rule: str, draft: Draft | None, batch: Batch, logits: torch.Tensor, drafted: Drafted
) -> tuple[Acceptance, torch.Tensor | None]:
    """Run a rule.

    Args:
        rule: as `choose` gave it.
        draft: for how its proposals were made.
        batch: the requests' settings.
        logits: of the target, [batch, nodes, vocab], without improbable tokens.
        drafted: the trees.

    Returns:
        An Acceptance, and None; or with several target roots int32 [batch, target_roots], candidates for the next token
        (-1 where fewer are possible). The Acceptance then has no next token: its tokens are those of the path, root
        first, and num_accepted does not count the root.
    """
    tokens, topology, law = drafted.tokens, drafted.topology, batch.law
    options = {**batch.noise, **law.filters}
    rows = drafted.draft_logits
    if rule == "typical":
        return typical_accept(logits, tokens, topology, **options), None
    if rule == "longest_path" and rows is not None:
        return _longest_path(draft, logits, drafted, options)
    if law.is_greedy:
        return greedy_accept(logits, tokens, topology), None
    if rule in ("match", "longest_path"):  # a round without a draft is plain sampling
        return match_accept(logits, tokens, topology, **options), None
    options["vocab_map"] = drafted.vocab_map
    if rule in _CHAIN_RULES:
        rows = None if rows is None else rows[:, :-1]
        return chain_accept(logits, tokens[:, 1:], rows, rule=rule, **options), None
    replacement = draft is not None and draft.proposals == "repeated" and rule != "kseq"
    return tree_accept(logits, tokens, topology, rows, rule=rule, replacement=replacement, **options), None


def _longest_path(
    draft: Draft, logits: torch.Tensor, drafted: Drafted, options: dict
) -> tuple[Acceptance, torch.Tensor | None]:
    """See `accept`. With one root it is node 0 and in the text already, and the one candidate is the next token."""
    depth = drafted.tokens.shape[1] - 1
    depth = depth if draft.max_depth is None else min(depth, draft.max_depth)
    found = longest_path_accept(
        *(logits, drafted.tokens, drafted.topology, drafted.draft_logits),
        vocab_map=drafted.vocab_map,
        width=draft.target_roots,
        max_depth=depth,
        **options,
    )
    tokens, count, last = found.tokens, found.num_accepted - 1, found.next_tokens[:, 0]
    if draft.target_roots == 1:
        place = count.long()[:, None]
        tokens = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1).scatter_(1, place, last[:, None])
    accepted = Acceptance(tokens, found.nodes, count, last, found.status, found.finished)
    return accepted, None if draft.target_roots == 1 else found.next_tokens
