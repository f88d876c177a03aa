"""Measure specdec_ops against PyTorch: `python -m benchmarks.run [--quick | --full]`. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import specdec_ops

from .harness import machine, report, results, roofs
from .harness.cases import Case
from .harness.contestant import check, unavailable
from .harness.timing import CpuTimer, Evictor, Measurement
from .registry import OPS, PRESETS

LOCAL_RESULTS = Path(__file__).parent / "results" / "local"
LIMITS = {
    "quick": 160.0,
    "gpu-first": 150.0,
    "gpu-quick": 480.0,
    "gpu": 540.0,
}  # seconds for everything after the imports
FLEX_RESERVE = 30.0  # of them, kept for the first compilation of FlexAttention
CELL_SECONDS = {"quick": 3.0, "standard": 4.0, "full": 8.0, "gpu-first": 0.5, "gpu-quick": 1.0, "gpu": 2.0}
PATIENCE_SECONDS = {"quick": 0.0, "standard": 15.0, "full": 30.0, "gpu-first": 0.0, "gpu-quick": 0.0, "gpu": 0.0}
FLEX_SECONDS = {"quick": 40.0, "standard": 120.0, "full": 300.0, "gpu-first": 0.0, "gpu-quick": 60.0, "gpu": 120.0}
UNFINISHED = 75  # exit status: time was up, or the GPU failed; run again with --resume for the rest
MOST_ATTEMPTS = 3  # at a cell that does not end
GEMM_ROWS = 64  # query rows per KV head from which the roofs of arithmetic run beside the contestants


@dataclass
class Options:
    """What the contestants' factories need to know."""

    preset: str = "standard"
    backends: tuple[str, ...] = ()
    isas: tuple[str, ...] = ("avx2",)
    flex_seconds: float = 0.0
    device: str = "cpu"
    patience: float = 0.0
    without: str = ""


class Clock:
    """How long each cell may take, so that a preset ends in time."""

    def __init__(
        self,
        preset: str,
        cells: int,
        cell_seconds: float | None = None,
        flex: bool = False,
        limit: float | None = None,
    ) -> None:
        self.start = time.perf_counter()
        self.left = self.cells = cells
        self.cell_seconds = cell_seconds or CELL_SECONDS[preset]
        self.limit = LIMITS.get(preset) if limit is None else limit
        self.reserve = FLEX_RESERVE if flex else 0.0
        self.flex_limit = FLEX_SECONDS[preset]
        self.untimed = 0.0  # inputs, checks and compilation so far

    def remaining(self) -> float:
        return float("inf") if self.limit is None else self.limit - (time.perf_counter() - self.start)

    def for_flex(self) -> float:
        """Seconds for one compilation; only the first one is slow enough to be provided for."""
        self.reserve = 0.0
        return max(0.0, min(self.flex_limit, self.remaining() - 2))

    def for_cell(self) -> float:
        """Seconds of timing for the next cell: its share of what is left after inputs and checks."""
        overhead = self.untimed / max(self.cells - self.left, 1)
        share = (self.remaining() - self.reserve) / max(self.left, 1) - overhead
        return max(0.1, min(self.cell_seconds, share))

    def done(self, untimed: float) -> None:
        self.left -= 1
        self.untimed += untimed

    def eta(self) -> str:
        finished = max(self.cells - self.left, 1)
        seconds = (time.perf_counter() - self.start) / finished * self.left
        seconds = min(seconds, max(0.0, self.remaining()))
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Runner:
    """Runs cells one after another and keeps their rows."""

    def __init__(self, options: Options, measured_roofs: roofs.Roofs, columns: dict[str, str], clock: Clock) -> None:
        self.options, self.roofs, self.columns, self.clock = options, measured_roofs, columns, clock
        self.rows: list[dict] = []
        self.timer = CpuTimer()
        self.arithmetic = {}  # dtype -> the roofs of arithmetic as contestants
        self.gpu_failed = False  # after an illegal access nothing runs on the GPU any more in this process

    def run(self, case: Case, modes: tuple[str, ...]) -> list[list[dict]]:
        """Check every contestant of a case, then time it in each mode; returns the rows of each cell."""
        start = time.perf_counter()
        needed = 3 * case.memory  # K and V, the copy in another layout, scores
        if self.options.device == "cpu" and needed > 0.8 * machine.available_bytes():
            return self.skip(case, modes, f"needs about {needed >> 30} GiB of memory")
        groups = self._contestants(case)
        untimed = time.perf_counter() - start
        finished = []
        self.gpu_failed = self.options.device == "cuda" and gpu_failed()
        for mode in modes:
            measured = Measurement() if self.gpu_failed else self._measure(groups, mode)
            rows = results.rows_of(case, mode, groups[0], measured, self.roofs, self.columns)
            self.rows += rows
            finished.append(rows)
            self.clock.done(untimed)
            untimed = 0.0
        return finished

    def _contestants(self, case: Case) -> list[list]:
        """The checked contestants over each copy of the inputs; one copy on a CPU."""
        op, device, copies = OPS[case.op], self.options.device, 1
        if device == "cuda":
            from .gpu.timing import copies_needed

            copies = copies_needed(case.memory)
        self.options.flex_seconds = self.clock.for_flex() if case.flex else 0.0
        groups = []
        for copy in range(copies):
            inputs = op.make_inputs(case, device)
            group = [each for each in op.contestants(inputs, self.options) if not self._left_out(each)]
            if copy == 0:
                expected = op.expected(inputs)
                group = [check(contestant, expected) for contestant in group]
            if case.op == "tree_attention" and case.nodes * case.model.group >= GEMM_ROWS:
                group += self._arithmetic_controls(case.dtype)
            groups.append(group)
        return groups

    def _left_out(self, contestant) -> bool:
        return bool(self.options.without and re.search(self.options.without, contestant.name))

    def _arithmetic_controls(self, dtype: str) -> list:
        if dtype not in self.arithmetic:
            both = [roofs.gemm_control(self.roofs, dtype, self.options.device), roofs.loop_control(self.roofs, dtype)]
            self.arithmetic[dtype] = [control for control in both if control is not None]
        return self.arithmetic[dtype]

    def _measure(self, groups: list[list], mode: str) -> Measurement:
        if self.options.device == "cuda":
            from .gpu.timing import GpuTimer

            return GpuTimer().measure(groups, self.clock.for_cell())
        return self.timer.measure(groups[0], mode, self.clock.for_cell(), self.options.patience)

    def skip(self, case: Case, modes: tuple[str, ...], reason: str) -> list[list[dict]]:
        finished = []
        for mode in modes:
            nobody = [unavailable("specdec_ops", "ours", reason)]
            finished.append(results.rows_of(case, mode, nobody, Measurement(), self.roofs, self.columns))
            self.rows += finished[-1]
            self.clock.done(0.0)
        return finished


def gpu_failed() -> bool:
    """Whether an earlier kernel has left the GPU unusable for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="preset", help="three minutes on two cores")
    size.add_argument("--full", action="store_const", const="full", dest="preset", help="every cell, for hours")
    size.add_argument("--preset", choices=PRESETS, help="another choice of cells")
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="only this op (may be repeated)")
    parser.add_argument("--filter", help="only cases whose label, as --list shows it, matches this regular expression")
    parser.add_argument("--csv", type=Path, help="where to write the lines (default: benchmarks/results/local)")
    parser.add_argument("--plot", type=Path, help="where to write the plot (default: beside the CSV)")
    parser.add_argument("--no-plot", action="store_true", help="write no plot")
    parser.add_argument("--backends", default="", help="also time these backends of specdec_ops, comma-separated")
    parser.add_argument("--isa", default="avx2", help="also time the CPU kernel held to these, comma-separated")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--cold", action="store_const", const=("cold",), dest="modes", help="every cell cold only")
    mode.add_argument("--warm", action="store_const", const=("warm",), dest="modes", help="every cell warm only")
    parser.add_argument("--seconds", type=float, help="seconds of timing per cell")
    parser.add_argument("--patience", type=float, help="seconds to wait, per cell, for rounds undisturbed by others")
    parser.add_argument("--threads", type=int, help="threads (default: PyTorch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--without", default="", help="leave out contestants whose name matches this regular expression"
    )
    parser.add_argument("--limit", type=float, help="start no cell after this many seconds")
    parser.add_argument("--resume", action="store_true", help="keep the cells that --csv has already")
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    asked = parser.parse_args(arguments)
    if asked.resume and asked.csv is None:
        parser.error("--resume needs --csv")
    if asked.preset == "quick" and asked.device == "cuda":
        asked.preset = "gpu-quick"
    return asked


def select(options: argparse.Namespace) -> list[tuple[Case, tuple[str, ...]]]:
    """The chosen cases, each with its modes. On a GPU every cell is cold."""
    chosen = []
    preset = options.preset or "standard"
    for case in PRESETS[preset]():
        if options.op and case.op not in options.op:
            continue
        if options.filter and not re.search(options.filter, case.label):
            continue
        modes = ("cold",) if options.device == "cuda" else options.modes or case.modes
        chosen.append((case, modes))
    return chosen


def introduce(columns: dict[str, str], device: str, cells: int, csv: Path) -> None:
    say(f"{columns['machine']}, {columns['isa']}, {columns['threads']} threads")
    say(f"specdec_ops {columns['specdec_ops']} (commit {columns['commit']}), torch {columns['torch']}")
    available = specdec_ops.backends("tree_attention", device)
    works = [backend for backend, reason in available.items() if reason is None]
    say(f"backends of specdec_ops on {device}: {', '.join(works)}; it takes the first one")
    if device not in works:  # the kernels that were compiled for it
        say(f"backend {device}: {available[device]}")
    say(f"{cells} cells follow, a line each: how many times faster than the fastest correct PyTorch form, the shape")
    say("(model, dtype, context, batch, nodes of the tree, caches warm or cold), both medians, the share of the roof:")
    say("the least time that reading or arithmetic takes on this machine. More: benchmarks/README.md")
    say(f"everything that is measured goes to {shown(csv)}")


def shown(path: Path) -> str:
    """A result's path from the root of the checkout; of one elsewhere only the name."""
    path = path.resolve()
    return str(path.relative_to(machine.ROOT)) if path.is_relative_to(machine.ROOT) else path.name


def say(line: str = "") -> None:
    print(line, flush=True)


def begin(case: Case, clock: Clock) -> None:
    """What is being done, where that takes long; on a terminal always, in a line that the result replaces."""
    text = f"[{clock.cells - clock.left + 1}/{clock.cells}] {case.label} ..."
    if case.flex or case.compiled:
        say(f"{text} compiling PyTorch's form, which may take half a minute")
    elif sys.stdout.isatty():
        print(text, end="\r", flush=True)


def progress(cell: results.Cell, clock: Clock) -> str:
    """One line about a finished cell, the ratio first."""
    count, ours = f"[{clock.cells - clock.left}/{clock.cells}]", cell.ours
    if ours is None:
        return f"{count} {cell.label}: no time: {report.problem(cell)}"
    peer, text = cell.of(ours["best_peer"]), report.microseconds(ours["p50_us"])
    ratio = f"{ours['ratio']:.2f}x" if ours["ratio"] != "" else "    "
    if peer:
        text += f" against {report.microseconds(peer['p50_us'])} of {ours['best_peer']}"
    if ours["roof_percent"] != "":
        text += f", {ours['roof_percent']:.0f}% of the roof"
    if cell.noisy:
        text += f" (others used {ours['others_percent']:.0f}%)"
    return f"{count} {ratio:>6} {cell.label}: {text}; {ours['rounds']} rounds, {clock.eta()} left"


def attempt(case: Case, csv: Path) -> str:
    """Note that a cell begins. Why it must not, if it has ended the whole run too often; else ""."""
    notes = csv.with_suffix(".attempts")
    tried = notes.read_text().splitlines().count(case.label) if notes.is_file() else 0
    with notes.open("a") as file:
        file.write(f"{case.label}\n")
    return f"ended the run {tried} times" if tried >= MOST_ATTEMPTS else ""


def run_all(runner: Runner, chosen, csv: Path, limit: float | None = None, resume: bool = False) -> bool:
    """Run, print and write each cell at once, so that an interrupted run keeps what it has. Whether all were run."""
    if not runner.rows:
        results.write(csv, [], header=True)
    start = time.perf_counter()
    try:
        for case, modes in chosen:
            if limit is not None and time.perf_counter() - start > limit:
                say("time is up")
                return False
            begin(case, runner.clock)
            reason = attempt(case, csv) if resume else ""
            for rows in runner.skip(case, modes, reason) if reason else runner.run(case, modes):
                results.write(csv, rows, header=False)
                say(progress(results.Cell(rows), runner.clock))
            if runner.gpu_failed:
                say("the GPU has failed in this cell; the first contestant with a problem is to blame")
                return False
            gc.collect()
            if runner.options.device == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        say("interrupted: what follows covers the cells above")
        return False
    return True


def done_before(csv: Path, resume: bool) -> list[dict]:
    """The rows of an earlier run to go on with."""
    return results.read(csv) if resume and csv.is_file() and csv.read_text().count("\n") > 1 else []


def still_to_run(chosen, rows: list[dict]) -> list[tuple[Case, tuple[str, ...]]]:
    keys = {cell.key for cell in results.cells(rows)}
    left = [(case, tuple(mode for mode in modes if results.key(case, mode) not in keys)) for case, modes in chosen]
    return [(case, modes) for case, modes in left if modes]


def draw(rows: list[dict], target: Path) -> None:
    try:
        from . import plot
    except ImportError:
        say("no plot: matplotlib is not installed")
        return
    for path in plot.save(rows, target):
        say(f"plot: {shown(path)}")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when a kernel of ours gave a wrong result, UNFINISHED when cells are left, else 0."""
    asked = parse(arguments)
    preset = asked.preset or "standard"
    chosen = select(asked)
    if asked.list or not chosen:
        for case, modes in chosen:
            say(f"{case.label} {' '.join(modes)}")
        say(f"{len(chosen)} cases")
        return 0
    if asked.threads:
        torch.set_num_threads(asked.threads)

    csv = asked.csv or LOCAL_RESULTS / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}.csv"
    before = done_before(csv, asked.resume)
    chosen = still_to_run(chosen, before)
    flex = any(case.flex for case, _ in chosen)
    clock = Clock(preset, sum(len(modes) for _, modes in chosen), asked.seconds, flex, asked.limit)
    columns = machine.describe(asked.device, sys.argv[1:] if arguments is None else arguments)
    introduce(columns, asked.device, clock.cells, csv)
    if asked.device == "cpu" and any("cold" in modes for _, modes in chosen):
        say(Evictor().how)
    dtypes = list(dict.fromkeys(case.dtype for case, _ in chosen if case.flops))
    say("measuring what this machine can do at best (seconds)")
    measured_roofs = roofs.measure(asked.device, dtypes)
    for line in measured_roofs.describe():
        say(line)
    columns |= measured_roofs.columns

    isas = tuple(filter(None, asked.isa.split(",")))
    backends = tuple(filter(None, asked.backends.split(",")))
    patience = PATIENCE_SECONDS[preset] if asked.patience is None else asked.patience
    options = Options(preset, backends, isas, device=asked.device, patience=patience, without=asked.without)
    runner = Runner(options, measured_roofs, columns, clock)
    runner.rows += before
    complete = run_all(runner, chosen, csv, asked.limit, asked.resume)
    for line in report.summary(results.cells(runner.rows)):
        say(line)
    say(f"all contestants of every cell: {shown(csv)}")
    if not asked.no_plot:
        draw(runner.rows, asked.plot or csv.with_suffix(".png"))
    if asked.device == "cpu" and not asked.op and not asked.filter:  # the acceptance rules; no clock is involved
        from .acceptance import lengths as acceptance_lengths

        say()
        path = csv.with_name(f"{csv.stem}-acceptance.csv")
        acceptance_lengths.report(preset, path, columns, say, plot=not asked.no_plot)
    wrong = [row for row in runner.rows if row["role"] == "ours" and row["problem"].startswith(("WRONG", "fails"))]
    return UNFINISHED if not complete else 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
