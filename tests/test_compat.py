"""Drop-in forms of FlashInfer's and vLLM's chain functions: their published cases, rewritten, and where ours differ."""

from types import SimpleNamespace

import pytest
import torch

from specdec_ops.compat.flashinfer import chain_speculative_sampling
from specdec_ops.compat.vllm import PLACEHOLDER_TOKEN_ID, rejection_sample

FALSE_ALARM = 1e-6  # of each statistical test, were the seeds not fixed


def chance_of_larger(observed, expected):
    """The chance of a larger chi-square than that of the counts [cells] against the expected ones, all above 5."""
    assert (expected > 5).all()
    statistic = ((observed - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def random_probs(*shape):
    return torch.rand(shape).pow(3).softmax(-1)


# ---- FlashInfer


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("onehot_target", [False, True])
def test_chain_outputs_are_valid(steps, onehot_target):
    batch, vocab = 5, 111
    draft_probs, draft_tokens = random_probs(batch, steps, vocab), torch.randint(vocab, (batch, steps))
    chosen = torch.cat([draft_tokens, torch.randint(vocab, (batch, 1))], dim=1)
    target_probs = random_probs(batch, steps + 1, vocab)
    if onehot_target:
        target_probs = torch.nn.functional.one_hot(chosen, vocab).float()
    for trial in range(3):
        accepted, emitted = (torch.zeros(batch, dtype=torch.int32) for _ in range(2))
        given = (draft_probs, draft_tokens, target_probs, accepted, emitted)
        tokens, *counts = chain_speculative_sampling(*given, seed=trial, offset=0)
        assert counts[0] is accepted and counts[1] is emitted
        assert tokens.dtype == torch.int32 and tokens.shape == (batch, steps + 1)
        assert torch.equal(emitted + 1, (tokens >= 0).sum(1))
        assert (accepted >= emitted).all() and (accepted <= steps).all()
        for row, drafts, count in zip(tokens.tolist(), draft_tokens.tolist(), emitted.tolist(), strict=True):
            assert row[:count] == drafts[:count] and 0 <= row[count] < vocab and set(row[count + 1 :]) <= {-1}
        if onehot_target:
            assert torch.equal(tokens.long(), chosen)


def test_chain_example_of_the_documentation():
    """The first token is twice as likely to the target as to the draft, the second impossible, with one alternative."""
    draft_probs = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    target_probs = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    tokens, accepted, emitted = chain_speculative_sampling(draft_probs, torch.tensor([[2, 1]]), target_probs)
    assert (tokens.tolist(), accepted.tolist(), emitted.tolist()) == ([[2, 0, -1]], [1], [1])


def test_chain_counts_are_added_to():
    probs = random_probs(2, 4, 9)
    accepted, emitted = torch.tensor([5, 6]), torch.tensor([7, 8])
    drafts = torch.randint(9, (2, 3))
    chain_speculative_sampling(probs[:, :3], drafts, probs, accepted, emitted)
    assert (accepted.tolist(), emitted.tolist()) == ([8, 9], [10, 11]), "equal probabilities always pass"


def test_chain_follows_the_laws():
    """First token, acceptance count, what follows a rejection, and independent acceptance, over 16384 chains."""
    draws, vocab = 16384, 12
    draft, target = random_probs(2, vocab), random_probs(3, vocab)
    drafts = torch.multinomial(draft, draws, replacement=True).T.contiguous()
    spread = draft.expand(draws, 2, vocab), drafts, target.expand(draws, 3, vocab)
    tokens, passed, emitted = chain_speculative_sampling(*spread, seed=11, offset=5)
    chance = torch.minimum(draft, target[:2]).sum(-1).double()
    laws = {
        "first token": (tokens[:, 0], target[0].double()),
        "emitted": (emitted, torch.stack([1 - chance[0], chance[0] * (1 - chance[1]), chance.prod()])),
        "passed": (
            passed,
            torch.stack([(1 - chance).prod(), (chance * (1 - chance).flip(0)).sum(), chance.prod()]),
        ),
        "bonus": (tokens[emitted == 2, 2], target[2].double()),
    }
    for step in range(2):
        left = (target[step] - draft[step]).clamp(min=0).double()
        here, kept = tokens[emitted == step, step], left > 0
        assert kept[here.long()].all()
        laws[f"residual {step}"] = (kept.cumsum(0)[here.long()] - 1, left[kept] / left.sum())
    for name, (drawn, law) in laws.items():
        observed = torch.bincount(drawn.long(), minlength=len(law)).double()
        assert chance_of_larger(observed, law * len(drawn)) > FALSE_ALARM, name


def test_chain_seeds_are_per_request():
    batch, vocab = 6, 50
    draft_probs, target_probs = random_probs(batch, 2, vocab), random_probs(batch, 3, vocab)
    drafts = torch.randint(vocab, (batch, 2))
    seeds, offsets = torch.randint(1 << 62, (batch,)), torch.randint(1 << 40, (batch,))
    alone = [
        chain_speculative_sampling(
            *(x[[i]] for x in (draft_probs, drafts, target_probs)), seed=seeds[[i]], offset=offsets[[i]]
        )
        for i in range(batch)
    ]
    order = torch.randperm(batch)
    inputs = [x[order] for x in (draft_probs, drafts, target_probs)]
    together = chain_speculative_sampling(*inputs, seed=seeds[order], offset=offsets[order])
    for column in range(3):
        assert torch.equal(together[column], torch.cat([one[column] for one in alone])[order])
    unsigned = chain_speculative_sampling(*inputs, seed=seeds[order].to(torch.uint64), offset=offsets[order])
    assert torch.equal(unsigned[0], together[0])


def test_chain_seed_and_offset_change_the_tokens():
    batch, vocab = 64, 1000
    probs = torch.full((batch, 2, vocab), 1 / vocab)
    drafts = torch.randint(vocab, (batch, 1))

    def bonus(**keys):
        return chain_speculative_sampling(probs[:, :1], drafts, probs, **keys)[0][:, 1].tolist()

    base = bonus(seed=3, offset=0)
    assert len(set(base)) > 50, "requests that share a seed have noise of their own"
    assert base == bonus(seed=3, offset=0) == bonus(seed=torch.tensor([3]), offset=torch.tensor([0]))
    for other in (bonus(seed=4, offset=0), bonus(seed=3, offset=1), bonus(seed=3, offset=1 << 31)):
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 8
    generator = torch.Generator().manual_seed(1)
    drawn = [bonus(generator=generator) for _ in range(2)]
    assert drawn[0] != drawn[1] and drawn[0] == bonus(generator=generator.manual_seed(1))


def test_chain_takes_what_harms_the_original():
    vocab = 7
    same = random_probs(1, 2, vocab).expand(512, 2, vocab)
    drafts = torch.randint(vocab, (512, 1))
    tokens, _, emitted = chain_speculative_sampling(same[:, :1], drafts, same, seed=0, offset=0)
    assert (emitted == 1).all() and (tokens >= 0).all(), "equal probabilities, whatever the coin: no empty residual"

    impossible = torch.tensor([[[0.0, 1.0, 0.0]]])
    tokens, accepted, _ = chain_speculative_sampling(impossible, torch.tensor([[0]]), torch.full((1, 2, 3), 1 / 3))
    assert 0 <= tokens[0, 0] < 3 and tokens[0, 1] == -1 and accepted == 0, "rejected; another draw may repeat it"

    draft_probs, target_probs = random_probs(3, 1, vocab), random_probs(3, 2, vocab)
    clean = chain_speculative_sampling(draft_probs, drafts[:3], target_probs, seed=1, offset=1)[0]
    target_probs[1] = float("nan")
    tokens = chain_speculative_sampling(draft_probs, drafts[:3], target_probs, seed=1, offset=1)[0]
    assert 0 <= tokens[1, 0] < vocab
    assert torch.equal(tokens[[0, 2]], clean[[0, 2]])
    target_probs[1] = 0
    assert 0 <= chain_speculative_sampling(draft_probs, drafts[:3], target_probs)[0][1, 0] < vocab


def test_chain_errors():
    probs = random_probs(2, 2, 5)
    given = (probs[:, :1], torch.zeros(2, 1, dtype=torch.int32), probs)
    with pytest.raises(ValueError, match="seed and offset must be both ints or both tensors"):
        chain_speculative_sampling(*given, seed=1, offset=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"seed must be int64 or uint64 \[1\] or \[2\], got int64 \[3\]"):
        chain_speculative_sampling(*given, seed=torch.zeros(3, dtype=torch.int64), offset=torch.tensor([1]))


# ---- vLLM


def metadata(batch, *, temperature=1.0, generators=None, all_greedy=False):
    temperature = torch.full((batch,), temperature) if isinstance(temperature, float) else temperature
    return SimpleNamespace(
        all_greedy=all_greedy,
        all_random=not all_greedy and bool((temperature > 0).all()),
        temperature=None if all_greedy else temperature,
        generators=generators or {},
    )


def verify(drafts, target_probs, bonus, sampling, draft_probs=None, longest=None):
    counts = [len(tokens) for tokens in drafts]
    flat = torch.tensor([token for tokens in drafts for token in tokens], dtype=torch.int32)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bonus = torch.tensor(bonus).view(-1, 1)
    longest = max(counts) if longest is None else longest
    return rejection_sample(flat, counts, longest, ends, draft_probs, target_probs, bonus, sampling).tolist()


def rows_choosing(tokens, vocab=100):
    """Logits of which each row's greatest is at the given token."""
    rows = torch.full((len(tokens), vocab), -100.0)
    rows[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.int64)] = 100.0
    return rows


@pytest.mark.parametrize(
    "drafts, choices, bonus, expected",
    [
        ([[1, 2, 3]], [1, 2, 3], [4], [[1, 2, 3, 4]]),
        ([[1, 2, 3]], [1, 5, 3], [4], [[1, 5, -1, -1]]),
        ([[1, 2], [3]], [1, 2, 3], [5, 4], [[1, 2, 5], [3, 4, -1]]),
        ([[1]], [1], [2], [[1, 2]]),
        ([[]], [], [5], [[5]]),
        ([[1, 2, 3], [4, 5, 6]], [1, 2, 7, 4, 8, 6], [6, 9], [[1, 2, 7, -1], [4, 8, -1, -1]]),
        ([[1]], [2], [3], [[2, -1]]),
        ([[1, 2], [3, 4]], [1, 5, 3, 4], [6, 7], [[1, 5, -1], [3, 4, 7]]),
        (
            [[1, 1, 1], [], [1, 1, 1]],
            [1, 15, 1, 1, 1, 15],
            [1, 7, 1],
            [[1, 15, -1, -1], [7, -1, -1, -1], [1, 1, 15, -1]],
        ),
    ],
)
def test_greedy_requests(drafts, choices, bonus, expected):
    rows = rows_choosing(choices)
    assert verify(drafts, rows, bonus, metadata(len(drafts), all_greedy=True)) == expected
    zero = torch.zeros(len(drafts))
    assert verify(drafts, rows.softmax(-1), bonus, metadata(len(drafts), temperature=zero)) == expected
    assert verify(drafts, rows.softmax(-1), bonus, metadata(len(drafts), temperature=zero - 1)) == expected
    wide = verify(drafts, rows, bonus, metadata(len(drafts), all_greedy=True), longest=6)
    size = len(expected[0])
    assert [row[:size] for row in wide] == expected and all(set(row[size:]) <= {-1} for row in wide)
    assert PLACEHOLDER_TOKEN_ID == -1


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_seeded_requests_repeat(with_draft_probs):
    batch, steps, vocab = 6, 3, 200
    drafts = torch.randint(vocab, (batch, steps)).tolist()
    target = random_probs(batch * steps, vocab)
    draft_probs = random_probs(batch * steps, vocab) if with_draft_probs else None

    def run(seeded):
        generators = {request: torch.Generator().manual_seed(request) for request in seeded}
        return verify(drafts, target, list(range(batch)), metadata(batch, generators=generators), draft_probs)

    first, second, other = run([0, 2, 5]), run([0, 2, 5]), run([0, 2])
    for request in (0, 2):
        assert first[request] == second[request] == other[request]
    assert first[5] == second[5]
    assert any(first[request] != second[request] for request in (1, 3, 4))


def test_a_request_without_drafts_leaves_its_generator_alone():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    tokens = verify([[], [1]], rows_choosing([2]).softmax(-1), [7, 8], metadata(2, generators={0: generator}))
    assert tokens == [[7, -1], [2, -1]]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_sampled_requests_follow_the_target(with_draft_probs):
    """Joint law of the first two tokens, where the second is drawn plainly after a rejection, over 16384 requests."""
    draws, vocab, steps = 16384, 6, 2
    draft, target = random_probs(vocab + 1, vocab), random_probs(vocab + 1, vocab)  # row: the token before; last: none
    first = torch.multinomial(draft[vocab], draws, replacement=True)
    drafts = torch.stack([first, torch.multinomial(draft[first], 1)[:, 0]], dim=1)
    before = torch.stack([torch.full_like(first, vocab), first], dim=1).flatten()
    draft_probs = draft[before] if with_draft_probs else None  # without: any choice that ignores the noise is lossless
    out = verify(drafts.tolist(), target[before], [0] * draws, metadata(draws), draft_probs)
    tokens = torch.tensor(out)[:, :steps]
    plain = torch.multinomial(target[tokens[:, 0]], 1)[:, 0]
    second = torch.where(tokens[:, 1] < 0, plain, tokens[:, 1])
    law = (target[vocab, :, None] * target[:vocab]).flatten().double()
    observed = torch.bincount(tokens[:, 0] * vocab + second, minlength=vocab * vocab).double()
    assert chance_of_larger(observed, law * draws) > FALSE_ALARM


def test_masked_tokens_are_never_emitted():
    batch, steps, vocab = 64, 3, 40
    allowed = torch.rand(batch * steps, vocab) < 0.2
    allowed[:, 0] = True
    target = torch.where(allowed, random_probs(batch * steps, vocab), 0.0)
    target /= target.sum(-1, keepdim=True)
    draft_probs = random_probs(batch * steps, vocab)
    drafts = torch.multinomial(draft_probs, 1).view(batch, steps).tolist()
    for rows in (
        verify(drafts, target, [0] * batch, metadata(batch), draft_probs),
        verify(drafts, target, [0] * batch, metadata(batch)),
    ):
        for request, row in enumerate(rows):
            for step, token in enumerate(row[:steps]):
                assert token == -1 or allowed[request * steps + step, token]


def test_greedy_and_sampled_requests_in_one_batch():
    target = torch.cat([rows_choosing([4, 5], 10).softmax(-1), torch.full((2, 10), 0.1)])
    temperature = torch.tensor([0.0, 1.0])
    seen = set()
    for _ in range(40):
        greedy, sampled = verify([[4, 6], [1, 2]], target, [9, 9], metadata(2, temperature=temperature))
        assert greedy == [4, 5, -1]
        seen.add(sampled[0])
    assert len(seen) > 5


def test_a_row_of_nan_harms_nobody_else():
    target = random_probs(4, 33)
    target[1] = float("nan")
    generators = {1: torch.Generator().manual_seed(0)}
    rows = verify([[3, 4], [5, 6]], target, [1, 2], metadata(2, generators=generators))
    assert all(-1 <= token < 33 for token in rows[0]) and rows[0][0] >= 0
    target[1] = 1 / 33
    generators[1].manual_seed(0)
    assert verify([[3, 4], [5, 6]], target, [1, 2], metadata(2, generators=generators))[1] == rows[1]


def test_rejection_sample_errors():
    with pytest.raises(ValueError, match="max_spec_len must be at least 2, got 1"):
        verify([[1, 2]], random_probs(2, 5), [0], metadata(1), longest=1)
    with pytest.raises(ValueError, match=r"target_probs must be \[2, 5\], got float32 \[3, 5\]"):
        verify([[1, 2]], random_probs(3, 5), [0], metadata(1))
