"""Whether the CPU kernels are lossless, by statistics: over three million sequences in all.

Exact enumeration (test_accept_enumeration.py) proves the rules; this proves that kernels, noise and samplers together
do what the rules say. Target and draft are Markov chains over 8 tokens, so every row depends on what came before.
Children are drawn by `sample_children`, decided by the rule, and what a round leaves short is completed by
`sample_tokens` from the target, as a decoder would. Then the joint law of the first three tokens is compared with the
target's by a G test over 512 cells, and so is every conditional law given its prefix.

Every p-value must be above ALPHA = 1e-6, or that divided by the number of tests that are made together; there are fewer
than 90 of these, so right kernels fail with a probability below 9e-5 (seeds are fixed: no run differs from another).
Power: at 160,000 sequences a G test over 511 degrees of freedom finds, nine times in ten, a relative deviation of all
cells by 4%, and one over 7 degrees of freedom by 2% (`test_the_test_has_the_power_it_claims`); the wrong rules that are
planted below shift cells by more, and are found.
"""

import math

import pytest
import torch

from specdec_ops import backends, chain_accept, sample_children, sample_tokens
from specdec_ops.ops.acceptance.reference_sample import Settings, law
from tests.acceptance.accept_sequences import (
    ALPHA,
    RULES,
    STEPS,
    VOCAB,
    assert_fits,
    assert_rate,
    chains,
    completed,
    counts_of,
    decide,
    g_statistic,
    joint_law,
    p_value,
)

SEQUENCES = 160_000
pytestmark = pytest.mark.skipif(backends("accept")["cpu"] is not None, reason=str(backends("accept")["cpu"]))


def independent(rows, columns):
    """Two sequences of small integers, paired, are independent. False if one of them hardly varies."""
    table = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1, dtype=torch.float64)
    table.index_put_((rows, columns), torch.ones(len(rows), dtype=torch.float64), accumulate=True)
    table = table[table.sum(1) > 50][:, table.sum(0) > 50]
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    g, _ = g_statistic(table, expected)
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    if freedom == 0:
        return False
    assert p_value(g, freedom) > ALPHA, f"G {g:.1f} at {freedom} degrees of freedom"
    return True


def assert_lossless(sequences, target):
    """The joint law, and every law given its prefix."""
    joint, counts = joint_law(target), counts_of(sequences)
    assert_fits(counts, joint)
    p = torch.softmax(target.double(), -1)
    assert_fits(counts.sum((1, 2)), p[0])
    tests = VOCAB + VOCAB**2
    for first in range(VOCAB):
        assert_fits(counts[first].sum(1), p[first], 1 / tests)
        for second in range(VOCAB):
            if counts[first, second].sum() >= 100:
                assert_fits(counts[first, second], p[second], 1 / tests)


@pytest.mark.parametrize("name", RULES)
def test_sequences_are_the_targets(name):
    """The joint law of three tokens, and the laws given their prefixes."""
    target, draft = chains()
    seeds = torch.arange(SEQUENCES) * 7919 + 13
    _, result = decide(name, target, draft, seeds)
    assert not result.status.any()
    assert 0.05 < float((result.num_accepted > 0).double().mean()) < 0.99
    assert_lossless(completed(result, target, seeds), target)


def test_acceptance_rates():
    """Closed forms: sum min(p, q) for a chain, the mass of the children for deterministic ones, kseq's own equation."""
    target, draft = chains()
    p, q = torch.softmax(target.double(), -1), torch.softmax(draft.double(), -1)
    seeds = torch.arange(SEQUENCES) - 2**40
    both = torch.minimum(p, q).sum(-1)
    _, result = decide("token", target, draft, seeds)
    assert_rate(int((result.num_accepted >= 1).sum()), SEQUENCES, float(both[0]))
    assert_rate(int((result.num_accepted == 2).sum()), SEQUENCES, float((torch.minimum(p, q)[0] * both).sum()))

    _, result = decide("target_only", target, draft, seeds)
    children = draft[0].topk(3).indices
    assert_rate(int((result.num_accepted >= 1).sum()), SEQUENCES, float(p[0, children].sum()))

    def two_draws(rho):
        beta = float(torch.minimum(q[0], p[0] / rho).sum())
        return 1 - (1 - beta) ** 2, rho * beta

    low, high = 1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        reached, least = two_draws(middle)
        low, high = (middle, high) if reached > least else (low, middle)
    _, result = decide("kseq", target, draft, seeds)
    assert_rate(int((result.num_accepted >= 1).sum()), SEQUENCES, two_draws(high)[0])


def test_block_verification_accepts_more():
    """Than token by token, on the same drafts."""
    target, draft = chains()
    seeds = torch.arange(SEQUENCES)
    accepted = [decide(rule, target, draft, seeds)[1].num_accepted.double().mean() for rule in ("token", "block")]
    assert accepted[1] > accepted[0] + 0.005


def test_children_have_the_law_that_acceptance_is_told():
    """Pairs without replacement: q(x) q(y) / (1 - q(x)). With: q(x) q(y)."""
    _, draft = chains()
    q = torch.softmax(draft[3].double(), -1)
    rows = draft[3].expand(SEQUENCES, 1, VOCAB)
    for replacement in (False, True):
        got = sample_children(
            rows, 2, replacement=replacement, seeds=torch.arange(SEQUENCES), positions=5, backend="cpu"
        )
        pairs = q[:, None] * q if replacement else q[:, None] * q / (1 - q[:, None]) * (1 - torch.eye(VOCAB))
        assert_fits(counts_of(got.tokens[:, 0].long()), pairs)


@pytest.mark.parametrize("vocab", [32])
def test_filtered_and_scaled_samples(vocab):
    """Temperature, top-k and top-p, at a vocabulary of 32."""
    row = 2 * torch.randn(vocab)
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.3, 9, 1.0), (1.0, 0, 0.8), (2.0, 20, 0.9)):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        seeds = torch.arange(100_000)
        got = sample_tokens(row.expand(100_000, vocab), seeds=seeds, positions=3, backend="cpu", **options)
        want = law(row, Settings(temperature, top_k, top_p)).probabilities
        assert_fits(torch.bincount(got.long(), minlength=vocab), want)


def test_the_far_tail_of_a_large_vocabulary():
    """One token above 32,767 that lie 18 below it: each has 1.5e-8, together 5e-4.

    Uniforms of 24 bits give the tail four times or a tenth of that; a Poisson count of 30 is between 8 and 63 but for
    one time in a million.
    """
    vocab, rows = 32_768, 60_000
    row = torch.full((vocab,), -18.0)
    row[12_345] = 0.0
    tail = (vocab - 1) * math.exp(-18.0)
    got = sample_tokens(row.expand(rows, vocab), seeds=torch.arange(rows), positions=1, backend="cpu")
    hits = int((got != 12_345).sum())
    mean = rows * tail / (1 + tail)
    assert 28 < mean < 32
    assert 8 <= hits <= 63
    row[:] = -20.0  # 24 bits would give 58 of these, 2 are due
    row[12_345] = 0.0
    rows //= 2
    got = sample_tokens(row.expand(rows, vocab), seeds=torch.arange(rows) + 2**33, positions=1, backend="cpu")
    assert int((got != 12_345).sum()) <= 14


def test_draws_are_independent():
    """The rejected token and the next one; a coin and the residual; neighbours by position, by seed and by domain."""
    target, draft = chains()
    seeds = torch.arange(SEQUENCES) + 2**35
    tokens, result = decide("token", target, draft, seeds)
    rejected, bonuses = [], []
    for token in range(VOCAB):
        # Given the token before, the next one does not know which was rejected; given the last token, the bonus does
        # not know the one before.
        at_second = (result.num_accepted == 1) & (tokens[:, 1] == token)
        at_end = (result.num_accepted == STEPS) & (tokens[:, 2] == token)
        if at_second.sum() > 1000:
            rejected.append(independent(tokens[at_second, 2].long(), result.next_token[at_second].long()))
        if at_end.sum() > 1000:
            bonuses.append(independent(tokens[at_end, 1].long(), result.next_token[at_end].long()))
    assert sum(rejected) > 2
    assert sum(bonuses) > 2
    row = target[2].expand(SEQUENCES, VOCAB)
    here = sample_tokens(row, seeds=seeds, positions=100, backend="cpu").long()
    after = sample_tokens(row, seeds=seeds, positions=101, backend="cpu").long()
    assert independent(here, after)
    assert independent(here[0::2], here[1::2])
    drafted = sample_children(row[:, None], 1, seeds=seeds, positions=100, backend="cpu").tokens[:, 0, 0].long()
    assert independent(here, drafted)
    bonus = chain_accept(
        row[:, None], torch.empty(SEQUENCES, 0, dtype=torch.int32), seeds=seeds, positions=100, backend="cpu"
    ).next_token.long()
    assert independent(here, bonus)
    assert independent(drafted, bonus)
    twice = (
        sample_children(row[:, None], 2, replacement=True, seeds=seeds, positions=7, backend="cpu").tokens[:, 0].long()
    )
    assert independent(twice[:, 0], twice[:, 1])


WRONG = {
    "a draft at another temperature than it said": ("token", {"draft_temperature": 1.2}),
    "children without replacement, taken for with": ("recursive with replacement", {"drawn_with": False}),
    "deterministic children, taken for drawn ones": ("one-hot", {"soft": True}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_is_found(wrong):
    """The joint law has teeth."""
    target, draft = chains()
    name, changes = WRONG[wrong]
    seeds = torch.arange(SEQUENCES)
    _, result = decide(name, target, draft, seeds, **changes)
    counts, joint = counts_of(completed(result, target, seeds)), joint_law(target)
    g, freedom = g_statistic(counts, joint * SEQUENCES)
    assert p_value(g, freedom) < ALPHA


@pytest.mark.parametrize(("cells", "deviation"), [(512, 0.04), (8, 0.02)])
def test_the_test_has_the_power_it_claims(cells, deviation):
    """Cells that are too likely and too rare by turns, by this much: found in at least 18 of 20 trials."""
    rng = torch.Generator().manual_seed(5)
    target, _ = chains()
    right = joint_law(target).flatten() if cells == 512 else torch.softmax(target[0].double(), -1)
    sign = torch.ones(cells, dtype=torch.float64)
    sign[right.argsort()[::2]] = -1
    wrong = right * (1 + deviation * sign)
    wrong = wrong / wrong.sum()
    found = 0
    for _ in range(20):
        counts = torch.bincount(torch.multinomial(wrong, SEQUENCES, replacement=True, generator=rng), minlength=cells)
        found += p_value(*g_statistic(counts, right * SEQUENCES)) < ALPHA
    assert found >= 18
