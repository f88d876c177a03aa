"""Acceptance lengths: how many bytes a call of the target gives, by rule and tree, of the models in benchmarks/decode.

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

from benchmarks.decode import ngram_decode
from benchmarks.harness import machine
from benchmarks.harness.results import MACHINE_COLUMNS

COLUMNS = ("tree", "nodes", "depth", "rule", "temperature", "tokens_per_call", "standard_error", "calls")
SIZES = {"quick": (48, 4), "standard": (128, 8), "full": (256, 16)}  # bytes of each text, texts per prompt


def acceptance_lengths(models: ngram_decode.Models, length: int = 48, copies: int = 4) -> list[dict]:
    """Bytes per call of the target, for every rule on every tree it is for, at temperature 1; and greedy, at 0.

    Args:
        models: the target and the draft.
        length: bytes of each text.
        copies: texts per prompt.

    Returns:
        One dict per tree and rule: tree, nodes, depth, rule, temperature, tokens_per_call, standard_error, calls.
    """
    prompts = ngram_decode.PROMPTS * copies
    lines = []
    for name, tree in ngram_decode.TREES.items():
        chain = tree.depth == len(tree) - 1
        for rule in (*ngram_decode.RULES, ngram_decode.GREEDY):
            if rule.chains_only and not chain:
                continue
            temperature = 0.0 if rule is ngram_decode.GREEDY else 1.0
            decoded = ngram_decode.decode(models, rule, tree, prompts, length, temperature=temperature)
            mean, error = decoded.tokens_per_call()
            lines.append(
                {
                    **{"tree": name, "nodes": len(tree), "depth": tree.depth, "rule": rule.name},
                    **{"temperature": temperature, "tokens_per_call": mean, "standard_error": error},
                    "calls": int(decoded.calls.sum()),
                }
            )
    return lines


def measure(preset: str) -> list[dict]:
    """Decode with every rule on every tree. The lines are those of acceptance_lengths."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rows of 256 bytes are too short to be worth a second thread
    try:
        return acceptance_lengths(ngram_decode.load(), *SIZES.get(preset, SIZES["standard"]))
    finally:
        torch.set_num_threads(threads)


def table(lines: list[dict]) -> list[str]:
    """The acceptance lengths as text: a line per rule, a column per tree."""
    trees = list(dict.fromkeys(line["tree"] for line in lines))
    rules = list(dict.fromkeys(line["rule"] for line in lines))
    found = {(line["rule"], line["tree"]): line for line in lines}
    rows = ["bytes per call of the target".ljust(28) + "".join(tree.rjust(16) for tree in trees)]
    for rule in rules:
        cells = [found.get((rule, tree)) for tree in trees]
        shown = ["" if c is None else f"{c['tokens_per_call']:.2f} ±{c['standard_error']:.2f}" for c in cells]
        rows.append(rule.ljust(28) + "".join(cell.rjust(16) for cell in shown))
    return rows


def draw(lines: list[dict], path: Path) -> str:
    """Draw the acceptance lengths. Returns one line that says where, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    trees = list(dict.fromkeys(line["tree"] for line in lines))
    rules = list(dict.fromkeys(line["rule"] for line in lines))
    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    colours = matplotlib.colormaps["tab20"]
    for place, rule in enumerate(rules):
        mine = [line for line in lines if line["rule"] == rule]
        at = [trees.index(line["tree"]) + (place - len(rules) / 2) * 0.8 / len(rules) for line in mine]
        heights, errors = ([line[name] for line in mine] for name in ("tokens_per_call", "standard_error"))
        axes.bar(at, heights, 0.75 / len(rules), yerr=errors, label=rule, color=colours(place), error_kw={"lw": 0.7})
    nodes = {line["tree"]: line["nodes"] for line in lines}
    axes.set_xticks(range(len(trees)), [f"{tree}\n{nodes[tree]} nodes" for tree in trees])
    axes.set_ylabel("bytes per call of the target")
    axes.set_title("byte n-gram models of the Python standard library: order 8 as the target", fontsize=10)
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path}"


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
    for row in table(lines):
        say(row)
    write(path, lines, columns)
    say(f"lines: {path.name}")
    if plot:
        said = draw(lines, path.with_suffix(".png"))
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
