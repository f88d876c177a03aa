"""Plots of a result: the ratio to PyTorch by size of tree, and the share of the roof. Needs matplotlib.

`python -m benchmarks.plot RESULT.csv [PNG]`
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot

from .harness import plot_acceptance, results
from .harness.results import Cell

COLOURS = ("#1f5fa8", "#d1661b", "#3c8d40", "#8e4585", "#7a6a53", "#444444")
FIGURES = (
    ("ratio", "ratio", "times faster than the fastest PyTorch form", True),
    (
        "roof",
        "roof_percent",
        "% of the roof: the longer of a plain read of K and V and of the FLOPs at the best rate",
        False,
    ),
)


def series(cells: list[Cell], dtype: str, value: str) -> dict[str, list[tuple[float, float]]]:
    """Points (nodes, value) by line; a line is a model, context, batch and mode. Ragged batches are left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        op, model, cell_dtype, context, lengths, batch, tree, nodes, mode = cell.key
        usable = op == "tree_attention" and cell_dtype == dtype and lengths == "equal" and cell.ours
        if not usable or cell.ours[value] == "" or (tree == "chain" and nodes > 8):
            continue
        name = f"{model}, context {context}, batch {batch}, {mode}"
        lines.setdefault(name, []).append((nodes, cell.ours[value]))
    return {name: sorted(points) for name, points in lines.items()}


def by_model(lines: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    grouped: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in lines.items():
        model, label = name.split(", ", 1)
        kind = "head dims 64 and 80" if model.startswith("32/8 dim") else model
        grouped.setdefault(kind, {})[f"dim {model.split()[-1]}, {label}" if kind != model else label] = points
    return grouped


def panel(axes, lines: dict[str, list[tuple[float, float]]], one: float) -> None:
    shapes = list(dict.fromkeys(label.rsplit(", ", 1)[0] for label in lines))  # warm and cold share a colour
    for label, points in lines.items():
        shape, mode = label.rsplit(", ", 1)
        style = {"color": COLOURS[shapes.index(shape) % len(COLOURS)], "linestyle": "--" if mode == "cold" else "-"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.3, label=label, **style)
    axes.axhline(one, color="#999999", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, 320)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256], labels=["1", "2", "4", "8", "16", "32", "64", "128", "256"])
    axes.set_xlabel("nodes in the tree")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)


def save(rows: list[dict], target: Path) -> list[Path]:
    """Write one PNG per figure, named after `target`; returns those that had something to show."""
    cells, written = results.cells(rows), []
    dtypes = sorted({cell.first["dtype"] for cell in cells if cell.first["op"] == "tree_attention" and cell.ours})
    for suffix, value, axis, logarithmic in FIGURES:
        panels = [(d, m, lines) for d in dtypes for m, lines in by_model(series(cells, d, value)).items()]
        if not panels:
            continue
        columns = min(3, len(panels))
        height = -(-len(panels) // columns)
        figure, grid = pyplot.subplots(height, columns, figsize=(5.2 * columns, 3.9 * height), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (dtype, model, lines) in zip(grid.flat, panels, strict=False):
            panel(axes, lines, 1.0 if logarithmic else 100.0)
            axes.set_title(f"{model}, {dtype}", fontsize=10)
            if logarithmic:
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%gx"))
            else:
                axes.set_ylim(0, 1.15 * max(100, *(y for points in lines.values() for _, y in points)))
        machine, note = cells[0].first, results.roofs_note(rows)
        figure.suptitle(
            f"tree attention: {axis}\n{machine['machine']}, {machine['isa']}, {machine['threads']} threads, torch "
            f"{machine['torch']}, commit {machine['commit']}, {machine['date']}: {machine['command']}"
            + (f"\n{note}" if note and value == "roof_percent" else ""),
            fontsize=9,
        )
        figure.tight_layout()
        path = target.with_name(f"{target.stem}-{suffix}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written + plot_acceptance.save(cells, target)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) not in (1, 2):
        print(__doc__)
        return 2
    source = Path(arguments[0])
    for path in save(results.read(source), Path(arguments[-1]).with_suffix(".png")):
        print(path.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
