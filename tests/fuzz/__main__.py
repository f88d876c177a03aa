"""All fuzzers, each in processes of its own: `python -m tests.fuzz [--seconds 120] [--seed 0] [--sanitized]`.

`--seconds` is for each of the two programs of random calls; racing writers make ten calls of each op a second of it. A
process that crashes or hangs is noted with the call that did it, and the next one goes on behind that call. Ends with a
table, and with status 1 if there is anything in its last three columns.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.fuzz import racing_writers, sanitized
from tests.fuzz.mutated_calls import SLOWEST

ROOT = Path(__file__).parents[2]
HUNG = "Timeout ("  # what faulthandler writes of a call that takes too long
COLUMNS = ("valid", "near", "mutated", "racing", "crashed", "hung", "different")


class Report:
    """What has been counted of each op."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.notes: list[str] = []

    def note(self, op: str, column: str, what: str) -> None:
        self.counts[op][column] += 1
        self.notes.append(f"{column}: {what}")
        print(self.notes[-1], flush=True)

    def table(self) -> str:
        rows = [("op", *COLUMNS)]
        rows += [(op, *(str(counts[column]) for column in COLUMNS)) for op, counts in sorted(self.counts.items())]
        total = sum(self.counts.values(), Counter())
        rows.append(("all", *(str(total[column]) for column in COLUMNS)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    @property
    def is_clean(self) -> bool:
        return not any(counts[column] for counts in self.counts.values() for column in COLUMNS[-3:])


def run(command: list[str], environment: dict[str, str], seconds: float) -> subprocess.CompletedProcess | None:
    """None if it hangs."""
    try:
        return subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, **environment},
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return None


def random_calls(program: str, column: str, seconds: float, seed: int, environment, report: Report) -> None:
    """Runs a program of random calls until the time is up, also if it ends before."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        done = run([f"tests.fuzz.{program}", str(left), str(seed)], environment, left + 3 * SLOWEST)
        if done is None:
            return report.note("all", "hung", f"{program} from seed {seed} on")
        counted = re.findall(r"^= (\w+) (\d+) (\d+)(?: (\d+))?$", done.stdout, re.MULTILINE)
        for line in done.stdout.splitlines():
            if not line.startswith("="):
                report.note(line.split()[0], "different", f"{program} {line}")
        for op, calls, _, near in counted:
            report.counts[op][column] += int(calls)
            report.counts[op]["near"] += int(near or 0)
        if counted:
            return None
        calls = re.findall(r"^(\w+) (\d+)$", done.stderr, re.MULTILINE)
        if not calls:
            raise SystemExit(f"{program} did not start: {done.stderr[-2000:]}")
        op, last = calls[-1]
        for name, _ in calls:
            report.counts[name][column] += 1
        what = "hung" if HUNG in done.stderr else "crashed"
        report.note(op, what, f"{program} {op} {last}: exit {done.returncode}: {done.stderr[-3000:]}")
        seed = int(last) + 1


def racing_calls(calls: int, environment, report: Report) -> None:
    for op in racing_writers.OPS:
        done = run(["tests.fuzz.racing_writers", op, str(calls)], environment, 60 + calls)
        report.counts[op]["racing"] += calls
        if done is None:
            report.note(op, "hung", f"racing_writers {op}")
        elif done.returncode:
            report.note(op, "crashed", f"racing_writers {op}: exit {done.returncode}: {done.stderr[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitized", action="store_true", help="with a build under ASan and UBSan")
    options = parser.parse_args()
    environment, report = {}, Report()
    if options.sanitized:
        sanitized.build()
        environment = sanitized.environment()
    for program, column in (("valid_calls", "valid"), ("mutated_calls", "mutated")):
        random_calls(program, column, options.seconds, options.seed, environment, report)
    racing_calls(int(10 * options.seconds), environment, report)
    print(report.table())
    return int(not report.is_clean)


if __name__ == "__main__":
    sys.exit(main())
