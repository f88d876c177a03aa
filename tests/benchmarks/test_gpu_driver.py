"""benchmarks.gpu on a machine that only looks like one with a GPU, and the plugin that lets tests resume."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu

ROOT = Path(__file__).parents[2]
SMI = 'printf "NVIDIA Imaginary 100, 9.0\\nNVIDIA Imaginary 100, 9.0\\n"'
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
    script(tools / "compute-sanitizer", 'shift 4; echo "========= ERROR SUMMARY: 0 errors"; echo "9 passed in 3 s"')
    outcome = json.dumps({"test": "tests/gpu/test_gpu.py::test_a", "outcome": "passed"})
    python = script(
        tools / "python",
        f"""echo "$TORCH_CUDA_ARCH_LIST $*" >> {calls}
case "$*" in
*specdec_ops*) cat {tmp_path}/self-check ;;
*--record*) for last; do :; done; mkdir -p {tmp_path}/out/tests; echo '{outcome}' > {tmp_path}/out/tests/0.jsonl ;;
*matplotlib*) exit 1 ;;
esac""",
    )
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu, "CACHES", tmp_path / "caches")
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu, "any_module", lambda: True)

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
    assert machine.run() == 0
    assert set(machine.statuses().values()) == {"ok"}
    assert {name.partition(":")[0] for name in machine.statuses()} == set(gpu.PIECES)
    calls = machine.calls()
    assert all(call.startswith("9.0 ") for call in calls if "matplotlib" not in call)
    assert sum("--shard" in call for call in calls) == gpu.TEST_PROCESSES
    assert any("benchmarks.run --device cuda --preset gpu" in call and "--resume" in call for call in calls)
    assert "later, anywhere: python -m benchmarks.plot" in capsys.readouterr().out

    assert machine.run() == 0
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
    assert machine.run() == 1
    statuses = machine.statuses()
    assert statuses["sanitizer: racecheck cuda"] == "failed"
    assert statuses["bench: benchmarks"] == statuses["report: tables"] == "ok"
    summary = json.loads((machine.out / "summary.json").read_text())
    assert summary["steps"]["sanitizer: racecheck cuda"]["note"] == "compute-sanitizer: 3 errors"


def test_a_build_that_fails_stops_at_once(machine):
    script(machine.bin / "python", 'case "$*" in *setup.py*) exit 1 ;; esac')
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
    script(machine.bin / "python", 'case "$*" in *setup.py*) sleep 60 ;; esac')
    assert machine.run("--piece", "build", "--limit", "1") == 1
    note = json.loads((machine.out / "summary.json").read_text())["steps"]["build: compile"]["note"]
    assert note == "longer than 1 s"


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
    assert machine.run() == 0
    (machine.out / "bench.csv").write_text("old")
    monkeypatch.setattr(gpu, "sources_hash", lambda: "another")
    assert machine.run("--piece", "build") == 0
    assert "have changed: everything is run anew" in capsys.readouterr().out
    assert not (machine.out / "bench.csv").exists() and sorted(machine.statuses()) == [
        "build: compile",
        "build: self-check",
        "build: torch",
    ]


def test_results_are_copied(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "elsewhere"))
    assert machine.run("--piece", "build") == 0
    assert (tmp_path / "elsewhere" / "summary.json").is_file()
    assert (tmp_path / "elsewhere" / "build-compile-0.log").is_file()


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
        assert (gpu.driver_link() / "libcuda.so").readlink() == Path("/usr/lib/somewhere/libcuda.so.1")


def test_no_gpu_is_a_sentence(machine, capsys):
    script(machine.bin / "nvidia-smi", 'echo "NVIDIA-SMI has failed"; exit 9')
    assert machine.run() == 2
    assert capsys.readouterr().out == "benchmarks.gpu: nvidia-smi finds no GPU here\n"


def test_dry_run_needs_no_gpu(machine, capsys):
    script(machine.bin / "nvidia-smi", "exit 1")
    assert machine.run("--dry-run") == 0
    shown = capsys.readouterr().out
    assert [line.rstrip(":") for line in shown.splitlines() if not line.startswith((" ", "no plots"))] == list(
        gpu.PIECES
    )
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in shown and not machine.out.exists()


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
    assert wrong in gpu.no_errors([log]) and bool(wrong) == bool(gpu.no_errors([log]))


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
    assert list(gpu.recorded(tmp_path / "record").values()).count("passed") == 3
    assert "1 failed, 1 passed" in run_tests(tmp_path).stdout
    outcomes = {test[-2]: outcome for test, outcome in gpu.recorded(tmp_path / "record").items()}
    assert outcomes == dict(zip("012345", ["passed"] * 3 + ["failed"] * 2 + ["passed"], strict=True))
    assert run_tests(tmp_path).returncode == 0  # nothing is left
    gpu.retry_failed(tmp_path / "record")
    again = run_tests(tmp_path, FIXED="1")
    assert "1 failed, 1 passed" in again.stdout


def test_shards_cover_all_tests(tmp_path):
    (tmp_path / "test_them.py").write_text(TESTS)
    for index in range(2):
        run_tests(tmp_path, "--shard", f"{index}/2", FIXED="1")
        assert len(gpu.recorded(tmp_path / "record")) == 3 * (index + 1)
