"""Laws and acceptance rates where distributions are sharp: temperatures from .02, logits that are 20 apart and more.

What is left of a draft row after its likely tokens were drawn is then 1e-9 or 1e-400 of it, and decides all the same,
because children are drawn without a coin. A rule that loses it may keep the target's law and yet accept nothing, so
both are tested: the law of the text against the target's, the number of accepted drafts against the definition's.

Sizes. On the CPU kernels 40,000 sequences: a G test over 3 degrees of freedom finds, nine times in ten, a relative
deviation of all cells by 4%, one over 63 by 6%, and a rate that is off by 1.5% of its standard deviation is found.
Every p-value must be above 1e-6; there are fewer than 150 of them, and seeds are fixed. The other backends are compared
with the CPU kernels, decision by decision: a fault that changes one decision in 20 escapes 150 requests in one case of
2,000. The planted faults below, and those of the emulated kernels in test_accept_cuda.py, show that they are found.
"""

import functools
import math

import pytest
import torch

from specdec_ops import Tree, VocabMap, backends, longest_path_accept, sample_children, tree_accept
from specdec_ops.ops.acceptance import reference_rules as rules
from tests.acceptance.accept_cases import AcceptCase, Bands, assert_same, chain, make_case
from tests.acceptance.accept_laws import SharpProblem, law_of, total_variation
from tests.acceptance.accept_mutants import with_replaced
from tests.acceptance.accept_sequences import (
    BINARY,
    CHAIN,
    DETERMINISTIC,
    assert_fits,
    completed,
    counts_of,
    decide,
    draft_tree,
    joint_law,
)

OP = "accept"
INTERPRETED_SHARE = 2

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
# name: (its definition, the tree). Triton's interpreter runs the first and every second after it.
RULES = {
    "recursive without replacement": (rules.recursive, STAR),
    "token": (rules.recursive, CHAIN),
    "traversal without replacement": (rules.traversal, BINARY),
    "recursive with replacement": (functools.partial(rules.recursive, replacement=True), STAR),
    "kseq": (rules.kseq, STAR),
    "match": (rules.match, STAR),
    "block": (rules.traversal, CHAIN),
    "one-hot": (rules.recursive, STAR),
    "traversal with replacement": (functools.partial(rules.traversal, replacement=True), STAR),
    "target_only": (rules.target_only, STAR),
    "one-hot traversal": (rules.traversal, BINARY),
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


# Every pair where siblings are drawn without replacement, every second one of the others.
PAIRS = [
    (name, setting)
    for row, name in enumerate(RULES)
    for column, setting in enumerate(SETTINGS)
    if "without" in name or (row + column) % 2
]


@cpu_only
@pytest.mark.parametrize(("name", "setting"), PAIRS)
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


ISSUE = {"target": [0.0, 0.3, 0.15, -0.3], "draft": [4.0, 0.0, -0.5, -1.5], "temperature": 0.3}


def drafted_star(draft, temperature, seeds, count=3, **options):
    """Children [requests, count] of the rows [requests, vocab], drawn without replacement, and a token for node 0."""
    noise = {"seeds": seeds, "positions": 0, "first_parent": 0}
    drawn = sample_children(draft[:, None], count, temperature=temperature, **noise, backend="cpu", **options)
    assert (drawn.tokens >= 0).all()
    return torch.nn.functional.pad(drawn.tokens[:, 0], (1, 0))


def decided_star(target, draft, tokens, temperature, seeds, **options):
    nodes = tokens.shape[1]
    rows = [table[:, None].expand(-1, nodes, -1) for table in (target, draft)]
    tree = Tree([-1] + [0] * (nodes - 1)).to("cpu")
    noise = {"seeds": seeds, "positions": 0, "temperature": temperature, "backend": "cpu"}
    return tree_accept(rows[0], tokens, tree, rows[1], **noise, **options)


@cpu_only
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_first_tokens_after_a_likely_first_child(rule):
    """A difference in float32 gave .1745, .4980, .3160, .0115."""
    count, temperature = 100_000, ISSUE["temperature"]
    target, draft = (torch.tensor(ISSUE[name]).expand(count, -1) for name in ("target", "draft"))
    seeds = torch.arange(count)
    tokens = drafted_star(draft, temperature, seeds)
    result = decided_star(target, draft, tokens, temperature, seeds, rule=rule)
    law = torch.tensor([0.1744, 0.4740, 0.2875, 0.0641])
    shares = torch.bincount(result.tokens[:, 0].long(), minlength=4) / count
    torch.testing.assert_close(shares, law, rtol=0, atol=0.006)
    assert_fits((shares * count).round(), torch.softmax(target[0].double() / temperature, -1))
    assert_chance(result.num_accepted, chance_of_acceptance(target, draft, tokens, temperature))


def chance_of_acceptance(target, draft, tokens, temperature):
    """The probability that a child is accepted, given the children: float64 [requests], by logarithms."""
    p, logs = torch.softmax(target.double() / temperature, -1), draft.double() / temperature
    rejected = torch.ones(len(p), dtype=torch.float64)
    for child in tokens[:, 1:].long().T[..., None]:
        q = torch.softmax(logs, -1)
        rejected *= 1 - (p.gather(1, child) / q.gather(1, child)).nan_to_num(0.0).clamp(max=1)[:, 0]
        p = (p - q).clamp(min=0)
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        logs = logs.scatter(1, child, float("-inf"))
    return 1 - rejected


def assert_chance(accepted, chances):
    """Independent requests, each accepted with a chance of its own: |z| < 4.9 but for one time in a million."""
    error = max(float((chances * (1 - chances)).sum()) ** 0.5, 1e-3)
    z = float(accepted.double().sum() - chances.sum()) / error
    assert abs(z) < 4.9, f"z {z:.1f}: {float(accepted.double().mean()):.5f}, expected {float(chances.mean()):.5f}"


@cpu_only
@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("vocab", [4, 50, 2000])
def test_acceptance_of_random_rows(vocab, temperature):
    """2,000 pairs of rows: as often as float64 says of the very children drawn. No child is missing."""
    rng = torch.Generator().manual_seed(vocab)
    target = torch.randn(2000, vocab, generator=rng)
    draft = target + 0.7 * torch.randn(2000, vocab, generator=rng)
    seeds = torch.arange(2000)
    tokens = drafted_star(draft, temperature, seeds)
    chances = chance_of_acceptance(target, draft, tokens, temperature)
    for rule in ("recursive", "traversal"):
        result = decided_star(target, draft, tokens, temperature, seeds, rule=rule)
        assert not result.status.any()
        assert_chance(result.num_accepted, chances)
    rejected = result.num_accepted == 0
    assert_next_tokens(target, draft, tokens, temperature, result.next_token, rejected)


def assert_next_tokens(target, draft, tokens, temperature, following, rejected):
    """After a rejection of all the next token is none of them, and one of those that the residual has."""
    assert (following[rejected, None] != tokens[rejected, 1:]).all()
    p = torch.softmax(target.double() / temperature, -1).gather(1, following.long()[:, None])
    assert (p[rejected] > 1e-12).all()


def log_odds_law(logs):
    """The law of the first three tokens drawn without replacement: float64 [vocab] * 3."""
    vocab = len(logs)
    joint = torch.zeros((vocab,) * 3, dtype=torch.float64)
    for first in range(vocab):
        for second in set(range(vocab)) - {first}:
            chance, left = 1.0, logs.double().clone()
            for token in (first, second):
                chance *= float(torch.softmax(left, -1)[token])
                left[token] = float("-inf")
            joint[first, second] = chance * torch.softmax(left, -1)
    return joint


@cpu_only
@pytest.mark.parametrize("setting", SETTINGS)
def test_children_have_their_law(setting):
    """Triples without replacement, of rows whose later tokens have 1e-9 or 1e-400 of the first one's probability."""
    _, draft, temperature = tables(setting, 5)
    tokens = drafted_star(draft[2].expand(SEQUENCES, -1), temperature, torch.arange(SEQUENCES))
    joint = log_odds_law(draft[2].double() / temperature)
    assert_fits(counts_of(tokens[:, 1:].long(), 5), torch.where(joint > 1e-12, joint, 0.0))


def slow(target):
    return target.device == "cpu" and target.backend in ("triton", "cuda-emulated")


def mixed_case(name, each):
    """`each` requests of every setting in one call."""
    tree, parts = RULES[name][1], []
    for number, setting in enumerate(SETTINGS):
        rows, draft, temperature = tables(setting)
        seeds = torch.arange(each) + 1000 * number
        replacement = "with repl" in name or name == "kseq"
        drawn = {"replacement": replacement, "deterministic": name in DETERMINISTIC, "temperature": temperature}
        tokens = draft_tree(draft, tree, seeds=seeds, **drawn)
        parts.append((rows[tokens.long()], draft[tokens.long()], tokens, seeds, torch.full((each,), temperature)))
    rows, draft, tokens, seeds, temperature = (torch.cat(part) for part in zip(*parts, strict=True))
    options = {"seeds": seeds, "positions": 0, "temperature": temperature}
    rule = {"one-hot": "recursive", "one-hot traversal": "traversal"}.get(name, name.split()[0])
    if tree is CHAIN:
        return AcceptCase(rule, rows, tokens[:, 1:].contiguous(), None, draft[:, :-1], options)
    if "with repl" in name:
        options["replacement"] = True
    return AcceptCase(rule, rows, tokens, tree.to("cpu"), None if name in DETERMINISTIC else draft, options)


@pytest.mark.parametrize("name", RULES)
def test_every_backend_decides_alike(name, target):
    """One decision after the other, as the CPU kernels, whose law is tested above; those as the definition."""
    each = 1 if target.backend == "triton" and slow(target) else 25 if slow(target) else 12
    case = mixed_case(name, each)
    bands = Bands()
    bands.check(case, case.to(target.device).run(target.backend), None if target.backend == "cpu" else case.run("cpu"))
    bands.assert_rare(0.02)


@cpu_only
@pytest.mark.parametrize("name", ["recursive without replacement", "traversal without replacement", "kseq"])
def test_flushing_subnormal_numbers_changes_nothing(name):
    """A process may have switched them off."""
    case = mixed_case(name, 50)
    want = case.run("cpu")
    try:
        assert torch.set_flush_denormal(True)
        got = mixed_case(name, 50).run("cpu")
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, want)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_a_reduced_vocabulary_and_filters(rule, target):
    """What is left of a draft's row is looked for through the map, and among what its filters keep."""
    count = 4 if target.backend == "triton" and slow(target) else 40
    rng = torch.Generator().manual_seed(3)
    mapping = VocabMap(torch.randperm(12, generator=rng)[:7], 12)
    draft = 3 * torch.randn(count, 7, generator=rng)
    rows = 0.02 * torch.randn(count, 12, generator=rng)
    seeds = torch.arange(count)
    noise = {"seeds": seeds, "positions": 0, "temperature": 0.02}
    drawn = sample_children(draft[:, None], 5, vocab_map=mapping, top_k=4, first_parent=0, **noise, backend="cpu")
    assert ((drawn.tokens < 0).sum(-1) == 1).all()
    tokens = torch.nn.functional.pad(drawn.tokens[:, 0], (1, 0))
    options = {**noise, "vocab_map": mapping, "draft_top_k": 4}
    wide = [table[:, None].expand(-1, 6, -1).contiguous() for table in (rows, draft)]
    case = AcceptCase(rule, wide[0], tokens, Tree([-1, 0, 0, 0, 0, 0]).to("cpu"), wide[1], options)
    result = case.to(target.device).run(target.backend)
    assert not result.status.any()
    Bands().check(case, result)


@pytest.mark.parametrize("rule", ["recursive", "block", "traversal", "kseq"])
def test_random_rows_against_the_definition(rule, target):
    """300 tokens, of which a few have nearly all probability; the draft has others than the target."""
    count = 2 if target.backend == "triton" and slow(target) else 60
    heat = torch.tensor([0.02, 0.1, 0.3] * 20)[:count]
    trees = [chain(4) if rule == "block" else [-1, 0, 0, 0, 0, 1, 1]] * count
    case = make_case(rule, trees, 300, seed=5, scale=1.0, gap=0.5, temperature=heat)
    bands = Bands()
    bands.check(case, case.to(target.device).run(target.backend))
    bands.assert_rare(0.02)


def test_every_possible_token_is_drawn(target):
    """However unlikely it is next to those before it: rows that end, rows in two spans of a GPU, filters, maps."""
    count, requests = 6, 2 if slow(target) else 20
    noise = {"seeds": torch.arange(requests), "positions": 3, "temperature": 0.02}
    steps = -20.0 * torch.randperm(9).float().expand(requests, 9)
    random = torch.randn(requests, 40)
    ended = torch.where(torch.arange(40) % 10 == 0, random, float("-inf"))
    rows = {"steps": steps, "random": random, "ended": ended}
    if target.backend != "triton" or not slow(target):
        rows["long"] = torch.randn(requests, 9001)
    for name, row in rows.items():
        mapping = VocabMap(torch.randperm(2 * row.shape[-1])[: row.shape[-1]], 2 * row.shape[-1])
        for options in ({}, {"vocab_map": mapping, "top_k": 5}):
            want = sample_children(row[:, None], count, **noise, **options, backend="torch")
            on = {"vocab_map": mapping.to(target.device)} if options else {}
            moved = {**noise, **options, **on, "seeds": noise["seeds"].to(target.device)}
            got = sample_children(row[:, None].to(target.device), count, **moved, backend=target.backend)
            assert torch.equal(got.tokens.cpu(), want.tokens), name
            assert int((got.tokens[0] >= 0).sum()) == (4 if name == "ended" else 5 if options else 6)
            torch.testing.assert_close(got.logprobs.cpu(), want.logprobs, rtol=2e-5, atol=2e-5)


def test_next_tokens_of_the_longest_path(target):
    """`width` tokens from the row alone: all that there are, in the definition's order."""
    row = torch.randn(4, 1, 10)
    noise = {"seeds": torch.arange(4), "positions": 3, "temperature": 0.02}
    tree, tokens = Tree([-1]).to("cpu"), torch.zeros(4, 1, dtype=torch.int32)
    want = longest_path_accept(row, tokens, tree, row, width=11, **noise, backend="torch")
    assert ((want.next_tokens >= 0).sum(-1) == 10).all()
    noise["seeds"] = noise["seeds"].to(target.device)
    moved = [each.to(target.device) for each in (row, tokens, tree, row)]
    got = longest_path_accept(*moved, width=11, **noise, backend=target.backend)
    assert torch.equal(got.next_tokens.cpu(), want.next_tokens)


# Planted faults


def simulated(target, draft, tokens, temperature, left_of):
    """(first tokens, accepted) of the recursive rule in float32, with some way to know what is left of the draft."""
    rng = torch.Generator().manual_seed(1)
    p, q = (torch.softmax(table / temperature, -1) for table in (target, draft))
    weight, factor, mass = p.clone(), torch.zeros(len(p), 1), torch.ones(len(p), 1)
    removed = torch.zeros_like(p, dtype=torch.bool)
    first, left = torch.full((len(p),), -1), torch.ones(len(p), 1)
    for child in tokens[:, 1:].long().T[..., None]:
        u = torch.rand(len(p), 1, generator=rng)
        passes = (u * q.gather(1, child) * mass < weight.gather(1, child) * left) & (first[:, None] < 0) & (left > 0)
        first = torch.where(passes[:, 0], child[:, 0], first)
        factor = torch.where(left > 0, factor + mass / left, factor)
        removed = removed.scatter(1, child, True)
        weight = torch.where(removed, 0.0, (p - factor * q).clamp(min=0))
        mass, left = weight.sum(-1, keepdim=True), left_of(q, removed)
    drawn = torch.multinomial(weight.clamp(min=1e-30), 1, generator=rng)[:, 0]
    return torch.where(first < 0, drawn, first), (first >= 0).int()


def test_planted_faults_are_found():
    """What is left of the draft as a difference, and what it is: the first fails by law and by rate."""
    count, temperature = SEQUENCES, ISSUE["temperature"]
    target, draft = (torch.tensor(ISSUE[name]).expand(count, -1) for name in ("target", "draft"))
    q = torch.softmax(draft.double() / temperature, -1)
    tokens = torch.multinomial(q, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.nn.functional.pad(tokens.int(), (1, 0))
    law = torch.softmax(target[0].double() / temperature, -1)
    chances = chance_of_acceptance(target, draft, tokens, temperature)

    def difference(q, removed):
        return 1.0 - torch.where(removed, q, 0.0).sum(-1, keepdim=True)

    def summed(q, removed):
        return torch.where(removed, 0.0, q).sum(-1, keepdim=True)

    first, accepted = simulated(target, draft, tokens, temperature, summed)
    assert_fits(first.bincount(minlength=4), law)
    assert_chance(accepted, chances)
    first, accepted = simulated(target, draft, tokens, temperature, difference)
    with pytest.raises(AssertionError, match="degrees of freedom"):
        assert_fits(first.bincount(minlength=4), law)
    with pytest.raises(AssertionError, match="z "):
        assert_chance(accepted, chances)


@cpu_only
def test_a_rule_that_loses_acceptance_keeps_the_law():
    """Siblings after the first are given up, as where the rest of the draft rounds to nothing: the rate tells."""
    name, setting = "recursive without replacement", "steps of 7"

    def none_left(tree, child, removed, replacement):
        return None if removed else tree.proposal(child)

    problem = problem_of(name, setting)
    lost = law_of(problem, with_replaced(rules.recursive, proposal_left=none_left))
    assert total_variation(lost, problem) < 1e-9
    target, draft, temperature = tables(setting)
    _, result = decide(name, target, draft, torch.arange(SEQUENCES), tree=STAR, temperature=temperature)
    assert_mean(result.num_accepted, law_of(problem, rules.recursive).accepted)
    with pytest.raises(AssertionError, match="z "):
        assert_mean(result.num_accepted, lost.accepted)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_rows_may_share_their_memory(rule, target):
    """All draft rows are one: what is kept of a row for the law of one node is not that of a law that is stated anew.

    Node 8 is kept where node 0 is, while node 0's law is the one that its rejected children have left.
    """
    tree, vocab = Tree([-1, 0, 1, 2, 3, 4, 5, 6, 0, 8, 0]), 6
    requests = 600 if target.backend == "cpu" else 20
    nodes = len(tree)
    draft = torch.tensor([4, 0.0, -0.02, -0.03, -0.05, -0.01]).expand(requests, nodes, vocab)
    logits = (0.02 * torch.randn(nodes, vocab)).expand(requests, nodes, vocab)
    noise = {"seeds": torch.arange(requests), "positions": 5, "temperature": 0.02}
    tokens = torch.zeros(requests, nodes, dtype=torch.int32)
    for node in range(nodes):
        if len(children := (tree.parents == node).nonzero()[0]):
            drawn = sample_children(draft[:, node : node + 1], len(children), first_parent=node, **noise, backend="cpu")
            tokens[:, children] = drawn.tokens[:, 0]
    got, expected = (
        tree_accept(
            logits.to(target.device), tokens.to(target.device), tree.to(target.device), rows.to(target.device),
            rule=rule, backend=target.backend, **noise,
        )
        for rows in (draft, draft.contiguous())
    )  # fmt: skip
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.nodes, expected.nodes)


def test_the_definition_keeps_the_noise_at_any_temperature():
    """Logarithms of 1e18 would swallow it."""
    rows = torch.tensor([1.0, 0, 0, 0]).expand(300, 1, 4)
    options = {"seeds": torch.arange(300), "positions": 1, "temperature": 1e-18}
    drawn = sample_children(rows, 2, backend="torch", **options).tokens[:, 0]
    assert (drawn[:, 0] == 0).all()
    assert (drawn[:, 1].bincount(minlength=4)[1:] > 60).all()
    assert torch.equal(drawn, sample_children(rows, 2, **options).tokens[:, 0])
