"""`python -m specdec_ops.decode`, with tiny models in the place of loaded ones."""

import dataclasses
import io

import pytest

from specdec_ops.decode import Sampling
from specdec_ops.decode.__main__ import main
from tests.decode.test_engine import DRAFT, TARGET, by_hand
from tests.harness.tiny_models import Characters

TEXT = Characters().decode(by_hand([3, 4], Sampling(max_tokens=12)))


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """A folder for the target and one for the draft."""
    models = {}
    for name, model in (("target", TARGET), ("draft", DRAFT)):
        (tmp_path / name).mkdir()
        models[str(tmp_path / name)] = dataclasses.replace(model, tokenizer=Characters())
    monkeypatch.setattr(
        "specdec_ops.integrations.transformers.load", lambda path, weights=None: models[path], raising=True
    )
    return [*models]


@pytest.mark.parametrize("draft", ["ngram", "none", "model"])
def test_it_prints_the_answer_and_what_it_cost(folders, draft, capsys):
    asked = ["--model", folders[0], "--draft", folders[1] if draft == "model" else draft, "--max-tokens", "12", "34"]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert said.out == TEXT
    assert "12 tokens" in said.err and "ended by length" in said.err


def test_the_prompt_may_come_from_the_input(folders, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("34"))
    assert main(["--model", folders[0], "--max-tokens", "12", "-"]) == 0
    assert capsys.readouterr().out == TEXT


def test_a_diagnosis(folders, capsys):
    assert main(["--model", folders[0], "--draft", folders[1], "--diagnose", "--max-tokens", "12", "34"]) == 0
    assert "how far drafts agree with the target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "nowhere"], "--draft must be ngram, none, or a folder or file that exists, got 'nowhere'"),
        (["--rule", "best"], "rule must be 'auto' or one that is lossless for deterministic trees"),
        (["--temperature", "-1"], "temperature must be from 0 to"),
        (["--draft", "none", "--diagnose"], "diagnose needs an engine with a draft"),
        (["--chat"], "--chat needs a model whose tokenizer has a chat template"),
    ],
    ids=["draft", "rule", "temperature", "diagnose", "chat"],
)
def test_errors_are_one_sentence(folders, arguments, message, capsys):
    assert main(["--model", folders[0], *arguments, "34"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
