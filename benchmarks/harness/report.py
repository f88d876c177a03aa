"""What is printed: a line per cell while it runs, then the table, the means and the targets."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from .results import Cell, cells, geometric_mean, read, roofs_note
from .targets import EXIT_OPS, ROW_OPS, acceptance_verdicts, exit_verdicts, row_verdicts, verdicts
from .targets_gpu import library_means
from .targets_gpu import verdicts as gpu_verdicts

CLASSES = (("1 node", 1, 1), ("2-15 nodes", 2, 15), ("16-59 nodes", 16, 59), ("60 and more", 60, 1 << 30))
HEADINGS = (
    *(
        "cell",
        "ours",
        "best peer",
        "",
        "ratio",
        "by head",
        "avx2",
        "GFLOP/s",
        "% gemm",
        "GB/s",
        "% read",
        "% roof",
        "noise",
    ),
)


def microseconds(value: float) -> str:
    if value < 1000:
        return f"{value:.1f} us"
    return f"{value / 1000:.2f} ms" if value < 1e6 else f"{value / 1e6:.2f} s"


def number(value, pattern: str) -> str:
    return "" if value in ("", None) else pattern.format(value)


def table_line(cell: Cell) -> tuple[str, ...]:
    ours, limited, by_head = cell.ours, cell.of("specdec_ops avx2"), cell.of("specdec_ops head-major")
    if ours is None:
        return (cell.label, problem(cell)[:60] or "no time", *[""] * (len(HEADINGS) - 2))
    peer = cell.of(ours["best_peer"])
    return (
        cell.label,
        microseconds(ours["p50_us"]),
        microseconds(peer["p50_us"]) if peer else "",
        peer["contestant"] if peer else "",
        number(ours["ratio"], "{:.2f}x"),
        number(by_head["ratio"], "{:.2f}x") if by_head else "",
        number(limited["ratio"], "{:.2f}x") if limited else "",
        number(ours["gflops"], "{:.0f}"),
        number(ours["gemm_percent"], "{:.0f}"),
        number(ours["gbps"], "{:.1f}"),
        number(ours["read_percent"], "{:.0f}"),
        number(ours["roof_percent"], "{:.0f}"),
        f"{ours['noise_percent']:.0f}%" + (f" others {ours['others_percent']:.0f}%" if cell.noisy else ""),
    )


def problem(cell: Cell, role: str = "ours") -> str:
    """Why contestants of that role have no time."""
    return "; ".join(f"{r['contestant']} {r['problem']}" for r in cell.rows if r["role"] == role and r["problem"])


def table(all_cells: list[Cell]) -> list[str]:
    return aligned([HEADINGS] + [table_line(cell) for cell in all_cells], left=(0, 3))


def aligned(lines: list[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Text columns (their indices in `left`) to the left, figures to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def means(all_cells: list[Cell]) -> list[str]:
    """Geometric means of the ratio, per dtype and size of tree."""
    lines = []
    dtypes = sorted({cell.first["dtype"] for cell in all_cells if cell.first["op"] == "tree_attention"})
    for dtype in dtypes:
        chosen = [c for c in all_cells if c.first["op"] == "tree_attention" and c.first["dtype"] == dtype]
        for name, least, most in (*CLASSES, ("all", 1, 1 << 30)):
            ratios = _ratios(cell for cell in chosen if least <= cell.first["nodes"] <= most)
            if ratios:
                mean = geometric_mean(ratios)
                lines.append(f"geometric mean, {dtype}, {name}: {mean:.2f}x over {len(ratios)} cells")
    return lines


def _ratios(some: Iterable[Cell]) -> list[float]:
    return [
        cell.ours["ratio"]
        for cell in some
        if cell.ours and cell.ours["ratio"] != "" and cell.first["lengths"] == "equal"
    ]


def problems(all_cells: list[Cell]) -> list[str]:
    """Who got no time, and why; the same reason in several cells is said once."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in all_cells:
        for row in cell.rows:
            if row["problem"]:
                where.setdefault((row["contestant"], row["problem"]), []).append(cell.label)
    return [
        f"no time: {contestant}: {reason} ({labels[0]}{f' and {len(labels) - 1} more' if len(labels) > 1 else ''})"
        for (contestant, reason), labels in where.items()
    ]


def summary(all_cells: list[Cell]) -> list[str]:
    """Everything after the last cell."""
    lines = ["", *table(all_cells), "", *problems(all_cells), *means(all_cells), ""]
    if any(cell.first["op"] == "tree_attention" for cell in all_cells):
        on_gpu = all_cells[0].first["isa"].startswith("sm_")
        if on_gpu:
            lines += library_means(all_cells)
        judge = gpu_verdicts if on_gpu else verdicts
        lines += [line for verdict in judge(all_cells) for line in verdict.lines()]
    if any(cell.first["op"].startswith("accept") for cell in all_cells):
        lines += [line for verdict in acceptance_verdicts(all_cells) for line in verdict.lines()]
    if any(cell.first["op"] in EXIT_OPS for cell in all_cells):
        lines += [line for verdict in exit_verdicts(all_cells) for line in verdict.lines()]
    if any(cell.first["op"] in ROW_OPS for cell in all_cells):
        lines += [line for verdict in row_verdicts(all_cells) for line in verdict.lines()]
    note = roofs_note([row for cell in all_cells for row in cell.rows])
    lines += [note] if note else []
    noisy = sum(cell.noisy for cell in all_cells)
    if noisy:
        lines.append(f"{noisy} of {len(all_cells)} cells were disturbed by other processes (see 'others')")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks.harness.report RESULT.csv` prints the tables again. Returns 1 if one of ours was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    all_cells = cells(read(Path(arguments[0])))
    print("\n".join(summary(all_cells)))
    wrong = any(row["role"] == "ours" and row["problem"].startswith("WRONG") for cell in all_cells for row in cell.rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
