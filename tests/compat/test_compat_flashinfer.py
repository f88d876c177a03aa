"""The drop-in form of FlashInfer's chain function: its published cases, rewritten, and where ours differs."""

import pytest
import torch

from specdec_ops.compat.flashinfer import chain_speculative_sampling
from tests.compat.compat_cases import FALSE_ALARM, chance_of_larger, random_probs


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "drafts, accepted, emitted",
    [
        ([-1] * 5, 0, 0),
        ([3, 5, -1, 2, 1], 2, 2),  # what follows padding is no part of the draft
        ([3, 5, 9, 2, 1], 4, 2),  # what is beyond the vocabulary fails alone
        ([9, 9, 9, 9, 9], 0, 0),
        ([3, 5, 2, 1, -1], 4, 4),
    ],
)
def test_counts_leave_out_padding_and_ids_beyond_the_vocabulary(dtype, drafts, accepted, emitted):
    """Rows of target and draft are equal, so that whatever is a token passes its test."""
    vocab = 7
    probs = random_probs(1, 6, vocab)
    tokens, *counts = chain_speculative_sampling(probs[:, :5], torch.tensor([drafts], dtype=dtype), probs)
    assert [count.tolist() for count in counts] == [[accepted], [emitted]]
    assert tokens[0, :emitted].tolist() == drafts[:emitted] and 0 <= tokens[0, emitted] < vocab
    if dtype == torch.int64:  # ids that would be good ones if they were cut to 32 bits
        wide = torch.tensor([drafts]) + (1 << 32)
        assert [count.item() for count in chain_speculative_sampling(probs[:, :5], wide, probs)[1:]] == [0, 0]


def test_padding_leaves_the_targets_law():
    """A request of padding alone draws from the target's first row, whatever the draft's holds."""
    draws, vocab = 16384, 5
    draft, target = random_probs(1, vocab), random_probs(2, vocab)
    padding = torch.full((draws, 1), -1)
    tokens = chain_speculative_sampling(draft.expand(draws, 1, vocab), padding, target.expand(draws, 2, vocab))[0]
    observed = torch.bincount(tokens[:, 0].long(), minlength=vocab).double()
    assert chance_of_larger(observed, target[0].double() * draws) > FALSE_ALARM


def test_counts_agree_with_the_walk_whatever_rows_sum_to():
    """The token of step i alone, as the first of a chain of its own, passes with the chance that the count says.

    Target rows sum to 0.5 and hold numbers just below 0, as a subtraction leaves them: neither changes the law.
    """
    draws, vocab = 16384, 4
    draft, target = random_probs(2, vocab), random_probs(3, vocab)
    drafts = torch.multinomial(draft, draws, replacement=True).T.contiguous()
    chance = torch.minimum(draft, target[:2]).sum(-1).double()
    halved = torch.cat([target / 2, torch.full((3, 1), -1e-9)], dim=1)
    draft = torch.nn.functional.pad(draft, (0, 1))
    spread = draft.expand(draws, 2, vocab + 1), drafts, halved.expand(draws, 3, vocab + 1)
    tokens, passed, emitted = chain_speculative_sampling(*spread, seed=3, offset=0)
    laws = {
        "passed": (passed, [(1 - chance).prod(), (chance * (1 - chance).flip(0)).sum(), chance.prod()]),
        "emitted": (emitted, [1 - chance[0], chance[0] * (1 - chance[1]), chance.prod()]),
        "first token": (tokens[:, 0], target[0].double()),
    }
    for name, (drawn, law) in laws.items():
        law = torch.stack(tuple(law))
        observed = torch.bincount(drawn.long(), minlength=len(law)).double()
        assert chance_of_larger(observed, law * draws) > FALSE_ALARM, name


def test_chain_without_steps_or_requests():
    probs = random_probs(3, 1, 4)
    tokens, accepted, emitted = chain_speculative_sampling(probs[:, :0], torch.zeros(3, 0, dtype=torch.int32), probs)
    assert tokens.shape == (3, 1) and (tokens >= 0).all()
    assert accepted.tolist() == emitted.tolist() == [0, 0, 0]
    empty = chain_speculative_sampling(probs[:0, :0], torch.zeros(0, 0, dtype=torch.int32), probs[:0])
    assert [tensor.shape for tensor in empty] == [(0, 1), (0,), (0,)]


def test_chain_errors():
    probs = random_probs(2, 2, 5)
    given = (probs[:, :1], torch.zeros(2, 1, dtype=torch.int32), probs)
    with pytest.raises(ValueError, match="seed and offset must be both ints or both tensors"):
        chain_speculative_sampling(*given, seed=1, offset=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"seed must be int64 or uint64 \[1\] or \[2\], got int64 \[3\]"):
        chain_speculative_sampling(*given, seed=torch.zeros(3, dtype=torch.int64), offset=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"draft_probs must be \[2, 1, 5\], got float32 \[2, 2, 5\]"):
        chain_speculative_sampling(probs, *given[1:])
    with pytest.raises(ValueError, match=r"target_probs must be \[2, 2, vocab\], got float32 \[2, 1, 5\]"):
        chain_speculative_sampling(*given[:2], probs[:, :1])
    with pytest.raises(
        TypeError, match=r"draft_token_ids must be int32 or int64 \[batch, steps\], got float32 \[2, 1\]"
    ):
        chain_speculative_sampling(given[0], torch.zeros(2, 1), probs)
    with pytest.raises(
        ValueError, match=r"maybe_output_accepted_token_num must be int32 or int64 \[2\], got int64 \[1\]"
    ):
        chain_speculative_sampling(*given, torch.zeros(1, dtype=torch.int64))
