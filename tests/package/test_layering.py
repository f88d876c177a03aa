"""Imports and includes go one way: from programs and systems over the public ops down to the kernels.

Families do not know each other, but for what is written down here.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = ("topology", "attention", "acceptance", "early_exit", "kv", "linear")

# What a file may import besides the standard library, by the longest key that starts its path: other packages, and
# what of specdec_ops (or of this repository), by the longest prefix. A folder may import itself.
OPS = ("specdec_ops.ops", "specdec_ops._core", "specdec_ops.status", "specdec_ops.topology", "specdec_ops.vocab_map")
PUBLIC = (*OPS, "specdec_ops.rope", "specdec_ops.tree", "specdec_ops.published_trees", "specdec_ops.layer_cache")
# The engine and its drafts know each other's interfaces, and below them what a user of the ops knows.
SYSTEMS = (*PUBLIC, "specdec_ops.decode", "specdec_ops.drafts")
MAY_IMPORT = {
    "specdec_ops/__init__.py": PUBLIC,
    "specdec_ops/__main__.py": ("torch", "specdec_ops", "specdec_ops._core"),
    "specdec_ops/tree.py": ("numpy", "specdec_ops.topology"),
    "specdec_ops/published_trees.py": ("numpy", "specdec_ops.tree"),
    "specdec_ops/topology.py": (
        "numpy",
        "torch",
        "specdec_ops._core",
        "specdec_ops.ops.topology",
        "specdec_ops.tree",
        "specdec_ops._tree_masks",
    ),
    "specdec_ops/_tree_masks.py": ("torch", "specdec_ops._core"),
    "specdec_ops/vocab_map.py": ("torch", "specdec_ops._core"),
    "specdec_ops/rope.py": ("numpy", "torch", "specdec_ops._core"),
    "specdec_ops/status.py": (),
    "specdec_ops/dlpack.py": ("numpy", "torch", *PUBLIC),
    "specdec_ops/_layer_checks.py": ("torch", "specdec_ops._core"),
    "specdec_ops/_layer_state.py": ("specdec_ops._core", "specdec_ops._layer_checks"),
    "specdec_ops/_layer_tables.py": ("torch", "specdec_ops._core", "specdec_ops.topology"),
    "specdec_ops/layer_cache.py": (
        *("torch", *OPS, "specdec_ops._layer_checks", "specdec_ops._layer_state", "specdec_ops._layer_tables"),
    ),
    "specdec_ops/_core/loader.py": ("specdec_ops._C",),
    "specdec_ops/_core/": ("numpy", "torch", "specdec_ops._core"),
    "specdec_ops/ops/reference_settings.py": ("torch",),
    "specdec_ops/ops/": ("numpy", "torch", "specdec_ops._core", "specdec_ops.status", "specdec_ops.topology"),
    "specdec_ops/ops/topology/": (
        *("torch", "specdec_ops._core", "specdec_ops.status", "specdec_ops.topology", "specdec_ops.vocab_map"),
    ),
    "specdec_ops/ops/acceptance/": (
        *("numpy", "torch", "specdec_ops._core", "specdec_ops.status", "specdec_ops.topology"),
        *("specdec_ops.vocab_map", "specdec_ops.ops.reference_settings"),
    ),
    "specdec_ops/ops/early_exit/": (
        *("numpy", "torch", "specdec_ops._core", "specdec_ops.status", "specdec_ops.ops.reference_settings"),
        *("specdec_ops.vocab_map", "specdec_ops.ops.linear"),
    ),
    "specdec_ops/ops/kv/": ("torch", "specdec_ops._core", "specdec_ops.rope", "specdec_ops.topology"),
    "specdec_ops/compat/": ("torch", "specdec_ops", *OPS),
    "specdec_ops/decode/": ("torch", "tqdm", *SYSTEMS),
    "specdec_ops/decode/__main__.py": ("specdec_ops.integrations.transformers", *SYSTEMS),
    "specdec_ops/drafts/": ("torch", *SYSTEMS),
    "specdec_ops/drafts/checkpoint.py": ("torch", "safetensors", *SYSTEMS),
    "specdec_ops/remote/": ("numpy", "torch", "msgpack", "specdec_ops.remote", *SYSTEMS),
    "specdec_ops/remote/server.py": ("specdec_ops.integrations.transformers", *SYSTEMS),
    "specdec_ops/remote/client.py": ("transformers", "specdec_ops.integrations.transformers", *SYSTEMS),
    "specdec_ops/train/": ("torch", *SYSTEMS),
    "specdec_ops/train/trainer.py": ("torch", "matplotlib", "specdec_ops.integrations.transformers", *SYSTEMS),
    "specdec_ops/integrations/__init__.py": (),
    "specdec_ops/integrations/transformers/": ("torch", "transformers", "gguf", *SYSTEMS),
    "triton_kernels/common/": ("torch", "triton"),
    "triton_kernels/linear/": ("torch", "triton", "specdec_ops.triton_kernels.common"),
    "triton_kernels/": (
        *("torch", "triton", "specdec_ops.triton_kernels.common", "specdec_ops.triton_kernels.linear"),
    ),
    "setup.py": ("setuptools", "ninja", "pybind11"),
}
# A definition may import nothing that runs kernels, and kernels nothing of the ops.
REFERENCE = ("torch", "specdec_ops.status", "specdec_ops.ops")

# The same for #include "...". Only bindings include a framework, which is pybind11, and only CUDA files a .cuh.
MAY_INCLUDE = {
    **{f"{family}/": (f"{family}/", "common/", "linear/") for family in FAMILIES},
    "bindings/": ("bindings/", "struct_fields/", "common/", *(f"{family}/" for family in FAMILIES)),
    "common/cuda/errors.cu": ("common/", "acceptance/cuda/launchers.h", "topology/cuda/build_topology.cuh"),
    "common/": ("common/",),
}
FRAMEWORKS = re.compile(r"#include\s*<(torch|ATen|c10|Python|pybind11|cutlass|cute)\b")


def rule_of(path, rules):
    return rules[max((key for key in rules if path.startswith(key)), key=len)]


def module_of(path):
    """The dotted name of a file, and whether it is a package."""
    name = path.removesuffix(".py")
    name = f"specdec_ops.{name}" if name.startswith("triton_kernels/") else name
    return name.removesuffix("/__init__").replace("/", "."), path.endswith("__init__.py")


def imports_of(path):
    """What a file imports, also inside of its functions: dotted names of this repository, else top-level packages."""
    name, is_package = module_of(path)
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from own_name(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}" if base else above
            for alias in node.names:
                yield from own_name(f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base)


def is_module(name):
    path = name.replace("specdec_ops.triton_kernels", "triton_kernels").replace(".", "/")
    return (ROOT / f"{path}.py").exists() or (ROOT / path).is_dir() or name == "specdec_ops._C"


def own_name(name):
    top = name.partition(".")[0]
    if top in ("specdec_ops", "benchmarks", "tests", "examples"):
        yield name
    elif top not in sys.stdlib_module_names:
        yield top


def files(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def within(name, allowed):
    """Whether a name is one of these, or lies in one of them (`specdec_ops` alone: its public names)."""
    return any(name == each or (each != "specdec_ops" and name.startswith(f"{each}.")) for each in allowed)


@pytest.mark.parametrize("path", files("setup.py", "specdec_ops/**/*.py", "triton_kernels/**/*.py"))
def test_python_imports_go_down(path):
    folder = module_of(path)[0].rpartition(".")[0]
    own = () if path.count("/") < 2 and not path.startswith("triton") else (folder,)
    allowed = REFERENCE if Path(path).name.startswith("reference") else rule_of(path, MAY_IMPORT)
    wrong = sorted(name for name in set(imports_of(path)) if not within(name, (*allowed, *own)))
    assert not wrong, f"{path} imports {wrong}, and may import {allowed}"


@pytest.mark.parametrize("path", files("specdec_ops/ops/**/reference*.py"))
def test_definitions_import_definitions_only(path):
    others = [name for name in imports_of(path) if name.startswith("specdec_ops.ops.")]
    wrong = [name for name in others if not name.rpartition(".")[2].startswith(("reference", "contract"))]
    assert not wrong, f"{path} imports {wrong}"


def test_families_of_ops_do_not_import_each_other():
    for path in files("specdec_ops/ops/*/*.py", "triton_kernels/*/*.py"):
        own = path.split("/")[-2]
        for name in imports_of(path):
            others = [part for part in name.split(".")[2:3] if part in FAMILIES and part not in (own, "linear")]
            assert not others, f"{path} imports {name}"


def test_tree_needs_no_torch_to_be_imported():
    """tree.py may import topology.py, but only for the one method that makes device tensors."""
    module = ast.parse((ROOT / "specdec_ops/tree.py").read_text())
    imported = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imported if isinstance(node, ast.ImportFrom) and node.level]


# What the folders of benchmarks/ may import of benchmarks/, besides themselves. The programs at its top, and the
# registry of ops, know them all. Another folder is a mistake.
BENCHMARKS_MAY_IMPORT = {
    "harness": (),
    "decode": ("harness",),
    "gpu": ("harness",),
    **dict.fromkeys(FAMILIES, ("harness", "decode")),
}


@pytest.mark.parametrize("path", files("benchmarks/**/*.py", "examples/**/*.py"))
def test_programs_use_the_public_interface_only(path):
    names = list(imports_of(path))
    if path.startswith("examples/"):
        private = [name for name in names if "._" in name or name.startswith("specdec_ops.ops")]
        assert not private, f"{path} imports {private}"
    assert not [name for name in names if name.startswith(("specdec_ops.triton_kernels", "tests"))], path
    other = "benchmarks" if path.startswith("examples/") else "examples"
    assert not [name for name in names if within(name, (other,))], f"{path} imports {other}"


@pytest.mark.parametrize("path", files("benchmarks/*/**/*.py"))
def test_programs_of_a_family_of_benchmarks_know_no_other(path):
    folder = path.split("/")[1]
    allowed = [f"benchmarks.{name}" for name in (folder, *BENCHMARKS_MAY_IMPORT[folder])]
    wrong = [name for name in imports_of(path) if name.startswith("benchmarks") and not within(name, allowed)]
    assert not wrong, f"{path} imports {wrong}, and may import {allowed}"


def test_no_circle_among_modules():
    """Also of imports inside of functions, but for the one that tree.py has."""
    graph = {}
    for path in files("specdec_ops/**/*.py", "triton_kernels/**/*.py", "benchmarks/**/*.py"):
        name = module_of(path)[0]
        graph[name] = set(imports_of(path)) - {name, "specdec_ops"}
    graph["specdec_ops.tree"] -= {"specdec_ops.topology"}
    circle = circle_in(graph)
    assert not circle, " -> ".join(circle)


def circle_in(graph):
    """The names along a circle of a graph {name: names}, or an empty list."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", files("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cuh", "csrc/**/*.cu"))
def test_includes_go_down(path):
    text = (ROOT / path).read_text()
    path = path.removeprefix("csrc/")
    allowed = rule_of(path, MAY_INCLUDE)
    included = re.findall(r'#include\s*"([^"]+)"', text)
    wrong = [name for name in included if not any(name.startswith(start) for start in allowed)]
    assert not wrong, f"{path} includes {wrong}, and may include {allowed}"
    if not path.startswith("bindings/"):  # a CPU kernel includes nothing of CUDA, and the other way round
        other = "/cuda/" if "/cpu/" in path else "/cpu/" if "/cuda/" in path else "//"
        assert not [name for name in included if other in name], path
        if "/cpu/" not in path and "/cuda/" not in path:  # what both share knows neither
            assert not [name for name in included if "/cpu/" in name or "/cuda/" in name], path
    cuda = "/cuda/" in path
    device = [] if cuda else [name for name in included if name.endswith(".cuh")]
    assert not device, f"{path} includes {device}, which only CUDA files may"
    frameworks = set(FRAMEWORKS.findall(text)) - ({"pybind11"} if path.startswith("bindings/") else set())
    assert not frameworks, f"{path} includes {frameworks}"


@pytest.mark.parametrize("path", files("csrc/**/*.cuh"))
def test_kernels_use_the_names_of_device_cuh(path):
    if path.endswith("/device.cuh"):
        return
    code = re.sub(r"//.*", "", (ROOT / path).read_text())
    raw = re.findall(r"<<<|__shared__|\b__(?!global__|device__|host__|launch_bounds__|forceinline__|align__)\w+", code)
    assert not raw, f"{path} uses {raw} instead of a name of device.cuh"


def test_triton_kernels_is_no_package_of_its_own():
    assert not list((ROOT / "triton_kernels").rglob("__init__.py"))


@pytest.mark.parametrize("folder", ["specdec_ops", "triton_kernels"])
def test_variadic_arguments_are_not_read_by_place(folder):
    """`def f(*arguments)` that reads arguments[7] breaks silently when a signature changes: bind them by name."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                or not function.args.vararg
            ):
                continue
            name = function.args.vararg.arg
            reads = (node for node in ast.walk(function) if isinstance(node, ast.Subscript))
            reads = (node for node in reads if isinstance(node.value, ast.Name) and node.value.id == name)
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}" for node in reads if not isinstance(node.slice, ast.Slice)
            ]
    assert not found
