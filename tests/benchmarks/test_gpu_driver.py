"""benchmarks.gpu on a machine that only looks like one with a GPU, and the plugin that lets tests resume."""

import dataclasses
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import pieces, resume_tests, settings, summary

ROOT = Path(__file__).parents[2]
SMI = 'printf "NVIDIA Imaginary 100, 9.0\\nNVIDIA Imaginary 100, 9.0\\n"'
COUNTERS = '"Kernel Name","gpu__time_duration.sum"\\n"","ns"\\n"tree","1234"\\n'
SELF_CHECK = """backends on cuda (1 x NVIDIA, SM 9.0)
  merge_states     cuda     yes (largest error 2e-07)
  tree_attention   cuda     no: there is no cuda kernel for tree_attention yet
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An nvidia-smi, a compute-sanitizer and a Python that say what a healthy machine says."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    (tmp_path / "self-check").write_text(SELF_CHECK)
    script(tools / "nvidia-smi", SMI)
    script(tools / "ncu", f"printf '{COUNTERS}'")
    script(tools / "compute-sanitizer", 'shift 4; echo "========= ERROR SUMMARY: 0 errors"; echo "9 passed in 3 s"')
    outcome = json.dumps({"test": "tests/gpu/test_gpu.py::test_a", "outcome": "passed"})
    python = script(
        tools / "python",
        f"""echo "$TORCH_CUDA_ARCH_LIST $*" >> {calls}
case "$*" in
*specdec_ops*) cat {tmp_path}/self-check ;;
*--record*) while [ "$1" != --record ]; do shift; done; mkdir -p "$2"; echo '{outcome}' > "$2/0.jsonl" ;;
*benchmarks.run*) while [ "$1" != --csv ]; do shift; done; echo cell >> "$2" ;;
*matplotlib*) exit 1 ;;
esac""",
    )
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(settings, "CACHES", tmp_path / "caches")
    monkeypatch.setattr(pieces, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(pieces, "any_module", lambda: True)

    class Machine:
        out, bin, folder = tmp_path / "out", tools, tmp_path

        @staticmethod
        def run(*arguments: str) -> int:
            return gpu.main(["--out", str(tmp_path / "out"), "--python", str(python), *arguments])

        @staticmethod
        def calls() -> list[str]:
            lines = calls.read_text().splitlines() if calls.is_file() else []
            calls.unlink(missing_ok=True)
            return lines

        @staticmethod
        def statuses() -> dict[str, str]:
            steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
            return {name: step["status"] for name, step in steps.items()}

    return Machine


def test_everything_runs_once_and_is_remembered(machine, capsys):
    assert machine.run("--piece", "all") == 0
    assert set(machine.statuses().values()) == {"ok"}
    assert {name.partition(":")[0] for name in machine.statuses()} == set(gpu.LONG)
    calls = machine.calls()
    assert all(call.startswith("9.0 ") for call in calls if "matplotlib" not in call)
    assert sum("--shard" in call for call in calls) == pieces.TEST_PROCESSES
    assert any("benchmarks.run --device cuda --preset gpu" in call and "--resume" in call for call in calls)
    assert "later, anywhere: python -m benchmarks.plot" in capsys.readouterr().out

    assert machine.run("--piece", "all") == 0
    assert [call for call in machine.calls() if "matplotlib" not in call] == []
    assert "build: compile: done before" in capsys.readouterr().out


def test_one_piece_at_a_time(machine, capsys):
    assert machine.run("--piece", "tests") == 1
    assert "the piece build comes first" in capsys.readouterr().out
    assert machine.run("--piece", "build") == 0
    assert machine.run("--piece", "tests") == 0
    assert sorted(machine.statuses()) == ["build: compile", "build: self-check", "build: torch", "tests: pytest"]


def test_a_failing_piece_does_not_stop_the_others(machine):
    script(machine.bin / "compute-sanitizer", 'echo "========= ERROR SUMMARY: 3 errors"; echo "9 passed"; exit 86')
    assert machine.run("--piece", "all") == 1
    statuses = machine.statuses()
    assert statuses["sanitizer: racecheck cuda"] == "failed"
    assert statuses["bench: benchmarks"] == statuses["report: tables"] == "ok"
    summary = json.loads((machine.out / "summary.json").read_text())
    assert summary["steps"]["sanitizer: racecheck cuda"]["note"] == "compute-sanitizer: 3 errors"


def test_a_build_that_fails_stops_at_once(machine):
    script(machine.bin / "python", 'case "$*" in *"carried compile"*) exit 1 ;; esac')
    assert machine.run("--piece", "build") == 1
    assert machine.statuses() == {"build: torch": "ok", "build: compile": "failed"}
    assert machine.run("--piece", "tests") == 1 and "tests: pytest" not in machine.statuses()


def test_skipped_tests_are_no_success(machine):
    """A PyTorch that sees no GPU skips every test."""
    assert machine.run("--piece", "build") == 0
    text = (machine.bin / "python").read_text().replace('"passed"', '"skipped"')
    (machine.bin / "python").write_text(text)
    assert machine.run("--piece", "tests") == 1
    summary = json.loads((machine.out / "summary.json").read_text())
    assert summary["steps"]["tests: pytest"]["note"] == "no kernel has run on the GPU"


def test_unfinished_is_not_failed(machine, monkeypatch):
    assert machine.run("--piece", "build") == 0
    script(machine.bin / "python", 'case "$*" in *benchmarks.run*) exit 75 ;; esac')
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 2.0)
    assert machine.run("--piece", "bench", "--limit", "2.5") == 75
    script(machine.bin / "python", "exit 0")
    assert machine.run("--piece", "bench") == 0


def test_a_step_beyond_its_time_is_ended(machine, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    script(machine.bin / "python", 'case "$*" in *"carried compile"*) sleep 60 ;; esac')
    assert machine.run("--piece", "build", "--limit", "1") == gpu.UNFINISHED
    note = json.loads((machine.out / "summary.json").read_text())["steps"]["build: compile"]["note"]
    assert note == "out of time"


def test_missing_tool_is_a_note(machine):
    assert machine.run("--piece", "build") == 0
    (machine.bin / "compute-sanitizer").unlink()
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("the machine has a compute-sanitizer of its own")
    assert machine.run("--piece", "sanitizer") == 1
    steps = json.loads((machine.out / "summary.json").read_text())["steps"]
    assert steps["sanitizer: memcheck cuda"]["note"].startswith("compute-sanitizer: No such file")


def test_kernels_that_are_not_there_fail_the_build(machine):
    text = SELF_CHECK.replace("yes (largest error 2e-07)", "no: the installed package was built without CUDA")
    (machine.folder / "self-check").write_text(text)
    assert machine.run("--piece", "build") == 1
    (machine.folder / "self-check").write_text("backends on cpu (x86_64)\n  merge_states cpu yes\n")
    assert machine.run("--piece", "build") == 1
    note = json.loads((machine.out / "summary.json").read_text())["steps"]["build: self-check"]["note"]
    assert note == "no backend was checked on the GPU"


def test_changed_sources_start_anew(machine, monkeypatch, capsys):
    assert machine.run("--piece", "all") == 0
    (machine.out / "bench.csv").write_text("old")
    monkeypatch.setattr(summary, "sources_hash", lambda: "another")
    assert machine.run("--piece", "build") == 0
    assert "have changed: everything is run anew" in capsys.readouterr().out
    assert not (machine.out / "bench.csv").exists() and sorted(machine.statuses()) == [
        "build: compile",
        "build: self-check",
        "build: torch",
    ]


def test_results_come_back_in_one_file(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "elsewhere"))
    assert machine.run() == 0
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["results.tar.gz"]
    with tarfile.open(tmp_path / "elsewhere" / "results.tar.gz") as tar:
        names = tar.getnames()
    assert {"summary.json", "bench.csv", "first-compile-0.log", "tests/small-calls/0.jsonl"} <= set(names)


def test_a_long_log_keeps_its_end(tmp_path):
    (tmp_path / "long.log").write_bytes(bytes(summary.MOST_BYTES) + b"the end")
    found, content = summary.entry(tmp_path / "long.log", "long.log")
    assert found.size == summary.MOST_BYTES and content.read().endswith(b"the end")


def test_wheels_are_installed_offline_and_apart(machine):
    wheel = machine.folder / "wheels" / "peer-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert machine.run("--piece", "build") == 0
    install = machine.calls()[1]
    assert "pip install --no-deps --no-index" in install and install.endswith(f"/caches/site {wheel}")


def test_the_driver_can_be_linked_with(machine):
    script(machine.bin / "ldconfig", 'echo "	libcuda.so.1 (libc6,x86-64) => /usr/lib/somewhere/libcuda.so.1"')
    for _ in range(2):
        assert (settings.driver_link() / "libcuda.so").readlink() == Path("/usr/lib/somewhere/libcuda.so.1")


def test_no_gpu_is_a_sentence(machine, capsys):
    script(machine.bin / "nvidia-smi", 'echo "NVIDIA-SMI has failed"; exit 9')
    assert machine.run() == 2
    assert capsys.readouterr().out == "benchmarks.gpu: nvidia-smi finds no GPU here\n"


def test_dry_run_needs_no_gpu(machine, capsys):
    script(machine.bin / "nvidia-smi", "exit 1")
    assert machine.run("--dry-run") == 0
    shown = capsys.readouterr().out
    assert [line.rstrip(":") for line in shown.splitlines() if not line.startswith((" ", "no plots"))] == list(
        gpu.CALLS
    )
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in shown and not machine.out.exists()


# --- the two calls of few minutes


FIRST = ["torch", "compile", "names", "small calls", "graphs and streams", "attention", "others", "attention tests"]
FIRST += ["triton"]


def test_two_calls_in_the_order_of_what_they_tell(machine):
    assert machine.run() == 0
    assert [name for name in machine.statuses() if name.startswith("first")] == [f"first: {step}" for step in FIRST]
    second = [name.removeprefix("second: ") for name in machine.statuses() if name.startswith("second")]
    assert second == [*(f"profile {name}" for name, *_ in pieces.PROFILED), "memcheck cuda", "racecheck cuda"]
    assert sum(gpu.CALLS.values()) <= 12 * 60 and set(machine.statuses().values()) == {"ok"}
    machine.calls()
    assert machine.run() == 0 and machine.calls() == []


def caps(piece):
    made = settings.Settings("python", Path("out"), "gpu", settings.Gpu("", "9.0", 1), None, Path("other"))
    steps = pieces.PIECES[piece](made)
    return {step.name: step.seconds for step in steps if step.name not in ("torch", "compile")}


def test_the_steps_fit_their_call():
    """So that none takes the time of those behind it: beside 40 seconds for a module that was carried here."""
    for piece, seconds in gpu.CALLS.items():
        assert sum(caps(piece).values()) <= seconds - 40 * (piece == "first"), piece


def test_a_step_that_is_not_finished_waits_for_all_others(machine, monkeypatch):
    """Its own limit trips, not the call's; the rest runs; then it has another turn."""
    turns = machine.folder / "turns"
    change = f'case "$*" in *"calls and cuda"*) echo . >> {turns}; [ $(wc -l < {turns}) -gt 4 ] || exec sleep 60;; esac'
    text = (machine.bin / "python").read_text()
    (machine.bin / "python").write_text(text.replace("case", f"{change}\ncase", 1))
    made = pieces.first_steps

    def in_less_time(asked):
        return [dataclasses.replace(step, seconds=3.0) for step in made(asked)]

    monkeypatch.setitem(gpu.PIECES, "first", in_less_time)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.2)
    before = time.monotonic()
    assert machine.run("--piece", "first", "--limit", "40") == 0
    assert time.monotonic() - before < 30
    steps = json.loads((machine.out / "summary.json").read_text())["steps"]
    assert steps["first: small calls"]["status"] == "ok"
    names = [call for call in machine.calls() if "--record" in call]
    last = [index for index, call in enumerate(names) if "small_calls and cuda" in call][-1]
    assert last > max(index for index, call in enumerate(names) if "small_calls and triton" in call)


def test_a_call_that_is_out_of_time_goes_on_later(machine, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    text = (machine.bin / "python").read_text()
    (machine.bin / "python").write_text(text.replace("case", 'case "$*" in *--op*) exec sleep 60;; esac\ncase', 1))
    assert machine.run("--piece", "first", "--limit", "4") == gpu.UNFINISHED
    statuses = machine.statuses()
    assert statuses["first: small calls"] == "ok" and statuses["first: attention"] == "unfinished"
    assert statuses["first: triton"] == "unfinished"
    (machine.bin / "python").write_text(text)
    machine.calls()
    assert machine.run("--piece", "first") == 0
    assert not any("small_calls and cuda" in call for call in machine.calls())


def test_processes_share_the_cores(machine, monkeypatch):
    script(machine.bin / "nvidia-smi", SMI)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    made = settings.Settings("python", machine.out, "gpu", settings.Gpu("", "9.0", 1))
    assert [made.environment(processes)["OMP_NUM_THREADS"] for processes in (1, 4, 6, 40)] == ["8", "4", "2", "1"]


def test_kernels_that_no_profiler_may_see(machine):
    script(machine.bin / "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'")
    assert machine.run() == 1
    steps = json.loads((machine.out / "summary.json").read_text())["steps"]
    assert steps["second: profile 64 nodes"]["note"] == "this user may not read the GPU's counters"
    assert steps["second: racecheck cuda"]["status"] == "ok"


def test_another_build_is_compared(machine, monkeypatch):
    monkeypatch.setattr(settings, "CACHES", machine.folder / "caches")
    (machine.folder / "caches" / "against").mkdir(parents=True)
    assert machine.run("--against", str(machine.folder / "other")) == 0
    calls = machine.calls()
    assert any(f"carried copy {machine.folder}/other {machine.folder}/caches/against" in call for call in calls)
    assert any("benchmarks.run" in call and "against.csv" in call and "--op tree_attention" in call for call in calls)
    assert any("benchmarks.compare" in call for call in calls)


def test_shards_hold_whole_subjects():
    """The tests of an op are in one, whatever the function, so that no two processes compile the same kernels."""

    class Item:
        def __init__(self, function, op=None):
            self.nodeid = f"{function}[{op}]"
            self.callspec = type("Spec", (), {"params": {} if op is None else {"op": op}})

    ops = [Item(function, op) for function in ("a", "b") for op in ("x", "y", "z") for _ in range(5)]
    items = [*ops, *(Item("c") for _ in range(12)), *(Item("d") for _ in range(3))]
    parts = resume_tests.shards(items, 3)
    assert sorted(id(item) for part in parts for item in part) == sorted(map(id, items))
    subjects = [set(map(resume_tests.subject, part)) for part in parts]
    assert not any(one & other for index, one in enumerate(subjects) for other in subjects[:index])
    assert max(map(len, parts)) - min(map(len, parts)) <= 12


@pytest.mark.parametrize(
    ("log", "wrong"),
    [
        ("ERROR SUMMARY: 0 errors\n4 passed", ""),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n4 passed", ""),
        ("RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n4 passed", "compute-sanitizer: 2 hazards"),
        ("ERROR SUMMARY: 0 errors\n4 skipped", "no test ran"),
        ("4 passed", "gave no summary"),
    ],
)
def test_sanitizer_logs(log, wrong):
    assert wrong in pieces.no_errors([log]) and bool(wrong) == bool(pieces.no_errors([log]))


TESTS = """
import os, pytest
@pytest.mark.parametrize("i", range(6))
def test_it(i):
    if i == 3 and not os.environ.get("FIXED"): os._exit(1)
    assert i != 4
"""


QUICK = {"PATH": "/usr/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run_tests(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.gpu.resume_tests",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        folder,
    ]
    command += ["-c", "/dev/null", "--record", folder / "record", *options, folder / "test_them.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**QUICK, **environment})


def test_tests_resume_behind_the_one_that_ended_the_process(tmp_path):
    (tmp_path / "test_them.py").write_text(TESTS)
    for _ in range(2):
        assert run_tests(tmp_path).returncode == 1
    assert list(resume_tests.recorded(tmp_path / "record").values()).count("passed") == 3
    assert "1 failed, 1 passed" in run_tests(tmp_path).stdout
    outcomes = {test[-2]: outcome for test, outcome in resume_tests.recorded(tmp_path / "record").items()}
    assert outcomes == dict(zip("012345", ["passed"] * 3 + ["failed"] * 2 + ["passed"], strict=True))
    assert run_tests(tmp_path).returncode == 0  # nothing is left
    gpu.retry_failed(tmp_path / "record")
    again = run_tests(tmp_path, FIXED="1")
    assert "1 failed, 1 passed" in again.stdout


def test_shards_cover_all_tests(tmp_path):
    (tmp_path / "test_them.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    for index in range(2):
        run_tests(tmp_path, "--shard", f"{index}/2", FIXED="1")
        assert len(resume_tests.recorded(tmp_path / "record")) == index + 1
