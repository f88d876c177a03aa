"""A plot of acceptance: how many times faster than the fastest PyTorch form, and the share of a plain read."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot

from .results import Cell

COLOUR, REFERENCE = "#1f5fa8", "#999999"


def save(cells: list[Cell], target: Path) -> list[Path]:
    """Write TARGET-acceptance-speed.png if there is a cell to show."""
    shown = [cell for cell in cells if cell.first["op"].startswith("accept") and cell.ours]
    if not shown:
        return []
    names = [cell.label.removeprefix("accept ").replace("vocabulary ", "V") for cell in shown]
    rows = range(len(shown))
    figure, (ratio, read) = pyplot.subplots(1, 2, figsize=(12, 1.2 + 0.27 * len(shown)), sharey=True)
    ratio.barh(rows, [cell.ours["ratio"] or 0 for cell in shown], color=COLOUR)
    ratio.set_xscale("log", base=2)
    ratio.axvline(1, color=REFERENCE)
    ratio.set_xlabel("times faster than the fastest PyTorch form")
    ratio.set_yticks(list(rows), labels=names, fontsize=8)
    ratio.invert_yaxis()
    read.barh(rows, [cell.ours["read_percent"] or 0 for cell in shown], color=COLOUR)
    read.axvline(100, color=REFERENCE)
    read.set_xlabel("% of a plain read of the rows on the accepted paths")
    machine = shown[0].first
    figure.suptitle(
        f"acceptance: {machine['machine']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    path = target.with_name(f"{target.stem}-acceptance-speed.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return [path]
