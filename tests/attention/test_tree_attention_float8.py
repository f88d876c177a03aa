"""tree_attention over fp8 (e4m3) caches: the same answer as over what the caches' numbers are."""

import dataclasses
import itertools

import pytest
import torch

from specdec_ops import Tree, backends, tree_attention
from tests.attention.attention_cases import assert_right, chain, make_case, random_tree, star
from tests.emulator import build, kernels

FLOAT8 = torch.float8_e4m3fn
BACKENDS = [
    "torch",
    *([] if build.why_not() else [kernels.BACKEND]),
    *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []),
]


def float8_case(trees, contexts, dtype, **options):
    """A case whose caches hold fp8 numbers, and whose expected answer is that for these numbers."""
    case = make_case(trees, contexts, dtype=dtype, k_scale=0.7, v_scale=1.6, **options)
    return dataclasses.replace(
        case,
        k_cache=case.k_cache.to(FLOAT8),
        v_cache=case.v_cache.to(FLOAT8),
        keys=[keys.to(FLOAT8).to(dtype) for keys in case.keys],
        values=[values.to(FLOAT8).to(dtype) for values in case.values],
    )


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Those that take fp8 caches."""
    if request.param == kernels.BACKEND:
        monkeypatch.setattr("specdec_ops._core.dispatch.resolve", lambda *_: kernels.IMPLEMENTATIONS["tree_attention"])
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("dim", "heads", "options"),
    [
        (64, (4, 2), {"packed": True}),
        (80, (2, 2), {"page_size": 16}),
        (128, (8, 1), {"sinks": True, "window": 40}),
        (128, (3, 1), {"page_size": 5, "packed": True, "alibi": True, "softcap": 3.0}),
    ],
    ids=["64", "80", "128", "128-features"],
)
def test_float8_caches(dim, heads, options, dtype, backend):
    """Ragged, with blocks of 16 to 128 rows, and NaN in every slot that nobody sees."""
    trees, contexts = [random_tree(13), chain(1), star(4)], [70, 0, 133]
    device = "cuda" if backend == "cuda" else "cpu"
    case = float8_case(trees, contexts, dtype, dim=dim, heads=heads[0], kv_heads=heads[1], device=device, **options)
    assert_right(case, backend)


@pytest.mark.parametrize("nodes", [20, 50])
def test_float8_caches_in_parts(nodes, backend):
    """Joined from several parts, which leave their columns in another order than 16-bit caches."""
    case = float8_case(
        [random_tree(nodes)], [150], torch.bfloat16, heads=2, kv_heads=1, num_splits=3, device=device_of(backend)
    )
    assert_right(case, backend)


def device_of(backend):
    """The device whose tensors it takes."""
    return "cuda" if backend == "cuda" else "cpu"


def test_every_code_is_read_exactly(backend):
    """One slot per row of a tree whose nodes are all roots: a row sees only its own slot, and returns its values."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8).view(FLOAT8)
    case = float8_case([[-1] * 4], [0], torch.bfloat16, heads=1, kv_heads=1, device=device_of(backend))
    values = torch.zeros(4 * 64, dtype=torch.uint8)
    values[: len(codes)] = codes.view(torch.uint8)
    cache = torch.zeros_like(case.v_cache.view(torch.uint8))
    cache[0, :4, 0] = values.view(4, 64).to(cache.device)
    got = dataclasses.replace(case, v_cache=cache.view(FLOAT8)).run(backend, v_scale=1.0, k_scale=1.0)
    assert torch.equal(got[0, :, 0].cpu(), values.view(FLOAT8).view(4, 64).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_a_code_of_nan_reaches_those_who_see_it(dim, dtype, backend):
    """Both signs, in K and in V, of the context and of a sibling."""
    device = device_of(backend)
    tree = Tree([-1, 0, 0, 0]).to(device)
    for sign, in_keys, slot in itertools.product((0x7F, 0xFF), (False, True), (2, 6)):
        q = torch.ones(1, 4, 2, dim, device=device, dtype=dtype)
        k, v = (torch.full((1, 9, 1, dim), 0x38, dtype=torch.uint8) for _ in range(2))  # 1 in e4m3
        (k if in_keys else v)[0, slot] = sign
        k, v = (cache.view(torch.float8_e4m3fn).to(device) for cache in (k, v))
        out = tree_attention(q, k, v, tree, 5, backend=backend)
        sees = torch.tensor([True] * 4 if slot == 2 else [False, True, False, False], device=device)
        assert out[0, sees].isnan().all() and (out[0, ~sees] == 1).all(), (sign, in_keys, slot)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_others_refuse_them(name):
    """In one sentence; auto takes the definition."""
    case = float8_case([chain(3)], [5], torch.bfloat16)
    if reason := backends("tree_attention", "cpu")[name]:
        pytest.skip(reason)
    with pytest.raises(
        RuntimeError, match=f"backend='{name}' is unavailable: its kernels take caches of q's dtype, not float8"
    ):
        case.run(name)
    assert torch.equal(case.run("auto"), case.run("torch"))


def test_caches_must_agree():
    """Both are fp8, or neither."""
    case = float8_case([chain(3)], [5], torch.bfloat16)
    with pytest.raises(TypeError, match=r"v_cache must be float8_e4m3fn \[batch, slots, kv_heads, dim\] like k_cache"):
        dataclasses.replace(case, v_cache=case.v_cache.to(torch.bfloat16)).run("torch")
