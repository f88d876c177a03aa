"""How fast this machine reads: the fastest of many ways, found in the run itself. A roof must not be beaten.

No single way is the fastest on every processor: some read faster in several places at once, some when they are told
ahead what comes, some with fewer threads, most from huge pages. So the ways are tried, and the best of them is the
plain read that the kernels are judged against. It reads a buffer of its own, since that may lie as suits it best.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import random
import time
from dataclasses import dataclass

import torch

from .contestant import Contestant
from .machine import cache_bytes, native

STREAMS = (1, 2, 4, 8)
PREFETCHES = ((0, False), (512, True), (1024, True), (1024, False), (2048, False))  # bytes ahead, into the first cache
LEAST_BUFFER, MOST_BUFFER = 256 << 20, 1 << 30
SEARCH_SECONDS = 1.5  # of which the first half is for all ways, the other for the best of them
SMALL_SEARCH_SECONDS = 0.1  # for a size that caches hold
FINALISTS = 3
MADV_NOHUGEPAGE = 15  # Linux's number, which Python does not know by name


@dataclass(frozen=True)
class Way:
    """streams: places that a thread reads side by side. ahead: bytes by which it prefetches, into the first cache
    ("nearest") or the second one. huge: whether the buffer lies on huge pages.
    """

    threads: int
    streams: int = 1
    ahead: int = 0
    nearest: bool = False
    huge: bool = False

    def describe(self) -> str:
        level = "L1" if self.nearest else "L2"
        prefetch = f", prefetch to {level} {self.ahead} bytes ahead" if self.ahead else ""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{threads}, {self.streams} at once each{prefetch}, {'huge' if self.huge else 'small'} pages"


def allocate(size: int, huge: bool) -> torch.Tensor:
    """A buffer on pages of that kind, as far as the system allows it. The threads that will read it fill it."""
    pages = mmap.mmap(-1, size)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # without huge pages both kinds are the same
        pages.madvise(mmap.MADV_HUGEPAGE if huge else MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


class Reader:
    """Finds the fastest way, and reads in it.

    size: bytes of the buffer, which is larger than all caches. bandwidth: bytes per second of the fastest way from
    memory. chosen: that way.
    """

    def __init__(self, size: int | None = None, seconds: float | None = None) -> None:
        self.caches = max(cache_bytes(3), cache_bytes(2))
        self.size = size or min(max(LEAST_BUFFER, 4 * self.caches), MOST_BUFFER)
        seconds = SEARCH_SECONDS if seconds is None else seconds
        self.module, self.offset = native(), 0
        self.for_size: dict[int, Way] = {}
        self.buffers = {True: allocate(self.size, True)}
        if self.module is None:
            self.chosen = Way(torch.get_num_threads(), huge=True)
            rates = self.race([self.chosen], self.size // 4, seconds)
        else:
            rates = self.search(seconds)
            self.chosen = max(rates, key=rates.get)
            self.buffers = {self.chosen.huge: self.buffers[self.chosen.huge]}
        self.bandwidth = rates[self.chosen]

    def search(self, seconds: float) -> dict[Way, float]:
        """Bytes per second from memory, by way."""
        threads, part = torch.get_num_threads(), self.size // 4
        rates = self.race(self.ways(threads, True), part, seconds / 2)
        best = sorted(rates, key=rates.get)[-FINALISTS:]
        self.buffers[False] = allocate(self.size, False)
        fewer = {threads, -(-threads // 2), 1}
        finals = [
            Way(count, way.streams, way.ahead, way.nearest, huge)
            for way, count, huge in itertools.product(best, fewer, (True, False))
        ]
        for way, rate in self.race(finals, part, seconds / 2).items():
            rates[way] = max(rate, rates.get(way, 0.0))
        return rates

    def ways(self, threads: int, huge: bool) -> list[Way]:
        return [Way(threads, streams, *how, huge) for streams in STREAMS for how in PREFETCHES]

    def race(self, ways: list[Way], size: int, seconds: float) -> dict[Way, float]:
        """The best rate of each, in rounds of random order. Each read goes on where the one before has ended."""
        rates, order = dict.fromkeys(ways, 0.0), random.Random(0)
        start, rounds = time.perf_counter(), 0
        while rounds < 2 or time.perf_counter() - start < seconds:
            for way in order.sample(ways, len(ways)):
                self.offset = self.offset + size if self.offset + 2 * size <= self.size else 0
                begin = time.perf_counter()
                self.read_at(self.offset, size, way)
                rates[way] = max(rates[way], size / (time.perf_counter() - begin))
            rounds += 1
        return rates

    def read_at(self, offset: int, size: int, way: Way) -> None:
        buffer = self.buffers[way.huge]
        if self.module is None:
            buffer[offset : offset + size].sum()
            return
        address = buffer.data_ptr() + offset
        self.module.read_bytes(address, size, way.threads, way.streams, way.ahead, way.nearest)

    def read(self, size: int, way: Way) -> None:
        """So many bytes; more than the buffer has are read in several passes over it."""
        while size > 0:
            self.read_at(0, min(size, self.size), way)
            size -= self.size

    def way_for(self, size: int) -> Way:
        """The fastest way for a size that is read again and again: what caches hold is read in another way."""
        if size > self.caches or self.module is None:
            return self.chosen
        kind = max(size, 1).bit_length()
        if kind not in self.for_size:
            huge, threads = self.chosen.huge, torch.get_num_threads()
            ways = self.ways(threads, huge) + ([Way(1, streams, huge=huge) for streams in STREAMS] * (threads > 1))
            rates = dict.fromkeys(ways, 0.0)
            start = time.perf_counter()
            while time.perf_counter() - start < SMALL_SEARCH_SECONDS or not all(rates.values()):
                for way in ways:
                    self.read(size, way)
                    begin = time.perf_counter()
                    self.read(size, way)
                    rates[way] = max(rates[way], 1 / (time.perf_counter() - begin))
            self.for_size[kind] = max(rates, key=rates.get)
        return self.for_size[kind]

    def control(self, size: int) -> Contestant:
        """The plain read of so many bytes, to run beside those who must read as many."""
        buffer = self.buffers[self.chosen.huge][: min(size, self.size)]
        warm = functools.partial(self.read, size, self.way_for(size))
        cold = functools.partial(self.read, size, self.chosen)
        return Contestant("plain read", "control", warm, reads=(buffer,), cold_call=cold)


@functools.cache
def reader() -> Reader:
    """The one of this process."""
    return Reader()
