"""What the client drafts: how much, from which text, and that taking tokens back leaves no trace."""

import dataclasses
import random

import pytest

pytest.importorskip("msgpack", reason="the extra remote has it")

from specdec_ops.decode import Engine, Sampling
from specdec_ops.remote import Link, wire
from specdec_ops.remote.drafter import Drafter, FarTarget
from specdec_ops.remote.host_tree import HostTree
from specdec_ops.remote.pacing import Pacing
from tests.remote.talks import DRAFTS, PROMPT, TARGET, converse, local, states_for

SAMPLED = Sampling(max_tokens=30, eos=(), temperature=0.9, seed=7)
HELLO = wire.Hello(vocab=40, max_length=128, max_nodes=64)
ALONE = {name: draft for name, draft in DRAFTS.items() if name not in ("none", "eagle")}
#            0
#       1         2
#     3   4     5   6
TREE = HostTree([9, 1, 2, 3, 4, 3, -1], [-1, 0, 0, 1, 1, 2, 2])


def drafter(name: str) -> Drafter:
    draft = ALONE[name]
    return Drafter(draft, TARGET if states_for(draft) else FarTarget(HELLO, None), SAMPLED, 128)


@pytest.mark.parametrize("name", ALONE)
def test_a_draft_depends_on_the_text_alone(name):
    """Texts that grow along the draft or beside it, shrink and change: as if each were the first."""
    chance, text = random.Random(3), list(PROMPT)
    worn = drafter(name)
    for _ in range(40):
        tree = worn.propose(list(text))
        if name != "n-gram":  # which learns from the texts that it has seen
            assert tree == drafter(name).propose(list(text))
        assert tree.tokens[0] == text[-1]
        action = chance.random()
        if action < 0.5:
            text += tree.likeliest()[: chance.randint(1, 4)] or [chance.randrange(40)]
        elif action < 0.7:
            text += [chance.randrange(40) for _ in range(chance.randint(1, 3))]
        else:
            del text[max(2, len(text) - chance.randint(1, 6)) :]
            text += [chance.randrange(40)] * chance.randrange(2)
        text = text[:100]


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_levels_bound_a_draft(levels):
    short, whole = drafter("chain").propose(PROMPT, levels), drafter("chain").propose(PROMPT)
    assert short == HostTree(whole.tokens[: levels + 1], whole.parents[: levels + 1])
    assert len(whole.tokens) == 6


def test_a_text_that_is_full_is_not_drafted_for():
    assert drafter("chain").propose([1] * 128) == HostTree([1], [-1])


def test_walks_and_parts_of_trees():
    assert TREE.walk([]) == [0] and TREE.walk([7]) == [0]
    assert TREE.walk([1, 4, 8]) == [0, 1, 4] and TREE.walk([2, 3]) == [0, 2, 5]
    assert TREE.likeliest() == [1, 3]
    assert TREE.below(1) == HostTree([1, 3, 4], [-1, 0, 0])
    assert TREE.below(2).first(9) == HostTree([2, 3], [-1, 0]), "nodes without a token are left out"
    assert TREE.first(4) == HostTree([9, 1, 2, 3], [-1, 0, 0, 1])
    repeated = HostTree([9, 1, 1, 5], [-1, 0, 0, 2])
    assert repeated.walk([1, 5]) == [0, 2, 3], "of equal siblings the one that goes on"
    assert HostTree.chain([4, 5, 6]) == HostTree([4, 5, 6], [-1, 0, 1])


def measured(line: float, target: float, level: float, accepted: int, of: int) -> Pacing:
    pacing = Pacing(12)
    assert pacing.levels() == 12 and not pacing.drafts_ahead() and pacing.seconds() is None, "nothing is known"
    for _ in range(50):
        pacing.drafted(of, of * level)
        pacing.waited(line + target, target)
        pacing.judged(of, accepted, was_ready=False)
    return pacing


@pytest.mark.parametrize("accepted", [1, 3])
def test_the_longer_the_line_the_longer_the_draft(accepted):
    levels = [measured(line, 0.02, 0.01, accepted, 4).levels() for line in (0.0, 0.01, 0.05, 0.15, 1.0)]
    assert levels == sorted(levels) and levels[0] < levels[-1]


def test_levels_are_those_with_most_tokens_a_second():
    """By the formula, written out for a chance of 0.75 and waits of 70 ms."""
    pacing = measured(0.05, 0.02, 0.01, 3, 4)
    assert pacing.acceptance == pytest.approx(0.75, abs=0.01)
    rates = {k: sum(pacing.acceptance**n for n in range(k + 1)) / (0.07 + 0.01 * k) for k in range(1, 13)}
    assert pacing.levels() == max(rates, key=rates.get) == 4
    assert pacing.seconds()(1) == pacing.seconds()(64) == pytest.approx(0.07)


def test_drafts_that_are_ready_cost_nothing():
    slow, ready = (measured(0.05, 0.02, 0.01, 3, 4) for _ in range(2))
    for _ in range(50):
        ready.judged(4, 3, was_ready=True)
    assert ready.levels() > slow.levels()


def test_drafts_are_made_ahead_where_the_wait_is_long_enough():
    assert measured(0.05, 0.02, 0.01, 3, 4).drafts_ahead()
    assert not measured(0.0, 0.005, 0.01, 3, 4).drafts_ahead()
    result, seconds, _ = converse(SAMPLED, DRAFTS["own chain"], Link(rtt=0.1))
    assert result.tokens == local(PROMPT, SAMPLED).tokens and result.stats.ahead > result.stats.calls / 2
    assert seconds < 0.1 * 2 + (0.1 + 0.02 + 0.02) * result.stats.calls, "most rounds wait for the line and the target"


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(max_tokens=30, eos=())], ids=["sampled", "greedy"])
def test_a_draft_at_a_client_is_as_good_as_in_an_engine(sampling):
    """EAGLE's trees, whose rows came over the line, are those of an engine: but for the first round, which brings the
    prompt's rows, both take as many.
    """
    alone = Engine(TARGET, DRAFTS["eagle"], "match", max_batch=1, adapt=False)
    text = local(PROMPT, sampling).tokens
    rest = dataclasses.replace(sampling, max_tokens=29)
    there = alone.generate([[*PROMPT, text[0]]], rest)[0]
    here, _, _ = converse(sampling, DRAFTS["eagle"])
    assert [text[0], *there.tokens] == here.tokens == text
    assert here.stats.calls == there.stats.target_calls + 1 and here.stats.accepted == there.stats.accepted
