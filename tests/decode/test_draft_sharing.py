"""One draft object in several engines: each engine's text is that of its own target."""

import threading

import pytest
import torch

from specdec_ops import Tree, drafts
from specdec_ops.decode import Engine, Sampling
from tests.decode import test_engine
from tests.decode.test_engine import DRAFT, LENGTH, PROMPTS, TARGET, by_hand, samplings
from tests.harness.tiny_models import make_decoder, noisy_eagle, noisy_mixture

OTHER = make_decoder(7)
DRAFTS = {
    "n-gram": drafts.Ngram,
    "chain": lambda: drafts.Chain(DRAFT, 3),
    "tree": lambda: drafts.MultiCandidate(DRAFT, (3, 2, 1)),
    "tree with repeats": lambda: drafts.MultiCandidate(DRAFT, (2, 2), replacement=True),
    "eagle": lambda: noisy_eagle(TARGET, levels=3, width=3, branching=4, nodes=9),
    "mixture": lambda: noisy_mixture(TARGET, 1, levels=3, width=3, branching=4, nodes=9),
    **{name: test_engine.DRAFTS[name] for name in ("sorted chain", "sorted tree")},
}
ASKED = samplings(0.9)


@pytest.fixture(scope="module")
def expected():
    return {
        id(target): [by_hand(prompt, sampling, target) for prompt, sampling in zip(PROMPTS, ASKED, strict=True)]
        for target in (TARGET, OTHER)
    }


def engines(draft) -> list[Engine]:
    return [Engine(target, draft, "match", max_batch=3, adapt=False) for target in (TARGET, OTHER, TARGET)]


@pytest.mark.parametrize("name", DRAFTS)
def test_engines_with_one_draft_take_turns(name, expected):
    """Two targets, and one of them twice; every round of one lies between two of the others."""
    group = engines(DRAFTS[name]())
    places = [[engine.submit(*asked) for asked in zip(PROMPTS, ASKED, strict=True)] for engine in group]
    results = [{}, {}, {}]
    while not all(engine.is_idle for engine in group):
        for engine, found in zip(group, results, strict=True):
            found |= {chunk.request: chunk.result for chunk in engine.step() if chunk.result is not None}
    for engine, found, numbers in zip(group, results, places, strict=True):
        assert [found[number].tokens for number in numbers] == expected[id(engine.target)]
    accepted = [sum(result.stats.accepted for result in found.values()) for found in results]
    assert accepted[0] == accepted[2] > 0, "the engines in between must not have changed what was drafted"


@pytest.mark.parametrize("name", DRAFTS)
def test_engines_with_one_draft_in_threads(name, expected):
    group, texts = engines(DRAFTS[name]()), {}

    def run(place: int) -> None:
        texts[place] = [[r.tokens for r in group[place].generate(PROMPTS, ASKED)] for _ in range(3)]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(group))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, engine in enumerate(group):
        assert texts[place] == [expected[id(engine.target)]] * 3


class LastToken(drafts.Draft):
    """A draft as docs/decoding.md tells to write one: the last token once more."""

    proposals, max_nodes, is_chain = "deterministic", 2, True

    def bind(self, target, *, max_batch, max_length, max_slots, is_coupled):
        return LastTokenProposer(target.shape.device)


class LastTokenProposer(drafts.Proposer):
    def __init__(self, device) -> None:
        self.topology = Tree.chain(2).to(device)
        self.started, self.seen = [], []

    def start(self, request):
        request.draft_state = len(self.started)
        self.started.append(request.number)

    def propose(self, batch):
        return drafts.Drafted(torch.stack((batch.last_tokens, batch.last_tokens), 1), self.topology, is_chain=True)

    def observe(self, batch, drafted, acceptance, accepted):
        self.seen += [request.draft_state for request in batch.requests]


def test_a_draft_of_ones_own(expected):
    group = engines(LastToken())
    for engine in group:
        assert [r.tokens for r in engine.generate(PROMPTS, ASKED)] == expected[id(engine.target)]
        assert len(engine.proposer.started) == len(PROMPTS)
        assert set(engine.proposer.seen) == set(range(len(PROMPTS)))
    assert len({id(engine.proposer) for engine in group}) == 3


def test_a_draft_says_how_it_proposes_and_a_proposer_proposes():
    with pytest.raises(TypeError, match="bind"):
        type("Unbound", (drafts.Draft,), {})()
    with pytest.raises(TypeError, match="propose"):
        type("Silent", (drafts.Proposer,), {})()
    assert len(Engine(TARGET, LastToken()).generate([[1]], Sampling(max_tokens=LENGTH))[0].tokens) == LENGTH
