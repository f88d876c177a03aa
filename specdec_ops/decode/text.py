"""Text from tokens, as they come: what can be shown already, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer. Those of Hugging Face have it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...


_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MOST_PENDING = 8  # tokens of an unfinished character; beyond it they are no character


class TextStream:
    """The text of one answer. `push` takes its tokens; what may still change or be cut off is held back.

    Tokens are decoded together with some before them, since a tokenizer may treat the first token of a text in a way of
    its own. A token that ends inside a character waits for the rest of it, and the beginning of a stop string waits
    until it is one or is not.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._tokens: list[int] = []
        self._shown = self._context = 0  # tokens whose text is in `text`, and where decoding starts
        self.text = ""
        self.length_at: list[int] = []  # of `text` after each token
        self.stopped_at: int | None = None  # how many tokens it took until a stop string was whole
        self._released = 0

    def push(self, tokens: Sequence[int]) -> bool:
        """Take tokens one by one. Returns whether a stop string has ended the text; tokens after it are not taken."""
        for token in tokens:
            self._tokens.append(token)
            self._decode(final=False)
            self.length_at.append(len(self.text))
            if self._find_stop():
                return True
        return False

    def close(self) -> bool:
        """No more tokens come. Returns whether what was held back holds a stop string."""
        self._decode(final=True)
        return self._find_stop()

    def release(self, *, final: bool) -> str:
        """The text that was not released before and can't change any more."""
        end = len(self.text)
        if not final and self.stopped_at is None:
            end -= self._held_back()
        released, self._released = self.text[self._released : end], max(end, self._released)
        return released

    def _decode(self, *, final: bool) -> None:
        if self._tokenizer is None or self._shown == len(self._tokens):
            return
        before = self._text_of(self._context, self._shown)
        now = self._text_of(self._context, len(self._tokens))
        pending = len(self._tokens) - self._shown
        if now.endswith(_UNFINISHED) and not final and pending < _MOST_PENDING:
            return
        self.text += now[len(before) :]
        self._context, self._shown = self._shown, len(self._tokens)

    def _text_of(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True) if end > start else ""

    def _find_stop(self) -> bool:
        if not self._stop or self.stopped_at is not None:
            return self.stopped_at is not None
        start = max(0, (self.length_at[-2] if len(self.length_at) > 1 else 0) - self._longest)
        places = [place for place in (self.text.find(string, start) for string in self._stop) if place >= 0]
        if not places:
            return False
        self.text = self.text[: min(places)]
        self.stopped_at = len(self._tokens)
        return True

    def _held_back(self) -> int:
        """How many last characters may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(string.startswith(self.text[-length:]) for string in self._stop):
                return length
        return 0


def chat_prompt(target, question: str) -> str:
    """A question in the chat template of a target's tokenizer, with the beginning of the answer.

    Args:
        target: a model of the engine whose tokenizer is one of Hugging Face's.
        question: what the user says.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if getattr(target.tokenizer, "chat_template", None) is None:
        raise ValueError("specdec_ops.decode.chat_prompt: target must have a tokenizer with a chat template")
    messages = [{"role": "user", "content": question}]
    return target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
