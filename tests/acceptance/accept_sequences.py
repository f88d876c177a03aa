"""Sequences of speculative decoding on Markov chains, drafted and decided by the kernels, and tests of their law."""

import math

import torch

from specdec_ops import Tree, chain_accept, match_accept, sample_children, sample_tokens, tree_accept

VOCAB, STEPS = 8, 2
LENGTH = STEPS + 1
ALPHA = 1e-6


def chains(scale=1.0, gap=0.8, vocab=VOCAB):
    """Logits [vocab, vocab] of the next token after each token: target's and draft's. Token 0 comes first."""
    rng = torch.Generator().manual_seed(11)
    target = scale * torch.randn(vocab, vocab, generator=rng)
    return target, target + gap * torch.randn(vocab, vocab, generator=rng)


def p_value(g, freedom):
    """Of a G statistic: the upper tail of the chi-square distribution."""
    half = torch.tensor([freedom / 2, g / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def g_statistic(counts, expected):
    """Twice the log-likelihood ratio; cells that expect fewer than 5 are one cell."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    g = 2 * torch.where(counts > 0, counts * (counts / expected).log(), 0.0).sum()
    return float(g), len(counts) - 1


def assert_fits(counts, probabilities, share=1.0):
    """Counts of independent draws fit a law, at ALPHA * share."""
    assert counts.sum() > 0
    assert counts[probabilities == 0].sum() == 0
    g, freedom = g_statistic(counts, probabilities * counts.sum())
    assert p_value(g, freedom) > ALPHA * share, f"G {g:.1f} at {freedom} degrees of freedom"


def joint_law(target, length=LENGTH):
    """Probabilities [vocab] * length of the target's sequences after token 0, float64."""
    p = torch.softmax(target.double(), -1)
    joint = p[0]
    for _ in range(length - 1):
        joint = joint[..., None] * p
    return joint


def draft_tree(draft, tree, *, replacement, seeds, deterministic=False, temperature=1.0):
    """Tokens [sequences, nodes] of a tree whose nodes all have 0 or k children, drawn level by level."""
    tokens = torch.zeros(len(seeds), len(tree.parents), dtype=torch.int32)
    parents = torch.tensor(tree.parents.tolist())
    for node in range(len(parents)):
        children = (parents == node).nonzero()[:, 0]
        if not len(children):
            continue
        rows = draft[tokens[:, node].long()][:, None]
        if deterministic:
            tokens[:, children] = rows[:, 0].topk(len(children)).indices.int()
        else:
            options = {"replacement": replacement, "temperature": temperature, "first_parent": node, "backend": "cpu"}
            drawn = sample_children(rows, len(children), seeds=seeds, positions=0, **options)
            tokens[:, children] = drawn.tokens[:, 0]
    return tokens


def completed(result, target, seeds, length=LENGTH, temperature=1.0):
    """The first `length` tokens [sequences, length]: what a round emitted, and then the target's own."""
    emitted = torch.full((len(seeds), max(length, result.tokens.shape[1])), -1, dtype=torch.int64)
    emitted[:, : result.tokens.shape[1]] = result.tokens
    for place in range(1, length):
        missing = emitted[:, place] < 0
        rows = target[emitted[missing, place - 1]]
        noise = {"seeds": seeds[missing], "positions": 1000 + place}
        emitted[missing, place] = sample_tokens(rows, temperature=temperature, backend="cpu", **noise).long()
    return emitted[:, :length]


def counts_of(sequences, vocab=VOCAB):
    """How often each sequence came: [vocab] * length."""
    length = sequences.shape[1]
    code = (sequences * vocab ** torch.arange(length - 1, -1, -1)).sum(1)
    return torch.bincount(code, minlength=vocab**length).reshape((vocab,) * length)


def assert_rate(hits, trials, probability):
    """A count of successes is binomial; |z| < 4.9 but for one time in a million."""
    z = (hits - trials * probability) / math.sqrt(trials * probability * (1 - probability))
    assert abs(z) < 4.9, f"z {z:.1f}: {hits / trials:.5f}, expected {probability:.5f}"


CHAIN = Tree.chain(LENGTH)
BINARY = Tree([-1, 0, 0, 1, 1, 2, 2])
WIDE = Tree([-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
RULES = {
    "token": (CHAIN, {}),
    "block": (CHAIN, {}),
    "recursive without replacement": (WIDE, {"rule": "recursive"}),
    "recursive with replacement": (BINARY, {"rule": "recursive", "replacement": True}),
    "traversal without replacement": (BINARY, {"rule": "traversal"}),
    "traversal with replacement": (BINARY, {"rule": "traversal", "replacement": True}),
    "kseq": (BINARY, {"rule": "kseq"}),
    "one-hot": (BINARY, {"rule": "recursive"}),
    "one-hot traversal": (BINARY, {"rule": "traversal"}),
    "target_only": (WIDE, {"rule": "target_only"}),
    "match": (BINARY, {}),
}
DETERMINISTIC = ("one-hot", "one-hot traversal", "target_only", "match")


def decide(name, target, draft, seeds, *, tree=None, temperature=1.0, **changes):
    """One round of a rule over fresh drafts: their tokens and the result."""
    of_rule, options = RULES[name]
    tree = tree or of_rule
    options = {**options, **changes}
    deterministic = name in DETERMINISTIC
    replacement = options.get("replacement", False) or name == "kseq"
    drawn_with = changes.get("drawn_with", replacement)
    options.pop("drawn_with", None)
    drawn = {"replacement": drawn_with, "deterministic": deterministic, "temperature": temperature}
    tokens = draft_tree(draft, tree, seeds=seeds, **drawn)
    noise = {"seeds": seeds, "positions": 0, "temperature": temperature, "backend": "cpu"}
    target_logits = target[tokens.long()]
    draft_logits = None if deterministic and "soft" not in changes else draft[tokens.long()]
    options.pop("soft", None)
    if of_rule is CHAIN:
        drafted = (target_logits, tokens[:, 1:], draft_logits[:, :-1])
        return tokens, chain_accept(*drafted, rule=name, **noise, **options)
    if name == "match":
        return tokens, match_accept(target_logits, tokens, tree.to("cpu"), **noise)
    return tokens, tree_accept(target_logits, tokens, tree.to("cpu"), draft_logits, **noise, **options)
