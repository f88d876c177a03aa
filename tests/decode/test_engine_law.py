"""The law of whole answers: thousands of engine runs against the enumerated distribution of the target's texts."""

import collections
import dataclasses
import itertools

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from tests.decode.test_engine import law_by_hand
from tests.harness.tiny_models import Characters, first_layers, make_decoder

VOCAB, LENGTH, EOS, PROMPT = 4, 3, 3, [0, 1, 2]
TARGET = dataclasses.replace(make_decoder(11, vocab=VOCAB, sharpness=1.0), tokenizer=Characters())
DRAFT = make_decoder(12, vocab=VOCAB, sharpness=1.0)
RUNS, FEWEST = 6000, 5

CASES = {
    "n-gram, match": (drafts.Ngram, "match"),
    "n-gram, target_only": (drafts.Ngram, "target_only"),
    "chain, token": (lambda: drafts.Chain(DRAFT, 2), "token"),
    "chain, block": (lambda: drafts.Chain(DRAFT, 3), "auto"),
    "chain, match": (lambda: drafts.Chain(DRAFT, 2), "match"),
    "tree, recursive": (lambda: drafts.MultiCandidate(DRAFT, (2, 2)), "recursive"),
    "tree, traversal": (lambda: drafts.MultiCandidate(DRAFT, (3, 1)), "auto"),
    "tree with repeats, kseq": (lambda: drafts.MultiCandidate(DRAFT, (2, 1), replacement=True), "kseq"),
    "tree with repeats, auto": (lambda: drafts.MultiCandidate(DRAFT, (2, 1), replacement=True), "auto"),
}
SETTINGS = {
    "plain": Sampling(temperature=1.0, max_tokens=LENGTH, eos=EOS),
    "filtered": Sampling(temperature=0.6, top_k=3, top_p=0.9, max_tokens=LENGTH, eos=()),
    "min_p": Sampling(temperature=1.2, min_p=0.2, max_tokens=LENGTH, eos=EOS),
    "stop": Sampling(temperature=1.0, max_tokens=LENGTH, eos=(), stop="12"),
}


def exact_law(sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of every answer, by the chain rule."""
    filters = {name: getattr(sampling, name) for name in ("top_k", "top_p", "min_p")}
    law: dict[tuple[int, ...], float] = collections.defaultdict(float)
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        probability, answer = 1.0, text
        for place in range(LENGTH):
            row = logits_after(text[:place]).double() / sampling.temperature
            probability *= law_by_hand(row, **filters)[text[place]].item()
        for place, token in enumerate(text):
            shown = "".join(map(str, text[: place + 1]))
            if token in (sampling.eos or ()) or any(shown.endswith(stop) for stop in sampling.stop):
                answer = text[: place + 1]
                break
        law[answer] += probability
    assert sum(law.values()) == pytest.approx(1)
    return law


_LOGITS: dict[tuple[int, ...], torch.Tensor] = {}


def logits_after(answer: tuple[int, ...]) -> torch.Tensor:
    """One row, from the target alone."""
    if answer not in _LOGITS:
        seen = []
        engine = Engine(TARGET)
        score = engine._score
        engine._score = lambda *arguments: seen.append(score(*arguments)) or seen[-1]
        engine.generate([[*PROMPT, *answer]], Sampling(max_tokens=1))
        _LOGITS[answer] = seen[0][0][0, 0]
    return _LOGITS[answer]


def chi_squared(engine: Engine, sampling: Sampling) -> tuple[float, float]:
    """The statistic over answers, and the value that is exceeded once in about 10^5 tests."""
    asked = [dataclasses.replace(sampling, seed=seed) for seed in range(RUNS)]
    counts = collections.Counter(tuple(result.tokens) for result in engine.generate([PROMPT] * RUNS, asked))
    law = exact_law(sampling)
    assert all(law.get(answer, 0) > 0 for answer in counts), "an answer that can't be"
    statistic, rare, rare_expected, freedom = 0.0, 0, 0.0, -1
    for answer, probability in law.items():
        if RUNS * probability < FEWEST:
            rare, rare_expected = rare + counts[answer], rare_expected + RUNS * probability
            continue
        statistic += (counts[answer] - RUNS * probability) ** 2 / (RUNS * probability)
        freedom += 1
    if rare_expected >= 1:
        statistic, freedom = statistic + (rare - rare_expected) ** 2 / rare_expected, freedom + 1
    third = 2 / (9 * freedom)  # Wilson and Hilferty's approximation
    return statistic, freedom * (1 - third + 4.3 * third**0.5) ** 3


# Filters are tested for each rule by the tests of the ops; here for one draft of each kind.
FILTERED = ("n-gram, match", "chain, block", "tree, traversal")
PAIRS = [(case, setting) for case in CASES for setting in SETTINGS if setting in ("plain", "stop") or case in FILTERED]


@pytest.mark.parametrize(("case", "setting"), PAIRS)
def test_answers_have_the_targets_law(case, setting):
    make_draft, rule = CASES[case]
    engine = Engine(TARGET, make_draft(), rule, max_batch=128, max_length=32, adapt=False)
    statistic, limit = chi_squared(engine, SETTINGS[setting])
    assert statistic < limit


def test_a_draft_that_misreports_its_logits_is_found():
    """What the test is worth: a chain that is drawn from sharper logits than it says."""
    engine = Engine(TARGET, drafts.Chain(DRAFT, 2), "token", max_batch=128, max_length=32, adapt=False)
    propose = engine.proposer.propose

    def sharper(batch):
        honest = propose(batch)
        return dataclasses.replace(honest, draft_logits=honest.draft_logits * 0.3)

    engine.proposer.propose = sharper
    statistic, limit = chi_squared(engine, SETTINGS["plain"])
    assert statistic > limit


def test_a_draft_that_is_weak_is_accepted_less():
    """The law alone would hold for a rule that rejects everything: the chain of the target itself is all accepted."""
    asked = [Sampling(temperature=1.0, max_tokens=12, seed=seed, eos=()) for seed in range(64)]
    rates = []
    for model in (TARGET, first_layers(TARGET, 1), DRAFT):
        engine = Engine(TARGET, drafts.Chain(model, 3), max_batch=64, max_length=32, adapt=False)
        results = engine.generate([PROMPT] * 64, asked)
        rates.append(sum(r.stats.accepted for r in results) / sum(r.stats.drafted for r in results))
    assert rates[0] == 1.0 and 0.3 < rates[2] < 1.0
