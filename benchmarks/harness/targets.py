"""The speed that is asked of tree_attention and of acceptance, checked against a run: a line each, and what misses it.

Ratios are against the fastest PyTorch form of the same cell, in the layout that suits PyTorch best. What is asked of
attention beyond that is a share of the roof that this machine was measured to have, so the same lines hold for every
class of machine. Ragged batches are shown in the table but count for no target: PyTorch computes their padding, which
would flatter us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .results import Cell, geometric_mean

EXIT_OPS = ("exit_confidence", "screened_exit", "bounded_exit", "kv_propagate", "exit_mlp")
ROW_OPS = ("gather_layer_kv", "kv_commit")


@dataclass
class Verdict:
    """met: None when the run has no cell for it."""

    text: str
    measured: str
    met: bool | None
    missed: list[str]

    def lines(self) -> list[str]:
        outcome = {True: "met", False: "NOT MET", None: "no cell in this run"}[self.met]
        first = f"target: {self.text}; measured {self.measured}; {outcome}" if self.measured else ""
        first = first or f"target: {self.text}; {outcome}"
        return [first] + [f"    missed by {cell}" for cell in self.missed]


def each_and_mean(text: str, chosen: list[Cell], mean: float, each: float) -> Verdict:
    """Ratios: a geometric mean, and a floor for every cell."""
    if not chosen:
        return Verdict(text, "", None, [])
    ratios = [cell.ours["ratio"] for cell in chosen]
    average = geometric_mean(ratios)
    missed = [f"{c.label}: {ratio:.2f}x" for c, ratio in zip(chosen, ratios, strict=True) if ratio < each]
    measured = f"{average:.2f}x, least {min(ratios):.2f}x over {len(ratios)} cells"
    return Verdict(text, measured, average >= mean and not missed, missed)


def floor(text: str, chosen: list[Cell], value: Callable[[Cell], float | None], least: float, unit: str) -> Verdict:
    """A floor for one figure of every cell that has it."""
    values = [(cell, value(cell)) for cell in chosen]
    values = [(cell, figure) for cell, figure in values if figure is not None]
    if not values:
        return Verdict(text, "", None, [])
    missed = [f"{cell.label}: {figure:.3g}{unit}" for cell, figure in values if figure < least]
    figures = [figure for _, figure in values]
    return Verdict(text, f"{min(figures):.3g}{unit} to {max(figures):.3g}{unit}", not missed, missed)


def column(name: str, contestant: str = "specdec_ops") -> Callable[[Cell], float | None]:
    def value(cell: Cell) -> float | None:
        row = cell.of(contestant)
        return row[name] if row is not None and row[name] != "" else None

    return value


def relative_efficiency(all_cells: list[Cell]) -> Callable[[Cell], float | None]:
    """FLOP rate relative to matrix products, as a percentage of that of the 64-node cell of Llama-3-8B."""

    def key(cell: Cell) -> tuple:
        return cell.first["dtype"], cell.first["context"], cell.first["batch"], cell.first["mode"]

    base = {
        key(cell): cell.ours["gemm_percent"]
        for cell in all_cells
        if cell.first["model"] == "Llama-3-8B" and cell.first["nodes"] == 64 and cell.first["tree"] == "random"
    }

    def value(cell: Cell) -> float | None:
        percent, reference = cell.ours["gemm_percent"], base.get(key(cell))
        return 100 * percent / reference if percent and reference else None

    return value


def verdicts(all_cells: list[Cell]) -> list[Verdict]:
    usable = [
        cell
        for cell in all_cells
        if cell.first["op"] == "tree_attention" and cell.first["lengths"] == "equal" and cell.ours
        if cell.ours["ratio"] != ""
    ]

    def some(least: int, most: int = 1 << 30, mode: str | None = None) -> list[Cell]:
        return [c for c in usable if least <= c.first["nodes"] <= most and mode in (None, c.first["mode"])]

    few, trees = some(1, 8, "cold"), some(9)
    far, near = ([cell for cell in few if (cell.first["context"] >= 4096) is is_far] for is_far in (True, False))
    rows = {id(cell): cell.first["nodes"] * cell.first["heads"] // cell.first["kv_heads"] for cell in trees}
    sweep = [
        cell
        for cell in some(64)
        if (cell.first["model"] == "Llama-3-8B" and cell.first["nodes"] in (128, 256))
        or (cell.first["model"].startswith("32/8") and cell.first["nodes"] == 64)
    ]
    of_roof, by_head = column("roof_percent"), "specdec_ops head-major"
    return [
        floor("attention: never slower than PyTorch in its best layout", usable, column("ratio"), 1, "x"),
        floor("attention over head-major caches: never slower than PyTorch", usable, column("ratio", by_head), 1, "x"),
        each_and_mean("trees of 8 nodes and more: mean 1.5x, each 1x", some(8), 1.5, 1),
        floor("1 to 8 nodes, cold, 4k and more: 85% of the roof", far, of_roof, 85, "%"),
        floor("1 to 8 nodes, cold, shorter: 70% of the roof", near, of_roof, 70, "%"),
        floor("60 nodes and more: 85% of the roof", some(60), of_roof, 85, "%"),
        floor(
            "16 rows per KV head and more: 75% of the roof", [c for c in trees if rows[id(c)] >= 16], of_roof, 75, "%"
        ),
        floor("AVX2 alone: 80% of its roof", some(60), column("roof_percent", "specdec_ops avx2"), 80, "%"),
        floor("128-256 nodes, dims 64 and 80: 90% of 64 nodes at dim 128", sweep, relative_efficiency(usable), 90, "%"),
    ]


def acceptance_verdicts(all_cells: list[Cell]) -> list[Verdict]:
    """The same of acceptance. Traversal has no PyTorch form, so it counts for no ratio."""
    usable = [cell for cell in all_cells if cell.first["op"].startswith("accept") and cell.ours]
    greedy = [cell for cell in usable if cell.first["op"] == "accept greedy"]
    compared = [cell for cell in usable if cell.ours["ratio"] != ""]
    drawing = [cell for cell in compared if cell.first["op"] not in ("accept greedy", "accept typical")]
    many = [cell for cell in drawing if cell.first["batch"] >= 8]
    return [
        floor("greedy: 85% of a plain read of the path's rows", greedy, column("read_percent"), 85, "%"),
        floor("rules that draw, batch 8 and more: 5x", many, column("ratio"), 5, "x"),
        floor("acceptance: never slower than PyTorch", compared, column("ratio"), 1, "x"),
    ]


def against(contestant: str) -> Callable[[Cell], float | None]:
    """How much longer another contestant of the cell takes: a form of PyTorch, or our own op told otherwise."""

    def value(cell: Cell) -> float | None:
        other = cell.of(contestant)
        return other["p50_us"] / cell.ours["p50_us"] if other else None

    return value


against_full_head = against("specdec_ops full head")


def row_verdicts(all_cells: list[Cell]) -> list[Verdict]:
    """Of ops that move rows of all layers. Against one expression for layers in one tensor nothing is asked."""
    usable = [cell for cell in all_cells if cell.first["op"] in ROW_OPS and cell.ours]
    gathers, commits = ([cell for cell in usable if cell.first["op"] == op] for op in ROW_OPS)
    return [
        floor("kv_commit: 3x index_select and copy in each layer", commits, against("eager"), 3, "x"),
        floor("kv_commit: 3x caches that are joined by cat", commits, against("cat"), 3, "x"),
        floor("gather_layer_kv: 3x cat in each layer and stack", gathers, against("eager"), 3, "x"),
    ]


def exit_verdicts(all_cells: list[Cell]) -> list[Verdict]:
    """The same of early exit, and of the ops around it."""
    usable = [cell for cell in all_cells if cell.first["op"] == "exit_confidence" and cell.ours]
    others = [cell for cell in all_cells if cell.first["op"] in EXIT_OPS[1:] and cell.ours and cell.ours["ratio"] != ""]
    one = [cell for cell in usable if cell.first["nodes"] == 1]
    many = [cell for cell in usable if cell.first["nodes"] == 60]
    screened = [cell for cell in others if cell.first["op"] == "screened_exit" and cell.first["nodes"] == 1]
    falling = [cell for cell in others if cell.first["op"] == "bounded_exit" and cell.first["tree"] == "falling"]
    even = [cell for cell in others if cell.first["op"] == "bounded_exit" and cell.first["tree"] == "even"]
    return [
        floor("exit_confidence, one row: 85% of a plain read of the head", one, column("read_percent"), 85, "%"),
        floor("exit_confidence, 60 rows: 1.5x", many, column("ratio"), 1.5, "x"),
        floor("screened_exit, one row: 1.7x our own full head", screened, against_full_head, 1.7, "x"),
        floor(
            "bounded_exit, a head whose rows get shorter: 1.5x our own full head", falling, against_full_head, 1.5, "x"
        ),
        floor("bounded_exit, a head of even rows: 0.95x our own full head", even, against_full_head, 0.95, "x"),
        floor(f"{', '.join(EXIT_OPS[1:])}: never slower than PyTorch", others, column("ratio"), 1, "x"),
    ]
