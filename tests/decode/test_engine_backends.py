"""The engine on the backends torch and, interpreted, Triton: the same promises as on the CPU kernels, op by op.

Neither backend says that a row's bits do not depend on the rows beside it, so logits may differ in their last bits. The
tiny target's best tokens are further apart.
"""

import dataclasses

import pytest

from specdec_ops._core import dispatch
from specdec_ops.decode import Engine, decoder
from tests.decode import test_engine_law as laws
from tests.decode.test_engine import DRAFTS, PROMPTS, TARGET, by_hand, samplings


def choose(patch: pytest.MonkeyPatch, backend: str) -> None:
    """Let all ops that are free to choose take this one."""
    patch.setenv(dispatch.ENVIRONMENT, backend)
    dispatch.forget()
    decoder.row_invariant_backend.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def as_it_was():
    yield
    dispatch.forget()
    decoder.row_invariant_backend.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """The backends of the implementations that were looked up."""
    seen, choose_one = set(), dispatch._choose
    monkeypatch.setattr(dispatch, "_choose", lambda *call: seen.add(found := choose_one(*call)) or found)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTS)
def test_text_is_that_of_plain_decoding_on_torch(name, temperature, monkeypatch, ran):
    asked = samplings(temperature)
    on_cpu = [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS, asked, strict=True)]
    choose(monkeypatch, "torch")
    ran.clear()
    results = Engine(TARGET, DRAFTS[name](), rule="match", max_batch=3, adapt=False).generate(PROMPTS, asked)
    assert [result.tokens for result in results] == on_cpu
    assert ran == {"torch"}


@pytest.mark.parametrize(("case", "setting"), [
    ("chain, block", "filtered"),
    ("tree, traversal", "stop"),
])  # fmt: skip
def test_answers_have_the_targets_law_on_torch(case, setting, monkeypatch, ran):
    choose(monkeypatch, "torch")
    monkeypatch.setattr(laws, "RUNS", 1000)
    make_draft, rule = laws.CASES[case]
    engine = Engine(laws.TARGET, make_draft(), rule, max_batch=128, max_length=32, adapt=False)
    statistic, limit = laws.chi_squared(engine, laws.SETTINGS[setting])
    assert statistic < limit
    assert ran == {"torch"}


@pytest.mark.skipif(dispatch.backends("accept")["triton"] is not None, reason="Triton is not interpreted here")
@pytest.mark.parametrize(("name", "temperature"), [("eagle", 0.0), ("tree", 0.9)])
def test_text_is_that_of_plain_decoding_on_triton(name, temperature, monkeypatch, ran):
    """Two requests and four tokens: the interpreter takes long."""
    asked = [dataclasses.replace(sampling, max_tokens=4) for sampling in samplings(temperature)[1:3]]
    on_cpu = [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS[1:3], asked, strict=True)]
    choose(monkeypatch, "triton")
    ran.clear()
    results = Engine(TARGET, DRAFTS[name](), rule="match", max_batch=2, adapt=False).generate(PROMPTS[1:3], asked)
    assert [result.tokens for result in results] == on_cpu
    assert ran == {"triton"}
