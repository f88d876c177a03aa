"""What only the CPU kernels have: instruction sets, threads, chunks, and an exponential of their own."""

import subprocess
import sys

import pytest
import torch

from specdec_ops import merge_states, tree_attention
from specdec_ops._core import loader
from tests.attention.attention_cases import assert_right, chain, forest, make_case, random_tree, star

ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
kernels, reason = loader.load()
pytestmark = pytest.mark.skipif(kernels is None, reason=str(reason))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = (
    {},
    {"window": 70, "page_size": 16},
    {"alibi": True, "softcap": 20.0, "packed": True},
    {"sinks": True, "v_scale": 0.5, "page_size": 5},
)
# (trees, contexts, heads, kv_heads, dim): one row, a few rows, one block of rows, several blocks, rows past a block
SHAPES = (
    ([chain(1)], [300], 2, 2, 128),
    ([chain(1), chain(2)], [63, 700], 8, 2, 64),
    ([star(9), chain(3)], [130, 0], 4, 2, 80),
    ([forest(40), random_tree(16)], [257, 1000], 4, 1, 128),
    ([random_tree(130), random_tree(65)], [90, 31], 6, 2, 96),
    ([random_tree(70)], [50], 2, 2, 256),
    ([random_tree(20)], [100], 3, 1, 48),
)


# The last two instruction sets add bfloat16 only: for other dtypes avx512 runs under their names.
BY_ISA = [(isa, dtype) for isa in ISAS for dtype in DTYPES if dtype == torch.bfloat16 or ISAS.index(isa) < 3]


@pytest.mark.parametrize(("isa", "dtype"), BY_ISA, indirect=["isa"], ids=str)
@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("features", range(len(FEATURES)))
def test_every_instruction_set_is_right(isa, shape, features, dtype):
    trees, contexts, heads, kv_heads, dim = SHAPES[shape]
    case = make_case(trees, contexts, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, **FEATURES[features])
    assert_right(case, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_any_strides(isa, dtype):
    """Rows that start at odd elements: pairs of bfloat16 then straddle words, and vectors straddle lines."""
    case = make_case([random_tree(33)], [200], heads=4, kv_heads=2, dim=64, dtype=dtype)
    for name in ("k_cache", "v_cache"):
        cache = getattr(case, name)
        wide = torch.full((*cache.shape[:-1], 67), float("nan"), dtype=dtype)
        wide[..., 3:] = cache
        setattr(case, name, wide[..., 3:])
    assert_right(case, "cpu")


@pytest.mark.parametrize(
    ("tree", "context", "heads"),
    [
        (chain(1), 5000, (8, 8)),
        (chain(2), 700, (8, 2)),
        (random_tree(40), 5000, (4, 1)),
        (random_tree(300), 2500, (4, 2)),
    ],
    ids=("one row", "few rows", "chunks side by side", "groups of rows"),
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=("float32", "bfloat16"))
def test_threads_change_no_bit(isa, tree, context, heads, dtype, threads):
    """Every number of threads cuts the work differently. The bits may depend on the request alone."""
    case = make_case([tree], [context], heads=heads[0], kv_heads=heads[1], dtype=dtype)
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        results.append(case.run("cpu", return_lse=True))
    for other in results[1:]:
        assert torch.equal(other.out, results[0].out)
        assert torch.equal(other.lse, results[0].lse)


def test_long_context(isa):
    """More slots than the most chunks of the usual size hold."""
    assert_right(make_case([chain(2)], [40_000], heads=2, kv_heads=1, dim=64, dtype=torch.bfloat16), "cpu")


def test_many_rows(isa):
    """More rows than one lane holds: 512 nodes of 8 heads at dim 256."""
    assert_right(make_case([random_tree(512)], [20], heads=8, kv_heads=1, dim=256), "cpu")


def test_every_batch_is_served_in_bounded_memory(isa):
    """Enough short requests that their waiting states must be handled in several slices."""
    contexts = [1000 + 7 * i for i in range(40)]
    assert_right(make_case([chain(1)] * 40, contexts, heads=16, kv_heads=16, dim=64, dtype=torch.bfloat16), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("dim", [1, 7, 64, 100])
def test_merge_on_every_instruction_set(isa, dtype, dim):
    generator = torch.Generator().manual_seed(dim)
    parts = [torch.randn(3, 5, dim, generator=generator).to(dtype) for _ in range(2)]
    lses = [torch.randn(3, 5, generator=generator) * 3 for _ in range(2)]
    lses[0][0, 0] = lses[1][0, 0] = lses[1][0, 1] = -float("inf")
    parts[1][0, 1] = float("nan")  # saw nothing, so it must not matter
    got = merge_states(parts[0], lses[0], parts[1], lses[1], backend="cpu")
    want = merge_states(parts[0], lses[0], parts[1], lses[1], backend="torch")
    assert (got.out[0, 0] == 0).all()
    assert got.lse[0, 0] == -float("inf")
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)


def exp2_of(x: torch.Tensor, weights: bool) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    kernels.exp2_cpu(x.data_ptr(), y.data_ptr(), x.numel(), weights)
    return y


@pytest.mark.parametrize(("weights", "bound"), [(False, 3e-7), (True, 9e-5)], ids=("fp32", "bfloat16 weights"))
def test_the_error_of_the_exponential(isa, weights, bound):
    """The bounds that csrc/common/cpu/simd.h states, over all arguments that kernels form: to 2^8 above the maximum."""
    x = torch.linspace(-126, 8, 1 << 20)
    relative = exp2_of(x, weights).double() / torch.exp2(x.double()) - 1
    assert relative.abs().max() < bound


def test_the_edges_of_the_exponential(isa):
    x = torch.tensor([-float("inf"), -1e30, -200.0, 0.0, 1.0, 8.0, -1.0, -125.0] * 2)
    for weights in (False, True):
        y = exp2_of(x, weights)
        assert (y[:3] == 0).all(), "what is masked must weigh exactly nothing"
        torch.testing.assert_close(y[3:8], torch.exp2(x[3:8]), rtol=1e-4, atol=0)
        assert y[3] == 1


def test_a_wrong_name_is_one_sentence():
    script = "import torch, specdec_ops; from specdec_ops._core import loader; print(loader.load()[0].cpu_isa())"
    run = subprocess.run(
        [sys.executable, "-c", script], env={"SPECDEC_OPS_CPU_ISA": "avx9"}, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "SPECDEC_OPS_CPU_ISA must be generic, avx2, avx512, avx512_bf16 or amx, got 'avx9'" in run.stderr


@pytest.mark.parametrize("length", [-1, 200, 2**31 - 1])
def test_lengths_that_the_cache_cannot_hold(length):
    case = make_case([chain(3), chain(2)], [4, 9])
    lengths = torch.tensor([4, length], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"specdec_ops.tree_attention: context_lens\[1\]"):
        tree_attention(case.q, case.k_cache, case.v_cache, case.topology, lengths, backend="cpu")


@pytest.mark.parametrize("start", [-(2**31), -3, 3, 2**31 - 1])
def test_queries_before_and_after_the_tree_are_padding(start):
    case = make_case([chain(3), chain(3)], [4, 9])
    starts = torch.tensor([start, 0], dtype=torch.int32)
    got = case.run("cpu", query_start=starts, return_lse=True)
    assert (got.out[0] == 0).all()
    assert (got.lse[0] == -float("inf")).all()
    assert torch.equal(got.out[1], case.run("cpu")[1])
