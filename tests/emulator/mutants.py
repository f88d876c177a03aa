"""Kernels with a line changed, to show that the tests would see it."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from . import build, kernels


def replay(launch, sanitizer, file, old, new, only=None):
    """kernels.replay of an op whose sources have `new` for `old` in a file of csrc, given by path or name.

    only: the one file of the op's kernels, without its ending, that is compiled with the change; else all are.
    """
    (path,) = (build.ROOT / "csrc").glob(f"**/{file}")
    text = path.read_text()
    assert old in text, f"{file} no longer has {old!r}"
    build.made(f"{sanitizer}/{launch.op}")  # compiles the emulator's objects, and shows that linking works
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(build.ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu", "bindings"))
        (folder / path.relative_to(build.ROOT)).write_text(text.replace(old, new))
        flags = [flag for flag in build.FLAGS if flag != "-Icsrc"]
        flags += [f"-I{folder}/csrc", *build.SANITIZERS[sanitizer]]
        compiled = []
        for kernel in [only] if only else build.kernels_of(launch.op):
            compiled.append(str(folder / f"{kernel}.o"))
            source = ["-x", "c++", "-c", str(folder / build.source_of(kernel)), "-o", compiled[-1]]
            subprocess.run([*build.compiler(), *flags, *source], cwd=build.ROOT, check=True)
        others = [kernel for kernel in build.kernels_of(launch.op) if only not in (None, kernel)]
        parts = (*build.EMULATOR, f"{launch.op}_entry", "replay", *others)
        objects = [f"{build.OUTPUT}/{sanitizer}/{part}.o" for part in parts]
        link = [
            *build.compiler(),
            *compiled,
            *objects,  # of functions in several of them the first one counts
            "-o",
            str(folder / "replay"),
            *build.EMULATOR_FLAGS[sanitizer],
        ]
        subprocess.run([*link, *build.SANITIZERS[sanitizer]], cwd=build.ROOT, check=True)
        return kernels.replay(launch, sanitizer, program=str(folder / "replay"))
