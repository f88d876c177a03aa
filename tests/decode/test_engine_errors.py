"""What the engine refuses, in one sentence, and that nothing is lost by it."""

import dataclasses

import numpy as np
import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from tests.harness.tiny_models import first_layers, make_decoder

TARGET = make_decoder(1)
DRAFT = first_layers(TARGET, 1)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature must be from 0 to"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"temperature": float("nan")}, ValueError, "temperature must be from 0 to"),
        ({"top_p": 1.5}, ValueError, "top_p must be from 0 to 1, got 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p must be from 0 to 1, got -0.1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int, got 1.5"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be from 1 to"),
        ({"seed": 2**64}, ValueError, "seed must be from"),
        ({"eos": "x"}, TypeError, "eos must be None, an id or a sequence of ids, got 'x'"),
        ({"eos": (-1,)}, ValueError, "eos must be ids from 0 on"),
        ({"stop": ("",)}, ValueError, "stop must be of strings that are not empty"),
        ({"stop": 3}, TypeError, "stop must be a string or a sequence of strings, got 3"),
        ({"logprobs": 1}, TypeError, "logprobs must be True or False, got 1"),
    ],
    ids=str,
)
def test_sampling(changed, kind, message):
    with pytest.raises(kind) as raised:
        Sampling(**changed)
    assert str(raised.value).startswith("specdec_ops.Sampling: ") and message in str(raised.value)


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ([], ValueError, "prompt must have at least one token"),
        ([40], ValueError, "prompt must have at least one token, all ids below 40"),
        ([-1], ValueError, "prompt must have at least one token"),
        ([1.5], TypeError, "prompt must be a string or a sequence of token ids"),
        ("text", TypeError, "prompt must be token ids for a target without a tokenizer, got 'text'"),
        ([1] * 600, ValueError, "prompt must have fewer than 512 tokens, got 600"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_prompts(prompt, kind, message):
    engine = Engine(TARGET)
    with pytest.raises(kind) as raised:
        engine.submit(prompt)
    assert message in str(raised.value) and engine.is_idle


def test_prompts_that_are_none():
    for prompts in (3, None, {1: 2}):
        with pytest.raises(TypeError, match="prompts must be strings or sequences of token ids, one or more, got"):
            Engine(TARGET).generate(prompts)
    with pytest.raises(TypeError, match="prompt must be a string or a sequence of token ids, got 4"):
        Engine(TARGET).generate([[1], 4])
    assert Engine(TARGET).generate([]) == []


def test_tensors_and_arrays_as_prompts():
    engine, asked = Engine(TARGET), Sampling(max_tokens=4)
    (wanted,) = engine.generate([[3, 4]], asked)
    for prompts in (torch.tensor([3, 4]), [torch.tensor([3, 4])], torch.tensor([[3, 4]]), [np.array([3, 4])], (3, 4)):
        (result,) = engine.generate(prompts, asked)
        assert result.tokens == wanted.tokens


def test_models_that_are_none():
    for make in (lambda: Engine("folder"), lambda: drafts.Chain("folder"), lambda: drafts.MultiCandidate(None)):
        with pytest.raises(TypeError, match=r"must be a model of specdec_ops\.integrations\.transformers\.load, got"):
            make()


def test_what_is_printed():
    engine = Engine(TARGET, drafts.Chain(DRAFT, 3))
    engine.submit([1])
    said = repr(engine)
    assert "<Chain: chains of up to 4 nodes, distinct proposals>, rule block: 0 run, 1 wait>" in said
    assert repr(TARGET) in said and repr(drafts.Ngram()) == "<Ngram: trees of up to 16 nodes, deterministic proposals>"


def test_one_bad_prompt_takes_the_others_along():
    engine = Engine(TARGET)
    with pytest.raises(ValueError, match="all ids below 40"):
        engine.generate([[1, 2], [99]])
    assert engine.is_idle


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rule": "best"}, ValueError, "rule must be 'auto' or 'match' without a draft, got 'best'"),
        ({"draft": "ngram"}, TypeError, "draft must be a specdec_ops.drafts.Draft or None, got 'ngram'"),
        ({"draft": drafts.Ngram(), "rule": "kseq"}, ValueError, "lossless for deterministic trees"),
        ({"draft": drafts.Ngram(), "rule": "block"}, ValueError, "lossless for deterministic trees"),
        ({"draft": drafts.Chain(DRAFT), "rule": "target_only"}, ValueError, "lossless for distinct chains"),
        (
            {"draft": drafts.Chain(make_decoder(2, vocab=41))},
            ValueError,
            "the target's vocabulary of 40 tokens, or a vocab_map, got 41",
        ),
        ({"max_batch": 0}, ValueError, "max_batch must be from 1 to 4096, got 0"),
        ({"max_length": 513}, ValueError, "max_length must be from 1 to 512, got 513"),
        ({"pages": 0}, ValueError, "pages must be enough for"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_engines(arguments, kind, message):
    with pytest.raises(kind) as raised:
        Engine(TARGET, **arguments)
    assert message in str(raised.value)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop must be empty for a target without a tokenizer"):
        Engine(TARGET).submit([1], Sampling(stop="x"))


def test_as_many_samplings_as_prompts():
    with pytest.raises(ValueError, match="sampling must be one or 2, got 1"):
        Engine(TARGET).generate([[1], [2]], [Sampling()])


def test_diagnose_needs_a_draft_and_quiet():
    with pytest.raises(RuntimeError, match="needs an engine with a draft"):
        Engine(TARGET).diagnose([[1]])
    engine = Engine(TARGET, drafts.Ngram())
    engine.submit([1])
    with pytest.raises(RuntimeError, match="needs an idle engine, 1 requests run"):
        engine.diagnose([[1]])


def test_a_text_as_long_as_the_model_ends_there():
    target = dataclasses.replace(TARGET, shape=TARGET.shape._replace(max_positions=20))
    for draft in (None, drafts.Chain(DRAFT, 3)):
        result = Engine(target, draft, adapt=False).generate([[1, 2, 3]], Sampling(max_tokens=100))[0]
        assert len(result.tokens) == 17 and result.finish_reason == "length"
