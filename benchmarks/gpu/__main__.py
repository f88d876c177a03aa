"""Everything on a machine with an NVIDIA GPU, offline: `python -m benchmarks.gpu`, which is `make gpu`.

Two calls of few minutes, in which what tells most comes first:

    first      eight minutes: build, small calls of every kernel, graphs and streams, the cells that matter, Triton
    second     four minutes: profiles, some tests under compute-sanitizer, the same cells with another build

And, with --piece, what takes longer; --piece all runs these to their end:

    build      installs what lies in wheels/, compiles for this GPU, checks every backend once
    tests      all tests that run on CUDA tensors, in several processes
    sanitizer  a small suite under compute-sanitizer: memcheck, racecheck, synccheck
    bench      the benchmarks with every peer that is installed
    report     the tables, goals and plots of the benchmarks

A piece ends in time, and goes on where it stopped when it is called again; a step that fails doesn't stop the next
one, but the exit status is 1 then; 75 means that something is not finished. Changed sources start everything anew.
Logs, summary.json and CSV are in --out, and all of it in one results.tar.gz, which is also put into the folder that
the environment variable OUT names. `python -m benchmarks.gpu.table results.tar.gz` makes tables of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness.machine import ROOT

from .pieces import PIECES
from .settings import SLICE_SECONDS, Gpu, Settings, Step
from .summary import Summary

DEFAULT_OUT = ROOT / "benchmarks" / "results" / "local" / "gpu"
UNFINISHED = 75
LEAST_SECONDS = 20.0  # nothing is started with less time than this
MOST_SLICES = 20
CALLS = {"first": 480.0, "second": 240.0}  # seconds
LONG = ("build", "tests", "sanitizer", "bench", "report")
NEED_BUILD = ("second", "tests", "sanitizer", "bench")
ENDED_WELL = ("passed", "skipped")


def find_gpu() -> Gpu | None:
    """None where there is no driver or no device."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.rpartition(",") for line in done.stdout.splitlines() if re.search(r", *\d+\.\d+$", line)]
    if done.returncode != 0 or not lines:
        return None
    return Gpu(lines[0][0].strip(), lines[0][2].strip(), len(lines))


def retry_failed(folder: Path) -> None:
    """Forget the tests that failed, so that they run again."""
    for file in folder.rglob("*.jsonl"):
        kept = [line for line in file.read_text().splitlines(True) if json.loads(line)["outcome"] in ENDED_WELL]
        file.write_text("".join(kept))


def run_step(settings: Settings, piece: str, step: Step, seconds: float) -> tuple[str, str]:
    """Run the commands of a step at once. Returns its status ("ok", "failed", "unfinished") and a note."""
    logs = [settings.out / f"{piece}-{step.name.replace(' ', '-')}-{i}.log" for i in range(len(step.commands))]
    files = [log.open("a" if step.resumable else "w") for log in logs]
    environment = settings.environment(len(step.commands)) | step.environment
    limit = min(seconds, step.seconds)
    commands = step.commands
    if "benchmarks.run" in commands[0]:  # it stops by itself between two cells
        reserve = min(60.0, limit / 4)
        commands = [[*command, "--limit", f"{max(limit - reserve, 10):.0f}"] for command in commands]
    options = {"cwd": step.folder, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    end = time.monotonic() + limit
    try:
        running = [subprocess.Popen(c, stdout=file, **options) for c, file in zip(commands, files, strict=True)]
    except OSError as error:
        return "failed", f"{Path(error.filename or '').name}: {error.strerror}"
    finally:
        for file in files:
            file.close()
    codes = [wait(process, end) for process in running]
    if None in codes:
        return ("unfinished", "out of time") if step.resumable else ("failed", f"longer than {limit:.0f} s")
    if step.resumable and any(code == UNFINISHED or code < 0 for code in codes):
        return "unfinished", "a process died" if min(codes) < 0 else ""
    wrong = step.judge([log.read_text(errors="replace") for log in logs])
    if wrong or any(codes):
        return "failed", wrong or f"exit status {next(filter(None, codes))}; see {logs[0].name}"
    return "ok", ""


def wait(process: subprocess.Popen, end: float) -> int | None:
    """The exit status, or None for a process that had to be ended."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        return None


def run_piece(settings: Settings, summary: Summary, piece: str, seconds: float) -> str:
    """One slice of a piece; returns the worst status of its steps.

    A step that was not finished is tried again at once; in the pieces of few minutes, whose steps have little time
    each, after all others.
    """
    end, worst = time.monotonic() + seconds, "ok"
    if piece in NEED_BUILD and not is_built(summary):
        say(f"{piece}: the piece build comes first, and has not succeeded")
        return "failed"
    waiting = PIECES[piece](settings)
    while waiting:
        step = waiting.pop(0)
        before = summary.status(piece, step.name)
        if before == "ok" and step.still_there():
            say(f"{piece}: {step.name}: done before")
            continue
        if before == "failed":
            retry_failed(settings.out / "tests")
        status = run_once(settings, summary, piece, step, end)
        if status == "unfinished" and end - time.monotonic() >= LEAST_SECONDS:
            waiting.insert(len(waiting) if piece in CALLS else 0, step)
            continue
        worst = status if worst == "ok" or (worst == "failed" and status == "unfinished") else worst
        if step.needed and status != "ok":
            break  # a module of before would be tested in place of the one that failed
    return worst


def is_built(summary: Summary) -> bool:
    """By one of the pieces that do that."""
    return any(
        all(summary.status(piece, step) == "ok" for step in ("torch", "compile")) for piece in ("first", "build")
    )


def run_once(settings: Settings, summary: Summary, piece: str, step: Step, end: float) -> str:
    """Run a step in the time that is left, and write down how it ended."""
    left = end - time.monotonic()
    if left < LEAST_SECONDS:
        status, note, spent = "unfinished", "no time left", 0.0
    else:
        say(f"{piece}: {step.name} ...")
        start = time.monotonic()
        status, note = run_step(settings, piece, step, left)
        spent = time.monotonic() - start
    summary.record(piece, step.name, status, spent, note)
    say(f"{piece}: {step.name}: {status}{f' ({note})' if note else ''}, {spent:.0f} s")
    return status


def say(line: str) -> None:
    print(line, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--piece", choices=[*PIECES, "all"], help="one slice of one piece; or all the long ones to their end"
    )
    parser.add_argument(
        "--use-build", type=Path, metavar="FOLDER", help="a module that was carried here, see carried.py"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another one, to compare with in the second call"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the folder of results and state")
    parser.add_argument("--limit", type=float, help="seconds of one slice")
    parser.add_argument("--preset", default="gpu", help="the cells of the benchmarks: gpu or gpu-quick")
    parser.add_argument("--python", default=sys.executable, help="the Python with torch in it")
    parser.add_argument("--again", action="store_true", help="forget what was done")
    parser.add_argument("--dry-run", action="store_true", help="show the commands and run nothing")
    return parser.parse_args(arguments)


def show(settings: Settings, chosen: list[str]) -> None:
    """The commands of each piece."""
    for piece in chosen:
        say(f"{piece}:")
        for step in PIECES[piece](settings):
            extra = [f"{name}={value}" for name, value in step.environment.items()]
            for command in step.commands:
                text = " ".join([*extra, *command])
                say(f"  {step.name}: {text.replace(str(ROOT) + os.sep, '')}")


def settings_of(asked: argparse.Namespace, out: Path, gpu: Gpu) -> Settings:
    carried = [folder and folder.absolute() for folder in (asked.use_build, asked.against)]
    return Settings(asked.python, out, asked.preset, gpu, *carried)


def main(arguments: list[str] | None = None) -> int:
    asked = parse(arguments)
    chosen = {None: list(CALLS), "all": [*LONG]}.get(asked.piece, [asked.piece])
    gpu = find_gpu()
    out = asked.out.absolute()
    if asked.dry_run:
        show(settings_of(asked, out, gpu or Gpu("no GPU", "9.0", 0)), chosen)
        return 0
    if gpu is None:
        say("benchmarks.gpu: nvidia-smi finds no GPU here")
        return 2
    say(f"{gpu.count} x {gpu.name}, compute capability {gpu.capability}; results in {out.name}")
    settings, summary = settings_of(asked, out, gpu), Summary(out, gpu)
    if asked.again:
        summary.forget()
        summary.content["steps"] = {}
    statuses = {}
    for piece in chosen:
        for _ in range(MOST_SLICES if asked.piece == "all" else 1):
            limit = asked.limit or CALLS.get(piece, SLICE_SECONDS)
            statuses[piece] = run_piece(settings, summary, piece, limit)
            if statuses[piece] != "unfinished":
                break
    for piece, status in statuses.items():
        say(f"{piece}: {status}")
    if "failed" in statuses.values():
        return 1
    return UNFINISHED if "unfinished" in statuses.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
