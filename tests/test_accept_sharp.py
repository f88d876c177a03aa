"""Laws and acceptance rates where distributions are sharp: temperatures from .02, logits that are 20 apart and more.

What is left of a draft row after its likely tokens were drawn is then 1e-9 or 1e-400 of it, and decides all the same,
because children are drawn without a coin. A rule that loses it may keep the target's law and yet accept nothing, so both
are tested: the law of the text against the target's, the number of accepted drafts against the definition's.

Sizes. On the CPU kernels 40,000 sequences: a G test over 3 degrees of freedom finds, nine times in ten, a relative
deviation of all cells by 4%, one over 63 by 6%, and a rate that is off by 1.5% of its standard deviation is found.
Every p-value must be above 1e-6; there are fewer than 250 of them, and seeds are fixed. The other backends are compared
with the CPU kernels, decision by decision: a fault that changes one decision in 20 escapes 150 requests in one case of
2,000. `test_planted_faults_are_found` and the mutants of the emulated kernels show that the tests see what they are for.
"""

import functools
import math

import pytest
import torch

from accept_laws import SharpProblem, law_of
from accept_sequences import (
    ALPHA,
    BINARY,
    CHAIN,
    DETERMINISTIC,
    assert_fits,
    assert_rate,
    completed,
    counts_of,
    decide,
    joint_law,
)
from specdec_ops import Tree, backends, sample_children
from specdec_ops.reference import accept_rules as rules

SEQUENCES, VOCAB = 40_000, 4
STAR = Tree([-1, 0, 0, 0])
cpu_only = pytest.mark.skipif(backends("accept")["cpu"] is not None, reason=str(backends("accept")["cpu"]))

# name: (temperature, the form of the draft's rows, its gap in logits)
SETTINGS = {
    "a peak of 4": (0.3, "peak", 4.0),
    "a peak of 20": (1.0, "peak", 20.0),
    "steps of .2": (0.02, "steps", 0.2),
    "steps of 7": (0.1, "steps", 7.0),
    "steps of 20": (0.02, "steps", 20.0),
    "both sharp": (0.02, "both", 20.0),
}
# name: (its definition, the tree)
RULES = {
    "token": (rules.recursive, CHAIN),
    "block": (rules.traversal, CHAIN),
    "recursive without replacement": (rules.recursive, STAR),
    "recursive with replacement": (functools.partial(rules.recursive, replacement=True), STAR),
    "traversal without replacement": (rules.traversal, BINARY),
    "traversal with replacement": (functools.partial(rules.traversal, replacement=True), STAR),
    "kseq": (rules.kseq, STAR),
    "one-hot": (rules.recursive, STAR),
    "one-hot traversal": (rules.traversal, BINARY),
    "coin": (rules.coin, STAR),
    "match": (rules.match, STAR),
}


def tables(setting, vocab=VOCAB):
    """Logits [vocab, vocab] of the next token after each: target's and draft's, and the temperature.

    The target is spread over all tokens at its temperature (but where both are sharp), so drafts are often rejected.
    """
    temperature, form, gap = SETTINGS[setting]
    rng = torch.Generator().manual_seed(list(SETTINGS).index(setting))
    target = temperature * torch.randn(vocab, vocab, generator=rng)
    ranks = torch.stack([torch.randperm(vocab, generator=rng) for _ in range(vocab)])
    noise = temperature * torch.randn(vocab, vocab, generator=rng)
    draft = -gap * ranks + noise if form == "steps" else target + noise + gap * (ranks == 0)
    if form == "both":
        target = target + gap * ((ranks == 0) | (ranks == 1))
    return target, draft, temperature


def problem_of(name, setting):
    target, draft, temperature = tables(setting)
    drafting = "functions" if name in DETERMINISTIC else "with" if "with repl" in name or name == "kseq" else "without"
    return SharpProblem(RULES[name][1].parents.tolist(), VOCAB, drafting).set(target, draft, temperature)


@cpu_only
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", RULES)
def test_law_and_rate(name, setting):
    """The joint law of the text is the target's; drafts are accepted as often as by the definition."""
    target, draft, temperature = tables(setting)
    definition, tree = RULES[name]
    exact = law_of(problem_of(name, setting), definition)
    length = exact.joint.dim()
    seeds = torch.arange(SEQUENCES) * 7919 + 13
    _, result = decide(name, target, draft, seeds, tree=tree, temperature=temperature)
    assert not result.status.any()
    text = completed(result, target, seeds, length, temperature)
    joint = joint_law(target.double() / temperature, length)
    assert float((exact.joint - joint).abs().sum()) < 1e-9
    assert_fits(counts_of(text, VOCAB), joint)
    assert_mean(result.num_accepted, exact.accepted)


def assert_mean(numbers, expected):
    """|z| < 4.9 but for one time in a million."""
    numbers = numbers.double()
    error = max(float(numbers.std()), 1e-3) / math.sqrt(len(numbers))
    z = (float(numbers.mean()) - expected) / error
    assert abs(z) < 4.9, f"z {z:.1f}: {float(numbers.mean()):.5f}, expected {expected:.5f}"
