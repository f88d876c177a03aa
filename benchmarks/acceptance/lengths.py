"""Acceptance lengths: how many bytes a call of the target gives, by rule and tree, of the models in examples/.

python -m benchmarks.acceptance.lengths [--full] [CSV]

No clock is involved: the table says what the rules are worth on one pair of models (byte n-grams counted from Python's
own sources, so a Python of another version counts a little differently), and is the same on every machine with the same
Python and seeds, but for draws that a rounding decides. `benchmarks.run` prints it at its end.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import machine
from benchmarks.harness.results import MACHINE_COLUMNS
from examples import ngram_decode

COLUMNS = ("tree", "nodes", "depth", "rule", "temperature", "tokens_per_call", "standard_error", "calls")
SIZES = {"quick": (48, 4), "standard": (128, 8), "full": (256, 16)}  # bytes of each text, texts per prompt


def measure(preset: str) -> list[dict]:
    """Decode with every rule on every tree. See examples.ngram_decode.acceptance_lengths for the lines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rows of 256 bytes are too short to be worth a second thread
    try:
        return ngram_decode.acceptance_lengths(ngram_decode.load(), *SIZES.get(preset, SIZES["standard"]))
    finally:
        torch.set_num_threads(threads)


def write(path: Path, lines: list[dict], columns: dict[str, str]) -> None:
    """One line per tree and rule, with the machine's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *MACHINE_COLUMNS))
        writer.writeheader()
        for line in lines:
            values = line | columns
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def report(preset: str, path: Path, columns: dict[str, str], say: Callable[[str], None], plot: bool = True) -> None:
    """Measure, print the table, write the CSV and, beside it, the plot."""
    lines = measure(preset)
    say("byte n-gram models, order 8 as the target and order 4 as the draft:")
    for row in ngram_decode.table(lines):
        say(row)
    write(path, lines, columns)
    say(f"lines: {path.name}")
    if plot:
        said = ngram_decode.plot(lines, path.with_suffix(".png"))
        say(said if said.startswith("no plot") else f"plot: {path.with_suffix('.png').name}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance.lengths", description=__doc__)
    parser.add_argument("csv", nargs="?", type=Path, default=Path(__file__).parents[1] / "results/local/acceptance.csv")
    parser.add_argument("--full", action="store_const", const="full", default="standard", dest="preset")
    asked = parser.parse_args(arguments)
    columns = machine.describe("cpu", sys.argv[1:] if arguments is None else arguments)
    columns["command"] = columns["command"].replace("benchmarks.run", "benchmarks.acceptance.lengths")
    report(asked.preset, asked.csv, columns, print)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
