"""docs/add_an_op.md is true: a copy of this checkout that follows it has the op, on every backend that needs no GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specdec_ops._core import loader
from tests.harness import walk_through

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OPTION = "Add an option to an op"
pytest.importorskip("pybind11", reason="building needs pybind11")
pytest.importorskip("triton", reason="the page's op runs on Triton's interpreter, too")
TARGETS = ("cpu-on-cpu", "torch-on-cpu", "triton-on-cpu", "cuda-emulated-on-cpu")
# Objects of this checkout are taken over, so that only what differs is compiled. These are made by other tests.
NOT_COPIED = ("lib*", "bdist*", "triton", "mypy", "docs", "address", "thread", "*.so")


@pytest.fixture(scope="module")
def steps():
    return walk_through.steps(walk_through.DOCUMENT.read_text())


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What is built and tested of this checkout, with its objects."""
    folder = tmp_path_factory.mktemp("add_an_op")
    for name in ("csrc", "specdec_ops", "tests", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", ".clang-format", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    if (ROOT / "build").is_dir():
        shutil.copytree(ROOT / "build", folder / "build", ignore=shutil.ignore_patterns(*NOT_COPIED))
    return folder


def as_built_here():
    """How to build the copy: with CUDA kernels if this checkout's objects have them, for which its bindings differ."""
    module, _ = loader.load()
    if module and module.build_info()["cuda"] and list((ROOT / "build").glob("*/csrc/bindings/*.cuda.o")):
        return {"SPECDEC_OPS_BUILD": "auto", "TORCH_CUDA_ARCH_LIST": module.build_info()["archs"]}
    return {"SPECDEC_OPS_BUILD": "cpu"}


def run(*command, cwd, **environment):
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def follow(steps, folder):
    """Apply the steps and build. Return the sources that were compiled."""
    for step in steps:
        walk_through.apply(step, folder)
    printed = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder, **as_built_here())
    return set(re.findall(r"^\[\d+/\d+\] (?:cxx|nvcc) build/[^/]+/(\S+?)(?:\.cuda)?\.o$", printed, re.MULTILINE))


def passed(folder):
    """Run the op's own tests, and whether contract and struct agree: {target: how many tests have passed}."""
    contracts = "tests/package/test_contracts.py"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/scaling"]
    printed = run(*command, contracts, "-k", "scale_rows", cwd=folder)
    assert re.search(rf"^{contracts}::test_every_field_is_used\[scale_rows\] PASSED", printed, re.MULTILINE)
    assert " skipped" not in printed.splitlines()[-1], printed
    return {target: len(re.findall(rf"\[.*{target}.*\] PASSED", printed)) for target in TARGETS}


def without_option(steps):
    return [step for step in steps if step.section != OPTION]


@pytest.fixture(scope="module")
def with_op(steps, copy):
    """The copy with the op, and what that has compiled."""
    return copy, follow([step for step in steps if step.section != OPTION], copy)


@pytest.fixture(scope="module")
def tested(with_op):
    """How many of the op's tests have passed before it has an option."""
    return passed(with_op[0])


@pytest.fixture(scope="module")
def with_option(with_op, tested, steps):
    """The same with the option."""
    return with_op[0], follow([step for step in steps if step.section == OPTION], with_op[0])


def test_the_op_works_on_every_backend(tested):
    assert len(set(tested.values())) == 1 and tested["cpu-on-cpu"] > 15, tested


def test_an_option_is_a_field_in_each_of_the_two(with_option, tested):
    """Of the bindings only those of the family are compiled for it."""
    folder, compiled = with_option
    assert "csrc/bindings/scaling.cpp" in compiled
    assert all(path.startswith("csrc/scaling/") for path in compiled - {"csrc/bindings/scaling.cpp"}), compiled
    again = passed(folder)
    assert {target: count - tested[target] for target, count in again.items()} == dict.fromkeys(TARGETS, 3)


def test_of_what_there_was_only_the_list_of_families_is_compiled(with_op):
    """The files that say what was built may be, too: for another reason the copy may have no CUDA kernels."""
    others = {path for path in with_op[1] if "/scaling" not in path}
    of_the_build = {"csrc/common/cpu/build_info.cpp", "csrc/common/cuda/errors.cu"}
    assert others - of_the_build == {"csrc/bindings/module.cpp"}, "others of a checkout that is built up to date?"


def test_what_comes_out_is_in_the_style_of_the_house(with_option, steps):
    folder, _ = with_option
    tools = Path(sys.executable).parent
    if not (tools / "ruff").exists() or not (tools / "clang-format").exists():
        pytest.skip("ruff and clang-format are not installed beside this Python")
    paths = sorted({step.path for step in steps})
    python = [path for path in paths if path.endswith((".py", ".pyi"))]
    run(str(tools / "ruff"), "check", *python, cwd=folder)
    run(str(tools / "ruff"), "format", "--check", *python, cwd=folder)
    compiled = [path for path in paths if path.startswith("csrc/") or path.endswith(".cpp")]
    run(str(tools / "clang-format"), "--dry-run", "-Werror", *compiled, cwd=folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = 1\n```", ":1: nothing says where this code block goes"),
        ("New file `x.py`:\n\nThen:\n\n```python\n```", ":3: a code block must follow the line before it"),
        ("New file `x.py`:\n\n```sh\n```", ":3: a block that goes into a file must name its language"),
        ("New file `there.py`:\n\n```python\n```", ":4: there.py exists already"),
        ("At the end of `x.py`:\n\n```python\n```", ":4: x.py does not exist"),
        ("In `there.py`, after `z = 3`:\n\n```python\n```", ":4: there.py has 0 lines `z = 3`, and must have one"),
        ("In `there.py`, before `x = 1`:\n\n```python\n```", ":4: there.py has 2 lines `x = 1`, and must have one"),
    ],
)
def test_a_step_that_does_not_fit_is_named_by_its_line(text, message, tmp_path):
    (tmp_path / "there.py").write_text("x = 1\ny = 2\nx = 1\n")
    with pytest.raises(walk_through.WalkThroughError) as raised:
        for step in walk_through.steps(text):
            walk_through.apply(step, tmp_path)
    assert str(raised.value) == f"docs/add_an_op.md{message}"


@pytest.mark.parametrize(
    ("where", "result"),
    [
        ("In `there.py`, after `y = 2`:", "x = 1\n  y = 2\nnew\nz = 3\n"),
        ("In `there.py`, before `y = 2`:", "x = 1\nnew\n  y = 2\nz = 3\n"),
        ("In `there.py`, in place of `y = 2`:", "x = 1\nnew\nz = 3\n"),
        ("At the end of `there.py`:", "x = 1\n  y = 2\nz = 3\nnew\n"),
    ],
)
def test_a_step_goes_where_it_says(where, result, tmp_path):
    (tmp_path / "there.py").write_text("x = 1\n  y = 2\nz = 3\n")
    (step,) = walk_through.steps(f"{where}\n\n```python\nnew\n```")
    walk_through.apply(step, tmp_path)
    assert (tmp_path / "there.py").read_text() == result
