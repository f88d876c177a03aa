"""The speed that is asked of tree_attention on a GPU, checked against a run as in targets.py.

Ratios are against the fastest correct peer of the same cell, whatever library it is from and with its plan made before.
"""

from __future__ import annotations

from .results import Cell, geometric_mean
from .targets import Verdict, column, each_and_mean, floor

LONG = 8192  # slots
WIDE = 8  # requests
MEMORY_BOUND_ROWS = 128  # query rows per KV head: nodes times heads / kv_heads
COMPUTE_BOUND_ROWS = 1024


def rows_per_kv_head(cell: Cell) -> float:
    first = cell.first
    return first["nodes"] * first["heads"] / first["kv_heads"]


def attention_cells(all_cells: list[Cell]) -> list[Cell]:
    return [cell for cell in all_cells if cell.first["op"] == "tree_attention" and cell.ours]


def per_library(all_cells: list[Cell]) -> dict[str, list[float]]:
    """Times faster than each peer, by its name, over the cells that both have."""
    ratios: dict[str, list[float]] = {}
    for cell in attention_cells(all_cells):
        for row in cell.rows:
            if row["role"] in ("pytorch", "library") and row["p50_us"] != "":
                ratios.setdefault(row["contestant"], []).append(row["p50_us"] / cell.ours["p50_us"])
    return ratios


def library_means(all_cells: list[Cell]) -> list[str]:
    """A line for each peer, with the geometric mean. One that left a cell as hopeless counts with its few rounds."""
    return [
        f"against {name}: mean {geometric_mean(ratios):.2f}x, least {min(ratios):.2f}x over {len(ratios)} cells"
        for name, ratios in sorted(per_library(all_cells).items())
    ]


def verdicts(all_cells: list[Cell]) -> list[Verdict]:
    usable = attention_cells(all_cells)
    large = [
        c for c in usable if c.first["batch"] >= WIDE and c.first["context"] >= LONG and c.first["lengths"] == "equal"
    ]
    memory = [cell for cell in large if rows_per_kv_head(cell) <= MEMORY_BOUND_ROWS]
    compute = [cell for cell in large if rows_per_kv_head(cell) >= COMPUTE_BOUND_ROWS]
    compared = [cell for cell in usable if cell.ours["ratio"] != ""]
    shape = f"batch {WIDE} and more, context {LONG} and more"
    return [
        floor(
            *(f"85% of a copy's bandwidth: {shape}, up to {MEMORY_BOUND_ROWS} rows per KV head", memory),
            *(column("read_percent"), 85, "%"),
        ),
        floor(
            *(f"60% of the matrix product's rate: {shape}, {COMPUTE_BOUND_ROWS} rows per KV head and more", compute),
            *(column("gemm_percent"), 60, "%"),
        ),
        each_and_mean("the best peer: mean 1.3x, never slower by more than 5%", compared, 1.3, 1 / 1.05),
    ]
