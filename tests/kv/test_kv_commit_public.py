"""kv_commit as the public sees it: what it says of wrong arguments, torch.compile, its operator."""

import pytest
import torch

from specdec_ops import kv_commit
from tests.kv.cache_cases import (
    caches,
    committed,
    equal,
    ids,
)

K, V = caches(2, (2, 8, 2), torch.float32, "cpu")


PAGES = caches(2, (8, 4, 2), torch.float32, "cpu")


NODES, LENGTHS = ids([[0, 2], [1, 2]]), ids([3, 1])


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (
            {"k_caches": 1},
            TypeError,
            "of tensors (float32, bfloat16, int8, ...), or one [layers, ...], got 1",
        ),
        (
            {"k_caches": K[0]},
            ValueError,
            "k_caches must be [layers, ...] of [batch, slots, kv_heads, dim] if it is a te",
        ),
        ({"k_caches": K[:1]}, ValueError, "of one number of layers of at least 1, got 1, 2"),
        ({"k_caches": [], "v_caches": []}, ValueError, "of one number of layers of at least 1, got 0, 0"),
        (
            {"k_caches": [K[0], None]},
            TypeError,
            "k_caches[1] must be one of the tensors (float32, bfloat16, int8, ...) [ba",
        ),
        (
            {"k_caches": [None, K[0]]},
            TypeError,
            "k_caches[0] must be one of the tensors (float32, bfloat16, int8, ...) [ba",
        ),
        (
            {"k_caches": [K[0], K[1].to(torch.complex128)]},
            TypeError,
            "of a dtype of 1, 2, 4 or 8 bytes, got complex128",
        ),
        (
            {"v_caches": [V[0], V[1][:, :7]]},
            ValueError,
            "v_caches[1] must be like k_caches[1] [2, 8, 2, 8] but for its",
        ),
        (
            {"v_caches": [V[0], V[1].mT]},
            ValueError,
            "v_caches[1] must be contiguous in its last dimension, got float32",
        ),
        ({"v_caches": [V[0], V[1].to("meta")]}, ValueError, "v_caches[1] must be on cpu, got a tensor on meta"),
        (
            {"v_caches": [V[0], V[1][0]]},
            ValueError,
            "v_caches[1] must be [batch, slots, kv_heads, dim], got float32 [8,",
        ),
        ({"nodes": None}, TypeError, "nodes must be int32 or int64 [batch, steps], or None with copies, got None"),
        ({"nodes": NODES[0]}, ValueError, "nodes must be int32 or int64 [batch, steps], got int32 [2]"),
        ({"nodes": NODES[:1]}, ValueError, "nodes must be int32 or int64 [2, steps], got int32 [1, 2]"),
        ({"nodes": NODES.float()}, TypeError, "nodes must be int32 or int64 [batch, steps], got float32 [2, 2]"),
        ({"context_lens": None}, TypeError, "context_lens must be int32 or int64 [batch] or an int, got None"),
        ({"context_lens": -1}, ValueError, "context_lens must be from 0 to 2**31 - 1, got -1"),
        ({"context_lens": LENGTHS[:1]}, ValueError, "context_lens must be int32 or int64 [2] or an int, got int32 [1]"),
        ({"copies": ids([[0, 1]])}, ValueError, "copies must be None with dense caches: they have no pages, got int32"),
        ({"page_table": [None]}, ValueError, "page_table must be one, or 2, one a layer, got 1"),
        (
            {"page_table": "x"},
            TypeError,
            "page_table must be int32 or int64 [batch, max_pages], or one a layer, got 'x'",
        ),
        (
            {"page_table": [None, NODES.double()]},
            TypeError,
            "page_table[1] must be int32 or int64 [batch, max_pages], g",
        ),
        (
            {"page_table": [NODES, NODES[:1]]},
            ValueError,
            "page_table[1] must be [2, max_pages] like those before it, g",
        ),
        (
            {"page_table": [ids([[0]]), None]},
            ValueError,
            "k_caches[1] must be [batch, slots, kv_heads, dim] with a batc",
        ),
        (
            {"k_caches": [K[0].clone().requires_grad_(), K[1]]},
            RuntimeError,
            "an input requires grad, but this op has no",
        ),
    ],
    ids=str,
)
def test_errors(changed, kind, message):
    with pytest.raises(kind) as raised:
        kv_commit(**{"k_caches": K, "v_caches": V, "nodes": NODES, "context_lens": LENGTHS, **changed})
    assert str(raised.value).startswith("specdec_ops.kv_commit: ") and message in str(raised.value)


def test_copies_of_another_shape():
    with pytest.raises(ValueError, match=r"copies must be int32 or int64 \[count, 2\], got int32 \[1, 3\]"):
        kv_commit(*PAGES, None, None, copies=ids([[0, 1, 2]]))


@pytest.mark.parametrize("stacked", [False, True])
def test_compiles_without_a_break(stacked):
    torch._dynamo.reset()
    pair = caches(2, (2, 8, 2), torch.float32, "cpu")
    wanted = [[committed(cache, NODES.tolist(), LENGTHS.tolist()) for cache in part] for part in pair]
    pair = [torch.stack(part) for part in pair] if stacked else pair
    compiled = torch.compile(lambda k, v, n, c: kv_commit(k, v, n, c), fullgraph=True, backend="aot_eager")
    compiled(*pair, NODES, LENGTHS)
    for part, parts in zip(pair, wanted, strict=True):
        assert all(equal(cache, want) for cache, want in zip(part, parts, strict=True))


def test_opcheck():
    operator = torch.ops.specdec_ops.kv_commit.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    pages = caches(2, (4, 4, 2), torch.float32, "cpu")
    arguments = (NODES, LENGTHS, [ids([[0, 1], [2, 3]])], [0, 0], None, *pages, "auto")
    torch.library.opcheck(operator, arguments, test_utils=checks)
    torch.library.opcheck(operator, (NODES, LENGTHS, [], [-1, -1], None, K, V, "torch"), test_utils=checks)
