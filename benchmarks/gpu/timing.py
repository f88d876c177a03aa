"""Timing on a CUDA device: graph replay over rotating copies of the inputs, between CUDA events.

A graph holds one call per copy of the inputs, the copies together are larger than twice the L2 cache, and each replay
runs them in turn: every call finds K and V cold, and no launch overhead is timed. There is no warm mode on a GPU.
"""

from __future__ import annotations

import random

import torch

from benchmarks.harness.contestant import Contestant
from benchmarks.harness.timing import MAX_ROUNDS, MIN_ROUNDS, Measurement, Timing, without_hopeless

MAX_COPIES = 64


def copies_needed(bytes_per_copy: int) -> int:
    """How many copies of the inputs exceed twice the L2 cache."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(MAX_COPIES, -(-2 * l2 // max(bytes_per_copy, 1)) + 1))


def replay(calls, graph: bool = True) -> tuple:
    """A function that runs all the calls, what must live as long as it, and how it runs them: "graph" or "loop".

    Where a capture fails there is a plain loop, which "loop" then tells.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up away from the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                kept = [call() for call in calls]
            return captured.replay, kept, "graph"
        except RuntimeError:
            torch.cuda.synchronize()
    return lambda: [call() for call in calls], None, "loop"


class GpuTimer:
    """Times contestants on the current CUDA device."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def measure(self, copies: list[list[Contestant]], seconds: float) -> Measurement:
        """copies[i]: the contestants over copy i of the inputs. Who has a problem in any copy is left out.

        seconds: of the GPU's time, for all contestants together.
        """
        everybody = {each.name: [c for group in copies for c in group if c.name == each.name] for each in copies[0]}
        by_name = {name: group for name, group in everybody.items() if not any(c.problem for c in group)}
        names = [each for each in copies[0] if each.name in by_name]
        runs = {name: replay([each.call for each in group], group[0].graph) for name, group in by_name.items()}
        samples: dict[str, list[float]] = {each.name: [] for each in names}
        active, spent, rounds = names, 0.0, 0
        while active and rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or spent < seconds):
            for each in self.random.sample(active, len(active)):
                elapsed = self._time(runs[each.name][0])
                samples[each.name].append(elapsed / len(by_name[each.name]))
                spent += elapsed
            rounds += 1
            if rounds == MIN_ROUNDS:
                active = without_hopeless(active, samples)
        how = {name: run[2] for name, run in runs.items()}
        return Measurement({name: Timing(values) for name, values in samples.items()}, 0.0, rounds, rounds, how)

    @staticmethod
    def _time(run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
