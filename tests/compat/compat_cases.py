"""What the tests of the drop-in forms share."""

from types import SimpleNamespace

import torch

from specdec_ops import Tree
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
    temperature = torch.full((batch,), temperature, device="cpu") if isinstance(temperature, float) else temperature
    return SimpleNamespace(
        all_greedy=all_greedy,
        all_random=not all_greedy and bool((temperature > 0).all()),
        temperature=None if all_greedy else temperature,
        generators=generators or {},
    )


def call(drafts, target, sampling, *, how="place", draft_probs=None, **options):
    """rejection_sample with chains of equal length, the target given by place or under a name."""
    batch, steps = drafts.shape
    ends = torch.arange(steps, batch * steps + 1, steps, dtype=torch.int32, device="cpu")
    bonus = torch.zeros(batch, 1, dtype=torch.int64, device="cpu")
    chains = (drafts.flatten(), [steps] * batch, steps, ends, draft_probs)
    if how == "place":
        return rejection_sample(*chains, target, bonus, sampling, **options)
    named = {"bonus_token_ids": bonus, "sampling_metadata": sampling, how: target}
    return rejection_sample(*chains, **named, **options)


def eagle_trees(batch, topk, depth, selected, seed):
    """Random selections as EAGLE-2 makes them: parent_list, selected_index, and the trees they mean."""
    generator = torch.Generator().manual_seed(seed)
    parent_lists, selections, trees = [], [], []
    for _ in range(batch):
        parent_list, expanded = [-1], list(range(topk))
        for level in range(1, depth):
            parent_list += expanded
            first = topk + (level - 1) * topk * topk
            picked = torch.randperm(topk * topk, generator=generator)[:topk].sort().values
            expanded = (first + picked).tolist()
        chosen, alive = [], list(range(topk))
        while len(chosen) < selected:  # always with their parents
            chosen.append(alive.pop(int(torch.randint(len(alive), (1,), generator=generator))))
            alive += [
                g * topk + i for g, parent in enumerate(parent_list) if g and parent == chosen[-1] for i in range(topk)
            ]
        chosen.sort()
        place = {candidate: node + 1 for node, candidate in enumerate(chosen)}
        parent_of = [0 if c < topk else place[parent_list[c // topk]] for c in chosen]
        parent_lists.append(parent_list)
        selections.append(chosen)
        trees.append(Tree([-1, *parent_of]))
    return parent_lists, selections, trees
