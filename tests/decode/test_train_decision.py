"""Training of what stops a draft: the examples are the paper's, a network learns from them, and is taken up again."""

import dataclasses
import json

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.drafts.stop import confidence
from specdec_ops.train import decision as train
from specdec_ops.train import trainer
from tests.decode.test_multi_candidate import last_logits
from tests.decode.test_train_eagle import PROMPTS, TARGET, recorded
from tests.harness.tiny_models import make_decoder

TARGET = dataclasses.replace(TARGET, name="somewhere/tiny")
DRAFT = make_decoder(9, layers=1, sharpness=6.0, name="somewhere/draft")


@pytest.fixture(scope="module")
def texts():
    return recorded(TARGET, PROMPTS[:12], 24, seed=7, eos=())


def test_examples_are_the_worth_of_drafts(texts):
    """Of one text: rows, candidates and ratios by single passes over each candidate's own text."""
    gatherer = train.Gatherer(TARGET, DRAFT, 64, width=3, every=5)
    found = gatherer.examples(texts[0], 4)
    tokens = texts[0].tokens.tolist()
    lengths = range(len(tokens) - 1, 8, -5)
    assert len(found.worth) == 3 * len(lengths)
    for group, length in enumerate(lengths):
        text = tokens[:length]
        options = {"seeds": 4, "positions": length}
        roots = train.sample_tokens(last_logits(TARGET, text)[None], count=3, **options)[0].tolist()
        rows = [last_logits(DRAFT, [*text, root]) for root in roots]
        children = train.sample_children(torch.stack(rows)[None], 1, **options).tokens[0, :, 0].tolist()
        for place, (root, row, child) in enumerate(zip(roots, rows, children, strict=True)):
            example = 3 * group + place
            p, q = (logits.double().softmax(-1)[child] for logits in (last_logits(TARGET, [*text, root]), row))
            assert float(found.worth[example]) == pytest.approx(min(1.0, float(p / q)), abs=2e-2)
            assert torch.allclose(found.confidence[example], confidence(row[None])[0], atol=1e-4)
    again = train.Gatherer(TARGET, DRAFT, 64, width=3, every=5).examples(texts[0], 4)
    assert all(map(torch.equal, found, again))
    assert not torch.equal(gatherer.examples(texts[0], 5).worth, found.worth)


def test_area_is_the_share_of_pairs():
    scores = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2])
    accepted = torch.tensor([False, True, False, True, False])
    pairs = [(scores[a] > scores[b]).float() + 0.5 * (scores[a] == scores[b]) for a in (1, 3) for b in (0, 2, 4)]
    assert train.area(scores, accepted) == pytest.approx(float(sum(pairs)) / 6)


def test_the_best_network_is_kept(texts):
    """Whatever comes after it: what is saved is what did best on the held-out examples."""
    gatherer = train.Gatherer(TARGET, DRAFT, 64, every=2)
    parts = [gatherer.examples(text, number) for number, text in enumerate(texts[:4])]
    examples = tuple(train.Examples(*map(torch.cat, zip(*some, strict=True))) for some in (parts[:3], parts[3:]))
    asked = train.parser().parse_args(["--target", "x", "--out", "y", "--labels", "soft"])
    task = train.Decision(DRAFT, examples, asked)
    seen, generator = [], torch.Generator().manual_seed(0)
    for _ in range(12):
        for parameter in task.module.layers.parameters():
            parameter.data.normal_(generator=generator)
        seen.append(train.area(task.module(task._exam), task._accepted))
        with torch.no_grad():
            assert task.held_out()[1] == pytest.approx(max(seen))
    assert max(seen) > seen[-1] and len(set(seen)) > 3, "the last one is not meant to be the best"
    assert {name for name in task.module.state_dict() if "best" in name} == {
        "best_area",
        *(f"best.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")),
    }


def asked_for(tmp_path, *changes) -> list[str]:
    options = ["--target", "somewhere/tiny", "--draft", str(tmp_path / "draft"), "--out", str(tmp_path / "out")]
    options += ["--texts", str(tmp_path / "texts"), "--texts-share", "0", "--minutes", "0.05", "--examples", "300"]
    return [*options, "--every", "2", *changes]


@pytest.fixture
def program(tmp_path, texts, monkeypatch):
    """The program, with models from memory and texts that are there."""
    models = {"somewhere/tiny": TARGET, str(tmp_path / "draft"): DRAFT}
    monkeypatch.setattr(trainer, "load_model", models.__getitem__)
    (tmp_path / "texts").mkdir()
    torch.save([tuple(text) for text in texts], tmp_path / "texts" / "texts_00000.pt")
    return train.main


@pytest.mark.parametrize("features", ["confidence", "hidden"])
def test_a_network_is_trained_saved_and_used(program, tmp_path, features, capsys):
    assert program(asked_for(tmp_path, "--features", features)) == 0
    said = json.loads((tmp_path / "out" / "draft.json").read_text())
    assert said["features"] == features and said["threshold"] == 0.4 and said["examples"] >= 200
    assert said["command"].startswith("python -m specdec_ops.train.decision --target tiny --out out")
    assert f"--labels {'soft' if features == 'hidden' else 'hard'}" in said["command"]
    assert str(tmp_path) not in said["command"]
    assert said["held_out_auc"] > 0.6, "better than a coin"
    decision = drafts.Decision.load(tmp_path / "out", DRAFT)
    sizes = [layer[0].shape[0] for layer in decision.layers]
    assert sizes == ([44, 1] if features == "confidence" else [512, 256, 1])
    draft = drafts.MultiCandidate(DRAFT, (1, 1, 1), target_roots=2, stop=decision)
    engine = Engine(TARGET, draft, "longest_path")
    result = engine.generate([PROMPTS[0]], Sampling(temperature=1.0, max_tokens=30, eos=()))[0]
    assert len(result.tokens) == 30
    assert (tmp_path / "out" / "loss.csv").read_text().startswith("step,seconds,loss,held_out_accuracy,held_out_auc")


def test_a_slice_ends_and_the_same_command_goes_on(program, tmp_path, capsys):
    """Examples that are there are not made again."""
    assert program(asked_for(tmp_path, "--slice", "0.001")) == 3
    assert "the slice has ended" in capsys.readouterr().out
    assert program(asked_for(tmp_path)) == 0
    made = sorted((tmp_path / "out" / "work").glob("examples_*.pt"))
    times = [path.stat().st_mtime_ns for path in made]
    assert len(made) > 1
    assert program(asked_for(tmp_path)) == 0
    assert [path.stat().st_mtime_ns for path in made] == times


def test_texts_that_are_too_few_are_said(program, tmp_path, texts, capsys):
    short = [(text.tokens[:9], text.features[:8]) for text in texts[1:]]
    torch.save([tuple(texts[0]), *short], tmp_path / "texts" / "texts_00000.pt")
    assert program(asked_for(tmp_path)) == 2
    assert "texts must be at least two of more than 9 tokens" in capsys.readouterr().err
