"""Two results side by side: `python -m benchmarks.compare OLD.csv NEW.csv`.

Times of two runs on a shared machine differ by themselves. The last column compares the ratios to PyTorch of each run,
which differ less: above 1 the new run is better.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .harness import report, results
from .harness.results import geometric_mean

HEADINGS = ("cell", "old", "new", "old/new", "old ratio", "new ratio", "change")


def compare(old: list[dict], new: list[dict]) -> list[str]:
    """A table of the cells that both runs timed, with geometric means below it."""
    before = {cell.key: cell for cell in results.cells(old)}
    lines, speedups, changes = [HEADINGS], [], []
    for cell in results.cells(new):
        other = before.get(cell.key)
        if other is None or other.ours is None or cell.ours is None:
            continue
        a, b = other.ours, cell.ours
        speedups.append(a["p50_us"] / b["p50_us"])
        both = a["ratio"] != "" and b["ratio"] != ""
        if both:
            changes.append(b["ratio"] / a["ratio"])
        lines.append(
            (
                cell.label,
                report.microseconds(a["p50_us"]),
                report.microseconds(b["p50_us"]),
                f"{speedups[-1]:.2f}x",
                report.number(a["ratio"], "{:.2f}x"),
                report.number(b["ratio"], "{:.2f}x"),
                f"{changes[-1]:.2f}x" if both else "",
            )
        )
    if len(lines) == 1:
        return ["no cell is in both results"]
    text = f"geometric mean over {len(speedups)} cells: {geometric_mean(speedups):.2f}x in time"
    if changes:
        text += f", {geometric_mean(changes):.2f}x in the ratio to PyTorch"
    return [*report.aligned(lines), "", text, *differences(old[0], new[0])]


def differences(old: dict, new: dict) -> list[str]:
    """What else changed between the runs."""
    names = [name for name in results.MACHINE_COLUMNS if name not in ("date", "command") and old[name] != new[name]]
    return [f"{name}: {old[name]} -> {new[name]}" for name in names]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print(__doc__)
        return 2
    print("\n".join(compare(*(results.read(Path(argument)) for argument in arguments))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
