"""Siblings that two draft models have sampled, each told by a row of its own (`draft_rows="child"`), are lossless.

Every node of a binary tree has one child from each draft. A node's noise is keyed by its own number, given to
`sample_children` as the parent, so that siblings are independent; drawn for their parent by both models they share
their noise, which the same test finds.
"""

import pytest
import torch

from specdec_ops import backends, sample_children, tree_accept
from tests.acceptance.accept_sequences import (
    BINARY,
    LENGTH,
    VOCAB,
    assert_fits,
    assert_rate,
    chains,
    completed,
    counts_of,
    joint_law,
)

SEQUENCES = {"cpu": 160_000, "torch": 2_000}  # of the definition, which is slow: enough to see a gross error


def models(scale=1.0):
    """A target, and two drafts that are wrong in different places."""
    target, first = chains(scale)
    second = target + scale * 0.8 * torch.randn(target.shape, generator=torch.Generator().manual_seed(5))
    return target, (first, second)


def drafted(drafts, seeds, temperature, *, shared_noise=False):
    """Tokens [sequences, nodes], and for every node the row that it was sampled from [sequences, nodes, vocab]."""
    tokens = torch.zeros(len(seeds), len(BINARY), dtype=torch.int32)
    rows = torch.full((len(seeds), len(BINARY), VOCAB), torch.nan)  # that of node 0 is not read
    for node in range(1, len(BINARY)):
        parent, draft = int(BINARY.parents[node]), drafts[(node - 1) % 2]
        rows[:, node] = draft[tokens[:, parent].long()]
        drawn = sample_children(
            rows[:, node : node + 1], 1, seeds=seeds, positions=0, temperature=temperature, backend="cpu",
            first_parent=parent if shared_noise else node,
        )  # fmt: skip
        tokens[:, node] = drawn.tokens[:, 0, 0]
    return tokens, rows


def decided(rule, backend, temperature, count, *, scale=1.0, **changes):
    target, drafts = models(scale)
    seeds = torch.arange(count) * 104_729 + 3
    tokens, rows = drafted(drafts, seeds, temperature, shared_noise=changes.pop("shared_noise", False))
    options = {"draft_rows": "child", "draft_temperature": temperature, **changes}
    result = tree_accept(
        target[tokens.long()], tokens, BINARY.to(), rows, rule=rule, seeds=seeds, positions=0,
        temperature=temperature, backend=backend, **options,
    )  # fmt: skip
    assert not result.status.any()
    return target / temperature, [draft / temperature for draft in drafts], seeds, result, temperature


def check(rule, backend, temperature, **changes):
    count = SEQUENCES[backend]
    target, drafts, seeds, result, _ = decided(rule, backend, temperature, count, **changes)
    sequences = completed(result, target, seeds)
    joint = joint_law(target)
    assert_fits(counts_of(sequences), joint)
    for place in range(LENGTH):
        others = [axis for axis in range(LENGTH) if axis != place]
        assert_fits(counts_of(sequences).sum(others), joint.sum(others))
    return target, drafts, result, count


def first_level_rate(target, drafts):
    """How often one of two independent siblings is accepted, recursively: min(p, q), then the residual against q'."""
    p, (first, second) = target[0].double().softmax(-1), [draft[0].double().softmax(-1) for draft in drafts]
    kept = torch.minimum(p, first).sum()
    left = (p - first).clamp(min=0)
    if left.sum() == 0:
        return float(kept)
    return float(kept + (1 - kept) * torch.minimum(left / left.sum(), second).sum())


BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(backends("accept")[name] is not None, reason=f"{name} is not available")
    )
    for name in SEQUENCES
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", (0.3, 1.0))
@pytest.mark.parametrize("rule", ("recursive", "traversal"))
def test_two_samplers_are_lossless(rule, temperature, backend):
    target, drafts, result, count = check(rule, backend, temperature)
    accepted = int((result.num_accepted > 0).sum())
    if rule == "recursive":
        assert_rate(accepted, count, first_level_rate(target, drafts))
    else:
        assert accepted > count * 0.3


@pytest.mark.parametrize(
    "changes",
    (
        {"shared_noise": True},
        {"draft_rows": "parent"},
        {"draft_rows": "parent", "replacement": True},
    ),
    ids=("noise shared by siblings", "one row said, without replacement", "one row said, with replacement"),
)
def test_wrong_accounts_of_two_samplers_are_found(changes):
    """Rows of the wrong node hold a NaN for node 0 here, so those two are told what the first child was drawn from."""
    if "draft_rows" in changes:
        target, drafts = models()
        count = SEQUENCES["cpu"]
        seeds = torch.arange(count) * 104_729 + 3
        tokens, _ = drafted(drafts, seeds, 1.0)
        result = tree_accept(
            target[tokens.long()], tokens, BINARY.to(), drafts[0][tokens.long()], seeds=seeds, positions=0,
            backend="cpu", replacement=changes.get("replacement", False),
        )  # fmt: skip
        with pytest.raises(AssertionError, match="G "):
            assert_fits(counts_of(completed(result, target, seeds)), joint_law(target))
    else:
        with pytest.raises(AssertionError, match="G "):
            check("recursive", "cpu", 1.0, **changes)
