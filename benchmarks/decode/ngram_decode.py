"""Speculative decoding of a real pair of language models, with nothing to download: rules, trees and the loop.

The target is a byte n-gram model of order 8, the draft one of order 4 (see ngram_model.py). Each round drafts a tree
with `sample_children`, scores all of its nodes with the target in one call, and lets one of the acceptance rules decide
what stays. lossless.py proves that this changes no text and no law, benchmarks/acceptance/lengths.py counts the bytes
that a call of the target gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch

from specdec_ops import (
    Acceptance,
    Topology,
    Tree,
    chain_accept,
    greedy_accept,
    match_accept,
    sample_children,
    sample_tokens,
    tree_accept,
)

from .ngram_model import VOCAB, Counts, NgramModel, advance, context_of, standard_library

TREES = {
    "chain of 5": Tree.chain(6),
    "fork 4, 4 deep": Tree.fork(4, 3, root=True),
    "4x2x2x1": Tree.from_branching((4, 2, 2, 1), root=True),
    "2x4x3x1x1": Tree.from_branching((2, 4, 3, 1, 1), root=True),
}
PROMPTS = (b"import ", b"class ", b"    def ", b"        return ", b"# This ", b'    """', b"    for ", b"raise ")


@dataclasses.dataclass(frozen=True)
class Models:
    """A target and a draft over the same vocabulary of 256 bytes."""

    target: NgramModel
    draft: NgramModel


def load(draft_order: int = 4) -> Models:
    """Count the standard library: about a second. Draft and target agree on about two bytes in three."""
    counts = Counts(standard_library())
    return Models(NgramModel(counts, 8), NgramModel(counts, draft_order))


@dataclasses.dataclass(frozen=True)
class Round:
    """What a rule gets to see: a drafted tree and the target's opinion of it."""

    target_logits: torch.Tensor  # [batch, nodes, 256]
    tokens: torch.Tensor  # int32 [batch, nodes]
    draft_logits: torch.Tensor  # [batch, nodes, 256]; row n is what the children of node n come from
    topology: Topology
    options: dict  # seeds, positions, temperature


@dataclasses.dataclass(frozen=True)
class Rule:
    """An acceptance rule, and the kind of draft that it is lossless for."""

    name: str
    proposals: str  # "greatest": the draft's most likely bytes. "distinct", "repeated": drawn without, with replacement
    accept: Callable[[Round], Acceptance]
    chains_only: bool = False


def _greedy(drafted: Round) -> Acceptance:
    return greedy_accept(drafted.target_logits, drafted.tokens, drafted.topology)


def _match(drafted: Round) -> Acceptance:
    return match_accept(drafted.target_logits, drafted.tokens, drafted.topology, **drafted.options)


def _chain(rule: str) -> Callable[[Round], Acceptance]:
    def accept(drafted: Round) -> Acceptance:
        tokens, rows = drafted.tokens[:, 1:], drafted.draft_logits[:, :-1]
        return chain_accept(drafted.target_logits, tokens, rows, rule=rule, **drafted.options)

    return accept


def _tree(rule: str, proposals: str) -> Callable[[Round], Acceptance]:
    def accept(drafted: Round) -> Acceptance:
        rows = None if proposals == "greatest" else drafted.draft_logits
        repeated = proposals == "repeated" and rule != "kseq"  # kseq always takes repeated draws
        given = (drafted.target_logits, drafted.tokens, drafted.topology, rows)
        return tree_accept(*given, rule=rule, replacement=repeated, **drafted.options)

    return accept


GREEDY = Rule("greedy, temperature 0", "greatest", _greedy)
MATCH = Rule("match", "greatest", _match)
SAMPLING_RULES = (
    Rule("token", "distinct", _chain("token"), chains_only=True),
    Rule("block", "distinct", _chain("block"), chains_only=True),
    Rule("recursive", "distinct", _tree("recursive", "distinct")),
    Rule("recursive, repeated draws", "repeated", _tree("recursive", "repeated")),
    Rule("recursive, top children", "greatest", _tree("recursive", "greatest")),
    Rule("traversal", "distinct", _tree("traversal", "distinct")),
    Rule("traversal, repeated draws", "repeated", _tree("traversal", "repeated")),
    Rule("traversal, top children", "greatest", _tree("traversal", "greatest")),
    Rule("target_only, top children", "greatest", _tree("target_only", "greatest")),
    Rule("kseq, repeated draws", "repeated", _tree("kseq", "repeated")),
)
RULES = (*SAMPLING_RULES, Rule("match, top children", "greatest", _match))


def draft(
    models: Models, tree: Tree, topology: Topology, proposals: str, contexts: torch.Tensor, options: dict
) -> Round:
    """Grow a tree below each context, level by level, and score its nodes with one call of the target.

    Args:
        models: the target and the draft.
        tree: level-ordered, with one root: the last committed byte.
        topology: the same as tensors.
        proposals: how children are chosen, see Rule.
        contexts: int64 [batch].
        options: seeds, positions and temperature, which drafting and acceptance share.
    """
    batch, nodes = len(contexts), len(tree)
    tokens = torch.full((batch, nodes), -1, dtype=torch.int32)
    draft_logits = torch.zeros(batch, nodes, VOCAB)
    path = contexts[:, None].repeat(1, nodes)  # the context of every node
    temperature = 0.0 if proposals == "greatest" else options["temperature"]
    noise = {name: options[name] for name in ("seeds", "positions")}
    levels = tree.levels.tolist()
    for start, stop, end in zip(levels, levels[1:], levels[2:], strict=False):
        parents = torch.tensor(tree.parents[stop:end].tolist())
        ranks = (parents[:, None] == parents).tril(-1).sum(1)  # among its siblings, which are all on this level
        rows = models.draft(path[:, start:stop])
        children = sample_children(
            rows,
            int(ranks.max()) + 1,
            replacement=proposals == "repeated",
            first_parent=start,
            temperature=temperature,
            **noise,
        )
        draft_logits[:, start:stop] = rows
        tokens[:, stop:end] = children.tokens[:, parents - start, ranks]
        path[:, stop:end] = advance(path[:, parents], tokens[:, stop:end])
    return Round(models.target(path), tokens, draft_logits, topology, options)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Texts of one length, and what they cost."""

    tokens: torch.Tensor
    """int64 [batch, length]."""
    given: torch.Tensor
    """int64 [batch]: bytes that the rounds gave, the ones beyond `length` included."""
    calls: torch.Tensor
    """int64 [batch]: calls of the target, which are rounds."""

    @property
    def texts(self) -> list[str]:
        return [bytes(row).decode("latin-1") for row in self.tokens.tolist()]

    def tokens_per_call(self) -> tuple[float, float]:
        """The mean over all rounds, and its standard error from the spread between requests."""
        mean = (self.given.sum() / self.calls.sum()).item()
        residuals = self.given - mean * self.calls
        return mean, (residuals.square().sum().sqrt() / self.calls.sum()).item()


def decode(
    models: Models,
    rule: Rule,
    tree: Tree,
    prompts: Iterable[bytes],
    length: int,
    *,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> Decoded:
    """Speculative decoding of a batch. Requests that have `length` bytes leave the batch, which changes nobody's text.

    Args:
        models: the target and the draft.
        rule: how drafts are made and accepted.
        tree: the shape of every draft.
        prompts: one per request.
        length: bytes to decode.
        seeds: int64 [batch]; by default the requests' numbers.
        temperature: of the target and, unless the rule drafts its top bytes, of the draft.
    """
    prompts, topology = list(prompts), tree.to("cpu")
    seeds = torch.arange(len(prompts)) if seeds is None else seeds
    contexts = torch.tensor([context_of(prompt) for prompt in prompts])
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32)  # positions of node 0
    tokens = torch.full((len(prompts), length + tree.depth + 1), -1)
    given, calls = torch.zeros(len(prompts), dtype=torch.int64), torch.zeros(len(prompts), dtype=torch.int64)
    while True:
        active = (given < length).nonzero()[:, 0]
        if not len(active):
            return Decoded(tokens[:, :length], given, calls)
        options = {"seeds": seeds[active], "positions": last[active], "temperature": temperature}
        accepted = rule.accept(draft(models, tree, topology, rule.proposals, contexts[active], options))
        columns = given[active, None] + torch.arange(accepted.tokens.shape[1])
        kept = accepted.tokens >= 0
        tokens[active[:, None].expand_as(kept)[kept], columns[kept]] = accepted.tokens[kept].long()
        for step in accepted.tokens.long().unbind(1):
            contexts[active] = advance(contexts[active], step)
        given[active] += kept.sum(1)
        last[active] += kept.sum(1).int()
        calls[active] += 1


def decode_plainly(model: NgramModel, prompts: Iterable[bytes], length: int, *, seeds, temperature: float = 1.0):
    """One byte per call, with `sample_tokens`: what speculative decoding must not change. int64 [batch, length]."""
    prompts = list(prompts)
    contexts = torch.tensor([context_of(prompt) for prompt in prompts])
    next_position = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    tokens = torch.empty(len(prompts), length, dtype=torch.int64)
    for step in range(length):
        sampled = sample_tokens(model(contexts), seeds=seeds, positions=next_position + step, temperature=temperature)
        tokens[:, step] = sampled
        contexts = advance(contexts, sampled.long())
    return tokens
