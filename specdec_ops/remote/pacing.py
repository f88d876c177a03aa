"""`Pacing`: how much a client drafts, judged by what rounds take and give."""

from __future__ import annotations

from collections.abc import Callable

_MEMORY = 0.9  # weight of the past in running means
_PRIOR_HITS, _PRIOR_TRIES = 1.4, 2.0


class _Mean:
    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else _MEMORY * self.value + (1 - _MEMORY) * value


class Pacing:
    """Chooses the levels of a draft, and whether to draft while the server verifies.

    A round waits for the line (r) and for the target (t), and spends d on each of k levels, but for the share h of
    rounds whose draft was made during the wait before. If a drafted token is accepted with chance a wherever those
    before it were, a round gives 1 + a + ... + a^k tokens. So k is the one with most tokens a second, which are
    (1 + a + ... + a^k) / (r + t + k d (1 - h)). The longer the line, the longer the drafts. All five are running means
    of what was measured: r is the time from sending a tree to having its result, without what the server says it took,
    which is t.

    A draft is made ahead while the wait is expected to be at least as long as the draft takes: it then costs nothing
    but work, also if its guess turns out wrong.
    """

    def __init__(self, max_levels: int) -> None:
        self._max_levels = max_levels
        self.line, self.target, self.level = _Mean(), _Mean(), _Mean()
        self._ready = _Mean()
        self._hits, self._tries = _PRIOR_HITS, _PRIOR_TRIES

    @property
    def acceptance(self) -> float:
        """The chance that a drafted token is accepted if those before it were."""
        return min(self._hits / self._tries, 0.99)

    def levels(self) -> int:
        """Of the next draft."""
        if self.line.value is None or self.level.value is None:
            return self._max_levels
        chance, wait = self.acceptance, self.line.value + self.target.value
        cost = self.level.value * (1 - (self._ready.value or 0.0))
        best, most, tokens, term = 1, 0.0, 1.0, 1.0
        for levels in range(1, self._max_levels + 1):
            term *= chance
            tokens += term
            rate = tokens / max(wait + levels * cost, 1e-9)
            if rate > most:
                best, most = levels, rate
        return best

    def seconds(self) -> Callable[[int], float] | None:
        """How long a round takes by its nodes: the same for all, since the line takes most of it. None: not known."""
        if self.line.value is None:
            return None
        wait = self.line.value + self.target.value
        return lambda nodes: max(wait, 1e-9)

    def drafts_ahead(self) -> bool:
        """Whether the next wait is long enough to draft in it."""
        if self.line.value is None or self.level.value is None:
            return False
        return self.levels() * self.level.value <= self.line.value + self.target.value

    def drafted(self, levels: int, seconds: float) -> None:
        """A draft of so many levels was made in this time."""
        if levels:
            self.level.add(seconds / levels)

    def waited(self, seconds: float, server_seconds: float) -> None:
        """A round's result came after this time, of which the server used some."""
        self.target.add(server_seconds)
        self.line.add(max(0.0, seconds - server_seconds))

    def judged(self, levels: int, accepted: int, was_ready: bool) -> None:
        """Of a draft of so many levels, this many tokens were accepted."""
        self._ready.add(float(was_ready))
        if levels:
            self._hits = _MEMORY * self._hits + accepted
            self._tries = _MEMORY * self._tries + accepted + (accepted < levels)
