"""Improved multi-candidate speculative decoding in float64, written from its paper: exact laws of whole answers.

Nothing of the package is used. Answers are enumerated: every draw of a root, every draft, every test.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch

Text = tuple[int, ...]
Row = Callable[[Text], torch.Tensor]


def _always(text: Text) -> bool:
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Lu2024:
    """The paper's decoding: the target draws roots, the draft continues each, the longest accepted path stays.

    With one root the root is certain, so it belongs to the text at once, and the first is the last token of a prompt.

    Args:
        target: of a text, the target's probabilities of its next token, float64 [vocab].
        draft: the same of the draft.
        roots: W, candidates for the next token that the target draws without replacement.
        branching: children of each node below the roots, level by level; a fork has ones.
        length: of an answer.
        last: with one root the last token of the prompt, with which the texts of all rows begin; then answers do, too.
        ends: tokens that end it.
        goes_on: of a text, whether the draft's row after it wants to go on. After each level drafting stops if no row
            that the level was drawn from wants to.
        mistake: of the authors' programs, or of ours with them: "residual_row", "first_roots" or "length_zero".
        first: of a text, the probabilities that the first roots are drawn with, for mistake "first_roots".
    """

    target: Row
    draft: Row
    roots: int
    branching: tuple[int, ...]
    length: int
    last: int | None = None
    ends: frozenset[int] = frozenset()
    goes_on: Callable[[Text], bool] = _always
    mistake: str = ""
    first: Row | None = None

    def law(self) -> dict[Text, float]:
        """The probability of each answer."""
        return self._sum(lambda state: state[0])

    def calls(self) -> float:
        """Expected passes of the target over trees, for an answer."""
        return sum(weight * count for count, weight in self._counts.items())

    @functools.cached_property
    def _counts(self) -> dict[int, float]:
        return self._sum(lambda state: state[1])

    def _sum(self, key) -> dict:
        """Weights of whole answers by a key of (text, rounds)."""
        first = self.first if self.mistake == "first_roots" else self.target
        states: dict = {((), (self.last,)): 1.0}
        if self.last is None:
            states = {((), roots): weight for roots, weight in drawn(first(()), self.roots)}
        found: dict = collections.defaultdict(float)
        for number in itertools.count(1):
            following: dict = collections.defaultdict(float)
            for (text, roots), weight in states.items():
                for after, probability in self._round(text, roots).items():
                    following[after] += weight * probability
            states = {state: weight for state, weight in following.items() if state[1] is not None}
            for (text, roots), weight in following.items():
                if roots is None:
                    found[key((text, number))] += weight
            if not states:
                return dict(found)

    @functools.cache  # noqa: B019 -- lives as long as the test
    def _round(self, text: Text, roots: Text) -> dict[tuple[Text, Text | None], float]:
        """What a round makes of a text and its roots; no roots if the text has ended."""
        after: dict = collections.defaultdict(float)
        for branches in itertools.product(*(self._branch((*text, root)).items() for root in roots)):
            weight, depth = 1.0, len(self.branching)
            for _, probability in branches:
                weight *= probability
            for level in range(len(self.branching)):
                if not any(flags[level] for (flags, _), _ in branches):
                    depth = level + 1
                    break
            paths = [best[depth] for (_, best), _ in branches]
            end = max(range(len(roots)), key=lambda branch: (len(paths[branch]), -branch))
            path = (roots[end], *paths[end])
            kept = self._cut((*text, *path))
            if self._has_ended(kept):
                after[kept, None] += weight
                continue
            for candidates, probability in drawn(self._next(text, path, len(path) <= depth), self.roots):
                state = kept, candidates
                if self.roots == 1 and self._has_ended((*kept, *candidates)):
                    state = (*kept, *candidates), None
                after[state] += weight * probability
        return dict(after)

    @functools.cache  # noqa: B019
    def _branch(self, start: Text) -> dict:
        """Below a root, the last token of start: for each (flags, best) its probability.

        flags[s]: whether a row of level s, from which level s + 1 is drawn, wants to go on. best[d]: the deepest
        accepted path below the root if the tree has d levels below it, of the lowest node.
        """
        states: dict = {((((), True),), (), ((),)): 1.0}
        for count in self.branching:
            following: dict = collections.defaultdict(float)
            for (frontier, flags, best), weight in states.items():
                wants = any(self.goes_on(start + path) for path, _ in frontier)
                for children, probability in self._children(start, frontier, count):
                    alive = next((path for path, accepted in children if accepted), best[-1])
                    following[children, (*flags, wants), (*best, alive)] += weight * probability
            states = following
        found: dict = collections.defaultdict(float)
        for (_, flags, best), weight in states.items():
            found[flags, best] += weight
        return dict(found)

    def _children(self, start: Text, frontier, count: int) -> Iterator[tuple[tuple, float]]:
        """The next level: (path, whether it is accepted) of each node, and the probability."""
        for each in itertools.product(*(drawn(self.draft(start + path), count) for path, _ in frontier)):
            weight, level = 1.0, []
            for (path, accepted), (tokens, probability) in zip(frontier, each, strict=True):
                weight *= probability
                p, q = self.target(start + path), self.draft(start + path)
                level += [((*path, token), min(1.0, float(p[token] / q[token])) * accepted) for token in tokens]
            for passed in itertools.product((True, False), repeat=len(level)):
                chance = weight
                for (_, ratio), passes in zip(level, passed, strict=True):
                    chance *= ratio if passes else 1 - ratio
                if chance > 0:
                    yield tuple((path, passes) for (path, _), passes in zip(level, passed, strict=True)), chance

    def _next(self, text: Text, path: Text, has_children: bool) -> torch.Tensor:
        """What the next roots are drawn with, after a path whose first token is its root."""
        p = self.target((*text, *path))
        if not has_children or (len(path) == 1 and self.mistake != "length_zero"):
            return p
        before = path[:-1] if self.mistake == "residual_row" else path
        left = (p - self.draft((*text, *before))).clamp(min=0)
        return left / left.sum() if float(left.sum()) > 0 else p

    def _cut(self, text: Text) -> Text:
        ended = next((place for place, token in enumerate(text) if token in self.ends), len(text))
        return text[: min(self._length, ended + 1)]

    def _has_ended(self, text: Text) -> bool:
        return len(text) == self._length or text[-1] in self.ends

    @property
    def _length(self) -> int:
        return self.length + (self.last is not None)


def drawn(law: torch.Tensor, count: int) -> tuple[tuple[Text, float], ...]:
    """Ordered draws without replacement, fewer where fewer are possible, and their probabilities."""
    weights = law.tolist()
    found, possible = [], sum(weight > 0 for weight in weights)
    for tokens in itertools.permutations(range(len(weights)), min(count, possible)):
        chance, left = 1.0, sum(weights)
        for token in tokens:
            chance *= weights[token] / left if weights[token] > 0 else 0.0
            left -= weights[token]
        if chance > 0:
            found.append((tokens, chance))
    return tuple(found)


def plain(target: Row, length: int, ends: frozenset[int] = frozenset()) -> dict[Text, float]:
    """The law of the target's own answers."""
    law, states = {}, {(): 1.0}
    while states:
        following: dict[Text, float] = {}
        for text, weight in states.items():
            for token, probability in enumerate(target(text).tolist()):
                if probability > 0:
                    following[(*text, token)] = weight * probability
        ended = {text for text in following if len(text) == length or text[-1] in ends}
        law |= {text: following[text] for text in ended}
        states = {text: weight for text, weight in following.items() if text not in ended}
    return law


def total_variation(law: dict, other: dict) -> float:
    """Half of the sum of differences."""
    return sum(abs(law.get(text, 0.0) - other.get(text, 0.0)) for text in {*law, *other}) / 2


def random_rows(vocab: int, seed: int) -> Row:
    """Probabilities that depend on the whole text."""

    @functools.cache
    def row(text: Text) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((seed, text)) % 2**31)
        weights = torch.rand(vocab, dtype=torch.float64, generator=generator) ** 2 + 0.02
        return weights / weights.sum()

    return row
