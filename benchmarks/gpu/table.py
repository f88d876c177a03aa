"""Tables for the README from what a GPU run gave back: `python -m benchmarks.gpu.table results.tar.gz`.

Results of other sources than these are refused: what a table says, the commit that has it must do.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.harness import report, results

from .summary import sources_hash

# Of ncu, in the order of the table: the metric's name, and what it is called.
METRICS = {
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "shared memory",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores",
}


class OtherSources(Exception):
    """A tar that was made by other sources."""


def unpack(tar: Path, folder: Path) -> dict:
    """The summary of a tar, whose files are put into a folder."""
    with tarfile.open(tar) as opened:
        opened.extractall(folder, filter="data")
    summary = json.loads((folder / "summary.json").read_text())
    if summary["sources"] != sources_hash():
        raise OtherSources(
            f"{tar.name} is of commit {summary['commit']}, sources {summary['sources']}; these are {sources_hash()}"
        )
    return summary


def markdown(headings: list[str], lines: list[list[str]], left: int = 1) -> list[str]:
    """The first `left` columns to the left, figures to the right."""
    rule = ["---" if index < left else "---:" for index in range(len(headings))]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines)] + [""]


def cells_table(rows: list[dict]) -> list[str]:
    lines = []
    for cell in results.cells(rows):
        ours = cell.ours
        if ours is None:
            lines.append([cell.label, report.problem(cell) or "no time", "", "", "", ""])
            continue
        peer = cell.of(ours["best_peer"])
        lines.append(
            [
                cell.label,
                report.microseconds(ours["p50_us"]),
                report.microseconds(peer["p50_us"]) if peer else "",
                ours["best_peer"] if peer else "",
                report.number(ours["ratio"], "{:.2f}x"),
                report.number(ours["roof_percent"], "{:.0f}%"),
            ]
        )
    return markdown(["cell", "specdec_ops", "best peer", "which", "ratio", "of the roof"], lines)


def steps_table(summary: dict) -> list[str]:
    lines = [
        [name, step["status"], f"{step['seconds']:.0f} s", step["note"]] for name, step in summary["steps"].items()
    ]
    return markdown(["step", "status", "time", "note"], lines)


def profile(log: str) -> list[str] | None:
    """The metrics of the first kernel in a log of ncu, None where there is none."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return None
    names, units, values = list(csv.reader(io.StringIO("\n".join(lines))))[:3]
    found = dict(zip(names, zip(values, units, strict=True), strict=True))
    return [" ".join(found.get(metric, ("", ""))).strip() for metric in METRICS]


def profiles_table(folder: Path) -> list[str]:
    lines = []
    for log in sorted(folder.glob("second-profile-*.log")):
        name = log.stem.removeprefix("second-profile-").rpartition("-")[0].replace("-", " ")
        lines.append([name, *(profile(log.read_text(errors="replace")) or ["no counters", *[""] * (len(METRICS) - 1)])])
    return markdown(["kernel", *METRICS.values()], lines) if lines else []


def tables(folder: Path, summary: dict) -> list[str]:
    """Everything that a run has to say, in Markdown."""
    lines, read = [], folder / "bench.csv"
    rows = results.read(read) if read.is_file() else []
    first = rows[0] if rows else {}
    versions = f", torch {first['torch']}, {first['date']}" if first else ""
    lines += [f"{summary['gpu']}{versions}, commit {summary['commit']}.", ""]
    if rows:
        lines += cells_table(rows)
        lines += [f"- {line}" for verdict in report.gpu_verdicts(results.cells(rows)) for line in verdict.lines()]
        lines += [""]
    return [*lines, *profiles_table(folder), *steps_table(summary)]


def main(arguments: list[str] | None = None) -> int:
    """Returns 2 for a tar that is refused."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = unpack(Path(arguments[0]), Path(folder))
        except OtherSources as reason:
            print(f"benchmarks.gpu.table: {reason}")
            return 2
        print("\n".join(tables(Path(folder), summary)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
