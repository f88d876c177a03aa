"""The CSV: one line per contestant and cell, and the view of it in cells that tables, targets and plots use."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import Case
from .contestant import PEERS, Contestant
from .timing import Measurement, Timing, paired_ratio

MACHINE_COLUMNS = ("date", "commit", "machine", "isa", "threads", "specdec_ops", "torch", "python", "command", "roofs")
NUMBERS = (
    *("heads", "kv_heads", "dim", "context", "batch", "nodes", "error", "p20_us", "p50_us", "p80_us", "ratio"),
    *("gbps", "gflops", "roof_us", "roof_percent", "gemm_percent", "read_percent"),
    *("rounds", "noise_percent", "others_percent"),
)
ROOF_PERCENTILE = 20  # of its rounds: a roof is what can be done, so those in which others were in its way count less
COLUMNS = (
    *("op", "model", "heads", "kv_heads", "dim", "dtype", "context", "lengths", "batch", "tree", "nodes", "mode"),
    *("contestant", "role", "problem", "error", "p20_us", "p50_us", "p80_us", "ratio", "best_peer"),
    *("gbps", "gflops", "roof_us", "roof_percent", "gemm_percent", "read_percent"),
    *("rounds", "noise_percent", "others_percent", "how"),
    *MACHINE_COLUMNS,
)


def fastest_peer(contestants: list[Contestant], timings: dict[str, Timing]) -> str:
    """Name of the fastest correct peer, in whatever layout of K and V, or ""."""
    peers = [c.name for c in contestants if c.role in PEERS and c.name in timings]
    return min(peers, key=lambda name: timings[name].median, default="")


def rows_of(case: Case, mode: str, contestants: list[Contestant], measured: Measurement, roofs, machine) -> list[dict]:
    """The lines of one cell. `roofs` is benchmarks.harness.roofs.Roofs, `machine` the columns that never change."""
    timings = measured.timings
    gemm, product = _product_rates(case, timings, roofs)
    best = fastest_peer(contestants, timings)
    read = timings.get("plain read")
    least = read.percentile(ROOF_PERCENTILE) if read else case.bytes / roofs.read
    shape = {
        **{"op": case.op, "model": case.model.name, "heads": case.model.heads, "kv_heads": case.model.kv_heads},
        **{"dim": case.model.dim, "dtype": case.dtype, "context": case.context, "batch": case.batch},
        **{"lengths": "ragged" if case.ragged else "equal", "tree": case.tree.name, "nodes": case.nodes, "mode": mode},
    }
    rows = []
    for contestant in contestants:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | shape | machine
        row |= {"contestant": contestant.name, "role": contestant.role, "problem": contestant.problem}
        row["error"] = "" if contestant.error is None else contestant.error
        timing = timings.get(contestant.name)
        if timing is not None:
            row |= _speed(case, contestant, timing)
            row |= {"others_percent": measured.others_percent, "best_peer": best}
            row["how"] = measured.how.get(contestant.name, "")
            if contestant.role != "control":
                row["ratio"] = paired_ratio(timings[best], timing) if best else ""
                arithmetic = _arithmetic_rate(case, timings, roofs, product, contestant.isa)
                roof = max(least, case.flops / arithmetic if arithmetic else 0.0)
                row |= {"roof_us": roof * 1e6, "roof_percent": 100 * roof / timing.median}
                row["gemm_percent"] = 100 * case.flops / timing.median / gemm if gemm else ""
                row["read_percent"] = 100 * least / timing.median if read or roofs.how == "copy" else ""
        rows.append(row)
    return rows


def _product_rates(case: Case, timings: dict[str, Timing], roofs) -> tuple[float, float]:
    """FLOP per second of PyTorch's matrix product: the median of this cell, and what a roof takes of it."""
    rate, size = roofs.gemm.get(case.dtype, (0.0, 0))
    timing = timings.get("matrix product")
    if timing is None:
        return rate, rate
    return 2 * size**3 / timing.median, 2 * size**3 / timing.percentile(ROOF_PERCENTILE)


def _arithmetic_rate(case: Case, timings: dict[str, Timing], roofs, product: float, isa: str) -> float:
    """FLOP per second of the faster of PyTorch's product and multiply-adds in registers.

    A contestant that is held to an instruction set is judged by the multiply-adds of that set alone.
    """
    if isa:
        return roofs.rates.get((case.dtype, isa), 0.0)
    loop, timing = roofs.loops.get(case.dtype), timings.get("multiply-adds")
    if loop is None:
        return product
    return max(product, loop.flops / timing.percentile(ROOF_PERCENTILE) if timing else loop.rate)


def _speed(case: Case, contestant: Contestant, timing: Timing) -> dict[str, Any]:
    row: dict[str, Any] = {f"p{p}_us": timing.percentile(p) * 1e6 for p in (20, 50, 80)}
    row |= {"rounds": len(timing.seconds), "noise_percent": 100 * timing.noise}
    if contestant.role != "control":
        row |= {"gbps": case.bytes / timing.median / 1e9, "gflops": case.flops / timing.median / 1e9 or ""}
    elif contestant.name in ("plain read", "sdpa q=1"):
        row["gbps"] = case.kv_bytes / timing.median / 1e9
    return row


def write(path: Path, rows: Iterable[dict], header: bool) -> None:
    """Start a file with the header, or append to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if header else "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if header:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> list[dict]:
    """Rows with their numbers as numbers; empty stays ""."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"op", "contestant", "p50_us"} <= rows[0].keys():
        raise ValueError(f"{Path(path).name} is not a result of benchmarks.run")
    for row in rows:
        row.setdefault("best_peer", row.pop("best_pytorch", ""))  # results from before other libraries took part
        row.setdefault("roofs", "")  # from before the roofs were the fastest of several ways
        row["op"] = _current_name(row["op"])
    return [{k: float(v) if k in NUMBERS and v != "" else v for k, v in row.items()} for row in rows]


def _current_name(op: str) -> str:
    """The name that an op has now: older results call the rule target_only "coin"."""
    return op.replace("accept coin", "accept target_only")


def key(case: Case, mode: str) -> tuple:
    """What tells a case and mode from all others, as Cell.key."""
    lengths = "ragged" if case.ragged else "equal"
    shape = (case.op, case.model.name, case.dtype, case.context, lengths, case.batch, case.tree.name, case.nodes)
    return (*shape, mode)


@dataclass
class Cell:
    """All lines of one case and mode."""

    rows: list[dict]

    def of(self, contestant: str) -> dict | None:
        """The line of a contestant that was timed, or None."""
        found = (row for row in self.rows if row["contestant"] == contestant and row["p50_us"] != "")
        return next(found, None)

    @property
    def ours(self) -> dict | None:
        return self.of("specdec_ops")

    @property
    def first(self) -> dict:
        return self.rows[0]

    @property
    def key(self) -> tuple:
        names = ("op", "model", "dtype", "context", "lengths", "batch", "tree", "nodes", "mode")
        return tuple(int(v) if isinstance(v := self.first[name], float) else v for name in names)

    @property
    def label(self) -> str:
        op, model, dtype, context, lengths, batch, tree, nodes, mode = self.key
        if op == "build_topology":
            return f"{op} b{batch} n{nodes}"
        if op in ("grow_tree", "prune_tree"):
            return f"{op} b{batch} n{nodes} ({tree})"
        if op == "merge_states":
            return f"{op} {dtype} b{batch} n{nodes}"
        if op == "kv_append":
            return f"{op} {model} {dtype} ctx{context} n{nodes}"
        if op in ("exit_confidence", "screened_exit", "bounded_exit", "exit_mlp", "kv_propagate", "linear"):
            return f"{op} {model.removeprefix('head ')} {dtype} {tree} {nodes}"
        if op in ("gather_layer_kv", "kv_commit"):
            return f"{op} {model} {dtype} ctx{context} b{batch} {tree} {nodes}"
        if op.startswith("accept"):
            return f"{op} {model} {dtype} b{batch} n{nodes}"
        ragged = " ragged" if lengths == "ragged" else ""
        chain = " chain" if tree == "chain" and nodes > 8 else ""
        return f"{model} {dtype} ctx{context}{ragged} b{batch} n{nodes}{chain} {mode}"

    @property
    def noisy(self) -> bool:
        return bool(self.ours) and self.ours["others_percent"] > 5


def cells(rows: list[dict]) -> list[Cell]:
    grouped: dict[tuple, Cell] = {}
    for row in rows:
        grouped.setdefault(Cell([row]).key, Cell([])).rows.append(row)
    return list(grouped.values())


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def roofs_note(rows: list[dict]) -> str:
    """What to say of results whose roofs were lower than they should be, or ""."""
    if all(row["roofs"] for row in rows):
        return ""
    return "% read and % roof against a read in one stream a thread and PyTorch's product: lower than what is possible"
