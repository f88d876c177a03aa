"""What calls cost while other programs hold cores: short ops and PyTorch's, with no, one and two busy neighbours.

    python -m benchmarks.oversubscription [--seconds 1] [--neighbours 0 1 2]

A neighbour is a program that only counts, and goes where the scheduler puts it. Contestants take turns, half a turn is
for settling. The mean is what a decode loop feels; the median hides a call in ten that takes a time slice.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import specdec_ops

TURNS = 3


def contestants() -> dict[str, Callable[[], object]]:
    """Calls of 10 us to 1 ms."""
    x, weight, out = torch.randn(1, 576), torch.randn(960, 576), torch.empty(1, 960)
    q, slots = torch.randn(1, 1, 9, 64), torch.randn(2, 1, 4097, 3, 64)
    hidden, head = torch.randn(1, 576), torch.randn(49152, 576)
    topology, lens = specdec_ops.Tree.chain(1).to("cpu", 1), torch.tensor([4096], dtype=torch.int32)
    flat = [part.transpose(1, 2) for part in (q, *slots)]
    return {
        "linear 1 x 576 x 960": lambda: specdec_ops.linear(x, weight, out=out),
        "PyTorch's": lambda: torch.nn.functional.linear(x, weight),
        "one node, 4,096 slots": lambda: specdec_ops.tree_attention(q, *slots, topology, lens),
        "PyTorch's attention": lambda: torch.nn.functional.scaled_dot_product_attention(*flat, enable_gqa=True),
        "head 49,152 x 576": lambda: specdec_ops.exit_confidence(hidden, head),
        "PyTorch's head": lambda: torch.nn.functional.linear(hidden, head).softmax(-1).max(-1),
    }


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Programs that hold a core each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def microseconds(call: Callable[[], object], seconds: float) -> list[float]:
    """Of every call in the second half of the time."""
    found, begin = [], time.perf_counter()
    while (start := time.perf_counter()) < begin + seconds:
        call()
        if start > begin + seconds / 2:
            found.append(1e6 * (time.perf_counter() - start))
    return found or [1e6 * (time.perf_counter() - start)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    calls = contestants()
    print(f"{torch.get_num_threads()} threads; microseconds of a call: mean, median")
    print(f"{'':24}" + "".join(f"{f'{count} neighbours':>22}" for count in options.neighbours))
    cells: dict[str, list[str]] = {name: [] for name in calls}
    for count in options.neighbours:
        times: dict[str, list[float]] = {name: [] for name in calls}
        with busy(count):
            for _ in range(TURNS):
                for name, call in calls.items():
                    times[name] += microseconds(call, options.seconds)
        for name, found in times.items():
            cells[name].append(f"{statistics.mean(found):12.1f}{statistics.median(found):10.1f}")
    for name, row in cells.items():
        print(f"{name:24}" + "".join(row))


if __name__ == "__main__":
    main()
