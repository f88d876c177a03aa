"""A few calls of our op in one cell, for a profiler: `python -m benchmarks.one_call 'LABEL OF A CELL'`."""

from __future__ import annotations

import re
import sys

import torch

from .registry import OPS, PRESETS
from .run import Options

CALLS = 4  # the first ones compile and fill the caches


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    cases = [case for case in PRESETS["gpu-first"]() if len(arguments) == 1 and re.search(arguments[0], case.label)]
    if len(cases) != 1:
        print(f"{__doc__} The cells are:", *(case.label for case in PRESETS["gpu-first"]()), sep="\n")
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    op = OPS[cases[0].op]
    contestants = op.contestants(op.make_inputs(cases[0], device), Options("gpu-first", device=device))
    ours = next(each for each in contestants if each.role == "ours")
    for _ in range(CALLS):
        ours.call()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{CALLS} calls of {ours.name}: {cases[0].label}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
