"""`Ngram`: what followed the last tokens before, in the prompt or in the answer."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.topology import Topology
from specdec_ops.tree import MAX_NODES, Tree

from .base import Draft, Drafted, Proposer
from .model_draft import chains

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.model import Model
    from specdec_ops.decode.request import Request

_OP = "drafts.Ngram"

_LENGTHS = (1, 2, 3, 4, 5, 7, 12, 24)
_HITS = (0.22, 0.52, 0.60, 0.66, 0.76, 0.79, 0.87, 0.97)
_HITS_SAMPLED = (0.15, 0.33, 0.43, 0.53, 0.70, 0.70, 0.75, 0.80)
"""How often an answer went on as it did after the last 1, 2, 3, 4, 5, ... tokens before, of matches that are at least
as long as _LENGTHS says: greedy, and sampled at temperature 1. Measured with SmolLM2-135M on MT-Bench, HumanEval and
GSM8K, 30 prompts."""
_TRUST, _KEPT = 8.0, 128  # how many tries of a text these figures count as, and how many are remembered
_LEAST = 0.05  # chance of a node that is thought about
_GAIN = 1.03  # drafts have to promise as much more than a plain round
_PRICE, _FREE_ROWS = 0.13, 4
"""Where the batch plays no part: the least chance of a node, but for so many rows. A pass over them takes as long as
one over one, since the weights are read once."""


class _Chances:
    """How often a text goes on as it did before, by the length of the match: `expected`, and as learned so far."""

    def __init__(self, temperature: float) -> None:
        share = min(temperature, 1.0)
        self.expected = [a + share * (b - a) for a, b in zip(_HITS, _HITS_SAMPLED, strict=True)]
        self.of_kinds = list(self.expected)
        self._tries, self._hits = [_TRUST] * len(_HITS), [_TRUST * chance for chance in self.expected]

    def add(self, kind: int, hit: bool) -> None:
        """The text has gone on like this or not, after a match of this kind."""
        if self._tries[kind] >= _KEPT:
            self._tries[kind] /= 2
            self._hits[kind] /= 2
        self._tries[kind] += 1
        self._hits[kind] += hit
        self.of_kinds[kind] = self._hits[kind] / self._tries[kind]


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


class _Grown:
    """A tree of continuations. The chance of a child is never greater than its parent's, which comes before it."""

    def __init__(self, root: int, length: int) -> None:
        self.length = length  # of the text that it was grown for
        self.tokens, self.parents, self.chances, self.kinds = [root], [-1], [1.0], [0]
        self.children: list[dict[int, int]] = [{}]
        self.left = [1.0]  # the chance that none of a node's children so far is next

    def add(self, parent: int, token: int, hit: float, kind: int) -> int:
        """A child that is next with a chance of `hit`, unless one before it is."""
        self.children[parent][token] = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.chances.append(self.chances[parent] * self.left[parent] * hit)
        self.kinds.append(kind)
        self.children.append({})
        self.left[parent] *= 1 - hit
        self.left.append(1.0)
        return len(self.tokens) - 1

    def learn(self, following: list[int], chances: _Chances) -> None:
        """What the text has become since tells how good the first child of each node on its way was."""
        node = 0
        for token in following:
            if not self.children[node]:
                return
            first = next(iter(self.children[node].values()))
            chances.add(self.kinds[first], self.tokens[first] == token)
            node = self.children[node].get(token)
            if node is None:
                return

    def part(self, nodes: list[int]) -> tuple[Tree, list[int]]:
        """The tree of these nodes, which are in order and have their parents with them."""
        places = {node: place for place, node in enumerate(nodes)}
        parents = [places.get(self.parents[node], -1) for node in nodes]
        return Tree.from_parents(parents), [self.tokens[node] for node in nodes]


class _State:
    """Of a request: its index, the chances in its text, and the last tree."""

    def __init__(self, longest: int, temperature: float) -> None:
        self.index, self.chances, self.grown = _Index(longest), _Chances(temperature), None


class Ngram(Draft):
    """Prompt lookup: continuations of earlier occurrences of the last tokens, merged into one tree. Needs no model.

    Answers that repeat what stands in the prompt (summaries, code edits, extraction) or themselves gain most. The idea
    is prompt lookup decoding (Saxena, 2023) and, with several continuations in a tree, REST (He et al., 2023).

    A node has to be likely enough to be worth its row. The longer the match and the fewer tokens lie between, the
    likelier it is; how likely is learned from the texts as they grow, drafted or not. How much rows cost the engine
    measures, and each round has the nodes that promise most tokens per second together, if any do: after the goodput
    of Liu et al. (TurboSpec, 2024). With rules other than "match" neither has a part in it, since the tree would have
    a part in what is drawn: there a node's chance has a fixed limit.

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
    weighs_rows = True

    def __init__(self, nodes: int = 16, *, longest: int = 6, shortest: int = 1, branches: int = 3) -> None:
        limits = {"nodes": (nodes, 2, MAX_NODES), "longest": (longest, 1, 64), "shortest": (shortest, 1, longest)}
        limits["branches"] = (branches, 1, MAX_NODES)
        for name, (value, low, high) in limits.items():
            if not is_int(value):
                raise TypeError(argument_error(_OP, name, "an int", value))
            if not low <= value <= high:
                raise ValueError(argument_error(_OP, name, f"from {low} to {high}", value))
        self.max_nodes, self.longest, self.shortest, self.branches = nodes, longest, shortest, branches
        self.is_chain = branches == 1

    def bind(self, target: Model, **_) -> Proposer:
        """See `Draft.bind`. Any target will do."""
        return _Proposer(self)


class _Proposer(Proposer):
    """Keeps an index of each text."""

    def __init__(self, draft: Ngram) -> None:
        self.draft = draft

    def start(self, request: Request) -> None:
        """Its text is indexed when it is asked for."""
        request.draft_state = _State(self.draft.longest, request.sampling.temperature)

    def propose(self, batch: Batch) -> Drafted:
        """A tree for each request, of node 0 alone where nothing is known or worth its row."""
        least, count = _LEAST, len(batch)
        if batch.seconds is not None:  # half of what a node has to promise if rows cost the same throughout
            least = max(_LEAST, (batch.seconds(2 * count) / batch.seconds(count) - 1) / 2)
        grown = [self._grow(request, least, learns=batch.seconds is not None) for request in batch.requests]
        chosen = [_likely(tree) for tree in grown] if batch.seconds is None else _worthwhile(grown, batch.seconds)
        sizes = tuple(map(len, chosen))
        width, device = max(sizes), batch.context_lens.device
        if width == 1:
            return Drafted(batch.last_tokens[:, None], chains((1,), device), is_chain=True)
        parts = [tree.part(nodes) for tree, nodes in zip(grown, chosen, strict=True)]
        padded = [tokens + [-1] * (width - len(tokens)) for _, tokens in parts]
        trees = [tree for tree, _ in parts]
        return Drafted(
            torch.tensor(padded, dtype=torch.int32).to(device),
            Topology.from_trees(trees, device, packed=len(set(sizes)) > 1),
            sizes=sizes,
            is_chain=all(tree.depth == len(tree) - 1 for tree in trees),
        )

    def _grow(self, request: Request, least: float, learns: bool) -> _Grown:
        """All continuations, but for nodes with less than the least chance."""
        state, ids, draft = request.draft_state, request.ids, self.draft
        hits = state.chances.expected
        if learns:
            if state.grown is not None:
                state.grown.learn(ids[state.grown.length :], state.chances)
            hits = state.chances.of_kinds
        state.index.update(ids)
        grown, most = _Grown(ids[-1], len(ids)), draft.max_nodes - 1
        state.grown = grown
        for place, length in state.index.continuations(ids, draft.shortest, draft.branches):
            node = 0
            if length == draft.longest:
                length = _length_of_match(ids, place, length)
            following = ids[place : place + most]
            if len(following) < most:  # the text repeats what it has been repeating
                following = (following * most)[:most]
            for step, token in enumerate(following):
                found = grown.children[node].get(token)
                if found is None:
                    kind = bisect.bisect(_LENGTHS, length + step) - 1  # what is accepted makes the match longer
                    chance = grown.chances[node] * grown.left[node] * hits[kind]
                    if chance < least or len(grown.tokens) == draft.max_nodes:
                        break
                    found = grown.add(node, token, hits[kind], kind)
                node = found
        return grown


def _length_of_match(ids: list[int], place: int, length: int) -> int:
    """How many tokens before `place` are like the last ones; what is longer than the last of _LENGTHS is all one."""
    while length < _LENGTHS[-1] and length < place and ids[place - 1 - length] == ids[-1 - length]:
        length += 1
    return length


def _likely(grown: _Grown) -> list[int]:
    """The nodes of a tree that are likely enough by a fixed limit, but for the first ones."""
    kept = [0]
    for node in range(1, len(grown.tokens)):
        if (grown.chances[node] >= _PRICE or len(kept) < _FREE_ROWS) and grown.parents[node] in kept:
            kept.append(node)
    return kept


def _worthwhile(trees: list[_Grown], seconds: Callable[[int], float]) -> list[list[int]]:
    """The nodes of each tree with which a round gives most tokens per second; roots alone if none gives more."""
    order = [
        (chance, place, node) for place, grown in enumerate(trees) for node, chance in enumerate(grown.chances) if node
    ]
    order.sort(key=lambda one: -one[0])  # stable, so that parents stay before their children
    tokens, best, count = float(len(trees)), len(trees) / seconds(len(trees)) * _GAIN, 0
    for place, (chance, _, _) in enumerate(order, 1):
        tokens += chance
        rate = tokens / seconds(len(trees) + place)
        if rate > best:
            best, count = rate, place
    chosen = [[0] for _ in trees]
    for _, place, node in order[:count]:
        chosen[place].append(node)
    return [sorted(nodes) for nodes in chosen]
