"""How long rounds take, and whether drafts pay: `PassTimes`, `Pace`, and `Adaptation` of an engine."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Literal

_MEMORY, _MEMORY_OF_TOKENS = 0.95, 0.985  # weights of the past in running means: tokens differ much from round to round
_FIRST = 3  # the shortest of the first rounds counts: the very first also makes what later ones have
_OUTLIER = 1.5  # a round that took longer than this times the mean was interrupted, and counts as one that did not
_MARGIN = 1.03  # a draft has to lose by more than this share before it is left out
_ROWS_OF_PROMPT = 32  # in a pass that tells what a row takes where rows are cheapest

Plan = Literal["plain", "probe", "draft"]
"""What a round does. One that probes is a plain one whose pass has two rows for each request, so that it tells what
rows cost."""


class _Seconds:
    """How long rounds of one kind take."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.count = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.value is None or self.count <= _FIRST:
            self.value = seconds if self.value is None else min(self.value, seconds)
        else:
            self.value += (1 - _MEMORY) * (min(seconds, _OUTLIER * self.value) - self.value)


class PassTimes:
    """What a round takes without its draft, by the rows of its pass: measured, and guessed in between and beyond.

    One for each number of requests.
    """

    _EXACT = 8  # rows up to here each have a figure of their own, further on groups of
    _GROUP = 4
    _SLOPE = 1 / 16  # of a row in plain rounds, until there is a second figure
    _PLAIN_EVERY = 256  # rounds with a draft between two plain ones that tell what those take

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self._known: dict[int, _Seconds] = {}
        self._rows: list[int] = []
        self._since_plain = 0

    def _group(self, rows: int) -> int:
        over = max(0, rows - max(self._EXACT, self.requests))
        return rows if over == 0 else rows - over + -(-over // self._GROUP) * self._GROUP

    def add(self, rows: int, seconds: float) -> None:
        """A round with a pass over this many rows took this long."""
        self._since_plain = 0 if rows == self.requests else self._since_plain + 1
        group = self._group(rows)
        if group not in self._known:
            self._known[group] = _Seconds()
            bisect.insort(self._rows, group)
        self._known[group].add(seconds)

    @property
    def are_usable(self) -> bool:
        """Whether plain rounds have been measured, and lately."""
        return self.requests in self._known and self._since_plain < self._PLAIN_EVERY

    def seconds(self, rows: int) -> float:
        """Of a round with a pass over this many rows, at least one for each request."""
        group = self._group(rows)
        known = self._known.get(group)
        if known is not None:
            return known.value
        place = bisect.bisect(self._rows, group)
        if place == 0:
            return self._known[self._rows[0]].value
        below = self._rows[place - 1]
        least = self._known[below].value
        if place == len(self._rows):
            plain = self._known[self.requests].value
            slope = self._SLOPE * plain
            if below > self.requests:  # passes over more rows get dearer from row to row, so this one gets tried
                slope = max(0.0, least - plain) / (below - self.requests)
            return least + (group - below) * slope
        above = self._rows[place]
        return least + (self._known[above].value - least) * (group - below) / (above - below)


class _Tokens:
    """What rounds give: a running mean, and how far off it may be."""

    def __init__(self) -> None:
        self.count, self.value, self._square = 0, 0.0, 0.0

    def add(self, tokens: float) -> None:
        self.count += 1
        share = max(1 - _MEMORY_OF_TOKENS, 1 / self.count)
        self.value += share * (tokens - self.value)
        self._square += share * (tokens * tokens - self._square)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return math.sqrt(max(0.0, self._square - self.value**2) / min(self.count, 1 / (1 - _MEMORY_OF_TOKENS)))


class Pace:
    """Decides for each round whether to draft, for drafts that cost much before it is known what they propose.

    A round with a draft takes longer than a plain one and gives more tokens. What counts is seconds per token of a
    request. A few plain rounds tell how long those take; then rounds with the draft go on until they have given so
    little that chance does not explain it, or as long as they pay, with a plain round now and then. A draft that does
    not pay is tried again after a while, each time after twice as long. To try a draft costs more than its rounds: a
    model runs all prompts first. So one that says how long a level takes is first judged by that, and by what a pass
    over two rows for each request takes: if it would lose even if it were always right, it is not tried.

    One for each number of requests. A new one starts from the judgement of one for about as many requests, if that has
    tried the draft.

    Args:
        most: the most tokens that a round with the draft can give. If these would not pay, it is not tried soon again.
        like: of another number of requests.
        probes: whether the draft can be judged before it is tried.
    """

    _PLAIN_FIRST = 2
    _LEAST, _MOST = 2, 32  # rounds with a draft before it can be left out, and before the means alone decide
    _ERRORS = 1.5  # how many standard errors the tokens have to be below what would pay, until then
    _PLAIN_EVERY = 64  # rounds with a draft between two plain ones
    _RETRY_EVERY, _LONGEST_WAIT = 128, 2048  # plain rounds until a draft that did not pay is tried again

    def __init__(self, most: float = math.inf, like: Pace | None = None, *, probes: bool = False) -> None:
        if like is not None and not like.has_tried:
            like = None  # what passes over other numbers of rows would cost says nothing of these
        self._most, self._probes = most, probes
        self._has_tried = False
        self._with_draft, self._plain = _Seconds(), _Seconds()
        self._tokens = _Tokens()
        self._plain_left = self._PLAIN_FIRST
        self._since_plain, self._wait = 0, self._RETRY_EVERY
        self._pays = like is None or like.pays
        self._left_out = 0 if self._pays else like._wait  # plain rounds to come

    def wants_draft(self) -> bool:
        """Whether the next round should draft."""
        return self._plain_left == 0 and self._left_out == 0 and not self._probes

    def wants_probe(self) -> bool:
        """Whether the next round should tell what `judge` is to be told, before anything is drafted."""
        return self._plain_left == 0 and self._left_out == 0 and self._probes

    def judge(self, most_speedup: float) -> None:
        """A draft that is always right would decode at this speed, in that of plain decoding."""
        self._probes = False
        if most_speedup < 1:
            self._leave_out(most_speedup)
            self._probes = True  # before it is tried

    def _leave_out(self, speedup: float, wait: int | None = None) -> None:
        wait = wait or (self._RETRY_EVERY if self._pays else min(2 * self._wait, self._LONGEST_WAIT))
        self._pays, self._wait, self._left_out, self._last_speedup = False, wait, wait, speedup
        self._tokens = _Tokens()

    def record(self, drafted: bool, seconds: float, tokens: float) -> None:
        """A round took this long and gave this many tokens per request."""
        if not drafted:
            self._plain.add(seconds / tokens)
            self._since_plain = 0
            self._plain_left = max(0, self._plain_left - 1)
            self._left_out = max(0, self._left_out - 1)
            return
        self._has_tried = True
        self._with_draft.add(seconds)
        self._tokens.add(tokens)
        self._since_plain += 1
        if self._since_plain >= self._PLAIN_EVERY:
            self._plain_left = 1
        if self._plain.value is None:
            return
        needed = self._with_draft.value / self._plain.value  # tokens of a round that would pay
        if self._tokens.count >= self._MOST:
            loses = self._tokens.value * _MARGIN < needed
        else:
            allowed = self._ERRORS * max(self._tokens.error, 1 / self._tokens.count)
            loses = self._tokens.count >= self._LEAST and self._tokens.value + allowed < needed
        never_pays = needed > self._most and self._with_draft.count >= self._LEAST  # the first ran a prompt, too
        if loses or never_pays:
            self._leave_out(self._tokens.value / needed, self._LONGEST_WAIT if never_pays else None)
        elif self._tokens.count >= self._MOST:
            self._pays = True

    _last_speedup: float | None = None  # as it was when the draft was left out

    @property
    def speedup(self) -> float | None:
        """Seconds per token without a draft over those with it; None until both are known."""
        if None in (self._with_draft.value, self._plain.value) or not self._tokens.count:
            return self._last_speedup
        return self._tokens.value * self._plain.value / self._with_draft.value

    @property
    def pays(self) -> bool:
        """Whether drafts are used, but for tries of one that did not pay."""
        return self._pays

    @property
    def has_tried(self) -> bool:
        """Whether there was a round with the draft."""
        return self._has_tried


class Adaptation:
    """What an engine has learned of its rounds, by the number of their requests.

    Args:
        weighs_rows: whether the draft decides itself, by how long passes take; see `Draft`.
        most: the most tokens that a round with the draft can give.
        seconds_of_level: of the proposer.
        least: the fewest tokens that it makes a round's pass score for each request.
    """

    def __init__(
        self,
        weighs_rows: bool,
        most: int,
        seconds_of_level: Callable[[int], float | None] = lambda requests: None,
        least: int = 2,
    ) -> None:
        self._weighs_rows, self._most, self._seconds_of_level = weighs_rows, most, seconds_of_level
        self._least, self._row = least, math.inf
        self._levels: dict[int, float] = {}
        self._times: dict[int, PassTimes] = {}
        self._paces: dict[int, Pace] = {}
        self.loss: float | None = None  # the speed-up of a draft that the last round has judged to lose
        self.is_bound = False  # whether that is the most that it could be

    def _times_of(self, requests: int) -> PassTimes:
        return self._times.setdefault(requests, PassTimes(requests))

    def _pace_of(self, requests: int) -> Pace:
        if requests not in self._paces:
            nearest = min(self._paces, key=lambda known: abs(known - requests), default=None)
            like = None if nearest is None else self._paces[nearest]
            self._paces[requests] = Pace(self._most, like, probes=True)
        return self._paces[requests]

    def plan(self, requests: int) -> Plan:
        """What the next round should do."""
        if self._weighs_rows:
            return "draft" if self._times_of(requests).are_usable else "plain"
        pace = self._pace_of(requests)
        if pace.wants_probe():
            level = self._seconds_of_level(requests)
            if level is not None:
                self._levels[requests] = level
                return "probe"
            pace.judge(math.inf)
        return "draft" if pace.wants_draft() else "plain"

    def _most_speedup(self, requests: int) -> float:
        """Of a draft whose tokens are all accepted, with as many levels as are best of those that it may have.

        A pass over more rows than were ever measured takes as long as the measured ones lead to expect, and no less per
        row than a prompt's, whose many rows are the cheapest.
        """
        times, level = self._times_of(requests), self._levels[requests]
        plain, row = times.seconds(requests), self._row if math.isfinite(self._row) else 0.0

        def seconds(tokens: int) -> float:
            return (tokens - 1) * level + max(times.seconds(tokens * requests), tokens * requests * row)

        return max(tokens * plain / seconds(tokens) for tokens in range(self._least, self._most + 1))

    def record_prompt(self, rows: int, seconds: float) -> None:
        """A pass over parts of prompts took this long."""
        if rows >= _ROWS_OF_PROMPT:
            self._row = min(self._row, seconds / rows)

    def seconds_of_rows(self, requests: int) -> Callable[[int], float] | None:
        """What a round takes without its draft, by the rows of its pass; None: not known."""
        times = self._times_of(requests)
        return times.seconds if times.are_usable else None

    def record(self, requests: int, plan: Plan, rows: int, draft_seconds: float, seconds: float, tokens: float):
        """A round is over.

        Args:
            requests: of the round.
            plan: what it did.
            rows: of its pass.
            draft_seconds: what the draft took.
            seconds: what the rest took.
            tokens: that it gave, per request.
        """
        self._times_of(requests).add(rows, seconds)
        if not self._weighs_rows:
            pace = self._pace_of(requests)
            if plan == "probe":
                pace.judge(self._most_speedup(requests))
            else:
                pace.record(plan == "draft", draft_seconds + seconds, tokens)
            self.loss, self.is_bound = (None if pace.pays else pace.speedup), not pace.has_tried
