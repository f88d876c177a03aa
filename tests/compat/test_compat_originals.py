"""The drop-in forms against the originals: signatures as pinned here and as installed, and SGLang's own functions.

The originals are no dependencies. Where one can be found (installed, or a folder of its source on PYTHONPATH) it is
read, not imported: their imports want much more than their signatures.
"""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from specdec_ops import Tree, build_topology
from specdec_ops.compat import flashinfer, sgl_kernel, vllm
from tests.compat.compat_cases import eagle_trees


class Original(NamedTuple):
    """A function of another project, as of a version."""

    ours: object
    version: str
    """As our docstrings have it."""
    sources: tuple[str, ...]
    """Files that define it, from the folder that packages lie in."""
    parameters: str
    looser: frozenset[str] = frozenset()
    """Parameters that need not be given to ours."""


_TREE = "retrive_index, retrive_next_token, retrive_next_sibling"
ORIGINALS = {
    "chain_speculative_sampling": Original(
        flashinfer.chain_speculative_sampling,
        "flashinfer-python 0.7.4",
        ("flashinfer/sampling.py",),
        "draft_probs, draft_token_ids, target_probs, maybe_output_accepted_token_num=None,"
        "maybe_output_emitted_draft_token_num=None, deterministic=True, generator=None, seed=None, offset=None",
    ),
    "rejection_sample": Original(
        vllm.rejection_sample,
        "vLLM 0.32.0",
        ("vllm/v1/sample/rejection_sampler.py",),
        "draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits,"
        "bonus_token_ids, sampling_metadata, synthetic_mode=False, synthetic_conditional_rates=None,"
        "use_fp64_gumbel=False",
    ),
    "tree_speculative_sampling_target_only": Original(
        sgl_kernel.tree_speculative_sampling_target_only,
        "sgl-kernel 0.3.21",
        ("sgl_kernel/speculative.py", "sglang/kernels/ops/speculative/sampling.py"),
        f"predicts, accept_index, accept_token_num, candidates, {_TREE}, uniform_samples,"
        "uniform_samples_for_final_sampling, target_probs, draft_probs, threshold_single=1.0, threshold_acc=1.0,"
        "deterministic=True",
        frozenset({"draft_probs"}),
    ),
    "verify_tree_greedy": Original(
        sgl_kernel.verify_tree_greedy,
        "sgl-kernel 0.3.21",
        ("sgl_kernel/speculative.py", "sglang/kernels/ops/speculative/tree.py"),
        f"predicts, accept_index, accept_token_num, candidates, {_TREE}, target_predict",
    ),
    "build_tree_kernel_efficient": Original(
        sgl_kernel.build_tree_kernel_efficient,
        "sgl-kernel 0.3.21",
        ("sgl_kernel/speculative.py", "sglang/kernels/ops/speculative/tree.py"),
        f"parent_list, selected_index, verified_seq_len, tree_mask, positions, {_TREE}, topk, depth, draft_token_num,"
        "tree_mask_mode",
        frozenset({"tree_mask_mode"}),
    ),
}


def parameters_of(node: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names and defaults, None for none. What can only be given by name, or in any number, would be new."""
    arguments = node.args
    assert not (arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg)
    required = len(arguments.args) - len(arguments.defaults)
    defaults = [None] * required + [ast.unparse(default) for default in arguments.defaults]
    return [(argument.arg, default) for argument, default in zip(arguments.args, defaults, strict=True)]


def pinned(original: Original) -> list[tuple[str, str | None]]:
    return parameters_of(ast.parse(f"def f({original.parameters}): pass").body[0])


def find(source: str) -> Path | None:
    """A file of another package, without importing the package."""
    package, _, inside = source.partition("/")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / inside).is_file()), None)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_signature_is_the_pinned_one(name):
    original = ORIGINALS[name]
    for parameter, (wanted, default) in zip(
        inspect.signature(original.ours).parameters.values(), pinned(original), strict=True
    ):
        assert parameter.name == wanted and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if wanted not in original.looser:
            assert (None if parameter.default is parameter.empty else repr(parameter.default)) == default
        else:
            assert default is None and parameter.default is not parameter.empty


@pytest.mark.parametrize("name", ORIGINALS)
def test_docstrings_say_which_version_is_followed(name):
    original = ORIGINALS[name]
    project, version = original.version.split()
    module = sys.modules[original.ours.__module__]
    for text in (original.ours.__doc__, module.__doc__):
        assert set(re.findall(rf"\b{project}\s+(\d[\d.]*\d)", text)) == {version}


@pytest.mark.parametrize("name, source", [(name, s) for name, original in ORIGINALS.items() for s in original.sources])
def test_the_pinned_signature_is_the_installed_one(name, source):
    path = find(source)
    if path is None:
        pytest.skip(f"{source} is not installed here: compared where it is")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            assert parameters_of(node) == pinned(ORIGINALS[name])
            return
    pytest.fail(f"{path} has no {name} any more")


def test_target_probs_is_known_by_name_alone():
    assert "target_probs" not in inspect.signature(vllm.rejection_sample).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        vllm.rejection_sample(None, [], 0, None, None, torch.zeros(0, 1), None, None, no_such=1)


# ---- SGLang's functions over ours, and against its own Triton kernels


def module(name: str, **members) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture
def spec_tree(monkeypatch):
    """SGLang's module of functions over trees, on a CPU whose sgl_kernel is ours."""
    path = find("sglang/kernels/ops/speculative/spec_tree.py")
    if path is None:
        pytest.skip("SGLang's source is not at hand: it is run where it is, on PYTHONPATH too")
    machines = {
        f"is_{kind}": (lambda kind=kind: kind == "cpu") for kind in ("cpu", "cuda", "hip", "musa", "npu", "xpu")
    }
    ours = {
        "build_tree_kernel_efficient_cpu": sgl_kernel.build_tree_kernel_efficient,
        "verify_tree_greedy_cpu": sgl_kernel.verify_tree_greedy,
    }
    for stub in (
        module("sgl_kernel", **ours),
        module("sglang.srt.platforms", current_platform=None),
        module("sglang.srt.platforms.interface", reject_out_of_tree_path=None),
        module("sglang.srt.utils", **machines),
    ):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    spec = importlib.util.spec_from_file_location("spec_tree_of_sglang", path)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("topk, depth, selected", [(2, 1, 2), (1, 3, 3), (3, 3, 9), (4, 4, 11)])
@pytest.mark.parametrize("mode", [sgl_kernel.FULL_MASK, sgl_kernel.QLEN_ONLY])
def test_sglang_builds_trees_over_ours(spec_tree, topk, depth, selected, mode):
    parents, chosen, _ = eagle_trees(2, topk, depth, selected, seed=depth)
    if depth == 1:
        parents = [[], []]
    lengths, nodes = torch.tensor([3, 5]), selected + 1
    given = (torch.tensor(parents, dtype=torch.int64), torch.tensor(chosen), lengths)
    size = 2 * nodes * nodes + (8 * nodes if mode == sgl_kernel.FULL_MASK else 0)
    written = []
    for build in (spec_tree.build_tree_kernel_efficient_func, spec_tree.sgl_build_tree_kernel_triton):
        links = torch.full((3, 2, nodes), -1)
        outputs = (torch.full((size,), True), torch.zeros(2 * nodes, dtype=torch.int64), *links)
        build(*given, *outputs, topk, depth, nodes, spec_tree.TreeMaskMode(mode))
        written.append(outputs)
    for ours, theirs in zip(*written, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("steps", [2, 4])
def test_sglang_verifies_trees_over_ours(spec_tree, steps):
    """Trees of 7 nodes whose tokens are few, so that siblings repeat and paths are long."""
    batch, nodes = 8, 7
    trees = [Tree([-1, *(int(torch.randint(0, node, ())) for node in range(1, nodes))]) for _ in range(batch)]
    built = build_topology(torch.tensor([tree.parents.tolist() for tree in trees], dtype=torch.int32))
    candidates, target = torch.randint(0, 3, (batch, nodes)), torch.randint(0, 3, (batch, nodes))
    tree = {
        "candidates": candidates,
        "retrieve_index": torch.arange(batch * nodes).view(batch, nodes),
        "retrieve_next_token": built.first_child.long(),
        "retrieve_next_sibling": built.next_sibling.long(),
        "target_predict": target,
    }
    written = []
    for verify in (spec_tree.verify_tree_greedy_func, spec_tree.verify_tree_greedy_triton):
        outputs = {
            "predicts": torch.full((batch * nodes,), -7, dtype=torch.int32),
            "accept_index": torch.full((batch, steps), -7, dtype=torch.int32),
            "accept_token_num": torch.full((batch,), -7, dtype=torch.int32),
        }
        verify(**outputs, **tree)
        written.append(list(outputs.values()))
    for ours, theirs in zip(*written, strict=True):
        assert torch.equal(ours, theirs)
    assert written[0][2].max() == min(2, steps - 1)
