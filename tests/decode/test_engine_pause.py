"""Paused requests: what they say stays the same, whoever takes their pages meanwhile."""

import pytest

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from tests.harness.tiny_models import first_layers, make_decoder

TARGET = make_decoder(1)
DRAFT = first_layers(TARGET, 1)
PROMPTS = [[place, *range(1, 20 + place)] for place in range(5)]
SAMPLING = Sampling(max_tokens=20, temperature=0.8, seed=3, eos=())


@pytest.fixture(scope="module")
def expected():
    return [result.tokens for result in Engine(TARGET).generate(PROMPTS, SAMPLING)]


@pytest.mark.parametrize("draft", [None, drafts.Ngram(), drafts.Chain(DRAFT, 3)], ids=["plain", "ngram", "chain"])
@pytest.mark.parametrize("sizes", [{"max_batch": 2}, {"max_batch": 5, "pages": 8}], ids=["few at once", "few pages"])
def test_requests_that_take_turns_say_what_they_would_say_alone(draft, sizes, expected):
    """Each rests after every round, so that all of them have to give their places up to others again and again."""
    engine = Engine(TARGET, draft, "match", adapt=False, **sizes)
    numbers = [engine.submit(prompt, SAMPLING) for prompt in PROMPTS]
    said, turn = {number: [] for number in numbers}, 0
    for number in numbers:
        engine.pause(number)
    while not engine.is_idle:
        number = numbers[turn % len(numbers)]
        turn += 1
        engine.resume(number)
        got = []
        while engine.is_busy and not got:
            got = engine.step()
        assert all(chunk.request == number for chunk in got), "the others are paused"
        for chunk in got:
            said[number] += chunk.tokens
        engine.pause(number)
    assert list(said.values()) == expected
    assert engine.cache.pool.free == engine.cache.pool.pages


def test_a_paused_prompt_is_run():
    engine = Engine(TARGET)
    number = engine.submit(PROMPTS[0], SAMPLING)
    engine.pause(number)
    assert engine.is_busy
    while engine.is_busy:
        assert engine.step() == []
    assert engine.cache.pool.free < engine.cache.pool.pages
    engine.cancel(number)
    assert engine.is_busy, "its pages are still to be given back"
    (chunk,) = engine.step()
    assert chunk.result.finish_reason == "cancelled" and engine.is_idle and not engine.is_busy


def test_paused_requests_give_pages_up_before_running_ones():
    engine = Engine(TARGET, max_batch=3, pages=8)
    first, second = (engine.submit(prompt, SAMPLING) for prompt in PROMPTS[:2])
    engine.step()
    engine.pause(first)
    third = engine.submit(PROMPTS[2], Sampling(max_tokens=60, eos=()))
    done = {}
    while second not in done or third not in done:
        done |= {chunk.request: chunk.result for chunk in engine.step() if chunk.result}
    assert done[second].stats.prompt_tokens and done[third].finish_reason == "length"
    engine.resume(first)
    while first not in done:
        done |= {chunk.request: chunk.result for chunk in engine.step() if chunk.result}
    assert done[first].tokens == Engine(TARGET).generate([PROMPTS[0]], SAMPLING)[0].tokens
