"""The fine-tuned target of the sorted drafts' table, with a tiny model: it learns, goes on, and comes back whole."""

import dataclasses
import json

import pytest
import torch

from benchmarks.decode import fine_tune
from specdec_ops import Tree
from specdec_ops.decode import Cache, Engine, Rows, Sampling
from specdec_ops.decode.cache import Sequence
from specdec_ops.train import trainer
from tests.decode.test_train_soft import stop_after
from tests.harness.tiny_models import make_decoder

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 24


class Letters:
    """A token for each character, of 40."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 40 for character in text]


TARGET = dataclasses.replace(make_decoder(1, layers=4), tokenizer=Letters())


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.py").write_text(f"def {name}(number):\n    return number + 1\n\n\n" * 40)
    (folder / "short.py").write_text("pass\n")
    return folder


def asked_of(*options: str):
    return fine_tune.parser().parse_args(["--target", "some/decoder", "--out", "out", *options])


def whole_pass(model, text: list[int]) -> torch.Tensor:
    cache, sequence = Cache(model.shape, 8), Sequence()
    cache.reserve(sequence, len(text))
    table, start = cache.page_table([sequence]), torch.zeros(1, dtype=torch.int32)
    rows = Rows(torch.tensor([text], dtype=torch.int32), Tree.chain(len(text)).to("cpu"), start, table)
    return model.forward(rows, cache).logits


def make_task(sources, *options: str) -> fine_tune.FineTuning:
    texts = fine_tune.pieces(Letters(), sources, 24, LENGTH)
    return fine_tune.FineTuning(TARGET, texts, asked_of("--batch", "8", *options))


def test_pieces_are_the_same_each_time(sources):
    found = [fine_tune.pieces(Letters(), sources, 9, LENGTH) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert {len(piece) for piece in found[0]} == {LENGTH} and len({tuple(piece.tolist()) for piece in found[0]}) > 4


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_it_starts_as_the_target_and_learns(sources, layers, tmp_path):
    """Before the first step its loss is that of the target's own rows; what is saved is what was trained."""
    task = make_task(sources, "--layers", str(layers))
    torch.manual_seed(0)
    first = task.losses(0)[0].item()
    torch.manual_seed(0)
    chosen = torch.randperm(22)[:8].tolist()
    texts = [task._texts[place].tolist() for place in chosen]
    rows = torch.cat([whole_pass(TARGET, text)[:-1] for text in texts])
    following = torch.tensor([token for text in texts for token in text[1:]])
    assert first == pytest.approx(torch.nn.functional.cross_entropy(rows, following).item(), rel=1e-4)
    before, optimizer = task.held_out()[0], torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        task.losses(step)[0].backward()
        optimizer.step()
    with torch.no_grad():
        assert task.held_out()[0] > before + 0.2
        task.save(tmp_path / "made", {"steps": 40})
        scores = task._scores([0])[0]
    tuned = fine_tune.load(tmp_path / "made", TARGET)
    text = task._texts[0].tolist()
    torch.testing.assert_close(whole_pass(tuned, text)[:-1], scores, rtol=0.05, atol=0.1)  # bfloat16 weights
    assert tuned.layers[: 4 - layers] == TARGET.layers[: 4 - layers] and len(tuned.layers) == 4
    speechless = dataclasses.replace(tuned, tokenizer=None)
    assert Engine(speechless).generate([text[:4]], Sampling(max_tokens=3))[0].finish_reason == "length"
    with pytest.raises(ValueError, match="target must be decoder, for which the draft was trained"):
        fine_tune.load(tmp_path / "made", make_decoder(2, layers=4))


def test_the_program_goes_on_where_it_was(sources, tmp_path, monkeypatch, capsys):
    """In slices: the weights of one go, a line for each step, and a model in the end."""
    monkeypatch.setattr("specdec_ops.integrations.transformers.load", lambda path: TARGET, raising=False)
    monkeypatch.setattr(trainer, "_SAY", 0.0)
    monkeypatch.setattr(trainer, "_CHECKS", 1e9)
    arguments = ["--target", "some/decoder", "--texts", str(sources), "--layers", "2", "--length", str(LENGTH)]
    arguments += ["--pieces", "24"]
    weights = []
    for name, budget in (("whole", (6,)), ("cut", (2, 4))):
        for count in budget:
            stop_after(monkeypatch, count)
            assert fine_tune.main([*arguments, "--out", str(tmp_path / name), "--minutes", "99", "--slice", "9"]) == 3
        state = torch.load(tmp_path / name / "work" / "state.pt")
        assert state["step"] == 6
        weights.append(state["module"])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    monkeypatch.setattr("specdec_ops.integrations.transformers.load", lambda path: TARGET, raising=False)
    assert fine_tune.main([*arguments, "--out", str(tmp_path / "cut"), "--minutes", "1e-9"]) == 0
    assert "the model is in" in capsys.readouterr().out
    about = json.loads((tmp_path / "cut" / "draft.json").read_text())
    assert about["steps"] == 6 and about["layers"] == 2 and str(tmp_path) not in about["command"]
    header, *lines = (tmp_path / "cut" / "loss.csv").read_text().splitlines()
    assert header == "step,seconds,loss,held_out_accuracy" and len(lines) >= 4
    assert fine_tune.load(tmp_path / "cut", TARGET).shape == TARGET.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "5"), "layers must be from 1 to 4, got 5"),
        (("--length", "4000"), "texts must be sources of more than 32000 bytes"),
    ],
    ids=["layers", "length"],
)
def test_what_can_not_be_done_is_said(options, message, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("specdec_ops.integrations.transformers.load", lambda path: TARGET, raising=False)
    arguments = ["--target", "x", "--out", str(tmp_path / "out"), "--texts", str(sources), "--length", str(LENGTH)]
    assert fine_tune.main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
