"""`Pace`: whether drafts pay, judged by how long rounds take and what they give."""

from __future__ import annotations

_LEARN = 16  # rounds with a draft before the first judgement, and
_LEARN_PLAIN = 3  # plain ones after them
_PLAIN_EVERY = 64  # rounds with a draft between two plain ones that tell what those take
_RETRY_EVERY = 128  # plain rounds between two tries with a draft, once it did not pay
_RETRY_ROUNDS = 8
_MEMORY = 0.95  # weight of the past in running means: what is accepted differs much from round to round
_OUTLIER = 1.5  # a round that took longer than this times the mean was interrupted, and counts as one that did not
_MARGIN = 1.03  # a draft has to lose by more than this share before it is left out


class _Mean:
    """A running mean of all there is at first, and of the last ones later."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._count = 0

    def add(self, value: float) -> None:
        self._count += 1
        past = min(_MEMORY, 1 - 1 / self._count)
        self.value = value if self.value is None else past * self.value + (1 - past) * value


class _Kind:
    """Rounds of one kind: how long they take, and what they give. Both are means, so that luck weighs little."""

    def __init__(self) -> None:
        self._seconds, self._tokens = _Mean(), _Mean()

    def add(self, seconds: float, tokens: float) -> None:
        usual = self._seconds.value
        self._seconds.add(seconds if usual is None else min(seconds, _OUTLIER * usual))
        self._tokens.add(tokens)

    @property
    def value(self) -> float | None:
        """Seconds per token of a request."""
        return None if self._seconds.value is None else self._seconds.value / self._tokens.value


class Pace:
    """Decides for each round whether to draft. One for each number of requests, since both kinds scale differently.

    A round with a draft costs more than a plain one and gives more tokens. What counts is seconds per token of a
    request. Now and then a round of the other kind is run, so that neither figure gets old.
    """

    def __init__(self) -> None:
        self._with_draft, self._plain = _Kind(), _Kind()
        self._rounds = self._since_other = 0
        self._pays = True

    def wants_draft(self) -> bool:
        """Whether the next round should draft."""
        if self._rounds < _LEARN:
            return True
        if self._rounds < _LEARN + _LEARN_PLAIN:
            return False
        if self._pays:
            return self._since_other < _PLAIN_EVERY
        return self._since_other >= _RETRY_EVERY

    def record(self, drafted: bool, seconds: float, tokens: float) -> None:
        """A round took this long and gave this many tokens per request."""
        (self._with_draft if drafted else self._plain).add(seconds, tokens)
        self._rounds += 1
        self._since_other = self._since_other + 1 if drafted == self._pays else self._next_try(drafted)
        if self._rounds >= _LEARN + _LEARN_PLAIN and None not in (self._with_draft.value, self._plain.value):
            pays = self._with_draft.value <= self._plain.value * _MARGIN
            if pays != self._pays:
                self._pays, self._since_other = pays, 0

    def _next_try(self, drafted: bool) -> int:
        """How far the count of rounds since a try goes back: retries with a draft come several in a row."""
        tries_left = (self._since_other - _RETRY_EVERY + 1) % _RETRY_ROUNDS if drafted else 0
        return self._since_other + 1 if tries_left else 0

    @property
    def speedup(self) -> float | None:
        """Seconds per token without a draft over those with it; None until both are known."""
        if None in (self._with_draft.value, self._plain.value):
            return None
        return self._plain.value / self._with_draft.value

    @property
    def pays(self) -> bool:
        """Whether drafts are used now."""
        return self._pays
