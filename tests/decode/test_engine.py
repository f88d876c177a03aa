"""The engine's texts: equal to plain decoding by hand, whatever the draft, the batch, the pages and the order."""

import asyncio
import dataclasses
import warnings

import pytest
import torch

from specdec_ops import Tree, drafts, sample_tokens
from specdec_ops.decode import Cache, Engine, Rows, Sampling
from specdec_ops.decode.cache import Sequence
from tests.harness.tiny_models import (
    Characters,
    first_layers,
    joined_late,
    make_decoder,
    noisy_eagle,
    noisy_mixture,
    watch_sent_back,
)

TARGET = make_decoder(1)
DRAFT = first_layers(TARGET, 1)
SHARED = list(range(1, 20))
PROMPTS = [[*SHARED, 20], [3, 4], [5], [*SHARED, 21, 22], [7, 8, 7, 8, 7, 8, 7]]
LENGTH = 24

DRAFTS = {
    "plain": lambda: None,
    "n-gram tree": drafts.Ngram,
    "n-gram chain": lambda: drafts.Ngram(branches=1),
    "chain": lambda: drafts.Chain(DRAFT, 4),
    "own chain": lambda: drafts.Chain(TARGET, 3),
    "tree": lambda: drafts.MultiCandidate(DRAFT, (3, 2, 1)),
    "tree with repeats": lambda: drafts.MultiCandidate(DRAFT, (2, 2), replacement=True),
    "eagle": lambda: noisy_eagle(TARGET, levels=3, width=3, branching=4, nodes=9),
    "sorted chain": lambda: drafts.Sorted(TARGET, (1, 2), (0.7, 0.0), steps=4, head=None),
    "sorted tree": lambda: drafts.Sorted(TARGET, (1, 2), (0.7, 0.0), tree=drafts.TreeShape(3, 3, 4, 9), head=None),
    "mixture": lambda: noisy_mixture(TARGET, levels=3, width=3, branching=4, nodes=9),
    "mixture on the target's last layer": lambda: noisy_mixture(TARGET, 1, levels=3, width=3, branching=4, nodes=9),
}


def by_hand(prompt: list[int], sampling: Sampling, model=TARGET) -> list[int]:
    """Decode with nothing of the engine: one pass over the whole text for each token, into a cache of its own."""
    text = list(prompt)
    for _ in range(sampling.max_tokens):
        cache, sequence = Cache(model.shape, 8), Sequence()
        cache.reserve(sequence, len(text))
        table, start = cache.page_table([sequence]), torch.zeros(1, dtype=torch.int32)
        rows = Rows(torch.tensor([text], dtype=torch.int32), Tree.chain(len(text)).to("cpu"), start, table)
        logits = model.forward(rows, cache).logits[-1:]
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        text += sample_tokens(logits, seeds=sampling.seed, positions=len(text), **options).tolist()
    return text[len(prompt) :]


def samplings(temperature: float, **changes) -> list[Sampling]:
    settings = Sampling(temperature=temperature, max_tokens=LENGTH, **changes)
    return [dataclasses.replace(settings, seed=seed) for seed in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["greedy", "sampled"])
def expected(request):
    asked = samplings(request.param)
    return asked, [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS, asked, strict=True)]


@pytest.mark.parametrize("name", DRAFTS)
def test_text_is_that_of_plain_decoding(name, expected):
    """With rule "match", in a batch that shares pages and has to wait for each other."""
    asked, texts = expected
    draft = DRAFTS[name]()
    engine = Engine(TARGET, draft, rule="match", max_batch=3, adapt=False)
    results = engine.generate(PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert [result.request for result in results] == list(range(len(PROMPTS)))
    assert all(result.finish_reason == "length" for result in results)
    assert engine.is_idle and engine.cache.pool.free == engine.cache.pool.pages
    if name == "own chain":  # a draft that is its own target: every token is accepted, with rule "match" also sampled
        assert all(result.stats.tokens_per_call == 4 for result in results)


def test_a_request_does_not_depend_on_the_others(expected):
    """Sampled proposals: requests that join late, in another order, alone or with one that doesn't speculate."""
    asked, _ = expected
    alone = [
        Engine(TARGET, drafts.Chain(DRAFT, 3), max_batch=1, adapt=False).generate([prompt], sampling)[0]
        for prompt, sampling in zip(PROMPTS, asked, strict=True)
    ]
    engine = Engine(TARGET, drafts.Chain(DRAFT, 3), max_batch=4, adapt=False)
    results = joined_late(engine, PROMPTS, asked)
    assert [result.tokens for result in results] == [result.tokens for result in alone]


@pytest.mark.parametrize("name", ["n-gram tree", "chain", "tree", "eagle", "sorted chain", "sorted tree", "mixture"])
def test_few_pages_lose_nothing(name, expected):
    """Requests that have to give their pages back go on where they were."""
    asked, texts = expected
    draft = DRAFTS[name]()
    slots = max(map(len, PROMPTS)) + LENGTH + draft.max_nodes
    engine = Engine(TARGET, draft, rule="match", pages=slots // 4 + 3, page_size=4, adapt=False)
    sent_back = watch_sent_back(engine)
    assert [result.tokens for result in engine.generate(PROMPTS, asked)] == texts
    assert sent_back, "the test wants pages to run out"
    assert engine.cache.pool.free == engine.cache.pool.pages


def test_prompts_that_begin_alike_share_pages():
    engine = Engine(TARGET, page_size=4)
    first, again = (engine.generate([prompt], Sampling(max_tokens=4))[0] for prompt in (PROMPTS[0], PROMPTS[3]))
    assert first.stats.cached_prompt_tokens == 0
    assert again.stats.cached_prompt_tokens == len(SHARED) // 4 * 4
    assert again.tokens == by_hand(PROMPTS[3], Sampling(max_tokens=4))


def test_an_answer_goes_on_as_a_prompt():
    """The pages of a text that has ended serve the next turn."""
    engine = Engine(TARGET, drafts.Chain(DRAFT, 3), page_size=4, adapt=False)
    first = engine.generate([PROMPTS[1]], Sampling(max_tokens=14))[0]
    text = PROMPTS[1] + first.tokens
    second = engine.generate([text], Sampling(max_tokens=6))[0]
    assert second.stats.cached_prompt_tokens >= len(text) // 4 * 4 - 4
    assert second.tokens == by_hand(text, Sampling(max_tokens=6))


def eos_of(text: list[int], place: int) -> int:
    """A token that stands at this place of a text for the first time."""
    return next(token for token in text[place:] if token not in text[:place])


@pytest.mark.parametrize("name", DRAFTS)
def test_nothing_follows_an_eos(name, expected):
    asked, texts = expected
    ends = [eos_of(text, 5) for text in texts]
    asked = [dataclasses.replace(sampling, eos=end) for sampling, end in zip(asked, ends, strict=True)]
    target = dataclasses.replace(TARGET, eos=(ends[0],))  # trees that know of it grow nothing below this one
    results = Engine(target, DRAFTS[name](), rule="match", adapt=False).generate(PROMPTS, asked)
    for result, text, end in zip(results, texts, ends, strict=True):
        assert result.tokens == text[: text.index(end) + 1]
        assert result.finish_reason == "eos"


@pytest.mark.parametrize("name", ["plain", "own chain", "tree", "eagle", "sorted chain", "sorted tree", "mixture"])
@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_is_never_overshot(name, max_tokens, expected):
    asked, texts = expected
    asked = [dataclasses.replace(sampling, max_tokens=max_tokens) for sampling in asked]
    results = Engine(TARGET, DRAFTS[name](), rule="match", adapt=False).generate(PROMPTS, asked)
    assert [result.tokens for result in results] == [text[:max_tokens] for text in texts]


@pytest.mark.parametrize("name", ["plain", "own chain", "tree"])
def test_stop_strings_are_found_across_blocks(name):
    """Wherever a string stands among the accepted tokens; the text ends before it, the tokens with it."""
    target = dataclasses.replace(TARGET, tokenizer=Characters())
    text = by_hand(PROMPTS[1], Sampling(max_tokens=LENGTH))
    shown = Characters().decode(text)
    for start in range(LENGTH - 3):
        stop = shown[start : start + 3]
        engine = Engine(target, DRAFTS[name](), rule="match", adapt=False)
        chunks = list(engine.stream([PROMPTS[1]], Sampling(max_tokens=LENGTH, stop=(stop, "never"))))
        result = chunks[-1].result
        assert result.finish_reason == "stop"
        assert result.text == shown[: shown.index(stop)] == "".join(chunk.text for chunk in chunks)
        assert result.tokens == text[: shown.index(stop) + 3]
        assert [token for chunk in chunks for token in chunk.tokens] == result.tokens


def test_strings_as_prompts():
    target = dataclasses.replace(TARGET, tokenizer=Characters())
    result = Engine(target).generate("34", Sampling(max_tokens=8))[0]
    assert result.text == Characters().decode(by_hand([3, 4], Sampling(max_tokens=8)))


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_logprobs_are_those_of_plain_decoding(name, filters):
    """And of the law by hand: softmax over what the filters keep."""
    asked = samplings(0.8, logprobs=True, **filters)
    results = Engine(TARGET, DRAFTS[name](), rule="match", adapt=False).generate(PROMPTS[:2], asked[:2])
    plain = Engine(TARGET).generate(PROMPTS[:2], asked[:2])
    for result, other in zip(results, plain, strict=True):
        assert result.tokens == other.tokens and len(result.logprobs) == LENGTH
        assert result.logprobs == other.logprobs, "to the last bit: no near-tie can be decided in another way"
    text = PROMPTS[0] + plain[0].tokens[:-1]
    logits = whole_pass(text)[len(PROMPTS[0]) - 1 :].double() / 0.8
    for row, token, logprob in zip(logits, plain[0].tokens, plain[0].logprobs, strict=True):
        assert logprob == pytest.approx(law_by_hand(row, **filters)[token].log().item(), abs=1e-4)


def whole_pass(text: list[int]) -> torch.Tensor:
    cache, sequence = Cache(TARGET.shape, 8), Sequence()
    cache.reserve(sequence, len(text))
    table, start = cache.page_table([sequence]), torch.zeros(1, dtype=torch.int32)
    rows = Rows(torch.tensor([text], dtype=torch.int32), Tree.chain(len(text)).to("cpu"), start, table)
    return TARGET.forward(rows, cache).logits


def law_by_hand(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Probabilities of one row, token by token in Python."""
    probabilities = logits.softmax(-1).tolist()
    kept = [token for token, p in enumerate(probabilities) if p >= min_p * max(probabilities)]
    kept.sort(key=lambda token: (-probabilities[token], token))
    kept = kept[:top_k] if top_k else kept
    total, nucleus, share = sum(probabilities[token] for token in kept), [], 0.0
    for token in kept:
        if share < top_p * total:
            nucleus.append(token)
        share += probabilities[token]
    total = sum(probabilities[token] for token in nucleus)
    law = torch.zeros(len(probabilities), dtype=torch.float64)
    for token in nucleus:
        law[token] = probabilities[token] / total
    return law


def test_cancelled_requests_give_their_pages_back():
    engine = Engine(TARGET, drafts.Chain(DRAFT, 3), max_batch=2)
    numbers = [engine.submit(prompt, Sampling(max_tokens=100)) for prompt in PROMPTS[:3]]
    engine.step()
    for number in numbers:  # two run, one waits
        engine.cancel(number)
    chunks = engine.step()
    assert {chunk.request: chunk.result.finish_reason for chunk in chunks} == dict.fromkeys(numbers, "cancelled")
    assert engine.is_idle and engine.cache.pool.free == engine.cache.pool.pages
    assert engine.proposer.cache.pool.free == engine.proposer.cache.pool.pages
    engine.cancel(numbers[0])  # twice is no error


def test_a_stream_that_is_closed_cancels():
    engine = Engine(TARGET)
    stream = engine.stream(PROMPTS, Sampling(max_tokens=100))
    next(stream)
    stream.close()
    engine.step()
    assert engine.is_idle


def test_async_streams_share_the_rounds(expected):
    asked, texts = expected
    engine = Engine(TARGET, drafts.Ngram(), rule="match", adapt=False)

    async def answer(place: int) -> list[int]:
        tokens = []
        async for chunk in engine.astream(PROMPTS[place], asked[place]):
            tokens += chunk.tokens
        return tokens

    async def everybody():
        return await asyncio.gather(*map(answer, range(len(PROMPTS))))

    assert asyncio.run(everybody()) == texts


@pytest.mark.parametrize("name", ["plain", "n-gram tree", "chain", "tree"])
def test_nan_ends_its_request_alone(name):
    """One token's embedding is NaN; the request that comes across it ends, the other one goes on."""
    target = make_decoder(1)
    target.embedding[33] = float("nan")
    draft = {"chain": drafts.Chain, "tree": drafts.MultiCandidate}.get(name)
    draft = DRAFTS[name]() if draft is None else draft(first_layers(target, 1))
    bad, good = Engine(target, draft, adapt=False).generate([[1, 2, 33], [3, 4]], Sampling(max_tokens=8))
    assert bad.finish_reason == "invalid" and bad.tokens == []
    assert good.finish_reason == "length" and good.tokens == by_hand([3, 4], Sampling(max_tokens=8))


def test_losing_drafts_are_left_out_and_said_once(monkeypatch):
    """By a clock of the test: a round with a draft takes ten times as long as a plain one."""
    engine = Engine(TARGET, drafts.Chain(make_decoder(5), 2), rule="match")
    now = [0.0]
    monkeypatch.setattr("specdec_ops.decode.engine.time.perf_counter", lambda: now[0])
    propose, score = engine.proposer.propose, engine._score

    def slow(batch):
        now[0] += 9
        return propose(batch)

    def scored(batch, drafted):
        now[0] += 1
        return score(batch, drafted)

    engine.proposer.propose, engine._score = slow, scored
    with pytest.warns(UserWarning, match=r"decodes at 0\.\d\dx the speed of plain decoding") as warned:
        result = engine.generate([[3, 4]], Sampling(max_tokens=100))[0]
    assert len(warned) == 1
    assert result.tokens == by_hand([3, 4], Sampling(max_tokens=100))
    assert result.stats.drafted < 2 * 20, "most rounds should have been plain ones"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([[3, 4]], Sampling(max_tokens=20))


def test_diagnosis_tells_a_draft_that_agrees_from_one_that_does_not():
    good = Engine(TARGET, drafts.Chain(TARGET, 3)).diagnose(PROMPTS[:2], max_tokens=12)
    assert good.agreement == (1.0, 1.0, 1.0) and good.tokens_per_call > 3
    assert good.accepted[0] > 0.9 and "depth 3" in str(good)
    bad = Engine(TARGET, drafts.Chain(make_decoder(5), 3)).diagnose(PROMPTS[:2], max_tokens=12)
    assert bad.agreement[0] < 0.5 and bad.accepted[0] < 0.5


def test_diagnosis_shows_a_draft_whose_cache_does_not_follow():
    """Afresh it agrees, in the engine it does not: that is wiring."""
    engine = Engine(TARGET, drafts.Chain(TARGET, 3))

    def forgets(batch, drafted, acceptance, accepted):
        for request in batch.requests:
            request.draft_state.length = len(request.ids) - 1  # as if all of it were in the cache

    engine.proposer.observe = forgets
    diagnosis = engine.diagnose(PROMPTS[:2], max_tokens=60)
    assert diagnosis.agreement[0] == 1.0
    assert diagnosis.accepted[0] < 1.0
