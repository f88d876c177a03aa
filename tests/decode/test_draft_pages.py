"""Caches of drafts: as large as the target's pages, shared prefixes, and requests that wait for a draft's pages."""

import dataclasses

import pytest

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from tests.decode.test_engine import DRAFT, LENGTH, PROMPTS, SHARED, TARGET, by_hand, samplings
from tests.harness.tiny_models import noisy_eagle, noisy_mixture, watch_sent_back

DRAFTS = {
    "chain": lambda: drafts.Chain(DRAFT, 4),
    "tree": lambda: drafts.MultiCandidate(DRAFT, (3, 2, 1)),
    "eagle": lambda: noisy_eagle(TARGET, levels=3, width=3, branching=4, nodes=9),
    "mixture": lambda: noisy_mixture(TARGET, 1, levels=3, width=3, branching=4, nodes=9),
}
ASKED = samplings(0.9)


@pytest.fixture(scope="module")
def expected():
    return [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS, ASKED, strict=True)]


@pytest.mark.parametrize("name", DRAFTS)
def test_a_drafts_cache_is_as_large_as_the_targets_pages(name):
    """Whatever max_batch and max_length would come to."""
    small = Engine(TARGET, DRAFTS[name](), max_batch=64, pages=20)
    pages, slots = small.proposer.cache.pool.pages, small.proposer.cache.pool.pages * 16
    extra = getattr(small.draft, "run_nodes", 0)
    assert 20 * 16 <= slots <= (20 + 64) * 16 + 64 * extra + 16
    whole = Engine(TARGET, DRAFTS[name](), max_batch=2).proposer.cache.pool
    assert (
        whole.pages * 16 >= 2 * (512 + small.draft.max_nodes)
        and pages < Engine(TARGET, DRAFTS[name](), max_batch=64).proposer.cache.pool.pages
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_requests_wait_for_a_drafts_pages(name, expected):
    """The target has pages for all, the draft for one request and a half: nothing is lost, all pages come back."""
    engine = Engine(TARGET, DRAFTS[name](), "match", max_batch=4, adapt=False)
    pool = engine.proposer.cache.pool
    slots = max(map(len, PROMPTS)) + LENGTH + 12
    withheld = pool.take(pool.pages - (slots // 16 + 2))
    sent_back = watch_sent_back(engine)
    assert [result.tokens for result in engine.generate(PROMPTS, ASKED)] == expected
    assert sent_back, "the test wants the draft's pages to run out"
    assert pool.free + len(withheld) == pool.pages and engine.cache.pool.free == engine.cache.pool.pages


def test_a_draft_without_room_for_a_request_alone_is_an_error():
    engine = Engine(TARGET, drafts.Chain(DRAFT, 4), adapt=False)
    engine.proposer.cache.pool.take(engine.proposer.cache.pool.pages)
    with pytest.raises(RuntimeError, match="too few pages for a request that fitted"):
        engine.generate([PROMPTS[0]], Sampling(max_tokens=LENGTH))


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_a_draft_shares_prefixes(name):
    """Of prompts, and of answers that go on as prompts; what it drafts is the same."""
    rows = []
    shared = Engine(TARGET, DRAFTS[name](), "match", adapt=False)
    forward = DRAFT.forward

    class Counted:
        def __getattr__(self, attribute):
            return getattr(DRAFT, attribute)

        def forward(self, given, *arguments, **options):
            rows.append(given.count)
            return forward(given, *arguments, **options)

    shared.proposer.model = Counted()
    first = shared.generate([[*SHARED, 20]], Sampling(max_tokens=12))[0]
    assert rows[0] == len(SHARED) + 1
    rows.clear()
    again = shared.generate([[*SHARED, 20]], Sampling(max_tokens=12))[0]
    assert rows[0] == len(SHARED) + 1 - 16
    assert dataclasses.asdict(again.stats) | {"cached_prompt_tokens": 0} == dataclasses.asdict(first.stats)
    assert again.tokens == first.tokens == by_hand([*SHARED, 20], Sampling(max_tokens=12))
    rows.clear()
    text = [*SHARED, 20, *first.tokens]
    turn = shared.generate([text], Sampling(max_tokens=6))[0]
    assert rows[0] == len(text) - len(text) // 16 * 16 or rows[0] == len(text) - (len(text) - 1) // 16 * 16
    assert turn.tokens == by_hand(text, Sampling(max_tokens=6))


def test_a_text_is_no_longer_than_the_draft_has_positions_for():
    small = dataclasses.replace(DRAFT, shape=DRAFT.shape._replace(max_positions=20))
    result = Engine(TARGET, drafts.Chain(small, 3), adapt=False).generate([[1, 2, 3]], Sampling(max_tokens=100))[0]
    assert len(result.tokens) == 17 and result.finish_reason == "length"
    with pytest.raises(ValueError, match="max_length must be from 1 to 20, got 21"):
        Engine(TARGET, drafts.Chain(small, 3), max_length=21)
