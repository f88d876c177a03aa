"""What was run on what, how each step ended, and the one file that holds all results."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

from benchmarks.harness.machine import ROOT, commit

from .settings import Gpu

SOURCES = ("csrc", "specdec_ops", "triton_kernels", "tests", "benchmarks", "setup.py", "pyproject.toml")
RESULTS = "results.tar.gz"
MOST_BYTES = 4 << 20  # of a log in the tar: its end


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
            print("the sources or the GPU have changed: everything is run anew", flush=True)
            self.forget()

    def forget(self) -> None:
        """Start anew. Nothing but our own files is removed."""
        shutil.rmtree(self.out / "tests", ignore_errors=True)
        for path in {*self.out.glob("*.log"), *self.out.glob("bench*"), *self.out.glob("against*")}:
            path.unlink()

    def status(self, piece: str, step: str) -> str:
        return self.content["steps"].get(f"{piece}: {step}", {}).get("status", "")

    def record(self, piece: str, step: str, status: str, seconds: float, note: str) -> None:
        line = {"status": status, "seconds": round(seconds, 1), "note": note}
        self.content["steps"][f"{piece}: {step}"] = line
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        self.pack()

    def pack(self) -> None:
        """All results in one file, results.tar.gz, also in the folder that the environment variable OUT names: what a
        rented machine gives back may be few files.
        """
        complete = self.out / "results.new"
        with tarfile.open(complete, "w:gz") as tar:
            for path in sorted(self.out.rglob("*")):
                if path.is_file() and path != complete and path.name != RESULTS:
                    tar.addfile(*entry(path, str(path.relative_to(self.out))))
        complete.replace(self.out / RESULTS)
        target = os.environ.get("OUT")
        if target and Path(target).resolve() != self.out.resolve():
            Path(target).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.out / RESULTS, Path(target, RESULTS))


def sources_hash() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.suffix in (".py", ".h", ".cpp", ".cuh", ".cu", ".toml"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def entry(path: Path, name: str) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """A file of the tar. A long log keeps its end."""
    content = path.read_bytes()
    if path.suffix == ".log":
        content = content[-MOST_BYTES:]
    found = tarfile.TarInfo(name)
    found.size = len(content)
    return found, io.BytesIO(content)
