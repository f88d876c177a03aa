"""What goes to a machine with a GPU and what comes back: modules that were built elsewhere, and tables of a run."""

import csv
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import one_call
from benchmarks.gpu import carried, table
from benchmarks.gpu.summary import sources_hash
from benchmarks.harness import results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of two sources, whose module is made at once, and a folder with that module."""
    root, folder = tmp_path / "checkout", tmp_path / "carried"
    (root / "csrc").mkdir(parents=True)
    (root / "specdec_ops").mkdir()
    (root / "csrc" / "kernel.cu").write_text("one")
    (root / "setup.py").write_text("two")
    monkeypatch.setattr(carried, "ROOT", root)
    module = root / "specdec_ops" / f"_C{carried.tag()}"
    monkeypatch.setattr(carried, "compile_here", lambda: module.write_text((root / "csrc" / "kernel.cu").read_text()))
    assert carried.main(["keep", str(folder)]) == 0
    module.unlink()
    return root, folder, module


def test_a_module_is_carried(checkout):
    _, folder, module = checkout
    assert carried.main(["use", str(folder)]) == 0
    assert module.read_text() == "one" and carried.modules() == [module]


@pytest.mark.parametrize("changed", ["csrc/kernel.cu", "setup.py"])
def test_a_module_of_other_sources_is_refused(checkout, changed):
    root, folder, module = checkout
    (root / changed).write_text("changed")
    with pytest.raises(SystemExit, match="--use-build: carried was compiled from other sources: "):
        carried.main(["use", str(folder)])
    assert not module.exists()


def test_a_module_for_another_python_is_refused(checkout):
    _, folder, module = checkout
    made = json.loads((folder / "build.json").read_text()) | {"tag": ".cpython-39-x86_64-linux-gnu.so"}
    (folder / "build.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit, match=r"built for another Python: \.cpython-39-\S+, this one loads"):
        carried.main(["use", str(folder)])
    assert not module.exists()


def test_a_folder_without_a_module_is_refused(checkout, tmp_path):
    _, folder, module = checkout
    (folder / module.name).unlink()
    with pytest.raises(SystemExit, match="--use-build: carried has no _C"):
        carried.main(["use", str(folder)])
    with pytest.raises(SystemExit, match=r"has no build\.json"):
        carried.main(["use", str(tmp_path)])


def test_another_build_lies_beside_a_copy_of_our_python(checkout, tmp_path):
    """Of other sources: that is what two builds are compared for."""
    root, folder, _ = checkout
    for name in carried.COPIED:
        (root / name).mkdir(exist_ok=True)
        (root / name / "module.py").write_text(name)
    (root / "csrc" / "kernel.cu").write_text("changed")
    assert carried.main(["copy", str(folder), str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "specdec_ops" / f"_C{carried.tag()}").read_text() == "one"
    assert (tmp_path / "copy" / "benchmarks" / "module.py").read_text() == "benchmarks"


def test_the_build_needs_no_setuptools():
    """Versions before 77 can't read our pyproject.toml, and Python 3.12 comes without."""
    code = (
        "import sys; sys.modules['setuptools'] = None\n"
        "import runpy; from benchmarks.gpu import carried\n"
        "run_path = runpy.run_path\n"
        "class Build:\n"
        "    def __init__(self, version, module): self.version = version\n"
        "    def run(self, target): print(self.version, target.name)\n"
        "runpy.run_path = lambda path: run_path(path) | {'Build': Build}\n"
        "carried.compile_here()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    version = (ROOT / "specdec_ops" / "__init__.py").read_text().partition('__version__ = "')[2].partition('"')[0]
    assert done.stdout == f"{version} _C{carried.tag()}\n", done.stderr


def test_other_arguments_show_how():
    assert carried.main([]) == carried.main(["use"]) == table.main([]) == 2


def test_one_call_names_its_cells(capsys):
    assert one_call.main(["no such cell"]) == 2
    assert "tree_attention Llama-3-8B bf16 ctx8192 b8 n32 (random)" in capsys.readouterr().out


# --- tables

LOG = """==PROF== Connected to process 7
"Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","other"
"","ns","register/thread","%"
"tree_attention_kernel","123456","203","1.5"
"""


@pytest.fixture
def tar(tmp_path):
    """What a run gives back, with the cells of a result that is in the repository."""
    folder = tmp_path / "run"
    folder.mkdir()
    steps = {"first: small calls": {"status": "failed", "seconds": 31.4, "note": "2 of 80 tests failed"}}
    found = {"sources": sources_hash(), "commit": "abc1234", "gpu": "NVIDIA Imaginary 100", "steps": steps}
    (folder / "summary.json").write_text(json.dumps(found))
    row = dict.fromkeys(results.COLUMNS, "")
    row |= {"op": "tree_attention", "model": "Llama-3-8B", "dtype": "bf16", "context": 8192, "batch": 8, "nodes": 64}
    row |= {"heads": 32, "kv_heads": 8, "lengths": "equal", "tree": "random", "mode": "cold", "isa": "sm_90"}
    row |= {"date": "2031-01-02", "torch": "9.9", "role": "ours", "contestant": "specdec_ops", "p50_us": 123.4}
    row |= {"ratio": 1.5, "best_peer": "SDPA", "roof_percent": 81.0, "noise_percent": 0.0}
    peer = row | {"role": "pytorch", "contestant": "SDPA", "p50_us": 185.1, "ratio": ""}
    with (folder / "bench.csv").open("w") as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        writer.writerows([row, peer])
    (folder / "second-profile-64-nodes-0.log").write_text(LOG)
    (folder / "second-profile-exit-head-0.log").write_text("==ERROR== ERR_NVGPUCTRPERM")
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as opened:
        for path in folder.iterdir():
            opened.add(path, path.name)
    shutil.rmtree(folder)
    return tmp_path / "results.tar.gz"


def test_tables_of_a_run(tar, capsys):
    assert table.main([str(tar)]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA Imaginary 100, torch 9.9, 2031-01-02, commit abc1234." in shown
    (line,) = [line for line in shown.splitlines() if "123.4 us" in line]
    assert line.endswith("| 123.4 us | 185.1 us | SDPA | 1.50x | 81% |")
    assert "| 64 nodes | 123456 ns | 203 register/thread |" in shown
    assert "| exit head | no counters |" in shown
    assert "| first: small calls | failed | 31 s | 2 of 80 tests failed |" in shown


def test_a_run_of_other_sources_is_refused(tar, monkeypatch, capsys):
    monkeypatch.setattr(table, "sources_hash", lambda: "another")
    assert table.main([str(tar)]) == 2
    shown = capsys.readouterr().out
    assert "results.tar.gz is of commit abc1234, sources " in shown and "these are another" in shown
    assert "|" not in shown
