"""What only the CPU kernels of acceptance have: instruction sets, threads, and a filter that never sorts a row."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from specdec_ops import Topology, Tree, chain_accept, greedy_accept, sample_children, sample_tokens, tree_accept
from specdec_ops._core import loader
from specdec_ops.ops.acceptance import reference_philox
from specdec_ops.ops.acceptance.reference_sample import Settings, law
from tests.acceptance.accept_cases import CHAINS, RULES, WITH_DRAFT, Bands, assert_same, make_case, random_parents
from tests.acceptance.pitfall_cases import INF, NAN, STATUS_TARGET

ISAS = ("generic", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
kernels, reason = loader.load()
pytestmark = pytest.mark.skipif(kernels is None, reason=str(reason))


def mixed_case(rule, vocab, seed, dtype=torch.float32, batch=6, nodes=8):
    """A ragged batch in which every request has its own temperature and filters."""
    rng = np.random.default_rng(seed)
    roots = 2 if rule == "longest" else 1
    trees = [random_parents(int(size), seed + index, roots) for index, size in enumerate(rng.integers(2, nodes, batch))]
    options = {"width": 3} if rule == "longest" else {}
    if rule != "greedy":
        options["temperature"] = torch.tensor(rng.choice([0.0, 0.5, 1.0, 1.5], batch), dtype=torch.float32)
        options["top_k"] = torch.tensor(rng.choice([0, 3, vocab // 2], batch), dtype=torch.int32)
        options["top_p"] = torch.tensor(rng.choice([1.0, 0.9, 0.3], batch), dtype=torch.float32)
    return make_case(rule, trees, vocab, seed=seed, dtype=dtype, **options)


@functools.cache
def known_case(rule, dtype):
    """A case and what the definition says to it. 321 tokens: five words of the bit set and one more token."""
    case = mixed_case(rule, 321, RULES.index(rule), dtype)
    return case, case.run("torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_instruction_set_is_right(isa, dtype):
    """Every rule against the definition."""
    bands = Bands()
    for rule in RULES:
        case, want = known_case(rule, dtype)
        bands.check(case, case.run("cpu"), want)
    bands.assert_rare()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_greatest_of_any_signs(isa, dtype):
    """Its first place, at lengths around those of vectors and blocks; a NaN of either sign is found anywhere."""
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 31, 128, 511, 8192, 8193, 20_000):
        drawn = torch.randn(vocab, generator=generator).to(dtype)
        rows = {"any": drawn, "negative": -drawn.abs() - 1, "zeros": torch.zeros(vocab, dtype=dtype)}
        rows |= {"least": torch.full((vocab,), -INF, dtype=dtype), "zero below": torch.where(drawn < 0, drawn, -0.0)}
        rows["least"][vocab // 2] = torch.finfo(dtype).min
        rows["zeros"][: vocab // 2] = -0.0
        for name, row in rows.items():
            first = (row == row.max()).nonzero()[0].item()
            got = greatest(row)
            assert (got.next_token.item(), got.status.item()) == (first, 0), (vocab, name)
            for nan in (0x7FC0, 0xFFC0 - 0x10000) if dtype == torch.bfloat16 else (NAN, -NAN):
                spoilt = row.clone()
                (spoilt.view(torch.int16) if dtype == torch.bfloat16 else spoilt)[vocab * 2 // 3] = nan
                assert greatest(spoilt).status.item() == STATUS_TARGET, (vocab, name, nan)


def greatest(row):
    """Greedy decoding of one row."""
    tree = Topology.from_trees([Tree.chain(1)])
    return greedy_accept(row.view(1, 1, -1), torch.zeros(1, 1, dtype=torch.int32), tree, backend="cpu")


def without_unused(result):
    return [getattr(result, field.name) for field in dataclasses.fields(result)]


@pytest.mark.parametrize("rule", RULES)
def test_threads_never_show(rule, threads):
    """Bit for bit: a request on a thread of its own, or its rows shared by threads. Three chunks, and an odd end."""
    dtype = torch.bfloat16 if rule in ("token", "traversal") else torch.float32
    case = mixed_case(rule, 40_003, 7, dtype, batch=4, nodes=6)
    threads(1)
    want = case.run("cpu")
    for count in (2, 3):
        threads(count)
        assert_same(case.run("cpu"), want)


@pytest.mark.parametrize("count", [1, 4])
def test_threads_never_show_in_samples(count, threads):
    """Tokens, log-probabilities and masses are the same bits."""
    logits = 3 * torch.randn(2, 2, 40_003)
    found = []
    for number in (1, 2, 3):
        threads(number)
        options = {"top_k": torch.tensor([0, 900], dtype=torch.int32), "top_p": torch.tensor([0.8, 0.7])}
        found.append(sample_children(logits, count, seeds=3, positions=5, backend="cpu", **options))
    for other in found[1:]:
        for mine, theirs in zip(without_unused(other), without_unused(found[0]), strict=True):
            assert torch.equal(mine, theirs)


def test_instruction_sets_agree_on_large_rows():
    """Sums are taken in another order, so that a decision in thousands may differ, and no more."""
    differing = compared = 0
    try:
        for rule in RULES:
            case = mixed_case(rule, 20_011, 11, batch=4, nodes=4)
            results = []
            for isa in ISAS:
                kernels.set_cpu_isa(isa)
                results.append(case.run("cpu"))
            for other in results[1:]:
                compared += len(other.status)
                pairs = zip(without_unused(other), without_unused(results[0]), strict=True)
                unequal = [(a != b).reshape(len(b), -1).any(dim=1) for a, b in pairs]
                differing += int(torch.stack(unequal).any(dim=0).sum())
    finally:
        kernels.set_cpu_isa("")
    assert differing <= 1, f"{differing} of {compared}"


def test_noise_of_every_lane(isa):
    """On a flat row the least exponential wins, wherever it lies; 1,000 tokens are several vectors and a tail."""
    rows, vocab = 300, 1003
    seeds = torch.arange(rows) * 0x1234567891 - 77
    got = sample_tokens(torch.zeros(rows, vocab), seeds=seeds, positions=torch.arange(rows).int(), backend="cpu")
    words = torch.stack(
        [reference_philox.words(vocab, int(seed), row, reference_philox.SAMPLE, 0) for row, seed in enumerate(seeds)]
    )
    assert torch.equal(got.long(), words.argmin(dim=1))
    assert len(set((got % 64).tolist())) > 55


def awkward_rows(vocab, dtype):
    """Rows on which a search for a threshold may stumble."""
    spread = torch.randn(vocab)
    rows = {
        "normal": 3 * spread,
        "flat": torch.full((vocab,), -2.5),
        "two values": torch.where(spread > 0.5, 1.0, 0.0),
        "zeros of both signs": torch.where(spread > 0, 0.0, -0.0),
        "steep": -0.5 * torch.arange(vocab).float()[torch.randperm(vocab)],
        "one peak": torch.where(torch.arange(vocab) == vocab // 3, 30.0, 0.0),
        "many -inf": torch.where(spread > 1.5, spread, float("-inf")),
        "large": 1e4 * spread,
        "tiny": 1e-6 * spread,
    }
    return {name: row.to(dtype) for name, row in rows.items()}


FILTERS = [(1, 1.0), (50, 1.0), (2000, 1.0), (0, 0.9), (0, 0.5), (0, 1e-9), (0, 0.999), (50, 0.7), (2000, 0.95)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("vocab", [5, 700, 20_011])
def test_filters_keep_exactly_the_right_tokens(vocab, dtype):
    """Their mass is the definition's, and so is the set, read back by drawing all of it.

    top-k must be exact. Where rounding decides, a top-p cut may move by a token.
    """
    moved = compared = 0
    for name, row in awkward_rows(vocab, dtype).items():
        for top_k, top_p in FILTERS:
            got = sample_children(
                row[None, None], vocab, seeds=1, positions=0, top_k=top_k, top_p=top_p, temperature=1.0, backend="cpu"
            )
            mine = got.tokens[0, 0][got.tokens[0, 0] >= 0].sort().values.long()
            want = law(row, Settings(1.0, top_k, top_p)).probabilities
            theirs = want.nonzero()[:, 0]
            z = row.double()
            mine, theirs = (ids[z[ids] - z.max() > -85] for ids in (mine, theirs))  # below that, weights are subnormal
            scale = torch.exp(z - z.max())
            kept = scale[mine].sum() / scale[want > 0].sum()
            token = scale[theirs].min() / scale[want > 0].sum()
            assert abs(float(kept) - 1) < 1e-5 + 1.001 * float(token), (name, top_k, top_p)
            compared += 1
            if not torch.equal(mine, theirs):
                moved += 1
                assert top_p < 1, (name, top_k, len(mine), len(theirs))
            expected = torch.logsumexp(z[mine], 0)
            assert abs(float(got.logsumexp[0, 0]) - float(expected)) < 1e-4 + 1e-6 * float(
                z.abs().amax().nan_to_num(posinf=0)
            )
    assert moved <= 0.06 * compared, f"{moved} of {compared}"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in CHAINS])
def test_wild_links(rule):
    """Any integers as links: no hang, no wild read, the definition's answer."""
    rng = torch.Generator().manual_seed(RULES.index(rule))
    bands = Bands()
    for seed in range(6):
        case = mixed_case(rule, 19, seed, batch=5, nodes=9)
        shape = case.topology.first_child.shape

        def wild(shape=shape):
            return torch.randint(-3, shape[1] + 2, shape, generator=rng, dtype=torch.int32)

        sizes = torch.randint(-1, shape[1] + 3, (shape[0],), generator=rng, dtype=torch.int32)
        topology = dataclasses.replace(case.topology, first_child=wild(), next_sibling=wild(), num_nodes=sizes)
        tokens = torch.randint(-1, 21, case.tokens.shape, generator=rng, dtype=torch.int32)
        changes = {"target": case.target.nan_to_num(0.0), "draft": case.draft}
        if case.draft is not None:
            changes["draft"] = case.draft.nan_to_num(0.0)
        case = case.changed(topology=topology, tokens=tokens, **changes)
        bands.check(case, case.run("cpu"))
    bands.assert_rare()


def test_kernels_read_their_inputs_only():
    """Inputs are the same bits afterwards."""
    for rule in RULES:
        case = mixed_case(rule, 333, 3)
        before = case.target.clone(), case.tokens.clone(), None if case.draft is None else case.draft.clone()
        case.run("cpu")
        after = case.target, case.tokens, case.draft
        for mine, theirs in zip(before, after, strict=True):
            assert mine is None or mine.equal(theirs) or torch.equal(mine.isnan(), theirs.isnan())


def test_a_rejection_after_tiny_steps_stays_exact():
    """One-hot children that take all but 2^-12 of the mass: N is summed again rather than differed away."""
    probabilities = torch.tensor([0.5, 0.3, 0.2 - 2.0**-13, 2.0**-14, 2.0**-14])
    batch = 20_000
    logits = probabilities.log().expand(batch, 4, 5)
    tokens = torch.tensor([[-9, 0, 1, 2]], dtype=torch.int32).expand(batch, 4)
    tree = Tree([-1, 0, 0, 0]).to("cpu")
    result = tree_accept(logits, tokens, tree, seeds=torch.arange(batch), positions=0, backend="cpu")
    assert result.status.eq(0).all()
    counts = torch.bincount(result.tokens[:, 0], minlength=5) / batch
    assert torch.allclose(counts, probabilities, atol=0.02)


def test_a_draft_of_another_dtype_and_vocabulary(isa):
    """Rows of the draft are gathered through the map, in their own dtype."""
    bands = Bands()
    for rule in WITH_DRAFT:
        if rule in CHAINS:
            continue
        case = make_case(
            rule, [random_parents(6, 2)] * 3, 130, seed=5, draft_vocab=70, **({"width": 2} if rule == "longest" else {})
        )
        case = case.changed(draft=case.draft.to(torch.float16))
        bands.check(case, case.run("cpu"))
    bands.assert_rare()


def test_chain_without_steps():
    """Nothing drafted: plain sampling with the noise of a bonus token."""
    logits = torch.randn(4, 1, 99)
    result = chain_accept(logits, torch.empty(4, 0, dtype=torch.int32), seeds=9, positions=1, backend="cpu")
    want = chain_accept(logits, torch.empty(4, 0, dtype=torch.int32), seeds=9, positions=1, backend="torch")
    assert_same(result, want)
