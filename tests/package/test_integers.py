"""Integers of every size, as Python's and as tensors: each works, or is refused in one sentence.

Nothing raw comes out of the compiled module, PyTorch or NumPy: no pybind11 TypeError, OverflowError or MemoryError.
"""

import numpy as np
import pytest
import torch

import specdec_ops
from specdec_ops import Tree, VocabMap
from tests.harness.public_calls import CALLS, run, tensors_of
from tests.package.test_surroundings import differs

VALUES = (
    -(2**63),
    -(2**31) - 1,
    -1,
    0,
    2**31 - 1,
    2**31,
    2**40,
    2**63,
    2**64,
    True,
    1.0,
    np.int64(1),
    np.int32(2**31 - 1),
)
INTEGERS = {  # of each call: those that are ints there, and those that may be
    "greedy_accept": ("eos", "max_depth"),
    "match_accept": ("eos", "max_depth", "seeds", "positions", "top_k"),
    "chain_accept": ("eos", "num_steps", "seeds", "positions", "top_k", "draft_top_k"),
    "tree_accept": ("eos", "max_depth", "seeds", "positions", "top_k", "draft_top_k"),
    "typical_accept": ("eos", "max_depth", "seeds", "positions", "top_k"),
    "longest_path_accept": ("eos", "max_depth", "seeds", "positions", "top_k", "draft_top_k", "width"),
    "sample_tokens": ("count", "seeds", "positions", "top_k"),
    "sample_children": ("count", "first_parent", "seeds", "positions", "top_k"),
    "tree_attention": ("context_lens", "query_start", "window", "num_splits"),
    "tree_attention paged": ("context_lens", "query_start", "window", "num_splits"),
    "CandidatePool.empty": ("batch", "levels", "width", "branching"),
    "grow_tree": ("level", "width", "eos"),
    "prune_tree": ("nodes",),
    "exit_confidence": ("top_k",),
    "early_exit": ("top_k",),
    "early_exit bounds": ("top_k",),
    "bound_head": ("ends",),
    "VocabMap": ("vocab", "draft_to_target"),
    "AdaptiveThreshold": ("requests", "max_drafted"),
    "Tree.to": ("batch",),
    "Tree.position_ids": ("context_len",),
    "Topology.position_ids": ("context_lens",),
    "Topology.truncate": ("depth",),
    "Topology[:n]": ("stop",),
    "LayerCache": ("slots", "kv_heads", "head_dim", "dim", "batch"),
}
LISTED = ("ends", "draft_to_target")
# A result of 2^31 entries is what such a call asks for: its memory is not the test's to take.
SERVED = {("AdaptiveThreshold", "requests"), ("VocabMap", "vocab"), ("LayerCache", "slots"), ("LayerCache", "batch")}
SERVED |= {("CandidatePool.empty", "batch")}
SERVED |= {("LayerCache", name) for name in ("kv_heads", "head_dim", "dim")}


def one_sentence(function, *arguments, **options) -> str:
    """What a call raises, which must be ours; "" if it works."""
    try:
        function(*arguments, **options)
    except (TypeError, ValueError) as error:
        text = str(error)
        assert text.startswith("specdec_ops."), text
        assert " must be " in text or "slots, but the cache has" in text, text
        assert "\n" not in text
        return text
    return ""


WITH_BACKENDS = [(name, {"backend": backend}) for name in INTEGERS if CALLS[name].op for backend in ("auto", "torch")]
WITHOUT = [(name, {}) for name in INTEGERS if not CALLS[name].op]


@pytest.mark.parametrize(("name", "options"), WITH_BACKENDS + WITHOUT, ids=str)
def test_each_integer(name, options):
    """Every integer argument of every public function."""
    for argument in INTEGERS[name]:
        for value in VALUES:
            if (name, argument) in SERVED and value in (2**31 - 1, True):
                continue
            text = one_sentence(run, name, **{argument: [value] if argument in LISTED else value}, **options)
            assert text or not isinstance(value, bool | float), (argument, value)


def test_the_table_is_complete():
    """Every argument that is an int in a call, or may be one by its annotation, is in it."""
    for name, call in CALLS.items():
        if " " in name or name.startswith(("dlpack", "sgl_kernel", "flashinfer", "vllm")):
            continue  # a variant, or in another framework's words
        given = {key for key, value in call.arguments.items() if isinstance(value, int) and not isinstance(value, bool)}
        hints = {
            key
            for key, hint in getattr(call.function, "__annotations__", {}).items()
            if "int" in str(hint).split(" | ")
        }
        assert given | hints <= set(INTEGERS.get(name, ())), name


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_what_great_integers_mean(backend):
    """Where they are taken, they mean what they say."""
    if why := specdec_ops.backends("tree_attention")[backend]:
        pytest.skip(why)
    attention = {"backend": backend}
    everything = run("tree_attention", **attention)
    for window in (2**31 - 1, 2**31, 2**64):
        assert not differs(run("tree_attention", window=window, **attention), everything)
    nothing = run("tree_attention", query_start=2**64, **attention)
    assert nothing[0].eq(0).all()
    assert nothing[1].eq(float("-inf")).all()
    signed = run("sample_tokens", seeds=-1, backend=backend)
    assert not differs(run("sample_tokens", seeds=2**64 - 1, backend=backend), signed)


def huge(tensor: torch.Tensor, dim: int, size: int = 2**31 + 1) -> torch.Tensor:
    """This size of one dimension, without memory: every entry is the first one."""
    return tensor.narrow(dim, 0, 1).expand(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])


SIZES = {  # tensors that may be of any strides: which of their dimensions are sizes
    "greedy_accept": {"target": (0, 1)},
    "match_accept": {"target_logits": (0, 1)},
    "chain_accept": {"target_logits": (0, 1), "draft_logits": (0, 1)},
    "tree_accept": {"target_logits": (0, 1), "draft_logits": (0, 1), "draft_tokens": (0, 1)},
    "sample_tokens": {"logits": (0,), "seeds": (0,), "positions": (0,), "top_k": (0,)},
    "sample_children": {"draft_logits": (0, 1), "parents": (0, 1)},
    "tree_attention": {"q": (0, 1, 2), "k_cache": (0, 2), "context_lens": (0,)},
    "tree_attention paged": {"page_table": (0,), "k_cache": (2,), "query_start": (0,)},
    "merge_states": {"out_a": (0, 1)},
    "build_topology": {"parents": (0, 1), "num_nodes": (0,)},
    "grow_tree": {"top_tokens": (0, 1, 2), "top_logprobs": (0, 1, 2), "active": (0,)},
    "prune_tree": {"root_tokens": (0,)},
    "exit_confidence": {"hidden": (0,), "temperature": (0,)},
    "exit_mlp": {"features": (0,)},
    "gather_layer_kv": {"slots": (0,), "requests": (0,), "page_table": (0, 1)},
    "kv_commit": {"nodes": (0, 1), "context_lens": (0,), "page_table": (0, 1), "copies": (0,)},
    "linear": {"x": (0,), "residual": (0,)},
    "rms_norm": {"x": (0,), "residual": (0,)},
    "kv_propagate": {"hidden": (0,), "positions": (0,), "slots": (0,), "requests": (0,), "page_table": (0, 1)},
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    """Of one dimension above 2^31, in every tensor in turn and, for caches, in K and V together."""
    for argument, dims in SIZES[name].items():
        for dim in dims:
            changes = {argument: huge(CALLS[name].arguments[argument], dim)}
            if argument == "k_cache":
                changes["v_cache"] = huge(CALLS[name].arguments["v_cache"], dim)
            text = one_sentence(run, name, **changes)
            assert text, (argument, dim)


def test_sizes_of_vocabularies():
    """Rows are contiguous, so such a row takes memory; it is only reserved, since nothing looks at it."""
    try:
        row = torch.empty(1, 2**31, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not reserve 4 GiB")
    text = one_sentence(specdec_ops.sample_tokens, row, seeds=0, positions=0)
    assert "logits must be [rows, vocab] with sizes below 2**31, got float16 [1, 2147483648]" in text
    text = one_sentence(specdec_ops.greedy_accept, row[None], torch.zeros(1, 1).int(), Tree.chain(1).to("cpu"))
    assert "with sizes below 2**31" in text
    text = one_sentence(specdec_ops.exit_confidence, torch.zeros(1, 1, dtype=torch.float16), row.view(-1, 1))
    assert "head must be of sizes below 2**31" in text
    text = one_sentence(specdec_ops.exit_confidence, row, row)
    assert "hidden must be of sizes below 2**31" in text


def test_trees():
    """On the host, where a list that is too long would take all memory first."""
    most = 2**20
    for make, message in (
        (lambda: Tree.chain(2**40), f"chain: nodes must be at most {most}, got {2**40}"),
        (lambda: Tree.fork(2**20, 2**20), f"fork: nodes must be at most {most}, got {2**20 * (2**20 + 1)}"),
        (lambda: Tree.from_branching((2**30, 2**30)), f"from_branching: nodes must be at most {most}, got"),
        (lambda: Tree.chain(3.0), "chain: nodes must be an int, got 3.0"),
        (lambda: Tree.chain(True), "chain: nodes must be an int, got True"),
        (lambda: Tree.chain(2).to("cpu", 2**40), "to: batch must be at most"),
        (lambda: VocabMap([2**70], 9), "VocabMap: draft_to_target must be int32 or int64 [draft_vocab], got list"),
    ):
        assert message in one_sentence(make)
    assert len(Tree.chain(np.int64(3))) == 3
    assert Tree.chain(3).truncate(2**64) == Tree.chain(3)


def test_rows_of_sample_children():
    """Noise tells 65,536 nodes apart."""
    logits = torch.zeros(1, 1, 4).expand(1, 65_537, 4)
    text = one_sentence(specdec_ops.sample_children, logits, 1, seeds=0, positions=0)
    assert "draft_logits must be of at most 65536 rows per request, first_parent being 0, got" in text
    assert tensors_of(specdec_ops.sample_children(logits[:, :2], 1, seeds=0, positions=0, first_parent=65_534))
    text = one_sentence(specdec_ops.sample_children, logits[:, :2], 1, seeds=0, positions=0, first_parent=65_535)
    assert "at most 1 rows" in text
