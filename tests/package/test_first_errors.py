"""What a newcomer does first, and what is said: whatever stands for an argument, the answer is one sentence of ours.

`test_anything` puts everything in the place of everything and looks for raw errors of Python, PyTorch and pybind11;
`test_sentences` pins those that are met first, word for word.
"""

import re

import numpy as np
import pytest
import torch

import specdec_ops
from specdec_ops import Topology, Tree, VocabMap, bound_head, build_topology
from tests.harness.public_calls import CALLS, TREE, run

OBJECTS = (
    *(None, "text", 1.5, -1, True, [1], (), {}, object(), np.zeros(2), np.float32(1), Tree.chain(2)),
    *(torch.zeros(2, 2), torch.tensor(1.5), torch.zeros(0), torch.zeros(2, dtype=torch.bool)),
)


def changed(value):
    """A tensor with one thing about it wrong."""
    yield from (
        value[None],
        value[:0],
        value.to("meta"),
        value.double(),
        value.to(torch.int8),
        value.to(torch.complex64),
    )
    if value.dim():
        yield from (value[0], value.mT if value.dim() > 1 else value[:-1], value.transpose(0, -1), value.tolist())
    yield value.numpy()


FUZZED = [
    name
    for name, call in CALLS.items()
    if call.op or name in ("quantize_head", "bound_head", "VocabMap", "entropy_stop")
]


@pytest.mark.parametrize("name", FUZZED)
def test_anything(name):
    """In the place of each argument: it works, or one of our sentences says what the argument must be."""
    for argument, value in CALLS[name].arguments.items():
        if argument == "return_lse":
            continue  # whatever is true
        others = [*OBJECTS, *(changed(value) if isinstance(value, torch.Tensor) else ())]
        for other in others:
            try:
                run(name, **{argument: other})
            except (TypeError, ValueError, RuntimeError) as error:
                text = str(error)
                assert text.startswith("specdec_ops."), (argument, other, text)
                assert "\n" not in text
                assert re.search(" must be | must not be |is unavailable|slots, but the cache has|needs? ", text), text


Q, K, V = (CALLS["tree_attention"].arguments[name] for name in ("q", "k_cache", "v_cache"))
LOGITS = CALLS["tree_accept"].arguments["target_logits"]
HEAD = CALLS["exit_confidence"].arguments["head"]
HEADS_FIRST = "; the layout is [batch, slots, kv_heads, dim], to which .transpose(1, 2) brings heads that come before"
FROM_ARRAY = "; torch.from_dlpack makes a tensor of it, and specdec_ops.dlpack takes it"
FROM_TREE = "; tree.to(device) makes one of a Tree, once for all calls, and build_topology of parents on the device"
SENTENCES = [  # a call, what is changed, and the end or the middle of the sentence
    ("tree_attention", {"topology": TREE}, "topology must be a specdec_ops.Topology or None, got Tree" + FROM_TREE),
    (
        "tree_attention",
        {"topology": TREE.mask()},
        "topology must be a specdec_ops.Topology or None, got ndarray" + FROM_TREE,
    ),
    (
        "tree_attention",
        {"k_cache": K.transpose(1, 2), "v_cache": V.transpose(1, 2)},
        "k_cache must be of a number of kv_heads that divides the 4 heads of q, got float32 [2, 2, 32, 64]"
        + HEADS_FIRST,
    ),
    ("tree_attention", {"q": Q.transpose(1, 2)}, "divides the 5 heads of q, got float32 [2, 32, 2, 64]" + HEADS_FIRST),
    (
        "tree_attention",
        {"q": Q.transpose(1, 2), "k_cache": K.transpose(1, 2), "v_cache": V.transpose(1, 2)},
        "divides the 5 heads of q, got float32 [2, 2, 32, 64]" + HEADS_FIRST,
    ),
    ("tree_attention", {"q": Q[:, :, :3]}, "that divides the 3 heads of q, got float32 [2, 32, 2, 64]"),
    (
        "tree_attention",
        {"q": Q.numpy()},
        "[batch, queries, heads, dim], got ndarray float32 [2, 5, 4, 64]" + FROM_ARRAY,
    ),
    (
        "tree_attention",
        {"context_lens": [20, 9]},
        "context_lens must be int32 or int64 [batch] or an int, got list [20, 9]",
    ),
    (
        "tree_attention",
        {"context_lens": np.int64(9)},
        "an int, got numpy.int64(9), of which int() or float() makes a number",
    ),
    ("tree_attention", {"context_lens": 20.0}, "context_lens must be int32 or int64 [batch] or an int, got 20.0"),
    ("tree_attention", {"topology": Topology.from_trees([TREE] * 3)}, "topology must have a batch of 2 or 1, got 3"),
    (
        "tree_attention",
        {"q": Q[:1], "k_cache": K[:1], "v_cache": V[:1]},
        "topology must have a batch of 1, got 2",
    ),
    (
        "tree_attention paged",
        {"page_table": None},
        "with a batch of 2 like q, got float32 [32, 4, 2, 64]; a cache of pages t",
    ),
    ("tree_attention", {"backend": "cuda"}, "backend='cuda' is unavailable: "),
    ("tree_accept", {"topology": TREE}, "topology must be a specdec_ops.Topology, got Tree" + FROM_TREE),
    ("tree_accept", {"topology": None}, "topology must be a specdec_ops.Topology, got None" + FROM_TREE),
    (
        "tree_accept",
        {"target_logits": LOGITS[0]},
        "target_logits must be [batch, nodes, vocab] with a vocab of at least 1, got",
    ),
    (
        "tree_accept",
        {"target_logits": LOGITS.mT.contiguous()},
        "draft_tokens must be int32 or int64 [2, 96], got int32 [2, 5]; there is one for each row of logits",
    ),
    (
        "tree_accept",
        {"target_logits": LOGITS.mT},
        "target_logits must be contiguous in its last dimension, got float32 [2, 96, 5]",
    ),
    ("tree_accept", {"target_logits": LOGITS.numpy()}, "got ndarray float32 [2, 5, 96]" + FROM_ARRAY),
    ("tree_accept", {"seeds": 1.0}, "seeds must be an int or int64 [batch], got 1.0"),
    ("tree_accept", {"seeds": None}, "seeds must be an int or int64 [batch], got None"),
    ("tree_accept", {"seeds": torch.Generator()}, "seeds must be an int or int64 [batch], got Generator"),
    (
        "tree_accept",
        {"seeds": torch.tensor(3.0)},
        "seeds must be int64, uint64, int32 or uint32 [2] if it is a tensor, got fl",
    ),
    ("tree_accept", {"positions": [1, 2]}, "positions must be an int, or int32 or int64 [batch], got list [1, 2]"),
    (
        "tree_accept",
        {"temperature": [1.0, 1.0]},
        "temperature must be a number or float32 [batch], got list [1.0, 1.0]",
    ),
    (
        "tree_accept",
        {"eos": torch.tensor([2])},
        "eos must be None, an int or up to 8 ints, got int64 [1]; its tolist() has them",
    ),
    (
        "sample_tokens",
        {"logits": LOGITS},
        "logits must be [rows, vocab] with a vocab of at least 1, got float32 [2, 5, 96]",
    ),
    ("exit_confidence", {"head": HEAD.T.contiguous()}, "got float32 [32, 96]; head.T.contiguous() fits"),
    ("exit_confidence", {"head": torch.nn.Linear(32, 96)}, "got Linear, a module; its weight may be meant"),
    (
        "exit_confidence",
        {"norm_weight": torch.nn.Parameter(torch.ones(32))},
        "an input requires grad, but this op has no",
    ),
    (
        "build_topology",
        {"parents": TREE},
        "parents must be int32 or int64 [batch, nodes], got Tree; tree.to(device) makes its",
    ),
    ("kv_propagate", {"k_caches": None}, "k_caches must be a sequence of tensors, got None"),
    ("kv_propagate", {"layers": None}, "layers must be a sequence of (norm_weight, k_weight, v_weight), got None"),
    (
        "kv_propagate",
        {
            name: [cache.transpose(1, 2) for cache in CALLS["kv_propagate"].arguments[name]]
            for name in ("k_caches", "v_caches")
        },
        "[128, 32]; caches are [..., slots, kv_heads, head_dim], to which .transpose(1, 2) brings heads before slots",
    ),
]


@pytest.mark.parametrize(
    ("name", "changes", "sentence"), SENTENCES, ids=[f"{name}-{next(iter(c))}" for name, c, _ in SENTENCES]
)
def test_sentences(name, changes, sentence):
    """Of calls that are nearly right."""
    with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(sentence)):
        run(name, **changes)


MADE = [
    (lambda: Tree.from_branching(4), "from_branching: branching must be a sequence of ints, got 4"),
    (lambda: Tree.from_branching([2.5]), "from_branching: branching must be an int, got 2.5"),
    (lambda: Tree.from_paths([1]), "from_paths: choices must be sequences of ranks, got [1]"),
    (lambda: Topology.from_trees(Tree.chain(2)), "trees must be a sequence of at least one specdec_ops.Tree, got Tree"),
    (
        lambda: Topology.from_trees([[-1, 0]]),
        "trees must be a sequence of at least one specdec_ops.Tree, got list [[-1, 0]]",
    ),
    (
        lambda: Tree.chain(3).to().position_ids([1]),
        "context_lens must be an int, or int32 or int64 [batch], got list [1]",
    ),
    (lambda: Tree.chain(3).to().truncate(1.5), "depth must be an int, or int32 or int64 [batch], got 1.5"),
    (lambda: VocabMap("abc", 9), "VocabMap: draft_to_target must be int32 or int64 [draft_vocab], got 'abc'"),
    (
        lambda: bound_head(HEAD, np.array([96])),
        "bound_head: ends must be ascending ints that end at 96, at most 16, got ndarray",
    ),
    (
        lambda: build_topology([[-1, 0]]),
        "build_topology: parents must be int32 or int64 [batch, nodes], got list [[-1, 0]]",
    ),
]


@pytest.mark.parametrize(("make", "sentence"), MADE, ids=[sentence[:24] for _, sentence in MADE])
def test_what_makes_things(make, sentence):
    """Trees, topologies, maps."""
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        make()


def test_missing_noise():
    """Python's own sentence names it."""
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'positions'"):
        specdec_ops.sample_tokens(LOGITS[:, 0], seeds=1)
