"""kv_append as the public sees it: what it says of wrong arguments, its operator, torch.compile."""

import pytest
import torch

from specdec_ops import Rope, Tree, kv_append
from tests.kv.append_cases import caches, ids, normal, tables

K = normal(2, 3, 2, 8, dtype=torch.float32)


def arguments(**changes):
    pair = caches(K, K, 2, 6)
    return {
        "k": K,
        "v": K,
        "k_cache": pair[0],
        "v_cache": pair[1],
        "topology": Tree.chain(3).to("cpu"),
        "context_lens": ids([1, 2]),
        **changes,
    }


def wrong(changes, kind, message):
    return pytest.param(changes, kind, message, id=f"{next(iter(changes))} {message[:40]}")


PACKED = K.flatten(0, 1)


CACHE = torch.zeros(2, 6, 2, 8)


EIGHT_BITS = {name: CACHE.to(torch.int8) for name in ("k_cache", "v_cache")}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        wrong({"k": 1}, TypeError, "k must be float32, bfloat16 or float16 [batch, queries, kv_heads, dim] or pac"),
        wrong({"k": K.int()}, TypeError, "got int32 [2, 3, 2, 8]"),
        wrong({"k": K[0, 0]}, ValueError, "k must be [batch, queries, kv_heads, dim] or packed [tokens, kv_heads, d"),
        wrong({"k": K[..., ::2]}, ValueError, "k must be contiguous in its last dimension, got float32 [2, 3, 2, 4] w"),
        wrong({"k": K[:, :, :0]}, ValueError, "k must be of at least one kv head, got float32 [2, 3, 0, 8]"),
        wrong({"v": K.half()}, TypeError, "v must be float32 like k, got float16 [2, 3, 2, 8]"),
        wrong({"v": K[:1]}, ValueError, "v must be [2, 3, 2, dim] like k, got float32 [1, 3, 2, 8]"),
        wrong({"q": K[:1]}, ValueError, "q must be [2, 3, heads, dim] like k, got float32 [1, 3, 2, 8]"),
        wrong({"q": K[..., :6]}, ValueError, "q must be of k's dim of 8, got float32 [2, 3, 2, 6]"),
        wrong({"q": K, "q_out": K[:1]}, ValueError, "q_out must be float32 [2, 3, 2, 8] like q, got float32 [1, 3, "),
        wrong({"q": K, "q_out": K.half()}, TypeError, "q_out must be float32 [2, 3, 2, 8] like q, got float16"),
        wrong({"q_out": K}, ValueError, "q_out must be None without q"),
        wrong({"q_norm_weight": K[0, 0, 0]}, ValueError, "q_norm_weight must be None without q"),
        wrong({"k_norm_weight": K[0, 0, 0, :4]}, ValueError, "k_norm_weight must be float32 [8], got float32 [4]"),
        wrong({"k_norm_weight": K[0, 0, 0].half()}, TypeError, "k_norm_weight must be float32 [8], got float16 [8]"),
        wrong({"k_cache": CACHE.half()}, TypeError, "k_cache must be float32, float8_e4m3fn, float8_e5m2 or int8 [ba"),
        wrong({"k_cache": CACHE[..., :4]}, ValueError, "k_cache must be [batch, slots, 2, 8] like k, got float32"),
        wrong(
            {"k_cache": CACHE.transpose(1, 2)},
            ValueError,
            "; the layout is [batch, slots, kv_heads, dim], to which .transpose(1, 2) brings heads that come before",
        ),
        wrong({"v_cache": CACHE[:, :5]}, ValueError, "v_cache must be of k_cache's first two sizes [2, 6], got"),
        wrong({"v_cache": CACHE.to(torch.int8)}, TypeError, "v_cache must be float32 like k_cache, got int8"),
        wrong(
            {name: CACHE[:1] for name in ("k_cache", "v_cache")},
            ValueError,
            "k_cache must be of a batch of 2, got float32 [1, 6, 2, 8]",
        ),
        wrong(EIGHT_BITS, TypeError, "k_scale must be a number or float32 [2] with an int8 cache, got None"),
        wrong({**EIGHT_BITS, "k_scale": 0}, ValueError, "k_scale must be a finite number above 0, got 0"),
        wrong({"v_scale": torch.ones(3)}, ValueError, "v_scale must be a number or float32 [2] or without dimensions"),
        wrong({"v_scale": torch.ones(2).half()}, TypeError, "v_scale must be a number or float32 [2], got float16 [2]"),
        wrong({"topology": Tree.chain(3)}, TypeError, "topology must be a specdec_ops.Topology or None, got Tree"),
        wrong({"topology": Tree.chain(3).to("cpu", 3)}, ValueError, "topology must have a batch of 2 or 1, got 3"),
        wrong({"context_lens": None}, TypeError, "context_lens must be int32 or int64 [batch] or an int without slots"),
        wrong({"context_lens": -1}, ValueError, "context_lens must be from 0 to 2**31 - 1, got -1"),
        wrong({"context_lens": ids([1])}, ValueError, "context_lens must be int32 or int64 [2] or an int, got int32"),
        wrong({"page_table": ids([[0]])}, ValueError, "page_table must be [2, max_pages], got int32 [1, 1]"),
        wrong({"query_start": -1}, ValueError, "query_start must be an int of at least 0, or int32 or int64 [batch]"),
        wrong(
            {"query_start": 0.5}, TypeError, "query_start must be an int of at least 0, or int32 or int64 [batch], g"
        ),
        wrong({"slots": ids([1, 2])}, ValueError, "slots must be int32 or int64 [2, 3], got int32 [2]"),
        wrong({"positions": K[..., 0, 0]}, TypeError, "positions must be int32 or int64 [2, 3], got float32 [2, 3]"),
        wrong({"requests": ids([0])}, ValueError, "requests must be None, but for packed rows without a topology"),
        wrong({"rope": 1e4}, TypeError, "rope must be a Rope, (cos, sin) or None, got 10000.0"),
        wrong({"rope": tables(9, 5)}, ValueError, "rope[0] must be two tables [positions, pairs] of one shape, of at "),
        wrong({"rope": (tables(9, 4)[0],) * 1}, TypeError, "rope must be a Rope, (cos, sin) or None, got tuple"),
        wrong({"rope": Rope(9.0, 5, 9)}, ValueError, "rope must be of at most 4 pairs, got Rope"),
        wrong({"rope": tuple(t[:, ::2] for t in tables(9, 8))}, ValueError, "rope must be of contiguous tables, got"),
        wrong({"rope": (tables(9, 4)[0].double(),) * 2}, TypeError, "rope[0] must be float32 [positions, pairs], got"),
        wrong({"interleaved": 1}, TypeError, "interleaved must be a bool, got 1"),
        wrong({"norm_eps": -1}, ValueError, "norm_eps must be a finite number of at least 0, got -1"),
        wrong({"k": PACKED, "v": PACKED}, ValueError, "topology must have offsets with packed rows, got None"),
        wrong(
            {"k": PACKED, "v": PACKED, "topology": None},
            ValueError,
            "k must be [batch, queries, kv_heads, dim], or packed with topology.offsets or slots, got float32 [6, 2",
        ),
        wrong(
            {"k": PACKED, "v": PACKED, "topology": None, "slots": ids([0] * 6)},
            ValueError,
            "context_lens must be None for packed rows without a topology, got int32 [2]",
        ),
        wrong(
            {"k": PACKED, "v": PACKED, "topology": None, "slots": ids([0] * 6), "context_lens": None}
            | {"rope": tables(9, 4)},
            TypeError,
            "positions must be int32 or int64 of k's rows with a rope and no context_lens, got None",
        ),
        wrong(
            {"k": PACKED, "v": PACKED, "topology": None, "slots": ids([0] * 6), "context_lens": None}
            | {"query_start": 1},
            ValueError,
            "query_start must be 0 for packed rows without a topology, got 1",
        ),
        wrong({"k": K.clone().requires_grad_()}, RuntimeError, "an input requires grad, but this op has no backward"),
        wrong(
            {"context_lens": ids([1, 2]).to("meta")}, ValueError, "context_lens must be on cpu, got a tensor on meta"
        ),
    ],
)
def test_wrong_arguments(changes, kind, message):
    with pytest.raises(kind) as raised:
        kv_append(**arguments(**changes))
    assert str(raised.value).startswith("specdec_ops.kv_append: ") and message in str(raised.value)


def test_the_operator():
    """Schema, fake and functionalisation."""
    q = normal(2, 3, 4, 8, dtype=torch.float32)
    seen = {}
    from specdec_ops.ops.kv import contract

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "kv_append", lambda call, backend, out: seen.update(call=call, out=out))
        kv_append(**arguments(q=q, rope=tables(9, 4), q_norm_weight=torch.ones(8)))
    torch.library.opcheck(
        torch.ops.specdec_ops.kv_append.default,
        (*seen["call"], *seen["out"], "auto"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_without_a_break(in_place):
    """With a Rope; the caches and q_out that the caller has change."""
    rope = Rope(100.0, 4, 9)

    def step(q, **options):
        return 2 * kv_append(q=q, rope=rope, q_out=q if in_place else None, **options)

    first, second = arguments(), arguments()
    queries = normal(2, 3, 4, 8, dtype=torch.float32)
    want = step(queries.clone(), **first)
    torch._dynamo.reset()
    mine = queries.clone()
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(mine, **second)
    assert torch.equal(got, want) and torch.equal(mine, want / 2 if in_place else queries)
    assert all(torch.equal(first[name], second[name]) for name in ("k_cache", "v_cache"))
