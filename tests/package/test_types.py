"""Type checkers: a user's program passes `mypy --strict`, its mistakes do not, and the stub is the compiled module."""

import ast
import functools
import inspect
import os
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import specdec_ops
from specdec_ops import dlpack, published_trees
from specdec_ops._core import loader
from specdec_ops.compat import flashinfer, sgl_kernel, vllm
from tests.harness.public_names import PUBLIC

ROOT = Path(specdec_ops.__file__).parents[1]
PROGRAM = Path(__file__).with_name("typed_program.py")
COMPAT = (flashinfer, sgl_kernel, vllm)
ONLY_WITH_CUDA = r"cuda_device_error|zeroed_memory|\w+_cuda"


def defined_in(module):
    """The public functions and classes that a module itself defines."""
    return {name: t for name, t in vars(module).items() if not name.startswith("_") and is_of(t, module)}


def is_of(thing, module):
    return callable(thing) and getattr(thing, "__module__", None) == module.__name__


def test_the_program_passes():
    """Strictly: what it gets is what it says, and each marked line is an error. Slow without the cache in build/."""
    pytest.importorskip("mypy", reason="mypy is not installed; the extra dev has it")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary"]
    command += ["--cache-dir", str(ROOT / "build" / "mypy"), str(PROGRAM)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=PROGRAM.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_runs():
    runpy.run_path(str(PROGRAM), run_name="__main__")


def test_the_program_uses_everything():
    """Every public name, and every function of compat."""
    tree = ast.parse(PROGRAM.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(PUBLIC) <= used and any(node.module == "specdec_ops" for node in imports)
    for module in COMPAT:
        functions = {name for name, thing in defined_in(module).items() if inspect.isfunction(thing)}
        assert functions and functions <= used, module.__name__


# ---- annotations


def functions_of():
    """(name, function) of what is public: functions, and the methods and properties of classes that we wrote."""
    things = dict(PUBLIC)
    things["Run"] = typing.get_type_hints(specdec_ops.LayerCache.run)["return"]
    for module in (dlpack, published_trees, *COMPAT):
        things |= {f"{module.__name__}.{name}": thing for name, thing in defined_in(module).items()}
    for name, thing in things.items():
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            for member, value in vars(thing).items():
                value = value.fget if isinstance(value, property) else value
                value = value.func if isinstance(value, functools.cached_property) else value
                value = getattr(value, "__func__", value)
                written = inspect.isfunction(value) and value.__code__.co_filename == inspect.getsourcefile(thing)
                if written and (not member.startswith("_") or member == "__init__"):
                    yield f"{name}.{member}", value


FUNCTIONS = dict(functions_of())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    bare = [each for each, parameter in signature.parameters.items() if parameter.annotation is parameter.empty]
    assert not [each for each in bare if each not in ("self", "cls")]
    assert signature.return_annotation is not signature.empty


def test_methods_are_among_them():
    expected = {"LayerCache.attend", "LayerCache.__init__", "LayerCache.groups", "Tree.depths", "Topology.from_trees"}
    assert FUNCTIONS.keys() >= expected | {"specdec_ops.compat.vllm.rejection_sample", "backends", "tree_attention"}


@pytest.mark.parametrize("name", ["tree_attention", "Tree.paths"])
def test_overloads_are_in_step(name):
    """They differ from the function in return_lse, out and padded alone: whoever adds an option adds it there, too."""
    function = FUNCTIONS[name]
    parsed = ast.parse(Path(inspect.getsourcefile(function)).read_text())
    found = [node for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef) and node.name == function.__name__]
    *overloads, written = [
        {argument.arg: ast.unparse(argument.annotation or ast.Constant(None)) for argument in all_of(node.args)}
        for node in found
    ]
    assert len(overloads) == 2
    for overload in overloads:
        assert list(overload) == list(written)
        assert {each for each in written if overload[each] != written[each]} <= {"return_lse", "out", "padded"}


def all_of(arguments):
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


# ---- what is installed beside the code


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "specdec_ops" / "py.typed").read_text() == ""


def test_the_stub_is_the_compiled_module():
    """Every function of one is in the other, and those with names for their arguments have the same names."""
    module, reason = loader.load()
    assert module, reason
    stub = ast.parse((ROOT / "specdec_ops" / "_C.pyi").read_text())
    stubs = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    declared = {name for name in stubs if not name.startswith("_")}
    built = {name for name in dir(module) if not name.startswith("_")}
    assert not built - declared, "missing from the stub"
    has_cuda = hasattr(module, "cuda_device_error")
    absent = declared - built
    assert not absent if has_cuda else all(re.fullmatch(ONLY_WITH_CUDA, name) for name in absent), absent
    for name in built:
        shown = re.findall(r"(\w+): ", module.__dict__[name].__doc__.partition(") ->")[0])
        shown = [each for each in shown if not re.fullmatch(r"arg\d+", each)]
        assert not shown or shown == [argument.arg for argument in all_of(stubs[name].args)], name
    keys = [node.target.id for node in stubs["_BuildInfo"].body if isinstance(node, ast.AnnAssign)]
    assert keys == list(module.build_info())
