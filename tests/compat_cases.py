"""What the tests of the drop-in forms share."""

from types import SimpleNamespace

import torch

from specdec_ops.compat.vllm import rejection_sample

FALSE_ALARM = 1e-6  # of each statistical test, were the seeds not fixed


def chance_of_larger(observed, expected):
    """The chance of a larger chi-square than that of the counts [cells] against the expected ones, all above 5."""
    assert (expected > 5).all()
    statistic = ((observed - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def random_probs(*shape):
    return torch.rand(shape).pow(3).softmax(-1)


def metadata(batch, *, temperature=1.0, generators=None, all_greedy=False):
    temperature = torch.full((batch,), temperature) if isinstance(temperature, float) else temperature
    return SimpleNamespace(
        all_greedy=all_greedy,
        all_random=not all_greedy and bool((temperature > 0).all()),
        temperature=None if all_greedy else temperature,
        generators=generators or {},
    )


def call(drafts, target, sampling, *, how="place", draft_probs=None, **options):
    """rejection_sample with chains of equal length, the target given by place or under a name."""
    batch, steps = drafts.shape
    ends = torch.arange(steps, batch * steps + 1, steps, dtype=torch.int32)
    bonus = torch.zeros(batch, 1, dtype=torch.int64)
    chains = (drafts.flatten(), [steps] * batch, steps, ends, draft_probs)
    if how == "place":
        return rejection_sample(*chains, target, bonus, sampling, **options)
    named = {"bonus_token_ids": bonus, "sampling_metadata": sampling, how: target}
    return rejection_sample(*chains, **named, **options)
