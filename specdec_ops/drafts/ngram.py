"""`Ngram`: what followed the last tokens before, in the prompt or in the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.topology import Topology
from specdec_ops.tree import MAX_NODES, Tree

from .base import Draft, Drafted, Proposer

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.model import Model
    from specdec_ops.decode.request import Request

_OP = "drafts.Ngram"

_HITS = (0.22, 0.54, 0.63, 0.68, 0.78, 0.85)
"""How often a greedy answer went on as it did after the last 1, 2, ... tokens before: measured with SmolLM2-135M on
MT-Bench, HumanEval and GSM8K, 30 prompts. At temperature 1 it was 0.15, 0.33, 0.43, 0.53, 0.79 and 0.68."""
_PRICE, _HIGHEST_PRICE = 0.13, 0.7
_FREE_ROWS = 4
"""A pass over this many rows takes as long as one over one: the weights are read once."""


class _Index:
    """Where each n-gram of a text has been followed by something."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.known = 0  # tokens whose n-grams are in `places`
        self.places: dict[tuple[int, ...], list[int]] = {}

    def update(self, ids: list[int]) -> None:
        """Add the n-grams that end before the last token: for each, where it is followed by what."""
        for end in range(max(self.known, 1), len(ids)):
            for length in range(1, min(self.longest, end) + 1):
                self.places.setdefault(tuple(ids[end - length : end]), []).append(end)
        self.known = len(ids)

    def continuations(self, ids: list[int], least: int, most: int):
        """(place, length) after the longest known suffixes, of the longest first and of the latest first."""
        seen: set[int] = set()
        for length in range(min(self.longest, len(ids)), least - 1, -1):
            for place in reversed(self.places.get(tuple(ids[-length:]), ())):
                if place not in seen:
                    seen.add(place)
                    yield place, length
                    if len(seen) == most:
                        return


class Ngram(Draft):
    """Prompt lookup: continuations of earlier occurrences of the last tokens, merged into one tree. Needs no model.

    Answers that repeat what stands in the prompt (summaries, code edits, extraction) or themselves gain most. The idea
    is prompt lookup decoding (Saxena, 2023) and, with several continuations in a tree, REST (He et al., 2023).

    A node has to be likely enough to be worth its row: the longer the n-gram that was found and the fewer tokens lie
    between, the likelier it is. Up to 4 rows of a pass cost next to nothing, and the rows of many requests add up, so
    a single request drafts on any match, and each of many only on long ones. With rules other than "match" the batch
    plays no part in it, since the tree would have a part in what is drawn.

    Args:
        nodes: the most tokens of a tree, its root included.
        longest: the longest n-gram that is looked up first.
        shortest: the shortest one.
        branches: the most continuations that are merged. With 1 every tree is a chain.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is out of range.
    """

    proposals = "deterministic"

    def __init__(self, nodes: int = 8, *, longest: int = 6, shortest: int = 1, branches: int = 3) -> None:
        limits = {"nodes": (nodes, 2, MAX_NODES), "longest": (longest, 1, 64), "shortest": (shortest, 1, longest)}
        limits["branches"] = (branches, 1, MAX_NODES)
        for name, (value, low, high) in limits.items():
            if not is_int(value):
                raise TypeError(argument_error(_OP, name, "an int", value))
            if not low <= value <= high:
                raise ValueError(argument_error(_OP, name, f"from {low} to {high}", value))
        self.max_nodes, self.longest, self.shortest, self.branches = nodes, longest, shortest, branches
        self.is_chain = branches == 1

    def bind(self, target: Model, *, max_batch: int, max_length: int, max_slots: int, is_coupled: bool) -> Proposer:
        """See `Draft.bind`. Any target will do."""
        return _Proposer(self, is_coupled)


class _Proposer(Proposer):
    """Keeps an index of each text."""

    def __init__(self, draft: Ngram, is_coupled: bool) -> None:
        self.draft, self._is_coupled = draft, is_coupled

    def start(self, request: Request) -> None:
        """Index the prompt."""
        request.draft_state = _Index(self.draft.longest)

    def propose(self, batch: Batch) -> Drafted:
        """A tree for each request, of node 0 alone where nothing is known."""
        together = len(batch) if self._is_coupled else 1
        price, free = min(_PRICE * together, _HIGHEST_PRICE), _FREE_ROWS // together
        grown = [self._grow(request, price, free) for request in batch.requests]
        trees, sizes = [tree for tree, _ in grown], tuple(len(tokens) for _, tokens in grown)
        width = max(sizes)
        padded = [tokens + [-1] * (width - len(tokens)) for _, tokens in grown]
        device = batch.context_lens.device
        return Drafted(
            torch.tensor(padded, dtype=torch.int32).to(device),
            Topology.from_trees(trees, device, packed=len(set(sizes)) > 1),
            sizes=sizes,
            is_chain=all(tree.depth == len(tree) - 1 for tree in trees),
        )

    def _grow(self, request: Request, price: float, free: int) -> tuple[Tree, list[int]]:
        """A tree whose nodes are accepted with a chance of at least `price`, but for the first `free` ones."""
        index, ids, draft = request.draft_state, request.ids, self.draft
        index.update(ids)
        tokens, parents, child = [ids[-1]], [-1], {}
        left = 1.0  # the chance that none of the root's children so far is accepted
        for place, length in index.continuations(ids, draft.shortest, draft.branches):
            node, chance = 0, left
            for step, token in enumerate(ids[place : place + draft.max_nodes - 1]):
                hit = _HITS[min(length + step, len(_HITS)) - 1]  # what is accepted makes the match longer
                chance *= hit
                found = child.get((node, token))
                if found is None:
                    if len(tokens) == draft.max_nodes or (chance < price and len(tokens) >= free):
                        break
                    found = child[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    if node == 0:
                        left *= 1 - hit
                node = found
        return Tree.from_parents(parents), tokens
