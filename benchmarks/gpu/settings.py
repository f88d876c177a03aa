"""What the driver knows of its machine, and what a step is."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.machine import ROOT

CACHES = ROOT / "build" / "gpu-caches"  # of Triton, Inductor and FlashInfer: large, and never copied
SLICE_SECONDS = 560.0
MOST_THREADS = 8  # of one process: what runs on the CPU is small


@dataclass
class Gpu:
    """The first device, as nvidia-smi describes it."""

    name: str
    capability: str  # such as 9.0
    count: int


@dataclass
class Step:
    """One command, or several that run at once.

    judge: reads the logs of commands that have ended: "" or what is wrong.
    resumable: the command itself goes on where it stopped, when it had no more time or its process died.
    still_there: whether what an earlier run has made exists.
    needed: what follows makes no sense where it fails.
    folder: where its commands run.
    """

    name: str
    commands: list[list[str]]
    seconds: float = SLICE_SECONDS
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[[list[str]], str] = lambda logs: ""
    resumable: bool = False
    still_there: Callable[[], bool] = lambda: True
    needed: bool = False
    folder: Path = ROOT


@dataclass
class Settings:
    python: str
    out: Path
    preset: str
    gpu: Gpu
    use_build: Path | None = None  # a build that was carried here
    against: Path | None = None  # another one, to compare with

    @property
    def site(self) -> Path:
        """Where wheels are installed: nothing of the machine's own Python is changed."""
        return CACHES / "site"

    def environment(self, processes: int = 1) -> dict[str, str]:
        """For each of several processes at once, which share the cores."""
        cores = len(os.sched_getaffinity(0))
        generation = self.gpu.capability.partition(".")[0]
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(max(1, min(cores // processes, MOST_THREADS))),
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
