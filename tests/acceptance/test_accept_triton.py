"""The Triton kernels of acceptance and sampling: their noise, their logarithm, and rows of several blocks.

The cases common to all backends are in test_accept.py and test_sampling.py. There, in Triton's interpreter, a
vocabulary is one block; here blocks are made small, so that ties, cuts and winners lie in different ones.
"""

import math

import numpy as np
import pytest
import torch

from specdec_ops import Topology, sample_children, sample_tokens
from specdec_ops.ops.acceptance import reference_philox as reference_noise
from tests.acceptance.accept_cases import RULES, WITH_DRAFT, Bands, make_case, random_parents, star

pytest.importorskip("triton")
import triton
import triton.language as tl
from specdec_ops.triton_kernels.acceptance import sample
from specdec_ops.triton_kernels.common import philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 64

# Published vectors of Random123: counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def philox_kernel(seed, counter, out):
    lane = tl.arange(0, 4)
    c0 = tl.load(counter) + lane * 0
    a, b, c, d = philox.philox(tl.load(seed), c0, tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3))
    tl.store(out + lane, tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)).to(tl.int64))


@triton.jit
def exponential_kernel(v, out, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + lane, philox.exponential(tl.load(v + lane)))


@triton.jit
def uniforms_kernel(seed, out, start, position, domain, salt, BLOCK: tl.constexpr):
    v = philox.token_uniforms(philox.NoiseStream(tl.load(seed), position, domain, salt), start, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), v)


@triton.jit
def coin_kernel(seed, out, position, node, level):
    tl.store(out, philox.node_coin(tl.load(seed), position, node, level))


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of a hundred tokens take several blocks."""
    monkeypatch.setattr(sample, "MAX_BLOCK", BLOCK)


def signed(value, bits):
    return value - (1 << bits) if value >> (bits - 1) else value


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_is_the_published_one(counter, key, words):
    seed = torch.tensor([signed(key[0] | key[1] << 32, 64)], device=DEVICE)
    counter = torch.tensor([signed(word, 32) for word in counter], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](seed, counter, out)
    assert tuple(out.tolist()) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 7, -(2**63)])
def test_noise_is_the_references(seed):
    """The same integers, and in the right lanes, so the same tokens."""
    key = torch.tensor([seed], device=DEVICE)
    got = torch.zeros(BLOCK, device=DEVICE)
    uniforms_kernel[(1,)](key, got, 2 * BLOCK, 77, 3, 5, BLOCK)
    words = reference_noise.words(3 * BLOCK, seed, 77, 3, 5)[2 * BLOCK :]
    exact = (words.double() + 0.5) * 2.0**-32
    torch.testing.assert_close(got.cpu().double(), exact, rtol=2**-23, atol=0)

    coin = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    for node, level in ((0, 1), (5, 0), (6, 0), (1023, 1)):
        coin_kernel[(1,)](key, coin, -3, node, level)
        assert coin.item() == reference_noise.coin(seed, -3, node, level=bool(level))


def test_a_seed_given_as_a_number_is_the_same_seed():
    for seed in (0, 1, 2**31, 2**32 - 1, 2**40 + 7, 2**63 - 1, -1, -(2**63)):
        low, high = sample.seed_words(seed)
        assert -(2**31) <= low < 2**31 and -(2**31) <= high < 2**31
        assert (high << 32 | low & 0xFFFFFFFF) - seed in (0, 2**64)


def test_exponential_is_exact_in_every_binade():
    """-log1p(-v) to 1e-6, from 2^-33 to the last number below 1: a plain log is wrong by a factor near either end."""
    rng = np.random.default_rng(0)
    small = np.concatenate([2.0**-power * (1 + rng.random(240)) for power in range(1, 34)])
    large = 1 - 2.0 ** -np.linspace(1, 24, 8192 - len(small) - 2)
    v = np.concatenate([small, large, [2.0**-33, 1 - 2.0**-24]]).astype(np.float32)
    v = v[v < 1]
    v = np.concatenate([v, np.full(8192 - len(v), 0.5, np.float32)])
    out = torch.zeros(len(v), device=DEVICE)
    exponential_kernel[(8,)](torch.from_numpy(v).to(DEVICE), out, 1024)
    exact = -np.log1p(-v.astype(np.float64))
    assert np.abs(out.cpu().numpy() / exact - 1).max() < 1e-6
    assert (np.abs(np.log(v.astype(np.float32)) / exact - 1) > 0.1).any(), "what the test must tell apart"
    exponential_kernel[(1,)](torch.ones(1024, device=DEVICE), out, 1024)
    assert torch.isinf(out[:1024]).all()


def test_the_tail_is_neither_cut_off_nor_inflated():
    """A token 20 below the top wins with its probability: integrated over the kernel's own exponentials.

    P(win) is the mean over the tail's v of P(E_top > E_tail / w). v is taken at the midpoints of the 2^32 words: all of
    the smallest 2^16, where the wins are, and strata above.
    """
    weight = math.exp(-20)
    dense = (np.arange(2**16) + 0.5) * 2.0**-32
    edges = np.geomspace(2.0**-16, 1.0, 2**16 + 1)
    middles, widths = np.sqrt(edges[1:] * edges[:-1]), np.diff(edges)
    v = np.concatenate([dense, middles]).astype(np.float32)
    share = np.concatenate([np.full(2**16, 2.0**-32), widths])
    out = torch.zeros(len(v), device=DEVICE)
    exponential_kernel[(len(v) // 8192,)](torch.from_numpy(v).to(DEVICE), out, 8192)
    win = (share * np.exp(-out.cpu().numpy().astype(np.float64) / weight)).sum()
    assert abs(win / (weight / (1 + weight)) - 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1, 63, 150])
def test_filters_cut_exactly_across_blocks(vocab, dtype, small_blocks):
    """Ties at the cut, in several blocks, go to the lowest ids; unlike fp32, rounded logits have many."""
    rows = 4
    logits = (2 * torch.randn(rows, vocab)).to(dtype)
    logits[1] = (logits[1] / 2).round()
    logits[2] = 0.0
    logits[3, ::2] = float("-inf")
    options = {
        "top_k": torch.tensor([5, 30, 70, 0], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.8]),
        "seeds": 3,
    }
    for position in range(1):
        got, want = (
            sample_tokens(logits.to(on), positions=position, backend=name,
                          **{key: value.to(on) if hasattr(value, "to") else value for key, value in options.items()})
            for name, on in (("triton", DEVICE), ("torch", "cpu"))
        )  # fmt: skip
        assert torch.equal(got.cpu(), want)
    drawn = min(vocab, 7)  # more than the filters keep: what is drawn is the kept set
    got, want = (
        sample_children(logits[None, :3].to(on), drawn, seeds=1, positions=9, first_parent=0, top_k=6, top_p=0.95,
                        backend=name)
        for name, on in (("triton", DEVICE), ("torch", "cpu"))
    )  # fmt: skip
    assert torch.equal(got.tokens.cpu(), want.tokens)
    torch.testing.assert_close(got.logprobs.cpu(), want.logprobs, rtol=1e-5, atol=1e-5)


def options_of(rule):
    found = {"width": 3} if rule == "longest" else {}
    if rule != "greedy":
        found |= {"temperature": 0.8, "top_k": 90, "top_p": 0.97}
    return found


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_several_blocks(rule, small_blocks):
    """150 tokens are three blocks; excluded tokens, terms and races cross them. Some requests are greedy."""
    trees = [random_parents(size, size, 3 if rule == "longest" else 1) for size in (7, 9)]
    options = options_of(rule)
    if rule != "greedy":
        options["temperature"] = torch.tensor([0.8, 0.0])
    case = make_case(rule, trees, 150, seed=2, dirt=0.1, draft_vocab=90 if rule in WITH_DRAFT else None, **options)
    case.target[0, 0, 140] = 9.0
    bands = Bands()
    bands.check(case, case.to(DEVICE).run("triton"))


@pytest.mark.parametrize("rule", ["recursive", "traversal", "target_only"])
def test_excluded_tokens_of_a_wide_node(rule, small_blocks):
    """Two dozen siblings, rejected one after another, several in one word of the bit set; the set is not left dirty."""
    case = make_case(rule, [star(24), [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]], 130, scale=0.3, gap=0.3, one_hot=True)
    bands = Bands()
    bands.check(case, case.to(DEVICE).run("triton"))


@pytest.mark.parametrize("rule", ["traversal", "typical", "longest"])
def test_links_that_share_nodes_end(rule):
    """Every node links to the next two: followed blindly, that is exponential in the nodes. It is reported instead."""
    nodes = 24
    first = torch.tensor([[*range(1, nodes), -1]], dtype=torch.int32)
    sibling = torch.tensor([[-1, *range(2, nodes), -1]], dtype=torch.int32)
    case = make_case(rule, [[node - 1 for node in range(nodes)]], 20, **({"width": 1} if rule == "longest" else {}))
    names = ("parents", "depths", "ancestors", "num_nodes", "status")
    tree = Topology(**{name: getattr(case.topology, name) for name in names}, first_child=first, next_sibling=sibling)
    case = case.changed(topology=tree)
    got = case.to(DEVICE).run("triton")
    assert got.status.item() & 16
    Bands().check(case, got)


@pytest.mark.parametrize("rule", ["recursive", "traversal", "kseq"])
def test_malformed_rows(rule, small_blocks):
    """NaN in another block than the maximum; +inf; nothing but -inf; the same in the draft's rows."""
    case = make_case(rule, [star(3)] * 6, 100, seed=4)
    case.target[0, 0, 99], case.target[1, 0, 70:72], case.target[2, 0] = float("nan"), float("inf"), float("-inf")
    case.draft[3, 0, 99], case.draft[4, 0, 70:72], case.draft[5, 0] = float("nan"), float("inf"), float("-inf")
    got = case.to(DEVICE).run("triton")
    assert [status & 3 for status in got.status.tolist()] == [1, 1, 1, 2, 2, 2]
    Bands().check(case, got)
