"""`Answer`: what a client knows of a text, which is all that it takes to go on with it, and what it hands out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.request import Request, State
from specdec_ops.decode.sampling import Sampling

from . import wire

if TYPE_CHECKING:
    import torch

    from specdec_ops.decode.text import Tokenizer

_OP = "remote.Client"
_FORMAT = 1
_BEFORE = 8  # verified tokens that unverified ones are decoded with


@dataclasses.dataclass
class RemoteStats:
    """What an answer cost.

    Attributes:
        calls: trees that were sent, repeats not counted: rounds of the server.
        tokens: of the answer.
        drafted: nodes of all trees, without their roots.
        accepted: tokens of them that were accepted.
        ahead: rounds whose draft was ready when the result before it came.
        reconnections: connections after the first.
        alone: tokens that were drafted without the server.
        withdrawn: those of them that were taken back.
    """

    calls: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    ahead: int = 0
    reconnections: int = 0
    alone: int = 0
    withdrawn: int = 0


@dataclasses.dataclass(frozen=True)
class RemoteResult:
    """An answer.

    Attributes:
        text: without the prompt and the stop string; "" without a tokenizer.
        tokens: ids without the prompt. The last `unverified` of them are the draft's alone.
        finish_reason: as that of `specdec_ops.decode.Result`, or "disconnected": the server stayed away.
        logprobs: of each verified token, if asked for; NaN for tokens that were kept.
        unverified: tokens at the end that no target has seen.
        kept: (start, end) of tokens in the answer that the target would not have said, with on_return="keep".
        stats: what it cost.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None
    unverified: int
    kept: tuple[tuple[int, int], ...]
    stats: RemoteStats


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: verified text since the last piece.
        tokens: verified ids since the last piece. They never change any more.
        unverified: ids after them that the draft alone has said so far. The next piece replaces them.
        unverified_text: the same as text.
        result: the whole answer with its last piece, else None.
    """

    text: str
    tokens: tuple[int, ...]
    unverified: tuple[int, ...] = ()
    unverified_text: str = ""
    result: RemoteResult | None = None


class Answer:
    """A text on its way.

    Args:
        prompt: its ids.
        sampling: how its tokens are chosen.
        hello: of the server; the model stays the same to the end.
        tokenizer: for text and stop strings, or None.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, hello: wire.Hello, tokenizer: Tokenizer | None) -> None:
        self.request = Request(prompt, sampling, hello.eos, tokenizer)
        self.hello = hello
        self.key: bytes | None = None
        self.round = 0
        self.unverified: list[int] = []
        self.kept: list[tuple[int, int]] = []
        self.stats = RemoteStats()
        self.states: list[tuple[int, torch.Tensor]] = []  # that have come and that the draft has not seen yet
        self.states_end = 0
        self._tokenizer = tokenizer

    @property
    def ids(self) -> list[int]:
        """The prompt and the verified tokens."""
        return self.request.ids

    @property
    def is_finished(self) -> bool:
        """Whether the answer has ended, for good or because the server stayed away."""
        return self.request.state is State.FINISHED

    def take(self, result: wire.Result, on_return: str) -> None:
        """A round's tokens. What was drafted meanwhile stays as far as it agrees with them; what does not, is kept or
        taken back.
        """
        tokens, logprobs, unverified = list(result.tokens), list(result.logprobs), self.unverified
        agreed = common(tokens, unverified)
        differ = agreed < min(len(tokens), len(unverified))
        self.round += 1
        self.unverified = [] if differ else unverified[agreed:]
        finish = result.finish
        if differ and on_return == "keep":
            start = len(self.ids) - self.request.prompt_length + agreed
            self.kept.append((start, start + len(unverified) - agreed))
            tokens = tokens[:agreed] + unverified[agreed:]
            logprobs = logprobs[:agreed] + [math.nan] * (len(tokens) - agreed) if logprobs else []
            finish, self.key = "", None  # another text than the session's
        elif differ:
            self.stats.withdrawn += len(unverified) - agreed
        self.request.take(tokens, logprobs or None, self.hello.max_length)
        if finish:
            self.request.finish(finish)
        if self.is_finished:
            self.stats.withdrawn += len(self.unverified)
            self.unverified = []
        self.stats.tokens = len(self.request.tokens)

    def room(self) -> int:
        """Tokens that may still be drafted alone."""
        text = [*self.request.tokens, *self.unverified]
        if self.is_finished or (self.unverified and self.unverified[-1] in self.request.eos):
            return 0
        longest = self.hello.max_length - self.request.prompt_length
        return max(0, min(self.request.sampling.max_tokens, longest) - len(text))

    def guess(self, tokens: list[int]) -> int:
        """Tokens of the draft alone, up to where the answer ends. Returns how many were taken."""
        taken = 0
        for token in tokens[: self.room()]:
            self.unverified.append(token)
            taken += 1
            if token in self.request.eos:
                break
        self.stats.alone += taken
        return taken

    def piece(self, *, last: bool = False) -> Piece:
        """What is new."""
        text, tokens = self.request.news()
        return Piece(text, tokens, tuple(self.unverified), self._unverified_text(), self.result() if last else None)

    def result(self) -> RemoteResult:
        """The whole answer."""
        request = self.request
        tokens = [*request.tokens, *self.unverified]
        self.stats.tokens = len(tokens)
        return RemoteResult(
            request.stream.text + self._unverified_text(),
            tokens,
            request.finish_reason,
            request.logprobs if request.sampling.logprobs else None,
            len(self.unverified),
            tuple(self.kept),
            dataclasses.replace(self.stats),
        )

    def _unverified_text(self) -> str:
        if self._tokenizer is None or not self.unverified:
            return ""
        before = self.request.tokens[-_BEFORE:]
        known = self._tokenizer.decode(before, skip_special_tokens=True) if before else ""
        return self._tokenizer.decode([*before, *self.unverified], skip_special_tokens=True)[len(known) :]

    def save(self, path: str | os.PathLike) -> None:
        """Write all that it takes to go on. Whoever reads the file meanwhile sees the old state or the new one."""
        request = self.request
        said = {
            "format": _FORMAT,
            "prompt": self.ids[: request.prompt_length],
            "tokens": request.tokens,
            "logprobs": request.logprobs,
            "unverified": self.unverified,
            "kept": self.kept,
            "sampling": dataclasses.asdict(request.sampling),
            "server": dataclasses.asdict(dataclasses.replace(self.hello, token="")),
            "key": None if self.key is None else self.key.hex(),
            "round": self.round,
            "stats": dataclasses.asdict(self.stats),
            "finish_reason": request.finish_reason,
        }
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(said) + "\n")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike, tokenizer: Tokenizer | None) -> Answer:
        """The answer that `save` has written.

        Raises:
            ValueError: the file holds no answer.
        """
        try:
            said = json.loads(Path(path).read_text())
            if said["format"] != _FORMAT:
                raise ValueError(said["format"])
            hello = wire.Hello(**{**said["server"], "eos": tuple(said["server"]["eos"])})
            answer = cls(said["prompt"], Sampling(**said["sampling"]), hello, tokenizer)
            answer.key = None if said["key"] is None else bytes.fromhex(said["key"])
            answer.round, answer.unverified = said["round"], said["unverified"]
            answer.kept = [tuple(pair) for pair in said["kept"]]
            answer.stats = RemoteStats(**said["stats"])
            if said["tokens"]:
                answer.request.take(said["tokens"], said["logprobs"] or None, hello.max_length)
            if said["finish_reason"] not in (None, "disconnected"):
                answer.request.finish(said["finish_reason"])
            return answer
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(argument_error(_OP, "saved", "a file that a client has written", str(path))) from error


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
