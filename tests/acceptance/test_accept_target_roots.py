"""Trees whose first level the target has drawn itself: which rules are lossless, and what the other roots are worth.

The roots are drawn without replacement from p, and are told to a rule as that: their proposal is p. By enumeration.
"""

import functools

import pytest

from specdec_ops.ops.acceptance import reference_rules as rules
from tests.acceptance.accept_laws import DraftedTree as Drafted
from tests.acceptance.accept_laws import Problem, law_of, outcomes, total_variation

EXACT, DIFFERENT = 1e-12, 1e-3
W1, W2, W3 = [-1, 0, 1], [-1, 0, 0, 1, 2], [-1, 0, 0, 0, 1, 2, 3]
W1_BUSHY, W2_BUSHY = [-1, 0, 1, 1], [-1, 0, 0, 1, 1, 2, 2]
WIDER = [(W1, W2), (W1, W3), (W1_BUSHY, W2_BUSHY)]
SEEDS = range(4)


class TargetRoots(Problem):
    """Node 0 is the last committed token; the target has drawn its children."""

    def q(self, prefix, sibling=0):
        return super().q(prefix, sibling) if prefix else self.p(prefix)


def problems(parents, drafting="without"):
    return [TargetRoots(parents, 3, drafting, seed) for seed in SEEDS]


def coupled(tree, choice):
    """`match` with the noise of the roots: the race's first is the root, so the target draws it again."""
    root = next(tree.children(0))
    tokens = {0: tree.token(root)}

    def token_after(node):
        return tokens.get(node) if node in tokens else choice.sample(tree.target(node), tree.depth(node))

    return rules.follow(tree, token_after)


FIRST_ROOT = {"recursive": rules.recursive, "traversal": rules.traversal, "match": coupled}


def roots_taken(problem, rule):
    """The probability that each root is on the accepted path."""
    taken: dict[int | None, float] = {}

    def run(choice):
        path, _ = rule(Drafted(problem, choice), choice)
        return path[1] if len(path) > 1 else None

    for root, probability in outcomes(run):
        taken[root] = taken.get(root, 0.0) + probability
    return taken


@pytest.mark.parametrize("name", FIRST_ROOT)
@pytest.mark.parametrize("parents", [W1, W2, W3, W2_BUSHY], ids=["1", "2", "3", "2 of 2"])
def test_lossless_rules_always_keep_the_first_root(name, parents):
    """They are lossless on such a tree, and no other root is ever accepted: its ratio p / q is 1."""
    for problem in problems(parents):
        assert total_variation(law_of(problem, FIRST_ROOT[name]), problem) < EXACT
        assert roots_taken(problem, FIRST_ROOT[name]) == pytest.approx({1: 1.0})


@pytest.mark.parametrize("name", FIRST_ROOT)
@pytest.mark.parametrize(("narrow", "wide"), WIDER, ids=["1 or 2", "1 or 3", "1 or 2 of 2"])
def test_so_further_roots_gain_nothing(name, narrow, wide):
    """As many tokens are accepted with one root, of which the text has the token at once."""
    for one, several in zip(problems(narrow), problems(wide), strict=True):
        found, wanted = (law_of(problem, FIRST_ROOT[name]).accepted for problem in (several, one))
        assert found == pytest.approx(wanted, abs=EXACT)


def test_match_with_other_noise_is_lossless_and_accepts_less():
    """Then the target's token need not be among the roots at all."""
    for problem in problems(W2):
        assert total_variation(law_of(problem, rules.match), problem) < EXACT
        assert roots_taken(problem, rules.match)[None] > DIFFERENT
        assert law_of(problem, rules.match).accepted < law_of(problem, coupled).accepted - DIFFERENT


def test_the_longest_path_is_not_lossless_with_one_root_either():
    """The residual is missing where the root is all that is accepted; only without siblings would that repair it."""

    def with_residual(tree, choice, roots, width):
        path, following = rules.longest_path(tree, choice, roots, width)
        child = next(tree.children(path[-1]), None)
        if len(path) == 1 and child is not None:
            left = (tree.target(path[0]) - tree.proposal(child)).clamp(min=0)
            following = left / left.sum() if float(left.sum()) > 0 else following
        return path, following

    chain, bushy = [-1, 0], [-1, 0, 0]
    for seed in SEEDS:
        for parents, repaired in ((chain, True), (bushy, False)):
            problem = Problem(parents, 3, "without", seed)
            published, changed = (
                total_variation(law_of(problem, functools.partial(rule, roots=[0], width=1), forest=True), problem)
                for rule in (rules.longest_path, with_residual)
            )
            assert published > DIFFERENT
            assert (changed < EXACT) is repaired
