"""Every message of tree_attention and merge_states: the op, the argument, what it must be, what it was."""

import dataclasses
import re

import pytest
import torch

from specdec_ops import AttentionState, Topology, Tree, merge_states, tree_attention
from tests.attention.attention_cases import chain, make_case

CASE = make_case([chain(3), chain(2)], [4, 9])
PAGED = make_case([chain(3), chain(2)], [4, 9], page_size=4)
Q, K, V, TOPOLOGY, LENGTHS = CASE.q, CASE.k_cache, CASE.v_cache, CASE.topology, CASE.context_lens
FP8 = K.to(torch.float8_e4m3fn)
META = torch.device("meta")


def strided(tensor):
    """The same shape with a last dimension that is not contiguous."""
    return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"q": Q.long()},
            TypeError,
            "q must be float32, bfloat16 or float16 [batch, queries, heads, dim], got int64 [2",
        ),
        ({"q": [1.0]}, TypeError, "q must be float32, bfloat16 or float16 [batch, queries, heads, dim], got list"),
        ({"q": Q[0, 0]}, ValueError, "q must be float32, bfloat16 or float16 [batch, queries, heads, dim], or [tokens"),
        ({"q": Q[0]}, ValueError, "or [tokens, heads, dim] with topology.offsets, got float32 [3, 4, 64]"),
        (
            {"q": strided(Q)},
            ValueError,
            "q must be contiguous in its last dimension, got float32 [2, 3, 4, 64] with str",
        ),
        ({"k_cache": K.half()}, TypeError, "k_cache must be float32 [batch, slots, kv_heads, dim] like q, got float16"),
        ({"v_cache": None}, TypeError, "v_cache must be float32 [batch, slots, kv_heads, dim] like q, got None"),
        (
            {"k_cache": FP8},
            TypeError,
            "v_cache must be float8_e4m3fn [batch, slots, kv_heads, dim] like k_cache, got",
        ),
        (
            {"v_cache": FP8},
            TypeError,
            "v_cache must be float32 [batch, slots, kv_heads, dim] like q, got float8_e4m3fn",
        ),
        ({"k_cache": K[0]}, ValueError, "k_cache must be [batch, slots, kv_heads, dim], got float32 [14, 2, 64]"),
        (
            {"v_cache": V[..., :32]},
            ValueError,
            "v_cache must be of k_cache's shape [2, 14, 2, 64], got float32 [2, 14, 2",
        ),
        (
            {"k_cache": K[..., :32], "v_cache": V[..., :32]},
            ValueError,
            "with q's dim of 64, got float32 [2, 14, 2, 32]",
        ),
        ({"v_cache": strided(V)}, ValueError, "v_cache must be contiguous in its last dimension"),
        ({"q": Q[:, :, :3]}, ValueError, "k_cache must be of a number of kv_heads that divides the 3 heads of q, got"),
        ({"k_cache": K[:1], "v_cache": V[:1]}, ValueError, "with a batch of 2 like q, got float32 [1, 14, 2, 64]"),
        ({"k_cache": K.to(META)}, ValueError, "k_cache must be on cpu, got a tensor on meta"),
        ({"topology": "chain"}, TypeError, "topology must be a specdec_ops.Topology or None, got 'chain'"),
        (
            {"topology": Tree.chain(3)},
            TypeError,
            "topology must be a specdec_ops.Topology or None, got Tree; tree.to(device) makes one of a Tree, once",
        ),
        ({"topology": Tree.chain(3).to(batch=3)}, ValueError, "topology must have a batch of 2 or 1, got 3"),
        ({"topology": TOPOLOGY.to(META)}, ValueError, "topology must be on cpu, got a tensor on meta"),
        (
            {"context_lens": LENGTHS.half()},
            TypeError,
            "context_lens must be int32 or int64 [batch] or an int, got float1",
        ),
        ({"context_lens": [4, 9]}, TypeError, "context_lens must be int32 or int64 [batch] or an int, got list [4, 9]"),
        ({"context_lens": LENGTHS[:1]}, ValueError, "context_lens must be int32 or int64 [2] or an int, got int32 [1]"),
        ({"context_lens": LENGTHS.repeat(2)[::2]}, ValueError, "context_lens must be contiguous, got int32 [2] with"),
        ({"context_lens": -1}, ValueError, "context_lens must be from 0 to 2**31 - 1, got -1"),
        ({"context_lens": LENGTHS.to(META)}, ValueError, "context_lens must be on cpu, got a tensor on meta"),
        (
            {"query_start": 1.5},
            TypeError,
            "query_start must be an int of at least 0, or int32 or int64 [batch], got 1.5",
        ),
        (
            {"query_start": -1},
            ValueError,
            "query_start must be an int of at least 0, or int32 or int64 [batch], got -1",
        ),
        (
            {"query_start": LENGTHS.short()},
            TypeError,
            "query_start must be int32 or int64 [batch] or an int, got int16 [2]",
        ),
        ({"scale": torch.tensor(0.1)}, TypeError, "scale must be a number or None, got float32 []"),
        ({"k_scale": torch.ones(2)}, TypeError, "k_scale must be a number or None, got float32 [2]"),
        ({"v_scale": "1"}, TypeError, "v_scale must be a number or None, got '1'"),
        ({"window": 0}, ValueError, "window must be None or an int of at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window must be None or an int of at least 1, got 2.0"),
        ({"window": True}, TypeError, "window must be None or an int of at least 1, got True"),
        ({"softcap": 0.0}, ValueError, "softcap must be None or a finite number above 0, got 0.0"),
        ({"softcap": float("nan")}, ValueError, "softcap must be None or a finite number above 0, got nan"),
        ({"softcap": "30"}, TypeError, "softcap must be None or a finite number above 0, got '30'"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must be float32 [4], got float32 [3]"),
        ({"sinks": torch.zeros(4).half()}, TypeError, "sinks must be float32 [4], got float16 [4]"),
        (
            {"alibi_slopes": torch.zeros(8)[::2]},
            ValueError,
            "alibi_slopes must be contiguous, got float32 [4] with str",
        ),
        ({"alibi_slopes": [0.1] * 4}, TypeError, "alibi_slopes must be float32 [4], got list"),
        ({"num_splits": 0}, ValueError, "num_splits must be None or an int from 1 to 256, got 0"),
        ({"num_splits": 257}, ValueError, "num_splits must be None or an int from 1 to 256, got 257"),
        ({"num_splits": "2"}, TypeError, "num_splits must be None or an int from 1 to 256, got '2'"),
        ({"out": Q.half()}, TypeError, "out must be float32 [2, 3, 4, 64], got float16 [2, 3, 4, 64]"),
        ({"out": Q[:, :2]}, ValueError, "out must be float32 [2, 3, 4, 64], got float32 [2, 2, 4, 64]"),
        ({"out": strided(Q)}, ValueError, "out must be contiguous in its last dimension"),
        ({"out": Q[:1].clone().expand(2, -1, -1, -1)}, ValueError, "its last dimension, and not expanded, got float32"),
        (
            {"out": torch.empty_like(Q), "return_lse": True},
            TypeError,
            "out must be an AttentionState(out, lse) with re",
        ),
        (
            {"out": AttentionState(Q, Q), "return_lse": True},
            ValueError,
            "out.lse must be float32 [2, 3, 4], got float32",
        ),
        ({"out": AttentionState(Q, Q[..., 0])}, TypeError, "out must be float32 [2, 3, 4, 64], got AttentionState"),
        (
            {"out": AttentionState(torch.empty_like(Q), Q[..., 0]), "return_lse": True},
            ValueError,
            "out.lse must be contiguous, got float32 [2, 3, 4] with strides [768, 256, 64]",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, cuda, triton, cpu, torch, got 'gpu'"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda' is unavailable: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tree_attention(changes, kind, message):
    """On a dense cache."""
    arguments = {"q": Q, "k_cache": K, "v_cache": V, "topology": TOPOLOGY, "context_lens": LENGTHS, **changes}
    with pytest.raises(kind, match=re.escape(message)) as raised:
        tree_attention(**arguments)
    assert str(raised.value).startswith("specdec_ops.tree_attention: ")


TABLE = PAGED.options["page_table"]


@pytest.mark.parametrize(
    ("table", "kind", "message"),
    [
        (TABLE.float(), TypeError, "page_table must be int32 or int64 [batch, max_pages], got float32 [2, 4]"),
        (TABLE[:1], ValueError, "page_table must be int32 or int64 [2, max_pages], got int32 [1, 4]"),
        (TABLE[0], ValueError, "page_table must be int32 or int64 [2, max_pages], got int32 [4]"),
        (
            TABLE[:, ::2],
            ValueError,
            "page_table must be contiguous in its last dimension, got int32 [2, 2] with strides",
        ),
        (TABLE.to(META), ValueError, "page_table must be on cpu, got a tensor on meta"),
        (TABLE.tolist(), TypeError, "page_table must be int32 or int64 [batch, max_pages], got list"),
    ],
    ids=range(6),
)
def test_page_table(table, kind, message):
    """On a paged cache."""
    with pytest.raises(kind, match=re.escape(message)):
        PAGED.run("auto", page_table=table)


def test_page_size_of_zero():
    """A cache of pages without slots."""
    empty = dataclasses.replace(PAGED, k_cache=PAGED.k_cache[:, :0], v_cache=PAGED.v_cache[:, :0])
    with pytest.raises(ValueError, match="with a page_size above 0"):
        empty.run("auto")


@pytest.mark.parametrize("page", [-1, 99])
def test_page_out_of_range(page, target):
    """On CPU an error; a GPU kernel can't raise one."""
    if target.backend not in ("cpu", "torch"):
        pytest.skip("GPU kernels can't report it")
    table = TABLE.clone().to(target.device)
    table[1, 0] = page
    case = make_case([chain(3), chain(2)], [4, 9], page_size=4, device=target.device)
    with pytest.raises(ValueError, match="page_table"):
        case.run(target.backend, page_table=table)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_inputs_that_require_grad(name):
    """There is no backward, so a missing gradient must not go unnoticed."""
    case = dataclasses.replace(CASE, **{name: getattr(CASE, name).clone().requires_grad_()})
    with pytest.raises(RuntimeError, match="an input requires grad, but this op has no backward"):
        case.run("auto")
    with torch.no_grad():
        case.run("auto")


STATE = (torch.zeros(2, 4, 64), torch.zeros(2, 4), torch.zeros(2, 4, 64), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("index", "value", "kind", "message"),
    [
        (
            0,
            STATE[0].int(),
            TypeError,
            "out_a must be float32, bfloat16 or float16 [..., heads, dim], got int32 [2, 4, 64]",
        ),
        (
            0,
            STATE[0][0, 0],
            ValueError,
            "out_a must be float32, bfloat16 or float16 [..., heads, dim], got float32 [64]",
        ),
        (0, STATE[0].mT.contiguous().mT, ValueError, "out_a must be contiguous, got float32 [2, 4, 64] with strides"),
        (1, STATE[1].half(), TypeError, "lse_a must be float32 [2, 4], got float16 [2, 4]"),
        (2, STATE[2].half(), TypeError, "out_b must be float32 [2, 4, 64], got float16 [2, 4, 64]"),
        (2, STATE[2][:1], ValueError, "out_b must be float32 [2, 4, 64], got float32 [1, 4, 64]"),
        (3, STATE[3][:, :2], ValueError, "lse_b must be float32 [2, 4], got float32 [2, 2]"),
        (3, STATE[3].to(META), ValueError, "lse_b must be on cpu, got a tensor on meta"),
    ],
    ids=range(8),
)
def test_merge_states(index, value, kind, message):
    """Each argument in turn."""
    arguments = list(STATE)
    arguments[index] = value
    with pytest.raises(kind, match=re.escape(f"specdec_ops.merge_states: {message}")):
        merge_states(*arguments)


def test_merge_states_out():
    """The given state."""
    with pytest.raises(TypeError, match=re.escape("out must be an AttentionState(out, lse), got float32 [2, 4, 64]")):
        merge_states(*STATE, out=STATE[0])
    with pytest.raises(ValueError, match=re.escape("out.lse must be float32 [2, 4], got float32 [1, 4]")):
        merge_states(*STATE, out=AttentionState(STATE[0], STATE[1][:1]))


def test_packed_topology_needs_as_many_offsets():
    """context_lens must fit the offsets."""
    topology = Topology.from_trees([Tree.chain(2)] * 3, packed=True)
    with pytest.raises(ValueError, match=re.escape("context_lens must be int32 or int64 [3] or an int, got int32 [2]")):
        tree_attention(torch.zeros(6, 4, 64), torch.zeros(3, 14, 2, 64), torch.zeros(3, 14, 2, 64), topology, LENGTHS)
