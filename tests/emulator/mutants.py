"""Kernels with a line changed, to show that the tests would see it."""

import hashlib
import shutil
import subprocess

from . import build, kernels


def replay(launch, sanitizer, file, old, new):
    """kernels.replay of an op whose sources have `new` for `old` in a file of csrc."""
    text = (build.ROOT / "csrc" / file).read_text()
    assert old in text, f"{file} no longer has {old!r}"
    right = build.made(f"{sanitizer}/{launch.op}")  # compiles the emulator's objects, and shows that linking works
    name = hashlib.sha256(f"{sanitizer} {file} {old} {new}".encode()).hexdigest()[:12]
    folder = build.ROOT / build.OUTPUT / "mutants" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(build.ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    (folder / "csrc" / file).write_text(text.replace(old, new))
    flags = [flag.replace("-O2", "-O1") for flag in build.FLAGS if flag != "-Icsrc"]
    flags += [f"-I{folder}/csrc", *build.SANITIZERS[sanitizer]]
    compiled = []
    for kernel in build.kernels_of(launch.op):
        compiled.append(str(folder / f"{kernel}.o"))
        source = ["-x", "c++", "-c", str(folder / "csrc/cuda" / f"{kernel}.cu"), "-o", compiled[-1]]
        subprocess.run([*build.compiler(), *flags, *source], cwd=build.ROOT, check=True)
    objects = [f"{build.OUTPUT}/{sanitizer}/{part}.o" for part in (*build.EMULATOR, f"{launch.op}_entry", "replay")]
    link = [*build.compiler(), *objects, *compiled, "-o", str(folder / "replay"), *build.EMULATOR_FLAGS[sanitizer]]
    subprocess.run([*link, *build.SANITIZERS[sanitizer]], cwd=build.ROOT, check=True)
    assert right
    return kernels.replay(launch, sanitizer, program=str(folder / "replay"))
