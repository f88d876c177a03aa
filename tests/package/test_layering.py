"""Imports and includes go one way: from the public ops down to the kernels."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = [
    ".bound_head",
    ".build_topology",
    ".early_exit",
    ".exit_confidence",
    ".exit_mlp",
    ".kv_propagate",
    ".merge_states",
    ".quantize_head",
    ".sample_children",
    ".sample_tokens",
    ".tree_accept",
    ".tree_attention",
]
OPS = ["tree", "published_trees", "topology", "tree_attention", "vocab_map", "accept", "accept_lossy", "sampling"]
OPS += ["early_exit", "quantized_head", "head_bounds", "draft_stop", "layer_cache", "kv", "status"]
PLUMBING = ["_checks", "_accept_checks", "_alloc", "_library", "_library_accept", "_library_exit", "_library_kv"]
PLUMBING += ["_dispatch", "_shield"]
ACCEPT_KERNELS = [".accept_kernels", ".accept_traversal_kernel", ".accept_lossy_kernels"]

# What a file may import besides the standard library, by the longest key that starts its path. Names without a dot in
# front are other packages; `.name` is specdec_ops.name.
MAY_IMPORT = {
    "specdec_ops/__init__.py": ["._dispatch", *(f".{op}" for op in OPS)],
    "specdec_ops/__main__.py": ["torch", "._dispatch", "._loader", ".__version__", ".Tree", *PUBLIC],
    "specdec_ops/tree.py": ["numpy", ".topology"],
    "specdec_ops/published_trees.py": ["numpy", ".tree"],
    "specdec_ops/dlpack.py": ["numpy", "torch", *(f".{name}" for name in [*OPS, *PLUMBING])],
    "specdec_ops/_core/loader.py": ["._C"],
    "specdec_ops/ops/acceptance/native.py": ["torch", "._native", "._alloc"],
    "specdec_ops/ops/early_exit/native.py": ["torch", "._native", "._alloc"],
    "specdec_ops/ops/kv/native.py": ["torch", "._native"],
    "specdec_ops/_core/native.py": ["torch", "._alloc", "._loader"],
    "specdec_ops/_core/alloc.py": ["torch"],
    "specdec_ops/_core/checks.py": ["numpy", "torch"],
    "specdec_ops/ops/acceptance/checks.py": ["torch", "._checks", ".topology", ".vocab_map"],
    "specdec_ops/_core/dispatch.py": ["torch", "._loader", "._checks", "._shield"],
    "specdec_ops/_core/shield.py": ["torch"],
    "specdec_ops/_core/library.py": ["torch", "._dispatch", "._alloc", "._checks"],
    "specdec_ops/compat/": ["torch", ".", "._checks", "._accept_checks", "._chains", "._links", ".reference"],
    "specdec_ops/status.py": [],
    "specdec_ops/ops/acceptance/reference_accept.py": ["torch", ".status", ".noise", ".sample", ".accept_rules"],
    "specdec_ops/ops/acceptance/reference_rules.py": ["torch", ".status", ".noise"],
    "specdec_ops/ops/acceptance/reference_sample.py": ["torch", ".status", ".noise", ".settings"],
    "specdec_ops/ops/early_exit/reference_exit_confidence.py": ["torch", ".status", ".settings"],
    "specdec_ops/_layer_checks.py": ["torch", "._checks"],
    "specdec_ops/_layer_state.py": ["._checks", "._layer_checks"],
    "specdec_ops/layer_cache.py": [
        *("torch", "._alloc", "._checks", "._layer_checks", "._layer_state", ".topology", ".tree_attention"),
    ],
    "specdec_ops/ops/early_exit/library.py": ["torch", "._library", "._dispatch", "._alloc"],
    "specdec_ops/ops/kv/library.py": ["torch", "._library", "._dispatch"],
    "specdec_ops/ops/acceptance/library.py": ["torch", "._library", "._dispatch", "._alloc"],
    "specdec_ops/ops/early_exit/reference_screened_exit.py": [".exit_confidence"],
    "specdec_ops/ops/early_exit/reference_bounded_exit.py": ["torch", ".status", ".exit_confidence"],
    "specdec_ops/reference/": ["torch", ".status", *(f".{name}" for name in ("noise", "sample", "accept_rules"))],
    "specdec_ops/": ["numpy", "torch", *(f".{name}" for name in [*OPS, *PLUMBING])],
    "triton_kernels/attention/tree_attention.py": ["torch", "triton", ".tree_attention_kernels"],
    "triton_kernels/attention/tree_attention_kernels.py": ["triton", ".tree_attention_sums"],
    "triton_kernels/common/token_rows.py": ["triton", ".noise"],
    "triton_kernels/acceptance/sample_kernels.py": ["triton", ".noise", ".rows"],
    "triton_kernels/acceptance/sample.py": ["torch", "triton", ".sample_kernels"],
    "triton_kernels/early_exit/exit_kernels.py": ["triton", ".rows"],
    "triton_kernels/early_exit/screen_stats.py": ["triton"],
    "triton_kernels/early_exit/screen_answer.py": ["triton", ".exit_kernels", ".rows", ".screen_figures"],
    "triton_kernels/early_exit/screen_kernels.py": [
        "triton",
        ".exit_kernels",
        ".rows",
        ".screen_answer",
        ".screen_figures",
    ],
    "triton_kernels/early_exit/screened_exit.py": [
        *("torch", "triton", ".exit_confidence", ".exit_kernels", ".sample", ".screen_figures", ".screen_kernels"),
    ],
    "triton_kernels/early_exit/bounded_kernels.py": ["triton", ".exit_kernels", ".rows"],
    "triton_kernels/early_exit/bounded_exit.py": [
        *("torch", "triton", ".bounded_kernels", ".exit_confidence", ".exit_kernels", ".sample"),
    ],
    "triton_kernels/early_exit/exit_mlp.py": ["torch", "triton", ".exit_kernels", ".sample"],
    "triton_kernels/kv/kv_propagate.py": ["torch", "triton", ".exit_kernels", ".sample"],
    "triton_kernels/early_exit/exit_confidence.py": ["torch", "triton", ".exit_kernels", ".sample"],
    "triton_kernels/acceptance/accept_state.py": ["triton", ".noise", ".rows"],
    "triton_kernels/acceptance/accept.py": ["torch", ".sample", ".accept_state", *ACCEPT_KERNELS],
    **{
        f"triton_kernels/{name[1:]}.py": ["triton", ".noise", ".rows", ".accept_state", ".accept_kernels"]
        for name in ACCEPT_KERNELS
    },
    "triton_kernels/": ["torch", "triton"],
    "setup.py": ["setuptools", "ninja", "pybind11"],
}

# The same for #include "...": what starts the included path. Only bindings include a framework, which is pybind11, and
# only CUDA files include a .cuh.
MAY_INCLUDE = {
    "bindings": ["bindings/bind.h", "cpu/", "cuda/launchers.h", "specdec/"],
    "specdec/params.h": [],
    "common/cuda/device.cuh": [],
    "specdec/": ["specdec/"],
    "cpu/": ["cpu/", "specdec/"],
    "cuda/launchers.h": ["specdec/"],
    "cuda/": ["cuda/launchers.h", "specdec/"],
}
FRAMEWORKS = re.compile(r"#include\s*<(torch|ATen|c10|Python|pybind11|cutlass|cute)\b")


def rule_of(path, rules):
    return rules[max((key for key in rules if path.startswith(key)), key=len)]


def imports_of(path):
    """What a file imports, also inside of its functions, in the notation of MAY_IMPORT."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from own_name(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path}: imports go through one package, not up two"
            yield from [f".{node.module}"] if node.module else [f".{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield from own_name(node.module)


def own_name(name):
    top, _, rest = name.partition(".")
    if top == "specdec_ops":
        yield f".{rest.partition('.')[0]}" if rest else "."
    elif top not in sys.stdlib_module_names:
        yield top


def files(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", files("setup.py", "specdec_ops/**/*.py", "triton_kernels/*.py"))
def test_python_imports_go_down(path):
    allowed = rule_of(path, MAY_IMPORT)
    wrong = sorted(set(imports_of(path)) - set(allowed))
    assert not wrong, f"{path} imports {wrong}, and may import {allowed}"


def test_tree_needs_no_torch_to_be_imported():
    """tree.py may import topology.py, but only for the one method that makes device tensors."""
    module = ast.parse((ROOT / "specdec_ops/tree.py").read_text())
    imported = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imported if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("path", files("benchmarks/*.py", "examples/*.py"))
def test_examples_use_the_public_interface_only(path):
    if path.startswith("examples/"):
        private = [name for name in imports_of(path) if name.startswith("._")]
        assert not private, f"{path} imports {private}"
    assert "triton_kernels" not in list(imports_of(path))


@pytest.mark.parametrize("path", files("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cuh", "csrc/**/*.cu"))
def test_includes_go_down(path):
    text = (ROOT / path).read_text()
    path = path.removeprefix("csrc/")
    allowed = rule_of(path, MAY_INCLUDE)
    included = re.findall(r'#include\s*"([^"]+)"', text)
    wrong = [name for name in included if not any(name.startswith(start) for start in allowed)]
    assert not wrong, f"{path} includes {wrong}, and may include {allowed}"
    cuda = path.startswith("cuda/") or path.endswith(".cuh")
    device = [] if cuda else [name for name in included if name.endswith(".cuh")]
    assert not device, f"{path} includes {device}, which only CUDA files may"
    frameworks = set(FRAMEWORKS.findall(text)) - ({"pybind11"} if path.startswith("bindings") else set())
    assert not frameworks, f"{path} includes {frameworks}"


@pytest.mark.parametrize("path", files("csrc/specdec/*.cuh"))
def test_kernels_use_the_names_of_device_cuh(path):
    if path.endswith("device.cuh"):
        return
    code = re.sub(r"//.*", "", (ROOT / path).read_text())
    raw = re.findall(r"<<<|__shared__|\b__(?!global__|device__|host__|launch_bounds__|forceinline__|align__)\w+", code)
    assert not raw, f"{path} uses {raw} instead of a name of device.cuh"


def test_triton_kernels_is_no_package_of_its_own():
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()
