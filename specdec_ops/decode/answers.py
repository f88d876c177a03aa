"""`Answers`: whole answers and streams of them, made of what an engine does request by request and round by round."""

from __future__ import annotations

import abc
import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence

import torch

from specdec_ops._core.checks import argument_error, is_int

from .diagnose import Prompt
from .progress import bar
from .result import Chunk, Result
from .sampling import Sampling

_OP = "Engine"


def _renumbered(chunk: Chunk, place: int) -> Chunk:
    """The same piece under the place of its prompt."""
    result = chunk.result and dataclasses.replace(chunk.result, request=place)
    return dataclasses.replace(chunk, request=place, result=result)


def as_prompts(prompts) -> list[Prompt]:
    """A list of prompts, of one or several as a caller gives them. What is in them is not checked."""
    if not isinstance(prompts, Sequence | torch.Tensor):
        raise TypeError(argument_error(_OP, "prompts", "strings or sequences of token ids, one or more", prompts))
    if isinstance(prompts, torch.Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (len(prompts) and is_int(prompts[0])):
        return [prompts]
    return list(prompts)


class Answers(abc.ABC):
    """`generate`, `stream` and `astream` of an engine."""

    def __init__(self) -> None:
        self._inboxes: dict[int, collections.deque[Chunk]] = {}  # of the answers that `astream` waits for
        self._turn = asyncio.Lock()

    @abc.abstractmethod
    def submit(self, prompt: Prompt, sampling: Sampling | None = None) -> int:
        """Let a request wait for its turn. Returns its number."""

    @abc.abstractmethod
    def cancel(self, number: int) -> None:
        """End a request."""

    @abc.abstractmethod
    def _withdraw(self, number: int) -> None:
        """Forget a request that no step has seen yet."""

    @abc.abstractmethod
    def step(self) -> list[Chunk]:
        """One round. Returns what is new."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        progress=False,
    ) -> list[Result]:
        """Decode prompts to their ends.

        Args:
            prompts: strings or lists of token ids; a single one is a list of one.
            sampling: of all, or one for each.
            progress: show a progress bar of prompts that are done (needs tqdm).

        Returns:
            Results in the order of the prompts.
        """
        results: dict[int, Result] = {}
        prompts = as_prompts(prompts)
        with bar(len(prompts), progress) as shown:
            for chunk in self.stream(prompts, sampling):
                if chunk.result is not None:
                    results[chunk.request] = chunk.result
                    shown.update(1)
        return [results[place] for place in range(len(prompts))]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[Chunk]:
        """Decode prompts and yield pieces of their answers as they come. Closing the iterator cancels what is left."""
        places = self._submit_all(as_prompts(prompts), sampling)
        try:
            while places:
                for chunk in self.step():
                    place = places.get(chunk.request)
                    if place is not None:
                        yield _renumbered(chunk, place)
                        if chunk.result is not None:
                            del places[chunk.request]
        finally:
            for number in places:
                self.cancel(number)

    async def astream(self, prompt: Prompt, sampling: Sampling | None = None) -> AsyncIterator[Chunk]:
        """`stream` of one prompt for asyncio. Any number of them share the engine's rounds."""
        number = self.submit(prompt, sampling)
        inbox = self._inboxes[number] = collections.deque()
        try:
            done = False
            while not done:
                async with self._turn:
                    if not inbox:
                        for chunk in await asyncio.to_thread(self.step):
                            if chunk.request in self._inboxes:
                                self._inboxes[chunk.request].append(chunk)
                while inbox:
                    chunk = inbox.popleft()
                    done = chunk.result is not None
                    yield _renumbered(chunk, 0)
                await asyncio.sleep(0)
        finally:
            del self._inboxes[number]
            self.cancel(number)

    def _submit_all(self, prompts: list[Prompt], sampling) -> dict[int, int]:
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"specdec_ops.{_OP}: sampling must be one or {len(prompts)}, got {len(each)}")
        places: dict[int, int] = {}
        try:
            for place, (prompt, settings) in enumerate(zip(prompts, each, strict=True)):
                places[self.submit(prompt, settings)] = place
        except Exception:
            for number in places:
                self._withdraw(number)
            raise
        return places
