"""Time that passes at once, and who runs models meanwhile.

Client and server wait by their event loop's clock alone, and run models by a `Work`. `run` gives them a loop whose
clock jumps to the next thing that is due, and `Inline` says how long a call takes on that clock: then a conversation
of an hour takes as long as its computations, and goes the same way every time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Work(Protocol):
    """Runs calls that compute, one at a time."""

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's value."""
        ...

    def close(self) -> None:
        """No more calls come."""
        ...


class Threaded:
    """Calls run in a thread, so that the loop goes on."""

    def __init__(self) -> None:
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "specdec_ops.remote")

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Work`."""
        call = functools.partial(_without_grad, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        """End the thread once it is idle."""
        self._executor.shutdown(wait=False)


class Inline:
    """Calls run at once, and then take some of the loop's time.

    Args:
        seconds: that each call takes; None: as long as it took by the system's clock.
    """

    def __init__(self, seconds: float | None = 0.0) -> None:
        self._seconds, self._turn = seconds, asyncio.Lock()

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Work`."""
        async with self._turn:
            start = time.perf_counter()
            value = _without_grad(function, *arguments)
            await asyncio.sleep(time.perf_counter() - start if self._seconds is None else self._seconds)
            return value

    def close(self) -> None:
        """Nothing to do."""


def _without_grad(function: Callable[..., T], *arguments: Any) -> T:
    with torch.no_grad():  # grad mode belongs to a thread
        return function(*arguments)


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: where it should, the clock jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None):
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("specdec_ops.remote: all tasks wait, and nothing is due that could wake them")
            self.now += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever all tasks wait. For streams in memory only."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._jumping.now


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a `VirtualLoop`; tasks that it leaves behind are cancelled.

    Raises:
        RuntimeError: all tasks wait for each other.
    """
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
