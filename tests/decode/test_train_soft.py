"""Sorted fine-tuning: the net starts as the engine's model, it learns, goes on where it was, and the draft loads."""

import dataclasses
import json

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.decode.decoder import Mlp, Norm, Projection
from specdec_ops.drafts.checkpoint import tokenizer_hash
from specdec_ops.drafts.weights import activation_name, dense_weight
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight, quantize_linear
from specdec_ops.rope import Rope
from specdec_ops.train import soft, trainer
from specdec_ops.train.sorted_net import SortedNet
from specdec_ops.train.texts import Text
from tests.decode.test_engine import PROMPTS
from tests.decode.test_sorted import rows_from_scratch
from tests.harness.tiny_models import DIM, HEAD_DIM, INNER, POSITIONS, Characters, make_decoder

pytest.importorskip("safetensors")


def with_layers(decoder, **changes):
    """Every layer with other parts: names of `Layer`, `Attention` and `Mlp`."""

    def changed(layer):
        parts = {}
        for name in ("attention", "mlp"):
            part = getattr(layer, name)
            parts[name] = dataclasses.replace(part, **{key: new for key, new in changes.items() if hasattr(part, key)})
        own = {key: new for key, new in changes.items() if hasattr(layer, key)}
        return dataclasses.replace(layer, **{**parts, **own})

    return dataclasses.replace(decoder, layers=[changed(layer) for layer in decoder.layers])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


PLAIN = make_decoder(1, layers=4)
NORM, HEAD_NORM = Norm(1 + draw(DIM), None, 1e-6), Norm(1 + draw(HEAD_DIM), None, 1e-5)
UNGATED = Mlp(Projection(draw(INNER, DIM), draw(INNER)), Projection(draw(DIM, INNER), draw(DIM)), torch.nn.GELU("tanh"))
MODELS = {
    "llama": PLAIN,
    "interleaved": with_layers(PLAIN, interleaved=True),
    "partly rotated": with_layers(PLAIN, rope=Rope(1e4, HEAD_DIM // 4, POSITIONS), scale=0.3),
    "norms of heads": with_layers(PLAIN, q_norm=HEAD_NORM, k_norm=HEAD_NORM),
    "window": with_layers(PLAIN, window=5),
    "capped scores": with_layers(PLAIN, softcap=2.0),
    "norms behind": dataclasses.replace(with_layers(PLAIN, after_attention=NORM, after_mlp=NORM), embedding_scale=2.0),
    "geglu": with_layers(PLAIN, activation="geglu"),
    "gpt": dataclasses.replace(
        with_layers(
            PLAIN,
            rope=None,
            mlp=UNGATED,
            attention_norm=Norm(1 + draw(DIM), draw(DIM), 1e-5),
            mlp_norm=Norm(1 + draw(DIM, seed=1), draw(DIM, seed=1), 1e-5),
        ),
        position_embedding=draw(POSITIONS, DIM),
        norm=Norm(1 + draw(DIM), draw(DIM), 1e-5),
    ),
    "parallel": with_layers(PLAIN, parallel=True),
}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_net_starts_as_the_engines_model(name):
    """Of every kind of layer, at each exit."""
    model, ids = MODELS[name], [5, 3, 8, 8, 1, 30, 2, 7, 7]
    net = SortedNet(model, (1, 3))
    task = make_task(model, "--exits", "1", "3", "--thresholds", "0.5", "0")
    lines = task._lines([Text(torch.tensor([*ids, 1]), torch.zeros(len(ids), DIM).half())])
    found = net(lines.embedded)
    small = net.decoder()
    for rows, layers in zip(found, (1, 3), strict=True):
        expected = model.norm(rows_from_scratch(model, ids, layers))
        close(rows[0].detach(), expected)
        close(small.norm(rows_from_scratch(small, ids, layers)), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_saved_draft_comes_back(name, weights, tmp_path):
    """The same logits from the folder; with int8 those of rounded weights."""
    model = dataclasses.replace(MODELS[name], tokenizer=Words())
    small = dataclasses.replace(model, layers=model.layers[:3], shape=model.shape._replace(layers=3))
    hot_vocab = torch.arange(3, 33)
    made = drafts.Sorted(small, (1, 3), (0.5, 0.0), hot_vocab=hot_vocab, head=None)
    made.save(tmp_path, model, weights=weights, about={"command": "python -m this"})
    about = json.loads((tmp_path / "draft.json").read_text())
    assert about["target"] == "decoder" and about["tokenizer_sha256"] == tokenizer_hash(Words())
    assert about["exits"] == [1, 3] and about["thresholds"] == [0.5, 0.0] and about["command"] == "python -m this"
    loaded = drafts.Sorted.load(tmp_path, head=None)
    assert loaded.exits == (1, 3) and loaded.thresholds == (0.5, 0.0) and torch.equal(loaded.hot_vocab, hot_vocab)
    bound = 2e-5 if weights == "float32" else 0.2
    for layers in (1, 3):
        got, expected = (rows_from_scratch(m, [1, 2, 3, 4, 5, 6, 7], layers) for m in (loaded.model, small))
        assert (got - expected).norm() <= bound * expected.norm()
    assert isinstance(loaded.model.layers[0].mlp.up.weight, QuantizedWeight) == (weights == "int8")
    results = Engine(model, loaded, adapt=False).generate(PROMPTS, Sampling(max_tokens=8))
    plain = Engine(model).generate(PROMPTS, Sampling(max_tokens=8))
    assert [result.tokens for result in results] == [result.tokens for result in plain]
    other = drafts.Sorted.load(tmp_path, exits=(2,), thresholds=(0,), hot_vocab=None, steps=3)
    assert other.exits == (2,) and other.vocab_map is None and other.steps == 3


class Words(Characters):
    def __init__(self, first: str = "a") -> None:
        self.first = first

    def get_vocab(self) -> dict[str, int]:
        return {chr(ord(self.first) + token): token for token in range(40)}


def test_targets_of_another_tokenizer_are_refused(tmp_path):
    model = dataclasses.replace(PLAIN, tokenizer=Words())
    drafts.Sorted(model, (2, 4), (0.5, 0.0)).save(tmp_path, model)
    loaded = drafts.Sorted.load(tmp_path)
    tied = dataclasses.replace(PLAIN, head=Projection(PLAIN.embedding))
    drafts.Sorted(tied, (2, 4), (0.5, 0.0)).save(tmp_path / "tied", model)
    sizes = [(folder / "draft.safetensors").stat().st_size for folder in (tmp_path, tmp_path / "tied")]
    assert sizes[0] - sizes[1] > 2 * 40 * DIM, "a head that is the embedding is saved once"
    for target in (PLAIN, model, make_decoder(3, layers=2, tokenizer=Words())):
        Engine(target, loaded)
    with pytest.raises(ValueError, match="target must have the tokenizer that the draft was trained with"):
        Engine(dataclasses.replace(PLAIN, tokenizer=Words("b")), loaded)
    with pytest.raises(ValueError, match="folder must hold a draft of kind eagle, got sorted"):
        drafts.Eagle.load(tmp_path, model)
    with pytest.raises(ValueError, match=r"folder must hold a draft\.safetensors"):
        drafts.Sorted.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="weights must be one of int8, bfloat16, float32, got 'int4'"):
        loaded.save(tmp_path, model, weights="int4")


# Training.


TEACHER = make_decoder(5, layers=4, sharpness=6.0)


def make_texts(count: int = 24) -> list[Text]:
    """Greedy and sampled answers, and the target's last rows over them."""
    asked = [Sampling(temperature=0.5 * (n % 2), max_tokens=24, seed=n) for n in range(count)]
    prompts = [[n % 40, 3 * n % 40] for n in range(count)]
    texts = []
    for prompt, result in zip(prompts, Engine(TEACHER).generate(prompts, asked), strict=True):
        ids = prompt + result.tokens
        features = TEACHER.norm(rows_from_scratch(TEACHER, ids, 4))[:-1].half()
        texts.append(Text(torch.tensor(ids, dtype=torch.int32), features.clone()))
    return texts


TEXTS = make_texts()


def asked_for(*options: str):
    return soft.parser().parse_args(["--target", "decoder", "--out", "folder", "--hot-vocab", "36", *options])


def make_task(target, *options: str, texts=None) -> soft.Soft:
    return soft.Soft(target, TEXTS if texts is None else texts, asked_for(*options))


EXITS = ("--exits", "1", "3", "--thresholds", "0.4", "0")


def test_losses_are_the_mean_over_exits():
    """SoFT's cross-entropy by hand, the distribution of the target by hand, and shares of both."""
    tasks = {share: make_task(TEACHER, *EXITS, "--distill", str(share), "--batch", "3") for share in (0.0, 0.25, 1.0)}
    found = {}
    for share, task in tasks.items():
        torch.manual_seed(4)
        found[share] = task.losses(4)
    task = tasks[0.0]
    torch.manual_seed(4)
    chosen = torch.randperm(len(task._learned))[:3].tolist()
    head = TEACHER.head.weight[task.hot_vocab].double()
    entries = {int(token): entry for entry, token in enumerate(task.hot_vocab)}
    for place, layers in enumerate((1, 3), start=1):
        words, laws = [], []
        for text in (task._learned[n] for n in chosen):
            ids = text.tokens.tolist()
            rows = TEACHER.norm(rows_from_scratch(TEACHER, ids[:-1], layers)).double()
            got, wanted = (rows @ head.T).log_softmax(-1), (text.features.double() @ head.T).softmax(-1)
            words += [-row[entries[token]].item() for row, token in zip(got, ids[1:], strict=True) if token in entries]
            laws += (-(wanted * got).sum(-1)).tolist()
        words, laws = sum(words) / len(words), sum(laws) / len(laws)
        assert found[0.0][place].item() == pytest.approx(words, rel=1e-3)
        assert found[1.0][place].item() == pytest.approx(laws, rel=1e-3)
        assert found[0.25][place].item() == pytest.approx(0.75 * words + 0.25 * laws, rel=1e-3)
    for loss, *parts in found.values():
        assert loss.item() == pytest.approx(sum(parts).item() / 2)


@pytest.mark.parametrize("distill", ["0", "1"])
def test_it_learns(distill):
    """Both exits: further down each guesses what the target says more often than before."""
    task = make_task(TEACHER, *EXITS, "--distill", distill, "--batch", "12", texts=[*TEXTS[:-2], *TEXTS[:2]])
    before = task.held_out()
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    for step in range(60):
        torch.manual_seed(step)
        loss = task.losses(step)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = task.held_out()
    assert all(new > old + 0.1 for new, old in zip(after, before, strict=True)), (before, after)


def write_texts(folder) -> None:
    folder.mkdir()
    torch.save([tuple(text) for text in TEXTS], folder / "texts_00000.pt")


def test_the_program_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """In slices: the same steps as in one go, a line of losses for each exit, a plot, and a folder that loads."""
    monkeypatch.setattr("specdec_ops.integrations.transformers.load", lambda path: TEACHER, raising=False)
    write_texts(tmp_path / "texts")
    arguments = ["--target", "some/decoder", "--texts", str(tmp_path / "texts"), "--texts-share", "0", *EXITS]
    arguments += ["--hot-vocab", "36", "--distill", "0.5", "--save", "float32"]
    monkeypatch.setattr(trainer, "_SAY", 0.0)
    weights, steps = [], []
    for name, budget in (("whole", (12,)), ("cut", (5, 7))):
        out, done = tmp_path / name, []
        for count in budget:
            stop_after(monkeypatch, count)
            done.append(soft.main([*arguments, "--out", str(out), "--minutes", "1000", "--slice", "900"]))
        assert done == [3] * len(budget)
        state = torch.load(out / "work" / "state.pt")
        steps.append(state["step"])
        weights.append(state["module"])
    assert steps == [12, 12]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=1e-6)
    header, *lines = (tmp_path / "cut" / "loss.csv").read_text().splitlines()
    assert header == "step,seconds,loss,loss_1,loss_3,agreement_1,agreement_3" and len(lines) >= 2
    about = json.loads((tmp_path / "cut" / "draft.json").read_text())
    assert about["steps"] == 12 and "--exits 1 3 --thresholds 0.4 0.0" in about["command"]
    assert str(tmp_path) not in about["command"]
    loaded = drafts.Sorted.load(tmp_path / "cut")
    assert loaded.exits == (1, 3) and loaded.thresholds == (0.4, 0.0) and len(loaded.hot_vocab) == 36
    assert Engine(TEACHER, loaded).generate([[1, 2]], Sampling(max_tokens=4))[0].finish_reason == "length"
    monkeypatch.undo()
    monkeypatch.setattr("specdec_ops.integrations.transformers.load", lambda path: TEACHER, raising=False)
    assert soft.main([*arguments, "--out", str(tmp_path / "cut"), "--minutes", "1e-9"]) == 0
    assert "the draft is in" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "cut" / "loss.png").stat().st_size > 1000


def stop_after(monkeypatch, count: int) -> None:
    """Let the next slice end after so many steps."""
    left = iter([False] * count + [True] * 10)
    monkeypatch.setattr(trainer.Trainer, "is_out_of_time", property(lambda self: next(left)))


def test_wrong_settings(tmp_path, monkeypatch, capsys):
    for options, words in (
        (("--exits", "2", "1", "--thresholds", "0", "0"), "exits must be ascending from 1 to the target's 4 layers"),
        (("--exits", "2", "5", "--thresholds", "0", "0"), "exits must be ascending from 1 to the target's 4 layers"),
        (("--exits", "2", "--thresholds", "0.5", "0"), "thresholds must be one for each exit"),
    ):
        with pytest.raises(ValueError, match=words):
            make_task(TEACHER, *options)
    with pytest.raises(ValueError, match="target must be a model without a soft cap"):
        make_task(dataclasses.replace(TEACHER, logit_softcap=3.0), *EXITS)
    sinks = with_layers(PLAIN, sinks=torch.zeros(4))
    with pytest.raises(ValueError, match="model must be one without attention sinks"):
        SortedNet(sinks, (2,))
    with pytest.raises(ValueError, match="model must be a model with an activation of gelu"):
        activation_name(torch.sin)
    monkeypatch.setattr("specdec_ops.integrations.transformers.load", lambda path: TEACHER, raising=False)
    none = ["--target", "x", "--out", str(tmp_path), "--texts-share", "0"]
    assert soft.main(none) == 2 and "minutes must be enough for two texts" in capsys.readouterr().err


def test_weights_of_every_form():
    weight = draw(6, 32)
    assert dense_weight(weight) is weight
    torch.testing.assert_close(dense_weight(quantize_linear(weight)), weight, rtol=0, atol=weight.abs().max() / 200)
