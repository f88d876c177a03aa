"""A compiled module that was built on another machine, and is carried to the one with the GPU.

    python -m benchmarks.gpu.carried keep FOLDER    here: compile what has changed, and put the module into FOLDER
    python -m benchmarks.gpu.carried use FOLDER     there: put it in its place, if it fits
    python -m benchmarks.gpu.carried copy FOLDER TO there: put it into a copy of our Python, to compare the two
    python -m benchmarks.gpu.carried compile        compile in place, with any setuptools or none

It fits if that Python loads modules with its tag, and if it was compiled from the sources that lie there.
"""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

from benchmarks.harness.machine import ROOT

COMPILED = ("csrc", "setup.py")
COPIED = ("specdec_ops", "triton_kernels", "benchmarks", "tests")  # what a run with another build needs
SUFFIXES = (".h", ".cpp", ".cuh", ".cu", ".py")


def compiled_sources() -> str:
    """A hash of what the module is made of."""
    digest = hashlib.sha256()
    for name in COMPILED:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in SUFFIXES:
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def tag() -> str:
    """The ending of the modules that this Python loads, such as .cpython-312-x86_64-linux-gnu.so."""
    return sysconfig.get_config_var("EXT_SUFFIX")


def modules() -> list[Path]:
    """Those in their place, of whatever Python."""
    return sorted((ROOT / "specdec_ops").glob("_C*.so"))


def compile_here() -> None:
    """What `python setup.py build_ext --inplace` does, without setuptools, whose older versions can't read our
    pyproject.toml.
    """
    sys.modules["setuptools"] = sys.modules["setuptools.command.build_ext"] = _StandIn()
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "specdec_ops" / "__init__.py").read_text(), re.MULTILINE)[1]
    build = runpy.run_path(str(ROOT / "setup.py"))["Build"]
    target = ROOT / "specdec_ops" / f"_C{tag()}"
    build(version, target).run(target)


class _StandIn:
    """Of setuptools: setup.py derives from one of its classes, and calls nothing of it when it is not the program."""

    build_ext = object


def keep(folder: Path) -> None:
    """Compile what has changed, and put the module and what it was made of into a folder."""
    compile_here()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"_C{tag()}"
    shutil.copyfile(ROOT / "specdec_ops" / name, folder / name)
    (folder / "build.json").write_text(json.dumps({"tag": tag(), "sources": compiled_sources()}) + "\n")


def why_unfit(folder: Path, same_sources: bool = True) -> str:
    """Why the module of a folder can't be used here, or an empty string."""
    try:
        built = json.loads((folder / "build.json").read_text())
    except (OSError, ValueError):
        return f"{folder.name} has no build.json: make it with `python -m benchmarks.gpu.carried keep`"
    if built["tag"] != tag():
        return f"{folder.name} was built for another Python: {built['tag']}, this one loads {tag()}"
    if same_sources and built["sources"] != compiled_sources():
        return f"{folder.name} was compiled from other sources: {built['sources']}, these are {compiled_sources()}"
    return "" if (folder / f"_C{tag()}").is_file() else f"{folder.name} has no _C{tag()}"


def use(folder: Path) -> None:
    """Put the module of a folder in its place."""
    if reason := why_unfit(folder):
        raise SystemExit(f"--use-build: {reason}")
    target = ROOT / "specdec_ops" / f"_C{tag()}"
    shutil.copyfile(folder / target.name, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


def copy(folder: Path, to: Path) -> None:
    """Our Python beside the module of another build, which may be of other sources: that is what is compared."""
    if reason := why_unfit(folder, same_sources=False):
        raise SystemExit(f"--against: {reason}")
    for name in COPIED:
        ignored = shutil.ignore_patterns("_C*", "__pycache__", "results", "checkpoints")
        shutil.copytree(ROOT / name, to / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copyfile(folder / f"_C{tag()}", to / "specdec_ops" / f"_C{tag()}")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["compile"]:
        compile_here()
    elif len(arguments) == 2 and arguments[0] in ("keep", "use"):
        {"keep": keep, "use": use}[arguments[0]](Path(arguments[1]))
    elif len(arguments) == 3 and arguments[0] == "copy":
        copy(*map(Path, arguments[1:]))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
