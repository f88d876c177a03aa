"""The pieces of `python -m benchmarks.gpu`: which commands there are, and how their logs are judged."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

from benchmarks.harness.machine import ROOT

from . import carried
from . import settings as settings_module
from .resume_tests import recorded
from .settings import Settings, Step

WHEELS = ROOT / "wheels"
TEST_PROCESSES = 4
COMPILING_PROCESSES = 6
PYTEST_OPTIONS = ["-q", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# initcheck is left out: the tests fill all memory with NaN before a kernel may write it, so it would find nothing.


def build_steps(settings: Settings) -> list[Step]:
    python, wheels = settings.python, sorted(map(str, WHEELS.glob("*.whl")))
    offline = ["--no-deps", "--no-index", "--quiet", "--upgrade", "--disable-pip-version-check"]
    install = [python, "-m", "pip", "install", *offline, "--target", str(settings.site), *wheels]
    sees_gpu = "import torch, sys; sys.exit(not torch.cuda.is_available() and 'PyTorch sees no GPU')"
    return [
        Step("torch", [[python, "-c", sees_gpu]], needed=True),
        *([Step("wheels", [install], still_there=settings.site.is_dir)] if wheels else []),
        module_step(settings),
        Step("self-check", [[python, "-m", "specdec_ops"]], judge=kernels_are_there),
    ]


def module_step(settings: Settings) -> Step:
    """A module that was carried here is put in its place; without one it is compiled, whatever setuptools there is."""
    what = ["use", str(settings.use_build)] if settings.use_build else ["compile"]
    return Step(
        "compile",
        [[settings.python, "-m", "benchmarks.gpu.carried", *what]],
        environment={"SPECDEC_OPS_BUILD": "cuda"},
        resumable=True,  # what has been compiled is kept
        still_there=lambda: any_module(),
        needed=True,
    )


def any_module() -> bool:
    return any(carried.modules())


def kernels_are_there(logs: list[str]) -> str:
    """The self-check passes where a backend is merely unavailable; here the CUDA kernels must run."""
    used = re.search(r"^backends on cuda.*\n((?:  .*\n)+)", logs[0], re.MULTILINE)
    lines = used[1].splitlines() if used else []
    missing = [line.strip() for line in lines if line.split()[1] == "cuda" and "no: " in line and " yet" not in line]
    return "; ".join(missing) if used else "no backend was checked on the GPU"


# --- the first eight minutes, and the four after them


def first_steps(settings: Settings) -> list[Step]:
    """What tells most comes first, and no step takes the time of those behind it.

    The caps are of a machine with 16 cores; their sum is what a call may take.
    """
    gpu_tests, attention = "tests/gpu/test_gpu.py", ("tests/attention/test_tree_attention.py",)
    more = ("tests/attention/test_tree_attention_features.py", "tests/attention/test_tree_attention_float8.py")
    return [
        build_steps(settings)[0],
        module_step(settings),
        pytest_step(settings, "names", 40.0, ["tests/emulator/test_emulator.py", "-k", "on_a_gpu"], 1),
        pytest_step(settings, "small calls", 60.0, [gpu_tests, "-k", "small_calls and cuda"]),
        pytest_step(settings, "graphs and streams", 60.0, [gpu_tests, "-k", "(cuda or captured) and not small_calls"]),
        bench_step(settings, "attention", 75.0, "--op", "tree_attention"),
        bench_step(settings, "others", 75.0),
        pytest_step(settings, "attention tests", 60.0, [*attention, *more, "-k", "cuda-on-cuda or float8"]),
        pytest_step(settings, "triton", 60.0, [gpu_tests, "-k", "small_calls and triton"]),
    ]


def second_steps(settings: Settings) -> list[Step]:
    """What decides what to do next: counters of the kernels that matter, a few tests under compute-sanitizer, and the
    attention cells with another build.
    """
    python = settings.python
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    options = ["--set", "full", "--csv", "--page", "raw", "--launch-skip", "2", "--launch-count", "1"]
    steps = [
        Step(
            f"profile {name}",
            [[tool, *options, "--kernel-name", f"regex:{kernel}", python, "-m", "benchmarks.one_call", label]],
            25.0,
            judge=has_counters,
        )
        for name, kernel, label in PROFILED
    ]
    few = "cuda and (tree_attention or accept) and not triton"
    steps += [sanitizer_step(settings, name, few, 40.0) for name in ("memcheck", "racecheck")]
    if settings.against:
        steps += against_steps(settings)
    return steps


PROFILED = (  # name, kernel, label of a cell
    ("32 nodes", "tree_attention_kernel", r"tree_attention Llama-3-8B bf16 ctx8192 b8 n32 "),
    ("64 nodes", "tree_attention_kernel", r"tree_attention Llama-3-8B bf16 ctx8192 b8 n64 "),
    ("exit head", "exit_confidence_kernel", r"exit_confidence 128256 x 4096 bf16 rows 8$"),
)


def has_counters(logs: list[str]) -> str:
    """Ncu ends well, too, where the driver keeps its counters from it."""
    if "ERR_NVGPUCTRPERM" in logs[0]:
        return "this user may not read the GPU's counters"
    return "" if "gpu__time_duration" in logs[0] else "no kernel was profiled"


def against_steps(settings: Settings) -> list[Step]:
    """The attention cells of the first call again, with another build in a copy of the sources; and both compared."""
    copy, out = settings_module.CACHES / "against", settings.out
    module = [settings.python, "-m", "benchmarks.gpu.carried", "copy", str(settings.against), str(copy)]
    compare = [settings.python, "-m", "benchmarks.compare", str(out / "bench.csv"), str(out / "against.csv")]
    again = bench_step(settings, "against", 50.0, "--op", "tree_attention")
    again.folder, again.environment = copy, {"PYTHONPATH": str(copy)}
    return [Step("other build", [module], 10.0), again, Step("comparison", [compare], 10.0)]


def bench_step(settings: Settings, name: str, seconds: float, *options: str) -> Step:
    """Cells of the preset gpu-first, in a CSV of their own where they are of another build."""
    csv = settings.out / ("against.csv" if name == "against" else "bench.csv")
    command = [settings.python, "-m", "benchmarks.run", "--device", "cuda", "--preset", "gpu-first", "--csv", str(csv)]
    command += ["--resume", "--no-plot", "--without", "(?i)flashinfer|flex", *options]
    return Step(name, [command], seconds, resumable=True)


def pytest_step(settings: Settings, name: str, seconds: float, chosen: list[str], processes: int = 0) -> Step:
    """Tests on the GPU, in several processes; those that have run in an earlier call are left out."""
    processes, folder = processes or TEST_PROCESSES, settings.out / "tests" / name.replace(" ", "-")
    command = [settings.python, "-m", "pytest", "-m", "gpu", *PYTEST_OPTIONS]
    command += ["-p", "benchmarks.gpu.resume_tests", "--record", str(folder), *chosen]
    shards = [[*command, "--shard", f"{index}/{processes}"] for index in range(processes)]

    def judge(logs: list[str]) -> str:
        outcomes = recorded(folder)
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        if not any(outcome == "passed" for outcome in outcomes.values()):
            return "no test has run on the GPU"
        return f"{len(failed)} of {len(outcomes)} tests failed, such as {failed[0]}" if failed else ""

    return Step(name, shards, seconds, judge=judge, resumable=True)


# --- everything


def test_steps(settings: Settings) -> list[Step]:
    folder = settings.out / "tests" / "all"
    records = ["-p", "benchmarks.gpu.resume_tests", "--record", str(folder)]
    command = [settings.python, "-m", "pytest", "-m", "gpu", *PYTEST_OPTIONS, *records]
    shards = [[*command, "--shard", f"{index}/{TEST_PROCESSES}"] for index in range(TEST_PROCESSES)]

    def judge(logs: list[str]) -> str:
        outcomes = recorded(folder)
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        if not any(outcome == "passed" and "test_gpu.py" in test for test, outcome in outcomes.items()):
            return "no kernel has run on the GPU"
        return f"{len(failed)} of {len(outcomes)} tests failed, such as {failed[0]}" if failed else ""

    return [Step("pytest", shards, judge=judge, resumable=True)]


def sanitizer_steps(settings: Settings) -> list[Step]:
    steps = [sanitizer_step(settings, name, "cuda", 280.0) for name in SANITIZERS]
    return [*steps, sanitizer_step(settings, "memcheck", "triton", 280.0)]


def sanitizer_step(settings: Settings, name: str, chosen: str, seconds: float) -> Step:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    suite = [settings.python, "-m", "pytest", "tests/gpu/test_gpu.py", "-m", "sanitize", *PYTEST_OPTIONS]
    options, environment = ["--tool", name, "--error-exitcode", "86"], {}
    if name == "memcheck":
        options += ["--report-api-errors", "no"]  # PyTorch asks the driver for functions that it may lack; no bug
        # Without PyTorch's pool of memory each tensor is an allocation of its own, whose end memcheck knows.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, *options, *suite, "-k", chosen]
    return Step(f"{name} {chosen.partition(' ')[0]}", [command], seconds, environment, judge=no_errors)


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
    if no_error([settings.python, "-c", "import matplotlib"]):
        steps.append(Step("plots", [[settings.python, "-m", "benchmarks.plot", csv]], 120.0))
    else:
        print("no plots: matplotlib is not installed; later, anywhere: python -m benchmarks.plot bench.csv", flush=True)
    return steps


def no_error(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


PIECES: dict[str, Callable[[Settings], list[Step]]] = {
    "first": first_steps,
    "second": second_steps,
    "build": build_steps,
    "tests": test_steps,
    "sanitizer": sanitizer_steps,
    "bench": bench_steps,
    "report": report_steps,
}
