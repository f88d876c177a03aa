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
_CHAIN_RULES = ("token", "block")


def choose(rule: str, draft: Draft | None) -> str:
    """The rule that the engine uses.

    "auto" takes one that is lossless for the draft and accepts most: "match" for deterministic proposals, which it
    accepts as often as any rule, "block" for sampled chains, "traversal" for sampled trees.

    Raises:
        ValueError: the rule is unknown, or would change the target's distribution with this draft.
    """
    if draft is None:
        if rule not in ("auto", "match"):
            raise ValueError(f"specdec_ops.Engine: rule must be 'auto' or 'match' without a draft, got {rule!r}")
        return "match"
    allowed = [name for name in LOSSLESS[draft.proposals] if draft.is_chain or name not in _CHAIN_RULES]
    if rule == "auto":
        if draft.proposals == "deterministic":
            return "match"
        return "block" if draft.is_chain and draft.proposals == "distinct" else "traversal"
    if rule not in (*allowed, *LOSSY):
        shape = "chains" if draft.is_chain else "trees"
        raise ValueError(
            f"specdec_ops.Engine: rule must be 'auto' or one that is lossless for {draft.proposals} {shape} "
            f"({', '.join(allowed)}) or lossy by name ({', '.join(LOSSY)}), got {rule!r}"
        )
    return rule


def accept(rule: str, draft: Draft | None, batch: Batch, logits: torch.Tensor, drafted: Drafted) -> Acceptance:
    """Run a rule.

    Args:
        rule: as `choose` gave it.
        draft: for how its proposals were made.
        batch: the requests' settings.
        logits: of the target, [batch, nodes, vocab], without improbable tokens.
        drafted: the trees.
    """
    tokens, topology, law = drafted.tokens, drafted.topology, batch.law
    if law.is_greedy and rule not in LOSSY:
        return greedy_accept(logits, tokens, topology)
    options = {**batch.noise, **law.filters}
    if rule == "match":
        return match_accept(logits, tokens, topology, **options)
    rows = drafted.draft_logits
    if rule == "typical":
        return typical_accept(logits, tokens, topology, **options)
    options["vocab_map"] = drafted.vocab_map
    if rule in _CHAIN_RULES:
        return chain_accept(logits, tokens[:, 1:], None if rows is None else rows[:, :-1], rule=rule, **options)
    if rule == "longest_path":
        return longest_path_accept(logits, tokens, topology, rows, **options)
    replacement = draft is not None and draft.proposals == "repeated" and rule != "kseq"
    return tree_accept(logits, tokens, topology, rows, rule=rule, replacement=replacement, **options)
