"""The noise: published vectors, the laws of coins and races, disjoint counters, and the tail that float32 could cut."""

import math

import pytest
import torch

from specdec_ops.ops.acceptance import reference_philox

# Counter, key, output: Random123's known answers for philox4x32-10.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_philox(counter, key):
    """The same in Python's unbounded integers, one number at a time."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return tuple(counter)


@pytest.mark.parametrize("counter, key, expected", PUBLISHED)
def test_published_vectors(counter, key, expected):
    assert tuple(word.item() for word in reference_philox.philox(counter, key)) == expected
    assert scalar_philox(counter, key) == expected


def test_vectors_of_counters_and_keys():
    """Tensors give what numbers give, also with the highest bits set."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 2**32, (50, 6), generator=generator)
    found = torch.stack(reference_philox.philox(values[:, :4].T, values[:, 4:].T), dim=-1)
    for row, words in zip(values.tolist(), found.tolist(), strict=True):
        assert tuple(words) == scalar_philox(row[:4], row[4:])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("position", [0, 5, 2**31 - 1, -1])
def test_words_are_four_to_a_counter(seed, position):
    """Token t: lane t % 4 of counter t // 4, whatever the vocabulary; the key is the seed's two halves."""
    found = reference_philox.words(11, seed, position, reference_philox.RESIDUAL, 9).tolist()
    for token, word in enumerate(found):
        counter = (token // 4, position % 2**32, 3, 9)
        assert word == scalar_philox(counter, (seed % 2**32, (seed >> 32) % 2**32))[token % 4]
    assert reference_philox.words(1, seed, position, reference_philox.RESIDUAL, 9).tolist() == found[:1]


def test_coins_are_the_accept_domain():
    for node, level in ((0, False), (7, False), (7, True), (1023, False)):
        word = scalar_philox((node // 4, 12, 2, int(level)), (99, 0))[node % 4]
        assert reference_philox.coin(99, 12, node, level=level) == ((word >> 9) + 0.5) / 2**23


def test_domains_and_details_are_disjoint():
    """No two draws of a round, nor of the rounds around it, share a counter: all of their words differ."""
    draws = [
        reference_philox.words(64, 5, position, domain, detail)
        for position in range(8)
        for domain in (
            reference_philox.SAMPLE,
            reference_philox.DRAFT,
            reference_philox.ACCEPT,
            reference_philox.RESIDUAL,
            reference_philox.BONUS,
        )
        for detail in (
            (0,)
            if domain == reference_philox.SAMPLE
            else (0, 1)
            if domain == reference_philox.ACCEPT
            else (0, 1, 2, 1 << 16)
        )
    ]
    words = torch.cat(draws)
    # 8,192 words of 32 bits: half a coincidence in a hundred is expected, a shared counter makes 64.
    assert len(words) - len(words.unique()) <= 2


def test_seeds_are_all_64_bits():
    words = torch.stack([reference_philox.words(8, seed, 0, 0, 0) for seed in (1, 1 + 2**32, 1 - 2**63, -1)])
    assert len(words.unique()) == words.numel()


def kolmogorov_smirnov(uniform):
    """Distance of a sample from the uniform law, times the root of its size."""
    ordered = uniform.sort().values
    count = len(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max())) * math.sqrt(count)


# Above 3.5 in 5e-11 of all samples.
LIMIT = 3.5


@pytest.mark.parametrize("seed", range(3))
def test_laws_of_coins_and_exponentials(seed):
    words = reference_philox.words(2**18, seed, 3, reference_philox.DRAFT, 1)
    assert kolmogorov_smirnov(reference_philox.coins_of(words)) < LIMIT
    assert kolmogorov_smirnov(-torch.expm1(-reference_philox.exponentials_of(words))) < LIMIT


def test_the_distance_can_tell():
    """A bias of one percent is told apart."""
    uniform = reference_philox.coins_of(reference_philox.words(2**18, 0, 3, reference_philox.DRAFT, 1))
    assert kolmogorov_smirnov(uniform**1.03) > LIMIT


def test_neighbours_are_independent():
    """Tokens, positions, seeds and domains side by side: correlations of 2^16 pairs, standard error 0.004."""
    count = 2**16
    base = reference_philox.coins_of(reference_philox.words(count, 0, 3, reference_philox.DRAFT, 0))
    others = [
        base.roll(1),
        reference_philox.coins_of(reference_philox.words(count, 1, 3, reference_philox.DRAFT, 0)),
        reference_philox.coins_of(reference_philox.words(count, 0, 4, reference_philox.DRAFT, 0)),
        reference_philox.coins_of(reference_philox.words(count, 0, 3, reference_philox.RESIDUAL, 0)),
        reference_philox.coins_of(reference_philox.words(count, 0, 3, reference_philox.DRAFT, 1)),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 0.026


def test_open_intervals():
    """Coins and exponentials at both ends of the integers, and over 2^22 draws, also in float32."""
    ends = torch.tensor([0, 2**32 - 1])
    coins = reference_philox.coins_of(ends)
    assert coins.tolist() == [2.0**-24, 1 - 2.0**-24]
    assert coins.float().double().tolist() == coins.tolist()
    drawn = reference_philox.exponentials_of(ends)
    assert drawn[0].item() == pytest.approx(2.0**-33)
    assert drawn[1].item() == pytest.approx(33 * math.log(2))
    least, greatest = 1.0, 0.0
    for part in range(4):
        words = reference_philox.words(2**20, 0, part, reference_philox.SAMPLE, 0)
        coins = reference_philox.coins_of(words)
        least, greatest = min(least, float(coins.min())), max(greatest, float(coins.max()))
        assert float(coins.min()) > 0 and float(coins.max()) < 1
        drawn = reference_philox.exponentials_of(words)
        assert float(drawn.min()) > 0 and float(drawn.max()) < 23
    # Of 2^22 values the extremes lie within 20 times their expected distance from the ends.
    assert least < 20 * 2.0**-22 and greatest > 1 - 20 * 2.0**-22


def test_coins_are_exact_in_float32():
    """Of 2^23 middles none rounds, so kernels have the same coins. Of 2^24, the last would round to 1."""
    words = torch.cat([torch.arange(2**10) << 9, torch.arange(2**23 - 2**10, 2**23) << 9])
    single = ((words >> 9).float() + 0.5) * 2.0**-23
    assert torch.equal(single.double(), reference_philox.coins_of(words))
    assert single.min() > 0 and single.max() < 1
    assert (torch.tensor(2**24 - 1).float() + 0.5) * 2.0**-24 == 1


def draw_share(exponential_of, gap, resolution):
    """Probability that a token whose logit is `gap` below a single other one wins the race, over the exact value.

    The other token's exponential is averaged exactly; of this one's only small values matter, which are its 2^18
    smallest.

    Args:
        exponential_of: the k-th smallest exponentials that the formula can give, for an int64 tensor of k.
        gap: between the logits.
        resolution: probability of each k.
    """
    smallest = torch.arange(2**18)
    drawn = exponential_of(smallest).double()
    wins = torch.exp(-drawn * math.exp(gap)).sum().item() * resolution
    return wins * (1 + math.exp(gap))


def single_log1p(k):
    """What kernels do."""
    return -torch.log1p(-((k.float() + 0.5) * torch.tensor(2.0**-32)))


def single_log_of_24_bits(k):
    return -torch.log((((2**24 - 1 - k).double() + 0.5) * 2.0**-24).float())


def single_log_of_32_bits(k):
    return -torch.log((((2**32 - 1 - k).double() + 0.5) * 2.0**-32).float())


def single_log_clamped(k):
    return -torch.log((((2**32 - 1 - k).double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24))


@pytest.mark.parametrize("gap", [14, 16, 18, 20])
def test_the_tail_is_resolved(gap):
    """Here and, rounded to float32, in kernels: tokens 20 below the top get their share to one part in a thousand."""
    assert draw_share(reference_philox.exponentials_of, gap, 2.0**-32) == pytest.approx(1, abs=1e-3)
    assert draw_share(single_log1p, gap, 2.0**-32) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "formula, resolution, least, greatest",
    [
        (single_log_of_24_bits, 2.0**-24, 3, math.inf),
        (single_log_of_32_bits, 2.0**-32, 1.8, math.inf),
        (single_log_clamped, 2.0**-32, 0, 0.2),
    ],
)
def test_other_formulas_fail_in_the_tail(formula, resolution, least, greatest):
    """Mutants, at a gap of 18: -log(u) of 24 bits, of 32 bits rounded to float32, and clamped below 1 (vLLM #54143)."""
    assert least <= draw_share(formula, 18, resolution) <= greatest


def test_race_is_a_draw_from_its_weights():
    """Chi-square of 2^17 races over 8 weights, one of them 0: 6 degrees of freedom, 1e-9 of false alarms at 50."""
    weights = torch.tensor([1, 2, 0, 4, 8, 3, 5, 9], dtype=torch.float64)
    count = 2**17
    drawn = reference_philox.exponentials_of(reference_philox.words(count * 8, 4, 1, reference_philox.DRAFT, 0)).view(
        count, 8
    )
    winners = (weights / drawn).argmax(dim=-1)
    assert winners[:100].tolist() == [reference_philox.race(weights, row) for row in drawn[:100]]
    expected = count * weights / weights.sum()
    counts = winners.bincount(minlength=8)
    assert counts[2] == 0
    possible = weights > 0
    assert float(((counts - expected)[possible] ** 2 / expected[possible]).sum()) < 50


def test_race_without_winners():
    """Ties go to the lowest token; where all scores vanish, the greatest weight wins."""
    one = torch.ones(4, dtype=torch.float64)
    assert reference_philox.race(one, one) == 0
    assert reference_philox.race(torch.tensor([0.0, 1, 3, 3]), torch.full((4,), math.inf)) == 2
    assert reference_philox.race(torch.tensor([0.0, 1, 3, 3]), torch.tensor([0.0, math.inf, 2, 2])) == 2
