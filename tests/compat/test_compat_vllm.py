"""The drop-in form of vLLM's chain function: its published cases, rewritten, and where ours differs."""

import pytest
import torch

from specdec_ops.compat.vllm import PLACEHOLDER_TOKEN_ID, rejection_sample
from tests.compat.compat_cases import FALSE_ALARM, call, chance_of_larger, metadata, random_probs


def verify(drafts, target_probs, bonus, sampling, draft_probs=None, longest=None, **options):
    counts = [len(tokens) for tokens in drafts]
    flat = torch.tensor([token for tokens in drafts for token in tokens], dtype=torch.int32)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bonus = torch.tensor(bonus).view(-1, 1)
    longest = max(counts) if longest is None else longest
    chains = (flat, counts, longest, ends, draft_probs)
    named = {"bonus_token_ids": bonus, "sampling_metadata": sampling}
    return rejection_sample(*chains, target_probs=target_probs, **named, **options).tolist()


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
    with pytest.raises(ValueError, match=r"target_probs must be \[2, vocab\], got float32 \[3, 5\]"):
        verify([[1, 2]], random_probs(3, 5), [0], metadata(1))
    with pytest.raises(ValueError, match=r"draft_probs must be \[2, 5\], got float32 \[2, 4\]"):
        verify([[1, 2]], random_probs(2, 5), [0], metadata(1), random_probs(2, 4))


# ---- vLLM: logits, probabilities, and synthetic mode


LAW = torch.tensor([0.036, 0.035, 0.271, 0.355, 0.282, 0.021])


@pytest.mark.parametrize("how", ["place", "target_logits", "target_probs"])
def test_logits_and_probabilities_have_one_law(how):
    """By place the target is logits, as in the current version. Taken for probabilities they gave 3 every time."""
    draws = 16384
    logits = (LAW.log() + 5).expand(draws, -1)
    target = logits.softmax(-1) if how == "target_probs" else logits
    tokens = call(torch.zeros(draws, 1, dtype=torch.int32), target, metadata(draws), how=how)[:, 0]
    observed = torch.bincount(tokens, minlength=6).double()
    assert chance_of_larger(observed, LAW.double() / LAW.double().sum() * draws) > FALSE_ALARM


def test_masked_logits_are_never_emitted():
    logits = torch.randn(256, 9)
    logits[:, ::2] = -torch.inf
    tokens = call(torch.zeros(256, 1, dtype=torch.int64), logits, metadata(256))[:, 0]
    assert set(tokens.tolist()) == {1, 3, 5, 7}


def test_a_mistake_between_logits_and_probabilities_is_refused():
    drafts, logits = torch.zeros(2, 3, dtype=torch.int32), torch.randn(6, 8)
    probs = logits.softmax(-1)
    with pytest.raises(ValueError, match=r"target_probs must be distributions, .* got float32 \[6, 8\]"):
        call(drafts, logits, metadata(2), how="target_probs")
    with pytest.raises(ValueError, match=r"target_probs must be distributions, .* got float32 \[6, 8\]"):
        call(drafts, logits.abs(), metadata(2), how="target_probs")
    with pytest.raises(ValueError, match=r"the sixth argument must be logits, named .* got distributions"):
        call(drafts, probs, metadata(2))
    with pytest.raises(ValueError, match=r"draft_probs must be distributions, .* got float32 \[6, 8\]"):
        call(drafts, logits, metadata(2), draft_probs=logits)
    with pytest.raises(TypeError, match="target_probs must be given alone, got target_logits too"):
        call(drafts, logits, metadata(2), target_probs=probs)
    with pytest.raises(TypeError, match=r"target_probs must be a tensor of floats \[6, vocab\], got list"):
        call(drafts, [1.0], metadata(2), how="target_probs")
    call(drafts, probs, metadata(2), how="target_logits")  # whoever says so means it
    call(drafts, probs, metadata(2, all_greedy=True))  # the same argmax
    call(drafts, logits, metadata(2, all_greedy=True), how="target_probs")
    mixed = torch.cat([probs[:5], logits[5:]])
    call(drafts, mixed, metadata(2))  # not distributions: logits, of which some rows look like some
    with pytest.raises(ValueError, match="target_probs must be distributions"):
        call(drafts, mixed, metadata(2), how="target_probs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distributions_of_16_bits_are_taken_for_what_they_are(dtype):
    probs = (torch.randn(40, 32_000) * 2).softmax(-1).to(dtype)
    drafts = torch.zeros(8, 5, dtype=torch.int32)
    call(drafts, probs, metadata(8), how="target_probs", draft_probs=probs)
    broken = probs.clone()
    broken[0], broken[1] = torch.nan, 0  # they harm one request, as ever
    out = call(drafts, broken, metadata(8), how="target_probs")
    assert ((out >= -1) & (out < 32_000)).all() and (out[:, 0] >= 0).all()
    with pytest.raises(ValueError, match="the sixth argument must be logits"):
        call(drafts, probs, metadata(8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_ids_outside_of_the_vocabulary_are_rejected(dtype, with_draft_probs):
    beyond = 1 << 32 if dtype == torch.int64 else 6
    drafts = torch.tensor([[2, -1, 2], [2, beyond + 1, 2], [-1, 2, 2]], dtype=dtype)
    target = torch.full((9, 6), -torch.inf)
    target[:, 2] = 0
    draft = torch.eye(6)[[2] * 9] if with_draft_probs else None
    for options in ({}, {"synthetic_mode": True, "synthetic_conditional_rates": torch.ones(3)}):
        out = call(drafts, target, metadata(3), draft_probs=draft, **options)
        assert out.tolist() == [[2, 2, -1, -1], [2, 2, -1, -1], [2, -1, -1, -1]], options


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_synthetic_mode_accepts_at_the_rates(with_draft_probs):
    """Lengths follow the rates alone, tokens after a rejection the original's law: what the target has left.

    16384 requests: a rate that is off by 0.02 is found with a chance above 99%.
    """
    draws, vocab, rates = 16384, 5, torch.tensor([0.8, 0.5, 0.0, 1.0])
    draft, target = random_probs(2, vocab), random_probs(2, vocab)
    drafts = torch.multinomial(draft, draws, replacement=True).T.contiguous().int()
    generators = {request: torch.Generator().manual_seed(request) for request in (5, 6)}
    options = {"synthetic_mode": True, "synthetic_conditional_rates": rates, "use_fp64_gumbel": True}
    options["draft_probs"] = draft.repeat(draws, 1) if with_draft_probs else None
    logits = target.log().repeat(draws, 1)
    out = call(drafts, logits, metadata(draws, generators=generators), **options)
    lengths = (out >= 0).sum(1) - 1
    law = torch.tensor([0.2, 0.8 * 0.5, 0.8 * 0.5]).double()
    assert chance_of_larger(torch.bincount(lengths, minlength=3).double(), law * draws) > FALSE_ALARM
    for step in range(2):
        assert torch.equal(out[lengths > step, step], drafts[lengths > step, step])
        here, token = out[lengths == step, step].long(), drafts[lengths == step, step].long()
        if with_draft_probs:
            left = (target[step] - draft[step]).clamp(min=0).expand(len(here), -1)
        else:
            left = target[step].expand(len(here), -1).scatter(1, token[:, None], 0)
        law = (left / left.sum(-1, keepdim=True)).double().sum(0)
        kept = law > 0
        assert kept[here].all()
        observed = torch.bincount(kept.cumsum(0)[here] - 1, minlength=int(kept.sum())).double()
        assert chance_of_larger(observed, law[kept]) > FALSE_ALARM
    generators = {request: torch.Generator().manual_seed(request) for request in (5, 6)}
    again = call(drafts, logits, metadata(draws, generators=generators), **options)
    assert torch.equal(again[5:7], out[5:7])


def test_synthetic_mode_of_greedy_requests():
    """A rejected token is replaced by the target's argmax, which may be the drafted token itself."""
    draws = 4096
    drafts = torch.tensor([[1, 2, 3]], dtype=torch.int32).repeat(draws, 1)
    logits = rows_choosing([1, 7, 3], 9).repeat(draws, 1)
    rates = {"synthetic_mode": True, "synthetic_conditional_rates": torch.tensor([0.5, 0.5, 0.5])}
    zero = torch.zeros(draws)
    for sampling in (metadata(draws, all_greedy=True), metadata(draws, temperature=zero)):
        out = call(drafts, logits, sampling, **rates)
        expected = {(1, -1, -1, -1), (1, 7, -1, -1), (1, 2, 3, -1), (1, 2, 3, 0)}
        assert set(map(tuple, out.tolist())) == expected
        lengths = torch.bincount((out >= 0).sum(1), minlength=5)[1:].double()
        assert chance_of_larger(lengths, torch.tensor([0.5, 0.25, 0.125, 0.125]).double() * draws) > FALSE_ALARM


def test_all_greedy_calls_leave_generators_alone():
    generator, logits = torch.Generator().manual_seed(0), torch.randn(2, 5)
    before = generator.get_state(), torch.get_rng_state()
    call(torch.zeros(2, 1, dtype=torch.int32), logits, metadata(2, generators={0: generator}, all_greedy=True))
    assert torch.equal(generator.get_state(), before[0]) and torch.equal(torch.get_rng_state(), before[1])


def test_synthetic_mode_errors():
    given = (torch.zeros(2, 3, dtype=torch.int32), torch.randn(6, 8), metadata(2))
    with pytest.raises(
        TypeError, match="synthetic_conditional_rates must be a tensor of floats in synthetic_mode, got None"
    ):
        call(*given, synthetic_mode=True)
    with pytest.raises(
        ValueError, match="synthetic_conditional_rates must be None without synthetic_mode, got float32"
    ):
        call(*given, synthetic_conditional_rates=torch.ones(3))
    with pytest.raises(
        ValueError, match=r"synthetic_conditional_rates must be \[steps\], of at least 3, got float32 \[2\]"
    ):
        call(*given, synthetic_mode=True, synthetic_conditional_rates=torch.ones(2))


def test_a_bonus_token_beyond_int32_is_no_other_token():
    """2**32 + 5 must not be token 5; what is no token is a placeholder."""
    out = verify([[1], [1]], rows_choosing([1, 1]), [2**32 + 5, 4], metadata(2, all_greedy=True))
    assert out == [[1, -1], [1, 4]]
