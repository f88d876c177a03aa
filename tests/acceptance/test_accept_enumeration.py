"""The acceptance rules by exact enumeration: lossless ones are, to rounding, lossy ones and wrong ones are not."""

import functools
import itertools
import math

import pytest
import torch

from specdec_ops.ops.acceptance import reference_philox
from specdec_ops.ops.acceptance import reference_rules as rules
from specdec_ops.ops.acceptance.reference_sample import Settings, law
from tests.acceptance import accept_mutants
from tests.acceptance.accept_laws import SHAPES, Problem, law_of, outcomes, problems, target_joint, total_variation
from tests.acceptance.accept_laws import DraftedTree as Drafted

EXACT = 1e-12
DIFFERENT = 1e-3
CHAINS = ["chain 1", "chain 2", "chain 3"]

recursive, traversal = rules.recursive, rules.traversal
recursive_with = functools.partial(recursive, replacement=True)
traversal_with = functools.partial(traversal, replacement=True)

# A rule, and how the children that it is lossless for are drawn.
LOSSLESS = {
    "recursive-without": (recursive, "without"),
    "recursive-with": (recursive_with, "with"),
    "recursive-own": (recursive, "own"),
    "recursive-functions": (recursive, "functions"),
    "recursive-duplicates": (recursive, "duplicates"),
    "traversal-without": (traversal, "without"),
    "traversal-with": (traversal_with, "with"),
    "traversal-own": (traversal, "own"),
    "traversal-functions": (traversal, "functions"),
    "traversal-duplicates": (traversal, "duplicates"),
    "target_only-functions": (rules.target_only, "functions"),
    "target_only-duplicates": (rules.target_only, "duplicates"),
    "kseq-with": (rules.kseq, "with"),
    "match-without": (rules.match, "without"),
    "match-with": (rules.match, "with"),
    "match-functions": (rules.match, "functions"),
}


def assert_lossless(rule, problem):
    result = law_of(problem, rule)
    distance = total_variation(result, problem)
    assert distance < EXACT, f"total variation {distance:.2e} on {problem}"
    return result


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless(name):
    """Every shape, two problems each. No status: nothing is odd about them."""
    rule, drafting = LOSSLESS[name]
    for problem in problems(SHAPES, [drafting]):
        assert assert_lossless(rule, problem).status == 0


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_with_larger_vocabularies(name):
    rule, drafting = LOSSLESS[name]
    for vocab, shape in itertools.product((4, 5), ("chain 2", "star 3", "2x2")):
        assert_lossless(rule, Problem(SHAPES[shape], vocab, drafting, seed=vocab))


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("supports", [(2, None), (None, 2), (1, None), (2, 2)], ids=str)
def test_lossless_with_zero_probabilities(name, supports):
    """Filters leave zeros in p and q; a draft may run out of tokens, and has then no more children to try."""
    rule, drafting = LOSSLESS[name]
    for problem in problems(
        ["chain 2", "star 3", "2x2"], [drafting], 4, proposal_support=supports[0], target_support=supports[1]
    ):
        assert_lossless(rule, problem)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_with_an_end_of_sequence(name):
    """Nothing follows an end of sequence, in the middle of a path or at its end."""
    rule, drafting = LOSSLESS[name]
    for problem in problems(["chain 2", "2x2"], [drafting], eos=(0,)):
        assert_lossless(rule, problem)


def block_verification(tree, choice):
    """Sun et al. 2024, as in the paper: all prefixes are tested independently, and the longest that passes is kept."""
    path, weights = [0], [1.0]
    for child in tree.children(0):
        while child is not None:
            token = tree.token(child)
            ratio = float(tree.target(path[-1])[token]) / float(tree.proposal(child)[token])
            weights.append(min(1.0, weights[-1] * ratio))
            path.append(child)
            child = next(tree.children(child), None)

    def left(place):
        following = next(tree.children(path[place]), None)
        p = tree.target(path[place])
        return p if following is None else (weights[place] * p - tree.proposal(following)).clamp(min=0)

    kept = 0
    for place in range(1, len(path)):
        total = float(left(place).sum())
        last = place == len(path) - 1
        limit = weights[place] if last else total / (total + 1 - weights[place]) if total > 0 else 0.0
        if choice.coin(path[place], 1.0, limit):
            kept = place
    return path[: kept + 1], choice.draw(left(kept), reference_philox.BONUS, path[kept])


def outcome_law(problem, rule):
    """Probability of every (accepted tokens, next token)."""
    law_by_tokens = {}

    def run(choice):
        tree = Drafted(problem, choice)
        path, following = rule(tree, choice)
        return tuple(tree.token(node) for node in path[1:]), following

    for (tokens, following), probability in outcomes(run):
        law_by_tokens[tokens] = law_by_tokens.get(tokens, 0) + probability * following
    return law_by_tokens


@pytest.mark.parametrize("shape", CHAINS)
@pytest.mark.parametrize("seed", range(4))
def test_traversal_is_block_verification_on_chains(shape, seed):
    """The same law of what is accepted and of what follows, not only the same completed sequences."""
    problem = Problem(SHAPES[shape], 3, "with", seed)
    ours, theirs = outcome_law(problem, traversal), outcome_law(problem, block_verification)
    assert ours.keys() == theirs.keys()
    for tokens in ours:
        torch.testing.assert_close(ours[tokens], theirs[tokens], rtol=0, atol=EXACT)


def test_block_verification_accepts_more():
    """Never less than token by token, and strictly more from two tokens on."""
    gains = {shape: [] for shape in CHAINS}
    for shape, seed in itertools.product(CHAINS, range(8)):
        problem = Problem(SHAPES[shape], 3, "with", seed)
        token, block = law_of(problem, recursive).accepted, law_of(problem, traversal).accepted
        gains[shape].append(block - token)
    assert all(gain > -EXACT for found in gains.values() for gain in found)
    assert all(abs(gain) < EXACT for gain in gains["chain 1"])
    assert max(gains["chain 2"]) > 0.01
    assert max(gains["chain 3"]) > 0.01


def test_a_single_draft_is_accepted_with_the_overlap():
    """The closed form: sum of min(p, q), for every rule that knows q."""
    for problem in problems(["chain 1"], ["with"], 5, seeds=range(4)):
        overlap = float(torch.minimum(problem.p(()), problem.q(())).sum())
        for rule in (recursive, recursive_with, traversal, rules.kseq):
            assert law_of(problem, rule).accepted == pytest.approx(overlap, abs=EXACT)


def test_match_accepts_the_mass_of_children():
    for problem in problems(["star 2"], ["functions"], 5, seeds=range(4)):
        tokens = problem.q(()).sort(descending=True).indices[:2]
        mass = float(problem.p(())[tokens].sum())
        for rule in (rules.match, rules.target_only, recursive):
            assert law_of(problem, rule).accepted == pytest.approx(mass, abs=EXACT)


# ---- lossy rules


def distances(rule, found, **options):
    return [total_variation(law_of(problem, rule, **options), problem) for problem in found]


@pytest.mark.parametrize("drafting", ["with", "functions"])
def test_typical_acceptance_differs(drafting):
    assert min(distances(rules.typical, problems(["chain 2", "star 2", "2x2"], [drafting]))) > DIFFERENT


def test_typical_acceptance_as_published():
    """Medusa's way: every path from root to leaf on its own, as lists of numbers."""
    accepted = set()
    for seed, (epsilon, delta) in itertools.product(range(40), [(0.3, 0.09), (0.4, 1.0), (0.9, 1.6)]):
        problem = Problem(SHAPES["ragged"], 4, "functions", seed)
        tree = Drafted(problem, None)
        parents = problem.parents

        def least(node, tree=tree, epsilon=epsilon, delta=delta):
            return min(epsilon, delta * math.exp(sum(p * math.log(p) for p in tree.target(node).tolist())))

        best = (0, 0.0, 0)  # length, log-likelihood, minus the last node
        for leaf in range(1, len(parents)):
            nodes = [leaf]
            while nodes[0]:
                nodes.insert(0, parents[nodes[0]])
            chances = [float(tree.target(parents[node])[tree.token(node)]) for node in nodes[1:]]
            if all(p > least(parent) for p, parent in zip(chances, nodes, strict=False)):
                best = max(best, (len(chances), sum(map(math.log, chances)), -leaf))
        path, following = rules.typical(Drafted(problem, None), Weights(), epsilon, delta)
        assert path[-1] == -best[2]
        accepted.add((len(path), path[-1]))
        p = tree.target(path[-1])
        kept = p > least(path[-1])
        assert torch.equal(following, torch.where(kept, p, 0.0) if kept.any() else p)
    assert len(accepted) > 4, "the problems must lead to different ends"


class Weights:
    """A choice that returns the weights that a token would be drawn from."""

    def draw(self, weights, domain, node):
        return weights


def longest_path(tree, choice):
    return rules.longest_path(tree, choice, list(tree.roots()), 1)


def longest_path_as_published(tree, choice):
    """Improved MCSD's way: a mask over all nodes, then the first of the longest paths."""
    parents = tree.problem.tree.parents.tolist()
    lengths = []
    for node, parent in enumerate(parents):
        tree.claimed[node] = None if parent < 0 else parent
        p, q = (None, None) if parent < 0 else (tree.target(parent), tree.proposal(node))
        token = tree.token(node)
        passed = parent >= 0 and choice.coin(node, float(q[token]), float(p[token]))
        lengths.append(0 if parent < 0 else lengths[parent] + 1 if passed and lengths[parent] >= 0 else -1)
    end = lengths.index(max(lengths))
    path = [end]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    p, children = tree.target(end), [node for node in range(len(parents)) if parents[node] == end]
    if len(path) > 1 and children:
        p = (p - tree.proposal(children[0])).clamp(min=0)
    return path, p / p.sum()


FORESTS = {"one root": [-1, 0, 0, 1], "two roots": [-1, -1, 0, 1, 1, 2], "two bushes": [-1, -1, 0, 0, 1, 1]}


@pytest.mark.parametrize("shape", FORESTS)
@pytest.mark.parametrize("drafting", ["with", "without"])
def test_longest_path_differs(shape, drafting):
    """Even with one root: a root that keeps none of its children is followed by p, not by the residual."""
    assert distances(longest_path, [Problem(FORESTS[shape], 3, drafting)], forest=True)[0] > DIFFERENT


@pytest.mark.parametrize("shape", FORESTS)
def test_longest_path_as_published(shape):
    problem = Problem(FORESTS[shape], 3, "without")
    ours = law_of(problem, longest_path, forest=True)
    theirs = law_of(problem, longest_path_as_published, forest=True)
    torch.testing.assert_close(ours.joint, theirs.joint, rtol=0, atol=EXACT)
    assert ours.accepted == pytest.approx(theirs.accepted, abs=EXACT)


@pytest.mark.parametrize("thresholds", [(0.3, 1.0), (1.0, 0.7)])
def test_coin_with_thresholds_differs(thresholds):
    def rule(tree, choice):
        return rules.target_only(tree, choice, *thresholds)

    assert max(distances(rule, problems(["chain 2", "star 2"], ["functions"]))) > DIFFERENT


@pytest.mark.parametrize("drafting", ["with", "without", "own"])
def test_rules_that_know_no_proposal_are_lossless_however_children_were_drawn(drafting):
    """Given its children, each of them keeps p. What they lose against rules that know q is acceptance."""
    for rule in (rules.target_only, recursive, traversal):
        for problem in problems(["chain 2", "star 3", "2x2"], [drafting], one_hot=True):
            assert_lossless(rule, problem)


def test_skipping_repeats_makes_drawing_with_replacement_drawing_without():
    for problem in problems(["star 3", "2x2"], ["with"]):
        result = assert_lossless(recursive, problem)
        assert result.status == rules.DRAFT_TOKEN_IMPOSSIBLE, "a repeat can't be drawn without replacement"


# ---- mutants


@pytest.mark.parametrize("name", accept_mutants.MUTANTS)
def test_mutants_fail(name):
    mutant, right, arguments = accept_mutants.MUTANTS[name]
    found = problems(*arguments)
    assert max(distances(right, found)) < EXACT
    assert max(distances(mutant, found)) > DIFFERENT


@pytest.mark.parametrize("shape", ["chain 1", "star 2", "2x2"])
def test_soft_proposals_for_deterministic_children_fail(shape):
    """A greedy draft scored with its softmax (HF #32867, S2D), and the best two of a row scored as drawn from it."""
    for rule in (recursive, traversal):
        assert max(distances(rule, problems([shape], ["functions"], one_hot=False))) > DIFFERENT
        assert max(distances(rule, problems([shape], ["functions"]))) < EXACT


class FixedCoin:
    """A choice whose coins are all u, at the edge of what a coin can be or beyond it."""

    def __init__(self, u, accepts):
        self.u, self.accepts = u, accepts

    def decide(self, chances):
        return 0

    def coin(self, node, left, right, *, level=False):
        return self.accepts(self.u * left, right)

    def draw(self, weights, domain, node):
        return int(weights.argmax())


@pytest.mark.parametrize("rule", [recursive, recursive_with, traversal, rules.target_only, rules.kseq])
def test_zero_probability_is_never_accepted(rule):
    """Even by a coin of 0. With `<=` it is (sglang #35771, vllm-ascend #13730)."""
    problem = Problem(SHAPES["chain 1"], 2, "functions")
    problem.rows[("q", 0)] = torch.tensor([1, 0], dtype=torch.float64)
    problem.rows[("p",)] = torch.tensor([0, 1], dtype=torch.float64)

    def accepted(accepts):
        choice = FixedCoin(0.0, accepts)
        return len(rule(Drafted(problem, choice), choice)[0]) - 1

    assert accepted(lambda left, right: left < right) == 0
    if rule is not traversal:  # which needs no coin to turn weight 0 down
        assert accepted(lambda left, right: left <= right) == 1


@pytest.mark.parametrize("rule", [recursive, recursive_with, traversal, rules.kseq])
def test_equal_distributions_always_accept(rule):
    """The greatest coin is below 1, so p = q never leaves an empty residual (FlashInfer, TensorRT-LLM)."""
    problem = Problem(SHAPES["chain 1"], 3, "with")
    problem.rows[("q", 0)] = problem.p(())
    choice = FixedCoin(reference_philox.coins_of(torch.tensor(2**32 - 1)).item(), lambda left, right: left < right)
    assert len(rule(Drafted(problem, choice), choice)[0]) == 2


@pytest.mark.parametrize(
    "domains, fair",
    [
        ((reference_philox.DRAFT, reference_philox.ACCEPT, reference_philox.RESIDUAL), True),
        ((reference_philox.DRAFT, reference_philox.ACCEPT, reference_philox.DRAFT), False),
        ((reference_philox.DRAFT, reference_philox.DRAFT, reference_philox.RESIDUAL), False),
        ((reference_philox.DRAFT, reference_philox.RESIDUAL, reference_philox.RESIDUAL), False),
    ],
)
def test_shared_noise_fails(domains, fair):
    """Chi-square of 60,000 rounds: 7 degrees of freedom, 6e-9 of false alarms at 52 (vLLM #47386)."""
    p, count = torch.arange(8, 0, -1, dtype=torch.float64) / 36, 60_000
    q = p.flip(0)
    counts = accept_mutants.one_round(count, domains, p, q)
    statistic = float(((counts - count * p) ** 2 / (count * p)).sum())
    assert (statistic < 52) == fair, statistic


# ---- temperature and filters


def processed(logits, temperature, top_k, top_p):
    """An oracle: one token at a time, in plain Python."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    weights = [math.exp((value - logits[order[0]]) / temperature) for value in logits]
    order = order[: top_k or None]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        mass += weights[token]
        if mass >= top_p * total:
            break
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


SETTINGS = [
    Settings(*values)
    for values in [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 3, 1.0),
        (1.0, 0, 0.75),
        (1.5, 3, 0.5),
        (0.0, 2, 0.5),
        (1.0, 1, 0.0),
    ]
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_law_of_a_row(settings):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(6, generator=generator).mul(4).round().div(2)  # with ties
        expected = torch.tensor(processed(logits.tolist(), *settings[:3]), dtype=torch.float64)
        found = law(logits, settings)
        assert found.valid
        torch.testing.assert_close(found.probabilities, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("draft_settings", [Settings(1.0, 0, 1.0), Settings(0.5, 2, 1.0)], ids=str)
def test_lossless_after_temperature_and_filters(settings, draft_settings):
    """The law is that of sampling from the processed target, whatever the draft's own settings."""

    class FromLogits(Problem):
        def row(self, kind, support, *key):
            name = (kind, *key)
            if name not in self.rows:
                logits = super().row(kind, support, *key).log()
                self.rows[name] = law(logits, settings if kind == "p" else draft_settings).probabilities
            return self.rows[name]

    for drafting, rule in (("without", recursive), ("with", traversal_with), ("with", rules.kseq)):
        problem = FromLogits(SHAPES["2x1"], 4, drafting)
        plain = Problem(SHAPES["2x1"], 4, drafting)
        expected = torch.tensor(processed(plain.p(()).log().tolist(), *settings[:3]), dtype=torch.float64)
        joint = law_of(problem, rule).joint
        torch.testing.assert_close(joint, target_joint(problem, 3), rtol=0, atol=EXACT)
        torch.testing.assert_close(joint.sum(dim=(1, 2)), expected, rtol=0, atol=EXACT)
