"""`Pace`: whether drafts pay, judged by how long rounds take and what they give."""

from __future__ import annotations

_LEARN = 8  # rounds with a draft before the first judgement
_PLAIN_EVERY = 64  # rounds with a draft between two plain ones that tell what those take
_RETRY_EVERY = 256  # plain rounds between two tries with a draft, once it did not pay
_RETRY_ROUNDS = 4
_MEMORY = 0.8  # weight of the past in running means
_MARGIN = 1.03  # a draft has to lose by more than this share before it is left out


class _Mean:
    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else _MEMORY * self.value + (1 - _MEMORY) * value


class Pace:
    """Decides for each round whether to draft. One for each number of requests, since both kinds scale differently.

    A round with a draft costs more than a plain one and gives more tokens. What counts is seconds per token of a
    request. Now and then a round of the other kind is run, so that neither figure gets old.
    """

    def __init__(self) -> None:
        self._with_draft, self._plain = _Mean(), _Mean()
        self._rounds = self._since_other = 0
        self._pays = True

    def wants_draft(self) -> bool:
        """Whether the next round should draft."""
        if self._rounds < _LEARN:
            return True
        if self._plain.value is None:
            return False
        if self._pays:
            return self._since_other < _PLAIN_EVERY
        return self._since_other >= _RETRY_EVERY

    def record(self, drafted: bool, seconds: float, tokens: float) -> None:
        """A round took this long and gave this many tokens per request."""
        (self._with_draft if drafted else self._plain).add(seconds / tokens)
        self._rounds += 1
        self._since_other = self._since_other + 1 if drafted == self._pays else self._next_try(drafted)
        if self._rounds > _LEARN and None not in (self._with_draft.value, self._plain.value):
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
