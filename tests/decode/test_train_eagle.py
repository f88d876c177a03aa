"""Training of EAGLE's layer: the network is the draft's layer, it learns, and it goes on where it stopped."""

import csv
import dataclasses
import json
import math

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.ops.linear.quantized_weight import quantize_linear
from specdec_ops.train import eagle as train
from specdec_ops.train.texts import Recorder, Text, Writer
from tests.harness.tiny_models import Characters, make_decoder


class AnyCharacters(Characters):
    """Of any text, so that 40 ids are enough for it."""

    def encode(self, text: str) -> list[int]:
        return [token % 40 for token in super().encode(text)]


TARGET = dataclasses.replace(make_decoder(1, layers=1, sharpness=6.0), name="somewhere/tiny", tokenizer=AnyCharacters())
PROMPTS = [[token, (7 * token + 1) % 40] for token in range(24)]


def recorded(target, prompts=PROMPTS, length: int = 40, **changes) -> list[Text]:
    recorder = Recorder()
    Engine(target, recorder, adapt=False).generate(prompts, Sampling(max_tokens=length, temperature=0.5, **changes))
    return list(recorder.texts.values())


def test_recorded_rows_are_those_of_one_pass():
    """Of prompts and answers, and of requests that had to wait for pages."""
    recorder = Recorder()
    engine = Engine(TARGET, recorder, pages=14, page_size=4, max_batch=3, adapt=False)
    engine.generate(PROMPTS[:5], Sampling(max_tokens=20, eos=()))
    assert len(recorder.texts) == 5
    for text in recorder.texts.values():
        again = Recorder()
        Engine(TARGET, again).generate([text.tokens.tolist()], Sampling(max_tokens=1))
        (whole,) = again.texts.values()
        assert len(text.features) == len(text.tokens) - 1 == 21
        assert torch.allclose(text.features.float(), whole.features[:21].float(), atol=5e-3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_network_is_the_draft(seed, interleaved):
    """The row that the engine's draft makes of node 0 is the network's last one."""
    target = make_decoder(seed)
    target.layers[-1].attention.interleaved = interleaved
    torch.manual_seed(0)
    net = train.Net(target)
    (text,) = recorded(target, [list(range(30))], 6, seed=3)
    pairs = train.side_by_side([text], 99)
    with torch.no_grad():
        want = net(train.Teacher(target, None).embed(pairs.tokens), pairs.before)[0]
    engine = Engine(target, net.draft(target, None, levels=1), adapt=False)
    seen, catch_up = {}, engine.proposer._catch_up

    def noted(batch):
        found = catch_up(batch)
        seen[len(batch.requests[0].ids)] = found[0][0]
        return found

    engine.proposer._catch_up = noted
    tokens = text.tokens.tolist()
    for length in (1, 2, 17, 35):
        engine.generate([tokens[:length]], Sampling(max_tokens=1))
        assert torch.allclose(seen[length], want[length - 1], atol=2e-3, rtol=1e-2)


def test_it_learns():
    """A few hundred steps for a tiny target of one layer: the draft comes to say what the target says."""
    texts = recorded(TARGET)
    torch.manual_seed(0)
    net, teacher = train.Net(TARGET), train.Teacher(TARGET, None)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    pairs = train.side_by_side(texts, 64)

    def rate() -> float:
        engine = Engine(TARGET, net.draft(TARGET, None, levels=3, width=2, branching=2, nodes=6), adapt=False)
        results = engine.generate(PROMPTS[:8], Sampling(max_tokens=30))
        return sum(r.stats.tokens for r in results) / sum(r.stats.target_calls for r in results)

    before = rate()
    for _ in range(300):
        found = train.losses(net, teacher, pairs, token_weight=0.1, noise=0.1)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    assert found.agreement > 0.85
    assert rate() > max(2.5, before + 0.5)


def test_losses_by_hand():
    """One text of three rows, its loss from the formulas; padding beside it counts for nothing."""
    text, longer = (Text(torch.arange(n + 1, dtype=torch.int32), torch.randn(n, 32).half()) for n in (3, 5))
    torch.manual_seed(0)
    net, teacher = train.Net(TARGET), train.Teacher(TARGET, torch.arange(10))
    with torch.no_grad():
        found = train.losses(net, teacher, train.side_by_side([text], 9), token_weight=0.3, noise=0.0)
        both = train.losses(net, teacher, train.side_by_side([text, longer], 9), token_weight=0.3, noise=0.0)
        other = train.losses(net, teacher, train.side_by_side([longer], 9), token_weight=0.3, noise=0.0)
        before = torch.cat((torch.zeros(1, 32), text.features[:2].float()))
        guess = net(TARGET.embedding[:3][None], before[None])[0]
    rows, tokens = 0.0, 0.0
    for got, want in zip(guess.tolist(), text.features.tolist(), strict=True):
        gaps = [abs(a - b) for a, b in zip(got, want, strict=True)]
        rows += sum(gap * gap / 2 if gap < 1 else gap - 0.5 for gap in gaps) / 32 / 3
        heads = [[sum(w * x for w, x in zip(line, row, strict=True)) for line in TARGET.head.weight[:10].tolist()]
                 for row in (got, want)]  # fmt: skip
        logs = [[logit - max(logits) - math.log(sum(math.exp(other - max(logits)) for other in logits))
                 for logit in logits] for logits in heads]  # fmt: skip
        tokens -= sum(math.exp(want) * got for got, want in zip(*logs, strict=True)) / 3
    assert found.rows.item() == pytest.approx(rows, rel=1e-4)
    assert found.tokens.item() == pytest.approx(tokens, rel=1e-4)
    assert found.loss.item() == pytest.approx(rows + 0.3 * tokens, rel=1e-4)
    assert both.loss.item() == pytest.approx((3 * found.loss.item() + 5 * other.loss.item()) / 8, rel=1e-4)


def test_noise_moves_features_and_not_what_is_learned():
    texts = recorded(TARGET, PROMPTS[:3], 10)
    pairs = train.side_by_side(texts, 99)
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, embedded, features):
            seen.append(features)
            return pairs.features

    found = train.losses(Spy(), train.Teacher(TARGET, None), pairs, token_weight=0.1, noise=0.2)
    moved, scale = seen[0] - pairs.before, pairs.features[pairs.there].std()
    assert found.rows == 0 and found.agreement == 1
    assert 0.15 * scale < moved.abs().max() <= 0.2 * scale
    assert not moved[:, 0].any(), "what stands before a text is zeros, also in training"


def test_hot_vocabulary():
    texts = [Text(torch.tensor([5, 5, 9, 30, 30, 30], dtype=torch.int32), torch.zeros(5, 2))]
    assert train.hottest(texts, 4, 40).tolist() == [0, 5, 9, 30]
    assert train.hottest(texts, 40, 40) is None


def asked(out, **changes):
    words = ["--target", "t", "--out", str(out), "--hot-vocab", "30", "--length", "32", "--bfloat16"]
    made = train.parser().parse_args(words)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """By a clock of the test: every look at it takes a second. A slice of a few seconds, again and again."""
    pytest.importorskip("safetensors")
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(train.time, "perf_counter", clock)
    slices, steps = 0, []
    while True:
        trainer = train.Trainer(TARGET, tmp_path, asked(tmp_path, minutes=2.0, slice=12.0))
        slices += 1
        if trainer.collect() and trainer.train():
            break
        if (tmp_path / "draft.json").exists():
            steps.append(json.loads((tmp_path / "draft.json").read_text())["steps"])
        assert slices < 100
    assert slices > 4 and steps == sorted(steps) and len(set(steps)) == len(steps) > 1
    about = json.loads((tmp_path / "draft.json").read_text())
    assert (
        about["target"] == "tiny" and about["steps"] > steps[-1] and about["command"].endswith("--bfloat16 --save int8")
    )
    assert str(tmp_path.parent) not in about["command"]
    with (tmp_path / "loss.csv").open() as file:
        logged = [int(row["step"]) for row in csv.DictReader(file)]
    assert logged == sorted(logged) and logged[-1] == about["steps"]
    assert not list(tmp_path.rglob("*.part"))
    engine = Engine(TARGET, drafts.Eagle.load(tmp_path, TARGET), adapt=False)
    results, plain = (each.generate(PROMPTS[:4], Sampling(max_tokens=20)) for each in (engine, Engine(TARGET)))
    assert [result.tokens for result in results] == [result.tokens for result in plain]


def test_a_group_of_texts_is_the_same_each_time():
    first, second = (Writer(TARGET, 12) for _ in range(2))
    second.group(0)
    for number in (0, 2):
        for one, other in zip(first.group(number), second.group(number), strict=True):
            assert torch.equal(one.tokens, other.tokens) and len(one.features) == len(one.tokens) - 1


@pytest.mark.parametrize("form", ["int8", "bfloat16", "float32"])
def test_saved_drafts(form, tmp_path):
    pytest.importorskip("safetensors")
    draft = train.Net(TARGET).draft(TARGET, torch.arange(5, 35))
    draft.save(tmp_path, TARGET, weights=form, about={"command": "me"})
    loaded = drafts.Eagle.load(tmp_path, TARGET, levels=2, nodes=5)
    assert loaded.levels == 2 and loaded.max_nodes == 5 and loaded.hot_vocab.tolist() == list(range(5, 35))
    for name in ("qkv", "out"):
        was, got = (getattr(each.layer.attention, name).weight for each in (draft, loaded))
        if form == "int8":
            assert torch.equal(quantize_linear(was).values, got.values)
        else:
            assert torch.equal(was.to(getattr(torch, form)), got)
    texts = [
        Engine(TARGET, each, adapt=False).generate(PROMPTS[:3], Sampling(max_tokens=12)) for each in (None, loaded)
    ]
    assert [result.tokens for result in texts[0]] == [result.tokens for result in texts[1]]


def test_drafts_of_another_target_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    train.Net(TARGET).draft(TARGET, None).save(tmp_path, TARGET)
    other = dataclasses.replace(make_decoder(2, layers=1), name="a/folder/other")
    with pytest.raises(ValueError, match=r"target must be tiny, for .*, got other \(of another norm_sha256\)$"):
        drafts.Eagle.load(tmp_path, other)
    deeper = dataclasses.replace(make_decoder(1, layers=2), name="deeper", norm=TARGET.norm)
    with pytest.raises(ValueError, match=r"got deeper \(of another target_layers\)$"):
        drafts.Eagle.load(tmp_path, deeper)

    class Others(Characters):
        def get_vocab(self):
            return {"a": 1}

    class Ours(Characters):
        def get_vocab(self):
            return {"b": 1}

    train.Net(TARGET).draft(TARGET, None).save(tmp_path, dataclasses.replace(TARGET, tokenizer=Ours()))
    with pytest.raises(ValueError, match=r"got tiny \(of another tokenizer_sha256\)$"):
        drafts.Eagle.load(tmp_path, dataclasses.replace(TARGET, tokenizer=Others()))
    drafts.Eagle.load(tmp_path, dataclasses.replace(TARGET, tokenizer=Ours(), name="another folder"))
    with pytest.raises(ValueError, match=r"folder must hold a draft.safetensors and a draft.json, got '.*nothing'$"):
        drafts.Eagle.load(tmp_path / "nothing", TARGET)
    about = json.loads((tmp_path / "draft.json").read_text())
    (tmp_path / "draft.json").write_text(json.dumps(about | {"draft": "sorted"}))
    with pytest.raises(ValueError, match=r"folder must hold a draft of kind eagle, got sorted$"):
        drafts.Eagle.load(tmp_path, TARGET)
    with pytest.raises(TypeError, match=r"target must be a specdec_ops.decode.Decoder"):
        drafts.Eagle.load(tmp_path, None)
