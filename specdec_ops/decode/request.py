"""`Request`: one prompt on its way through the engine."""

from __future__ import annotations

import enum
import itertools
from typing import Any

from .cache import Sequence
from .result import Result, Stats
from .sampling import Sampling
from .text import TextStream, Tokenizer


class State(enum.Enum):
    """Where a request stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """One prompt, the answer so far, and its pages.

    `text` is the prompt and the answer as ids. Its keys and values are in the first `Sequence.length` slots of the
    target's cache: in a round all but those of the last token, which is node 0 of the draft's tree. `draft_state`
    belongs to the proposer of the engine.

    Where the target draws `target_roots` candidates for the next token instead of the token itself, all of the text is
    in the cache, and `candidates` are the roots of the next tree.
    """

    _numbers = itertools.count()

    def __init__(self, prompt: list[int], sampling: Sampling, eos: tuple[int, ...], tokenizer: Tokenizer | None):
        self.number = next(self._numbers)
        self.sampling = sampling
        self.eos = frozenset(eos if sampling.eos is None else sampling.eos)
        self.ids = list(prompt)
        self.prompt_length = len(prompt)
        self.sequence = Sequence()
        self.state = State.WAITING
        self.is_paused = False
        self.draft_state: Any = None
        self.target_roots = 1
        self.candidates: list[int] = []
        self.candidate_logprobs: list[float] = []
        self.logprobs: list[float] = []
        self.stats = Stats(prompt_tokens=len(prompt))
        self.finish_reason: str | None = None
        self.stream = TextStream(tokenizer, sampling.stop)
        self._reported = 0

    @property
    def tokens(self) -> list[int]:
        """The answer so far."""
        return self.ids[self.prompt_length :]

    @property
    def is_prefilled(self) -> bool:
        """Whether nothing is missing in the cache but the next tree."""
        return self.sequence.length == self.tree_start

    @property
    def tree_start(self) -> int:
        """Slots before the next tree, which is also the position of its roots."""
        return len(self.ids) if self.target_roots > 1 else len(self.ids) - 1

    def take(self, tokens: list[int], logprobs: list[float] | None, longest: int) -> None:
        """Append the tokens of a round, up to where the text ends.

        Args:
            tokens: accepted ones and the next one.
            logprobs: of each, or None.
            longest: the most tokens of prompt and answer that the model has positions for.
        """
        room = min(self.sampling.max_tokens - (len(self.ids) - self.prompt_length), longest - len(self.ids))
        reason = "length" if len(tokens) >= room else None
        kept = tokens[:room]
        ended = next((place for place, token in enumerate(kept) if token in self.eos), None)
        if ended is not None:
            kept, reason = kept[: ended + 1], "eos"
        shown = kept[:-1] if ended is not None else kept
        before = len(self.stream.length_at)
        if self.stream.push(shown) or (reason is not None and self.stream.close()):
            kept, reason = kept[: self.stream.stopped_at - before], "stop"
        self.ids += kept
        if logprobs is not None:
            self.logprobs += logprobs[: len(kept)]
        self.stats.tokens += len(kept)
        if reason is not None:
            self.finish(reason)

    def set_candidates(self, tokens: list[int], logprobs: list[float] | None) -> None:
        """What the target has drawn for the next token: the roots of the next tree.

        Args:
            tokens: in the order drawn, then -1 where fewer were possible.
            logprobs: of each, or None.
        """
        self.candidates = [token for token in tokens if token >= 0]
        self.candidate_logprobs = [] if logprobs is None else logprobs[: len(self.candidates)]

    def logprob_of_root(self, token: int) -> float:
        """Of a candidate that was kept."""
        return self.candidate_logprobs[self.candidates.index(token)]

    def finish(self, reason: str) -> None:
        """No more tokens come."""
        if self.finish_reason is None:
            if reason != "stop":
                self.stream.close()
            self.finish_reason, self.state = reason, State.FINISHED

    def news(self) -> tuple[str, tuple[int, ...]]:
        """Text and tokens that have come since the last call."""
        text = self.stream.release(final=self.state is State.FINISHED)
        start, self._reported = self._reported, len(self.ids) - self.prompt_length
        return text, tuple(self.ids[self.prompt_length + start :])

    def result(self) -> Result:
        """The whole answer."""
        logprobs = self.logprobs if self.sampling.logprobs else None
        return Result(self.number, self.stream.text, self.tokens, self.finish_reason, logprobs, self.stats)
