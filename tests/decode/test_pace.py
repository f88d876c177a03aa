"""Whether to draft: how soon a draft that loses is left out, what that costs, and that gains are not lost."""

import dataclasses
import itertools
import random

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.decode.decoder import Projection
from specdec_ops.decode.pace import Adaptation, Pace, PassTimes
from specdec_ops.drafts.ngram import _Chances, _Grown, _worthwhile
from tests.decode.test_engine import PROMPTS, TARGET, by_hand, samplings
from tests.harness.tiny_models import DIM


def test_pass_times_are_measured_and_guessed_between_and_beyond():
    times = PassTimes(2)
    assert not times.are_usable
    times.add(2, 1.0)
    assert times.are_usable and times.seconds(2) == 1.0
    assert times.seconds(6) == pytest.approx(1 + 4 / 16)
    times.add(6, 2.0)
    assert times.seconds(6) == 2.0 and times.seconds(4) == pytest.approx(1.5)
    times.add(10, 5.0)
    assert times.seconds(9) == times.seconds(12) == 5.0, "beyond 8 rows four are one figure"
    assert times.seconds(13) == times.seconds(16) == pytest.approx(5 + 4 * (5 - 1) / (10 + 2 - 2))


def test_an_interruption_is_no_pass():
    times = PassTimes(1)
    for seconds in (9.0, 1.0, 1.0, 1.0, 50.0, 1.0):  # the first one also warms up
        times.add(1, seconds)
    assert times.seconds(1) < 1.05


def test_plain_rounds_are_measured_again():
    times = PassTimes(1)
    times.add(1, 1.0)
    rounds = 0
    while times.are_usable:
        times.add(8, 1.0)
        rounds += 1
    assert 100 < rounds < 1000
    times.add(1, 1.0)
    assert times.are_usable


def played(pace: Pace, cost: float, mean: float, tokens: int, seed: int = 0) -> float:
    """Time of a text of so many tokens, in plain rounds' time, with a draft whose rounds take `cost` and give `mean`.

    Each of up to 7 tokens is accepted with the same chance, until one is not; times have 3% of noise, and every
    hundredth round is interrupted.
    """
    chance = next(c / 1000 for c in range(1000) if sum((c / 1000) ** n for n in range(8)) >= mean)
    generator, spent = random.Random(seed), 0.0
    while tokens > 0:
        drafted, given = pace.wants_draft(), 1
        if drafted:
            given += next((n for n in range(7) if generator.random() >= chance), 7)
        seconds = (cost if drafted else 1.0) * generator.gauss(1, 0.03)
        pace.record(drafted, seconds * (2.5 if generator.random() < 0.01 else 1), given)
        spent += seconds
        tokens -= given
    return spent


SEEDS = range(20)


@pytest.mark.parametrize(("cost", "mean"), [(1.6, 1.35), (2.5, 1.3), (1.3, 1.02), (6.0, 2.0), (1.15, 1.0)])
def test_a_draft_that_loses_costs_little(cost, mean):
    """Less than 3% of a long text, less than 12% of a first short one, and 3% of short ones after it."""
    assert sum(played(Pace(), cost, mean, 2000, seed) for seed in SEEDS) < len(SEEDS) * 2000 * 1.03
    first = after = 0.0
    for seed in SEEDS:
        pace = Pace()
        first += played(pace, cost, mean, 128, seed)
        after += sum(played(pace, cost, mean, 128, seed + 100 * n) for n in range(1, 9))
    assert first < len(SEEDS) * 128 * 1.12
    assert after < len(SEEDS) * 8 * 128 * 1.03


@pytest.mark.parametrize(("cost", "mean"), [(1.6, 2.2), (1.1, 1.5), (2.0, 6.0), (1.3, 1.45)])
def test_a_draft_that_pays_is_kept(cost, mean):
    best = 2000 * cost / mean
    assert sum(played(Pace(), cost, mean, 2000, seed) for seed in SEEDS) < len(SEEDS) * best * 1.03


def test_a_draft_is_tried_again():
    """One that comes to pay is used again after the plain rounds between two tries, and some of the tries."""
    pace = Pace()
    played(pace, 1.6, 1.2, 500)
    assert not pace.pays and pace.speedup < 1
    assert played(pace, 1.6, 4.0, 6000) < 0.6 * 6000
    assert pace.pays and pace.speedup > 1.5


def test_a_draft_that_can_never_pay_is_tried_twice():
    """A round of it takes 12 plain ones and gives 7 tokens at most."""
    pace, drafted = Pace(most=7), 0
    for _ in range(1000):
        drafts = pace.wants_draft()
        drafted += drafts
        pace.record(drafts, 12.0 if drafts else 1.0, 7 if drafts else 1)
    assert drafted == 2 and not pace.pays and pace.speedup < 0.7


def test_the_first_round_with_a_draft_runs_the_prompt():
    """And takes very long: nothing follows from it."""
    pace, drafted = Pace(most=7), 0
    for _ in range(100):
        drafts = pace.wants_draft()
        drafted += drafts
        pace.record(drafts, (40.0 if drafted == 1 else 3.0) if drafts else 1.0, 6 if drafts else 1)
    assert pace.pays and drafted > 90


def test_other_numbers_of_requests_start_from_the_judgement_of_the_nearest():
    lost = Pace()
    played(lost, 3.0, 1.1, 400)
    assert sum(Pace(like=lost).wants_draft() for _ in range(10)) == 0
    assert played(Pace(like=lost), 3.0, 1.1, 100) < 101


def slow_passes(monkeypatch, engine, *, of_draft: float, of_rows) -> list[int]:
    """A clock of the test for passes of the draft and of the target. Returns the rows of the draft's passes."""
    now, seen = [0.0], []
    monkeypatch.setattr("specdec_ops.decode.engine.time.perf_counter", lambda: now[0])
    forward, score = engine.proposer.forward, engine._score

    def drafted(rows, want=True):
        now[0] += of_draft
        seen.append(rows.count)
        return forward(rows, want)

    def scored(batch, drafted):
        now[0] += of_rows(drafted.tokens.numel())
        return score(batch, drafted)

    engine.proposer.forward, engine._score = drafted, scored
    return seen


def test_a_draft_that_could_not_pay_if_it_were_always_right_runs_no_prompt(monkeypatch):
    """Four levels give 5 tokens in about 17 seconds, and 8 for the draft; plain rounds take 4."""
    engine = Engine(TARGET, drafts.Chain(TARGET, 4), "match", max_batch=3)
    seen = slow_passes(monkeypatch, engine, of_draft=2.0, of_rows=lambda rows: 1.0 + rows)
    asked = [dataclasses.replace(sampling, max_tokens=60) for sampling in samplings(0.9)[:3]]
    with pytest.warns(UserWarning, match=r"would decode at no more than 0\.80x the speed of plain") as warned:
        results = engine.generate(PROMPTS[:3], asked)
    assert len(warned) == 1
    assert seen == [3, 3], "two passes over a row for each request"
    for prompt, sampling, result in zip(PROMPTS, asked, results, strict=False):
        assert result.tokens == by_hand(prompt, sampling)
        assert 1 <= result.stats.drafted <= 2 and result.stats.target_calls <= 60


def test_a_draft_is_judged_for_each_number_of_requests(monkeypatch):
    """What can't pay for three can for one, for whom rows cost less."""
    engine = Engine(TARGET, drafts.Chain(TARGET, 4), "match", max_batch=3)
    slow_passes(monkeypatch, engine, of_draft=0.6, of_rows=lambda rows: 1 + max(0, rows - 5) / 2)
    with pytest.warns(UserWarning, match="would decode at no more than"):
        together = engine.generate(PROMPTS[:3], Sampling(max_tokens=30))
    alone = engine.generate(PROMPTS[3], Sampling(max_tokens=30))[0]
    assert all(result.stats.drafted < 5 for result in together)
    assert alone.stats.tokens_per_call > 2


def test_a_pass_takes_no_less_per_row_than_a_prompt():
    """Two rows each tell little of seven: eight requests, 0.7 for a level of the draft, 1.25 for 16 rows."""
    plans = {}
    for row in (None, 0.08):
        adaptation = Adaptation(False, 7, lambda requests: 0.7, least=7)
        for seconds in (1.0, 1.0):
            adaptation.record(8, adaptation.plan(8), 8, 0.0, seconds, 1.0)
        if row is not None:
            adaptation.record_prompt(256, 256 * row)
            adaptation.record_prompt(256, 300 * row)  # interrupted
            adaptation.record_prompt(16, 0.0)  # too few
        assert adaptation.plan(8) == "probe"
        adaptation.record(8, "probe", 16, 0.0, 1.25, 1.0)
        plans[row] = (adaptation.plan(8), adaptation.loss)
    assert plans[None] == ("draft", None)
    assert plans[0.08][0] == "plain" and plans[0.08][1] == pytest.approx(7 / (6 * 0.7 + 56 * 0.08))


def test_a_draft_that_was_ruled_out_is_judged_again():
    """After longer and longer while; and tried when it could pay."""
    pace, waits = Pace(probes=True), []
    for most_speedup in (0.9, 0.9, 0.8, 1.2):
        waited = 0
        while not pace.wants_probe():
            assert not pace.wants_draft()
            pace.record(False, 1.0, 1.0)
            waited += 1
        waits.append(waited)
        pace.judge(most_speedup)
    assert waits == [2, 128, 256, 512] and pace.wants_draft()


def test_goodput_is_the_greatest_of_all_trees():
    """Against every choice of nodes that has a node's parent with it."""
    generator = random.Random(1)
    for _ in range(30):
        trees = [_Grown(0, 1) for _ in range(2)]
        for grown in trees:
            for token in range(generator.randint(0, 4)):
                grown.add(generator.randrange(len(grown.tokens)), token, generator.random(), 0)
        step = generator.random() * 0.4

        def seconds(rows: int, step=step) -> float:
            return 1 + step * (rows - 2) + (step if rows > 4 else 0)

        choices = []
        for grown in trees:
            nodes = range(1, len(grown.tokens))
            subsets = itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(nodes) + 1))
            choices.append([s for s in subsets if all(grown.parents[node] in (0, *s) for node in s)])
        rates = {
            both: (2 + sum(trees[p].chances[node] for p in (0, 1) for node in both[p]))
            / seconds(2 + len(both[0]) + len(both[1]))
            for both in itertools.product(*choices)
        }
        chosen = tuple(tuple(nodes[1:]) for nodes in _worthwhile(trees, seconds))
        best = max(rates.values())
        assert rates[chosen] == pytest.approx(best) or (chosen == ((), ()) and best < rates[chosen] * 1.03)


def test_rows_that_cost_too_much_are_not_drafted():
    grown = _Grown(0, 1)
    node = 0
    for token in range(6):
        node = grown.add(node, token, 0.8, 0)
    assert _worthwhile([grown], lambda rows: float(rows)) == [[0]]
    assert _worthwhile([grown], lambda rows: 1.0) == [[0, 1, 2, 3, 4, 5, 6]]


def test_chances_are_learned_from_the_text():
    chances = _Chances(0.0)
    for _ in range(50):
        chances.add(0, True)
        chances.add(5, False)
    assert chances.of_kinds[0] > 0.8 and chances.of_kinds[5] < 0.15
    assert chances.of_kinds[1] == chances.expected[1] and _Chances(1.0).expected[0] < chances.expected[0]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_do_not_depend_on_what_rounds_take(temperature, monkeypatch):
    """By a clock that runs as it likes."""
    asked = samplings(temperature)
    texts = [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS, asked, strict=True)]
    for seed in range(3):
        generator = random.Random(seed)
        now = itertools.accumulate(generator.random() ** 4 for _ in itertools.count())
        monkeypatch.setattr("specdec_ops.decode.engine.time.perf_counter", lambda now=now: next(now))
        for draft in (drafts.Ngram(), drafts.Chain(TARGET, 2)):
            engine = Engine(TARGET, draft, "match", max_batch=3)
            monkeypatch.setattr(engine, "_warn_of_loss", lambda speedup: None)
            assert [result.tokens for result in engine.generate(PROMPTS, asked)] == texts


def test_repeated_text_is_drafted_at_length(monkeypatch):
    """Where the texts of a batch repeat themselves, trees grow as long as their rows pay."""
    now = [0.0]
    monkeypatch.setattr("specdec_ops.decode.engine.time.perf_counter", lambda: now[0])
    target = dataclasses.replace(TARGET, head=Projection(torch.zeros(40, DIM)))
    engine = Engine(target, drafts.Ngram(), max_batch=4)  # every logit is 0, so every token is token 0
    score, rows = engine._score, []

    def scored(batch, drafted):
        rows.append(sum(drafted.sizes or (drafted.tokens.numel(),)))
        now[0] += 1 + rows[-1] / 32
        return score(batch, drafted)

    engine._score = scored
    results = engine.generate([[7, 0, 0]] * 4, Sampling(max_tokens=200))
    assert all(result.tokens == [0] * 200 for result in results)
    assert min(result.stats.tokens_per_call for result in results) > 8
    assert max(rows) == 4 * 16
