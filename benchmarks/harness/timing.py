"""Interleaved, paired timing: every contestant once per round, in random order, so that all meet the same machine.

Results are lists of seconds per round. A ratio is the median of the ratios within rounds, which a slow drift of a
shared machine doesn't touch. Rounds in which other processes used the processors are dropped where enough are left.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .contestant import PEERS, Contestant
from .machine import cache_bytes, native

MIN_ROUNDS = 5
MAX_ROUNDS = 400
QUIET_PERCENT = 5.0  # use by others below which a window counts as quiet
WINDOW_SECONDS = 0.3  # /proc/stat counts in hundredths of a second
SHORT_CALL = 200e-6  # warm calls shorter than this are timed several at a time
LONG_CALL = 5e-3  # beyond this a warming call would change nothing
HOPELESS = 8.0  # a peer this many times slower than the fastest one leaves after MIN_ROUNDS


@dataclass
class Timing:
    """Seconds per round of one contestant."""

    seconds: list[float]

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.seconds)
        position = (len(ordered) - 1) * percent / 100
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def noise(self) -> float:
        """Spread between the 20th and 80th percentile, relative to the median."""
        return (self.percentile(80) - self.percentile(20)) / self.median if self.median > 0 else 0.0


def paired_ratio(slower: Timing, faster: Timing) -> float:
    """How many times faster the second is: the median over the rounds that both ran."""
    return statistics.median(a / b for a, b in zip(slower.seconds, faster.seconds, strict=False))


@dataclass
class Measurement:
    """timings by contestant name; the share of processor time that others took; rounds kept and rounds run.

    how: on a GPU, by contestant name: "graph" or "loop".
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    others_percent: float = 0.0
    rounds_kept: int = 0
    rounds_run: int = 0
    how: dict[str, str] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        return self.others_percent > QUIET_PERCENT


class Contention:
    """How much processor time somebody else used since the last look: /proc/stat minus our own."""

    def __init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        self.start = time.perf_counter()
        self.busy, self.own = self._busy(), time.process_time()

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def percent(self) -> float:
        """Percent of all processors' time since mark(); 0 where the system doesn't say."""
        busy = self._busy()
        if busy is None or self.busy is None or self.elapsed() <= 0:
            return 0.0
        others = (busy - self.busy) - (time.process_time() - self.own)
        return max(0.0, 100 * others / (self.elapsed() * (os.cpu_count() or 1)))

    @staticmethod
    def _busy() -> float | None:
        """Seconds that all processors have been busy, or stolen by the host, since they started."""
        try:
            counts = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except (OSError, ValueError, IndexError):
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = counts
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Evictor:
    """Makes tensors cold: writes their cache lines back and drops them, or else reads a large buffer over them."""

    FLUSH_LIMIT = 256 << 20

    def __init__(self) -> None:
        module = native()
        self.evict = getattr(module, "evict_from_cache", None)
        probe = torch.zeros(64)
        if self.evict is not None and self.evict(probe.data_ptr(), probe.numel() * 4):
            self.how = "cold: the cache lines of what is read are evicted (clflush) before each call"
            return
        self.evict = None
        last = max(cache_bytes(3), cache_bytes(2), 32 << 20)
        size = min(2 * last, self.FLUSH_LIMIT)
        self.flush = torch.ones(size // 4)
        self.how = f"cold: a buffer of {size >> 20} MiB is read before each call"
        if size < 2 * last:
            self.how += f", which can't empty a last-level cache of {last >> 20} MiB: read it as 'not in L2'"

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.evict is None:
            self.flush.sum()
            return
        for tensor in tensors:
            span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            self.evict(tensor.data_ptr(), span * tensor.element_size())


class CpuTimer:
    """Times contestants on the CPU."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.evictor: Evictor | None = None

    def measure(self, contestants: list[Contestant], mode: str, seconds: float, patience: float = 0) -> Measurement:
        """Alternate for about this long, and for MIN_ROUNDS at least.

        mode: "warm" or "cold". patience: go on for up to this many seconds until MIN_ROUNDS rounds were undisturbed.
        """
        if mode == "cold" and self.evictor is None:
            self.evictor = Evictor()
        active = [contestant for contestant in contestants if not contestant.problem]
        repeats = {contestant.name: self._repeats(contestant, mode) for contestant in active}
        samples: dict[str, list[float]] = {contestant.name: [] for contestant in active}
        others: list[float] = []  # per round
        window, start = Contention(), time.perf_counter()
        rounds = 0
        while active and rounds < MAX_ROUNDS:
            spent, quiet = time.perf_counter() - start, sum(percent <= QUIET_PERCENT for percent in others)
            if rounds >= MIN_ROUNDS and spent >= seconds and (quiet >= MIN_ROUNDS or spent >= patience):
                break
            for contestant in self.random.sample(active, len(active)):
                samples[contestant.name].append(self._time(contestant, mode, repeats[contestant.name]))
            rounds += 1
            if window.elapsed() >= WINDOW_SECONDS:
                others += [window.percent()] * (rounds - len(others))
                window.mark()
            if rounds == MIN_ROUNDS:
                active = without_hopeless(active, samples)
        others += [window.percent() if window.elapsed() >= 0.1 else (others or [0.0])[-1]] * (rounds - len(others))
        return keep_quiet(samples, others)

    def _time(self, contestant: Contestant, mode: str, repeats: int) -> float:
        if contestant.before is not None:
            contestant.before()
        call = contestant.call
        if mode == "cold":
            call = contestant.cold_call or call
            self.evictor(contestant.reads)
        elif repeats > 0:
            call()  # the contestant before may have pushed K and V out of the nearer caches
        repeats = max(repeats, 1)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        elapsed = time.perf_counter() - start
        if contestant.after is not None:
            contestant.after()
        return elapsed / repeats

    def _repeats(self, contestant: Contestant, mode: str) -> int:
        """Calls per measurement; 0: one call, without a warming call before it."""
        if mode == "cold":
            return 1
        estimate = self._time(contestant, "warm", 1)
        return 0 if estimate > LONG_CALL else max(1, min(50, round(SHORT_CALL / max(estimate, 1e-7))))


def without_hopeless(active: list[Contestant], samples: dict[str, list[float]]) -> list[Contestant]:
    medians = {each.name: statistics.median(samples[each.name]) for each in active if each.role in PEERS}
    fastest = min(medians.values(), default=0.0)
    return [each for each in active if each.role not in PEERS or medians[each.name] <= HOPELESS * fastest]


def keep_quiet(samples: dict[str, list[float]], others: list[float]) -> Measurement:
    """Drop the rounds of busy windows, unless fewer than MIN_ROUNDS would be left."""
    quiet = [i for i, percent in enumerate(others) if percent <= QUIET_PERCENT]
    kept = quiet if len(quiet) >= MIN_ROUNDS else range(len(others))
    timings = {}
    for name, seconds in samples.items():
        chosen = [seconds[i] for i in kept if i < len(seconds)]
        timings[name] = Timing(chosen if len(chosen) >= MIN_ROUNDS else seconds)  # one that left early has few rounds
    percent = statistics.fmean(others[i] for i in kept) if others else 0.0
    return Measurement(timings, percent, len(kept), len(others))
