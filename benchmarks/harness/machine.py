"""What a measurement was taken on: processor, versions, commit and date. No path of the machine is recorded."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def native():
    """The compiled module, or None where it isn't built: contestants and helpers that need it are then left out."""
    try:
        from specdec_ops import _C
    except ImportError:
        return None
    return _C


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def cache_bytes(level: int) -> int:
    """Size of the unified or data cache of that level seen by core 0; 0 when unknown."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_text()) != level or (index / "type").read_text().strip() == "Instruction":
                continue
            number, unit = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip()).groups()
            return int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]
        except (OSError, ValueError, AttributeError):
            continue
    return 0


def available_bytes() -> int:
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1)) * 1024 if match else 1 << 62


def commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command_line(arguments: list[str]) -> str:
    """The command as typed, with the folders of path arguments left out."""
    shown = [Path(argument).name if "/" in argument else argument for argument in arguments]
    return "python -m benchmarks.run" + "".join(" " + shlex.quote(argument) for argument in shown)


def cpu_isa() -> str:
    """What specdec_ops' CPU kernels run with; also PyTorch's level, where that is held to one or they aren't built.

    PyTorch is held by ATEN_CPU_CAPABILITY, its libraries by ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS.
    """
    import torch

    module, of_torch = native(), f"torch: {torch.backends.cpu.get_cpu_capability()}"
    held = [f"{name}={os.environ[name]}" for name in TORCH_LIMITS if os.environ.get(name)]
    if module is None:
        return " ".join([of_torch, *held])
    return " ".join([f"{module.cpu_isa()}, {of_torch}", *held]) if held else module.cpu_isa()


def describe(device: str, arguments: list[str]) -> dict[str, str]:
    """The columns that are the same on every line of one run."""
    import torch

    import specdec_ops

    if device == "cuda":
        name, isa = torch.cuda.get_device_name(), "sm_{}{}".format(*torch.cuda.get_device_capability())
    else:
        name, isa = cpu_model(), cpu_isa()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": name,
        "isa": isa,
        "threads": str(torch.get_num_threads()),
        "specdec_ops": specdec_ops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": command_line(arguments if arguments is not None else sys.argv[1:]),
    }
