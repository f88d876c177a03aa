"""Everything on a machine with an NVIDIA GPU, offline, in pieces: `python -m benchmarks.gpu`, which is `make gpu`.

    build      installs what lies in wheels/, compiles for this GPU, checks every backend once
    tests      all tests that run on CUDA tensors, in several processes
    sanitizer  a small suite under compute-sanitizer: memcheck, racecheck, synccheck
    bench      the benchmarks with every peer that is installed
    report     the tables, goals and plots of the benchmarks

`--piece tests` ends within ten minutes, and goes on where it stopped when it is called again. Without --piece all are
run to their end. A piece that fails doesn't stop the next one, but the exit status is 1 then; 75 means that a piece is
not finished. Changed sources start everything anew. Logs, summary.json, CSV and plots are in --out, and are copied to
the folder that the environment variable OUT names, if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.machine import ROOT, commit

from .resume_tests import recorded

DEFAULT_OUT = ROOT / "benchmarks" / "results" / "local" / "gpu"
CACHES = ROOT / "build" / "gpu-caches"  # of Triton, Inductor and FlashInfer: large, and never copied
WHEELS = ROOT / "wheels"
SOURCES = ("csrc", "specdec_ops", "triton_kernels", "tests", "benchmarks", "setup.py", "pyproject.toml")
UNFINISHED = 75
SLICE_SECONDS = 560.0
LEAST_SECONDS = 20.0  # nothing is started with less time than this
MOST_SLICES = 20
TEST_PROCESSES = 4
COMPILING_PROCESSES = 6
PYTEST_OPTIONS = ["-q", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
ENDED_WELL = ("passed", "skipped")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# initcheck is left out: the tests fill all memory with NaN before a kernel may write it, so it would find nothing.


@dataclass
class Gpu:
    """The first device, as nvidia-smi describes it."""

    name: str
    capability: str  # such as 9.0
    count: int


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


@dataclass
class Step:
    """One command, or several that run at once.

    judge: reads the logs of commands that have ended: "" or what is wrong.
    resumable: the command itself goes on where it stopped, when it had no more time or its process died.
    still_there: whether what an earlier run has made exists.
    """

    name: str
    commands: list[list[str]]
    seconds: float = SLICE_SECONDS
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[[list[str]], str] = lambda logs: ""
    resumable: bool = False
    still_there: Callable[[], bool] = lambda: True


@dataclass
class Settings:
    python: str
    out: Path
    preset: str
    gpu: Gpu

    @property
    def site(self) -> Path:
        """Where wheels are installed: nothing of the machine's own Python is changed."""
        return CACHES / "site"

    def environment(self) -> dict[str, str]:
        generation = self.gpu.capability.partition(".")[0]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(self.site), os.environ.get("PYTHONPATH")])),
            "TORCH_CUDA_ARCH_LIST": self.gpu.capability,
            "FLASHINFER_CUDA_ARCH_LIST": self.gpu.capability + ("a" if int(generation) >= 9 else ""),
            "FLASHINFER_WORKSPACE_BASE": str(CACHES),
            "TRITON_CACHE_DIR": str(CACHES / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor"),
            "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
            "LIBRARY_PATH": os.pathsep.join(filter(None, [str(driver_link()), os.environ.get("LIBRARY_PATH")])),
        }


def driver_link() -> Path:
    """A folder with a libcuda.so to link with: many machines have the driver's libcuda.so.1 only."""
    folder = CACHES / "lib"
    try:
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    except OSError:
        listed = ""
    found = re.search(r"libcuda\.so\.1 \(.*x86-64.*\) => (\S+)", listed)
    if found and not (folder / "libcuda.so").is_symlink():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libcuda.so").symlink_to(found[1])
    return folder


# --- the pieces


def build_steps(settings: Settings) -> list[Step]:
    python, wheels = settings.python, sorted(map(str, WHEELS.glob("*.whl")))
    offline = ["--no-deps", "--no-index", "--quiet", "--upgrade", "--disable-pip-version-check"]
    install = [python, "-m", "pip", "install", *offline, "--target", str(settings.site), *wheels]
    sees_gpu = "import torch, sys; sys.exit(not torch.cuda.is_available() and 'PyTorch sees no GPU')"
    return [
        Step("torch", [[python, "-c", sees_gpu]]),
        *([Step("wheels", [install], still_there=settings.site.is_dir)] if wheels else []),
        Step(
            "compile",
            [[python, "setup.py", "--quiet", "build_ext", "--inplace"]],
            environment={"SPECDEC_OPS_BUILD": "cuda"},
            still_there=lambda: any_module(),
        ),
        Step("self-check", [[python, "-m", "specdec_ops"]], judge=kernels_are_there),
    ]


def any_module() -> bool:
    return any(ROOT.glob("specdec_ops/_C*.so"))


def kernels_are_there(logs: list[str]) -> str:
    """The self-check passes where a backend is merely unavailable; here the CUDA kernels must run."""
    used = re.search(r"^backends on cuda.*\n((?:  .*\n)+)", logs[0], re.MULTILINE)
    lines = used[1].splitlines() if used else []
    missing = [line.strip() for line in lines if line.split()[1] == "cuda" and "no: " in line and " yet" not in line]
    return "; ".join(missing) if used else "no backend was checked on the GPU"


def test_steps(settings: Settings) -> list[Step]:
    records = ["-p", "benchmarks.gpu.resume_tests", "--record", str(settings.out / "tests")]
    command = [settings.python, "-m", "pytest", "-m", "gpu", *PYTEST_OPTIONS, *records]
    shards = [[*command, "--shard", f"{index}/{TEST_PROCESSES}"] for index in range(TEST_PROCESSES)]

    def judge(logs: list[str]) -> str:
        outcomes = recorded(settings.out / "tests")
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        if not any(outcome == "passed" and "test_gpu.py" in test for test, outcome in outcomes.items()):
            return "no kernel has run on the GPU"
        return f"{len(failed)} of {len(outcomes)} tests failed, such as {failed[0]}" if failed else ""

    return [Step("pytest", shards, judge=judge, resumable=True)]


def sanitizer_steps(settings: Settings) -> list[Step]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    suite = [settings.python, "-m", "pytest", "tests/gpu/test_gpu.py", "-m", "sanitize", *PYTEST_OPTIONS]

    def step(name: str, backend: str, **environment: str) -> Step:
        options = ["--tool", name, "--error-exitcode", "86"]
        if name == "memcheck":  # PyTorch asks the driver for functions that it may lack; that is no bug
            options += ["--report-api-errors", "no"]
        command = [tool, *options, *suite, "-k", backend]
        return Step(f"{name} {backend}", [command], 280.0, environment, judge=no_errors)

    # Without PyTorch's pool of memory each tensor is an allocation of its own, whose end memcheck knows.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    steps = [step(name, "cuda", **(alone if name == "memcheck" else {})) for name in SANITIZERS]
    return [*steps, step("memcheck", "triton", **alone)]


def no_errors(logs: list[str]) -> str:
    """A summary must be there: compute-sanitizer may also end well because it has looked at nothing."""
    found = re.findall(r"(ERROR|RACECHECK) SUMMARY: (.*)", logs[0])
    if not found:
        return "compute-sanitizer gave no summary"
    bad = [text for _, text in found if any(int(number) > 0 for number in re.findall(r"\d+", text))]
    if bad:
        return f"compute-sanitizer: {bad[0]}"
    return "" if re.search(r"\b[1-9]\d* passed", logs[0]) else "no test ran under compute-sanitizer"


def bench_steps(settings: Settings) -> list[Step]:
    csv = str(settings.out / "bench.csv")
    options = ["--device", "cuda", "--preset", settings.preset, "--csv", csv, "--resume", "--no-plot"]
    options += ["--backends", "triton"]
    # FlashInfer compiles its kernels when they are first used. That takes minutes, so all of them at once.
    compiling = [settings.python, "-m", "benchmarks.attention.flashinfer_peers", settings.preset]
    shards = [[*compiling, f"{index}/{COMPILING_PROCESSES}"] for index in range(COMPILING_PROCESSES)]
    return [
        Step("peers", shards, resumable=True),
        Step("benchmarks", [[settings.python, "-m", "benchmarks.run", *options]], resumable=True),
    ]


def report_steps(settings: Settings) -> list[Step]:
    csv = str(settings.out / "bench.csv")
    steps = [Step("tables", [[settings.python, "-m", "benchmarks.harness.report", csv]], 60.0)]
    found = subprocess.run([settings.python, "-c", "import matplotlib"], capture_output=True)
    if found.returncode == 0:
        steps.append(Step("plots", [[settings.python, "-m", "benchmarks.plot", csv]], 120.0))
    else:
        say("no plots: matplotlib is not installed; later, anywhere: python -m benchmarks.plot bench.csv")
    return steps


PIECES: dict[str, Callable[[Settings], list[Step]]] = {
    "build": build_steps,
    "tests": test_steps,
    "sanitizer": sanitizer_steps,
    "bench": bench_steps,
    "report": report_steps,
}


NEED_BUILD = ("tests", "sanitizer", "bench")


# --- running them


class Summary:
    """summary.json: what was run on what, and how each step ended. Steps that are "ok" are not run again."""

    def __init__(self, out: Path, gpu: Gpu) -> None:
        self.out, self.path = out, out / "summary.json"
        self.content = {"sources": sources_hash(), "commit": commit(), "gpu": gpu.name, "steps": {}}
        out.mkdir(parents=True, exist_ok=True)
        before = json.loads(self.path.read_text()) if self.path.is_file() else None
        if before and (before["sources"], before["gpu"]) == (self.content["sources"], gpu.name):
            self.content = before
        elif before:
            say("the sources or the GPU have changed: everything is run anew")
            self.forget()

    def forget(self) -> None:
        """Start anew. Nothing but our own files is removed."""
        shutil.rmtree(self.out / "tests", ignore_errors=True)
        for path in {*self.out.glob("*.log"), *self.out.glob("bench*")}:
            path.unlink()

    def status(self, piece: str, step: str) -> str:
        return self.content["steps"].get(f"{piece}: {step}", {}).get("status", "")

    def record(self, piece: str, step: str, status: str, seconds: float, note: str) -> None:
        line = {"status": status, "seconds": round(seconds, 1), "note": note}
        self.content["steps"][f"{piece}: {step}"] = line
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        target = os.environ.get("OUT")
        if target and Path(target).resolve() != self.out.resolve():
            shutil.copytree(self.out, target, dirs_exist_ok=True)


def sources_hash() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.suffix in (".py", ".h", ".cpp", ".cuh", ".cu", ".toml"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def retry_failed(folder: Path) -> None:
    """Forget the tests that failed, so that they run again."""
    for file in folder.glob("*.jsonl"):
        kept = [line for line in file.read_text().splitlines(True) if json.loads(line)["outcome"] in ENDED_WELL]
        file.write_text("".join(kept))


def run_step(settings: Settings, piece: str, step: Step, seconds: float) -> tuple[str, str]:
    """Run the commands of a step at once. Returns its status ("ok", "failed", "unfinished") and a note."""
    logs = [settings.out / f"{piece}-{step.name.replace(' ', '-')}-{i}.log" for i in range(len(step.commands))]
    files = [log.open("a" if step.resumable else "w") for log in logs]
    environment = settings.environment() | step.environment
    limit = min(seconds, step.seconds)
    commands = step.commands
    if step.name == "benchmarks":  # it stops by itself between two cells
        commands = [[*command, "--limit", f"{max(limit - 60, 10):.0f}"] for command in commands]
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
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
    """One slice of a piece; returns the worst status of its steps."""
    end, worst = time.monotonic() + seconds, "ok"
    if piece in NEED_BUILD and any(summary.status("build", step) != "ok" for step in ("torch", "compile")):
        say(f"{piece}: the piece build comes first, and has not succeeded")
        return "failed"
    for step in PIECES[piece](settings):
        status = summary.status(piece, step.name)
        if status == "ok" and step.still_there():
            say(f"{piece}: {step.name}: done before")
            continue
        if status == "failed" and piece == "tests":
            retry_failed(settings.out / "tests")
        while True:
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
            if status != "unfinished" or end - time.monotonic() < LEAST_SECONDS:
                break
        worst = status if worst == "ok" or (worst == "failed" and status == "unfinished") else worst
        if piece == "build" and status == "failed" and step.name != "wheels":
            break  # a compiled module of before would be checked in place of the one that failed
    return worst


def say(line: str) -> None:
    print(line, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--piece", choices=PIECES, help="one slice of one piece; all pieces to their end by default")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the folder of results and state")
    parser.add_argument("--limit", type=float, default=SLICE_SECONDS, help="seconds of one slice")
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


def main(arguments: list[str] | None = None) -> int:
    asked = parse(arguments)
    chosen = [asked.piece] if asked.piece else list(PIECES)
    gpu = find_gpu()
    out = asked.out.absolute()
    if asked.dry_run:
        show(Settings(asked.python, out, asked.preset, gpu or Gpu("no GPU", "9.0", 0)), chosen)
        return 0
    if gpu is None:
        say("benchmarks.gpu: nvidia-smi finds no GPU here")
        return 2
    say(f"{gpu.count} x {gpu.name}, compute capability {gpu.capability}; results in {out.name}")
    settings, summary = Settings(asked.python, out, asked.preset, gpu), Summary(out, gpu)
    if asked.again:
        summary.forget()
        summary.content["steps"] = {}
    statuses = {}
    for piece in chosen:
        for _ in range(1 if asked.piece else MOST_SLICES):
            statuses[piece] = run_piece(settings, summary, piece, asked.limit)
            if statuses[piece] != "unfinished":
                break
    for piece, status in statuses.items():
        say(f"{piece}: {status}")
    if "failed" in statuses.values():
        return 1
    return UNFINISHED if "unfinished" in statuses.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
