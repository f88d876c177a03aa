"""What the engine gives back: pieces of a text while it grows, and the whole."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Stats:
    """What an answer cost.

    Attributes:
        target_calls: passes of the target that this request took part in, its prompt's not counted.
        tokens: of the answer.
        drafted: nodes of all drafts, without their roots.
        accepted: drafted tokens that were accepted, without roots, whether or not the answer had room for them.
        prompt_tokens: of the prompt.
        cached_prompt_tokens: prompt tokens whose keys and values another request had left behind.
    """

    target_calls: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0

    @property
    def tokens_per_call(self) -> float:
        """Tokens of the answer for each pass of the target; 1 without a draft."""
        return self.tokens / self.target_calls if self.target_calls else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer, from `Engine.stream`. Text is held back while it may be the beginning of a stop string.

    Attributes:
        request: the number of the request, as `Engine.submit` gave it; in `stream`, the prompt's place.
        text: what has come since the last piece.
        tokens: the ids that have come since.
        result: the whole answer with its last piece, else None.
    """

    request: int
    text: str
    tokens: tuple[int, ...]
    result: Result | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """An answer.

    Attributes:
        request: the number of the request; in `generate`, the prompt's place.
        text: without the prompt and without the stop string; "" without a tokenizer.
        tokens: ids without the prompt. An EOS that ended the text is the last one.
        finish_reason: "eos", "stop" (a stop string), "length" (max_tokens, or the model's longest text),
            "cancelled", or "invalid" (the model gave NaN).
        logprobs: the natural log of each token's probability, or None if it was not asked for.
        stats: what it cost.
    """

    request: int
    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None
    stats: Stats
