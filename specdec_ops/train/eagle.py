"""Train a draft for `Eagle`: `python -m specdec_ops.train.eagle --target FILE_OR_FOLDER --out FOLDER`.

Texts come first: the target's own answers to questions that it has thought up itself, and excerpts of Python's standard
library, with the target's last rows over them. Then the layer learns, as EAGLE's does (Li et al., 2024), to tell each
row from the row before it and the token between: SmoothL1 over the rows, and 0.1 times the cross-entropy between what
the target's head makes of either; noise on the rows that go in. AdamW, with a rate that rises and falls.

The folder OUT gets draft.safetensors and draft.json, which `Eagle.load` reads; loss.csv (and loss.png
where matplotlib is installed); and a folder `work` with texts and the state of training, which nobody needs afterwards.
The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from specdec_ops.decode.decoder import Decoder, Projection
from specdec_ops.decode.rows import Rows
from specdec_ops.drafts.eagle import Eagle, parts
from specdec_ops.ops.linear.linear import linear
from specdec_ops.tree import Tree

from .texts import Text, Writer

COLUMNS = ("step", "seconds", "loss", "rows", "tokens", "agreement", "held_out_agreement")


class Net(torch.nn.Module):
    """The draft's layer in float32, for autograd. `draft` makes of it what the engine runs.

    Args:
        target: whose sizes it has.
        inner: of the MLP; that of the target if None.
    """

    def __init__(self, target: Decoder, inner: int | None = None) -> None:
        super().__init__()
        attention, dim = target.layers[-1].attention, target.shape.dim
        inner = _columns(target.layers[-1].mlp.down) if inner is None else inner
        self.sizes = {name: getattr(attention, name) for name in ("heads", "kv_heads", "head_dim", "interleaved")}
        self.sizes["norm_eps"] = 1e-5
        self._rope = attention.rope
        heads, width = attention.heads + 2 * attention.kv_heads, attention.heads * attention.head_dim

        def start(out: int, columns: int, scale: float = 1.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(out, columns) * (scale / columns**0.5))

        # Embeddings are often a tenth of a feature; both begin with the same say.
        sizes = (target.embedding.float().std().item(), target.norm.weight.float().square().mean().sqrt().item())
        self.fc = torch.nn.Parameter(torch.cat([start(dim, dim, 0.7 / size).data for size in sizes], dim=1))
        self.qkv, self.out = start(heads * attention.head_dim, dim), start(dim, width, 0.5)
        self.up, self.down = start(2 * inner, dim), start(dim, inner, 0.5)
        self.attention_norm, self.mlp_norm = (torch.nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[batch, length, dim] of embeddings [batch, length, dim] and of the features before them, like those."""
        x = _product(torch.cat((embedded, features), dim=-1), self.fc)
        x = x + self._attention(functional.rms_norm(x, x.shape[-1:], self.attention_norm, self.sizes["norm_eps"]))
        normed = functional.rms_norm(x, x.shape[-1:], self.mlp_norm, self.sizes["norm_eps"])
        gate, value = _product(normed, self.up).chunk(2, dim=-1)
        return x + _product(functional.silu(gate) * value, self.down)

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        heads, kv_heads = self.sizes["heads"], self.sizes["kv_heads"]
        qkv = _product(x, self.qkv).unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q, k = self._rotated(q), self._rotated(k)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return _product(attended.transpose(1, 2).flatten(2), self.out)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, head_dim]: pairs are neighbours if interleaved, else half of what is turned apart."""
        if self._rope is None:
            return x
        cosines, sines = (table[: x.shape[2]] for table in (self._rope.cosines, self._rope.sines))
        pairs, apart = cosines.shape[1], self.sizes["interleaved"]
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        turned = turned.unflatten(-1, (pairs, 2) if apart else (2, pairs))
        a, b = turned.unbind(-1 if apart else -2)
        turned = torch.stack((a * cosines - b * sines, b * cosines + a * sines), dim=-1 if apart else -2)
        return torch.cat((turned.flatten(-2), rest), dim=-1)

    def draft(self, target: Decoder, hot_vocab: torch.Tensor | None, **options) -> Eagle:
        """What it has learned so far, as a draft."""
        weights = {name: getattr(self, name).detach().clone() for name in ("fc", "qkv", "out", "up", "down")}
        norms = {name: getattr(self, name).detach().clone() for name in ("attention_norm", "mlp_norm")}
        return Eagle(*parts(weights, norms, self.sizes, target), hot_vocab, **options)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In float32, whatever autocast multiplies in: norms, residuals and losses stay exact."""
    return functional.linear(x, weight, bias).float()


def _columns(projection: Projection) -> int:
    weight = projection.weight
    return weight.shape[1] if isinstance(weight, torch.Tensor) else weight.dim


def _dense(projection: Projection, dim: int) -> torch.Tensor:
    """A weight [out, dim] in float32, whatever form it has."""
    if isinstance(projection.weight, torch.Tensor):
        return projection.weight.float()
    return linear(torch.eye(dim), projection.weight).T.contiguous()


class Teacher:
    """The target's head over the hot vocabulary, and its embedding.

    Args:
        target: the target.
        hot_vocab: int64 [entries], or None: all.
    """

    def __init__(self, target: Decoder, hot_vocab: torch.Tensor | None) -> None:
        self._target = target
        head, bias = _dense(target.head, target.shape.dim), target.head.bias
        self._head = head if hot_vocab is None else head[hot_vocab]
        self._bias = bias if bias is None or hot_vocab is None else bias[hot_vocab]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """[..., entries] of features [..., dim]."""
        logits, softcap = _product(features, self._head, self._bias), self._target.logit_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length, dim] of tokens [batch, length]."""
        batch, length = tokens.shape
        rows = Rows(tokens, Tree.chain(length).to("cpu"), torch.zeros(batch, dtype=torch.int32), None)
        return self._target.embed(rows).view(batch, length, -1).float()


class Losses(NamedTuple):
    """Of a batch."""

    loss: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    agreement: torch.Tensor


class Pairs(NamedTuple):
    """Texts side by side: a token, the feature before it and its own. `there` says where a text has a row."""

    tokens: torch.Tensor
    before: torch.Tensor
    features: torch.Tensor
    there: torch.Tensor


def side_by_side(texts: list[Text], longest: int) -> Pairs:
    """The leading `longest` rows of each text, padded."""
    length = min(longest, max(len(text.features) for text in texts))
    dim = texts[0].features.shape[1]
    tokens = torch.zeros(len(texts), length, dtype=torch.int32)
    features = torch.zeros(len(texts), length + 1, dim)
    there = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        count = min(length, len(text.features))
        tokens[row, :count] = text.tokens[:count]
        features[row, 1 : count + 1] = text.features[:count].float()
        there[row, :count] = True
    return Pairs(tokens, features[:, :-1], features[:, 1:], there)


def losses(net: Net, teacher: Teacher, pairs: Pairs, *, token_weight: float, noise: float) -> Losses:
    """EAGLE's: SmoothL1 of rows plus token_weight times cross-entropy, the mean over rows that are there.

    Args:
        net: the draft.
        teacher: the target.
        pairs: a batch.
        token_weight: of the cross-entropy.
        noise: features that go in are moved by up to so many times their standard deviation.
    """
    before = pairs.before
    if noise:
        moved = (torch.rand_like(before) * 2 - 1) * (noise * pairs.features[pairs.there].std())
        before = torch.where(before.any(dim=-1, keepdim=True), before + moved, before)
    guess = net(teacher.embed(pairs.tokens), before)[pairs.there]
    truth = pairs.features[pairs.there]
    with torch.no_grad():
        wanted = teacher.logits(truth)
        law = wanted.softmax(-1)
    got = teacher.logits(guess)
    rows = functional.smooth_l1_loss(guess, truth)
    tokens = functional.cross_entropy(got, law)
    agreement = (got.detach().argmax(-1) == wanted.argmax(-1)).float().mean()
    return Losses(rows + token_weight * tokens, rows, tokens, agreement)


def hottest(texts: list[Text], entries: int, vocab: int) -> torch.Tensor | None:
    """int64 [entries], ascending: the most frequent tokens, then those of the lowest ids. None if that is all."""
    if entries >= vocab:
        return None
    counts = torch.zeros(vocab, dtype=torch.float64)
    for text in texts:
        counts += torch.bincount(text.tokens.long(), minlength=vocab)
    counts -= torch.arange(vocab) / vocab  # among equals the lower id, which merges of a tokenizer make the shorter one
    return counts.topk(entries).indices.sort().values


class Trainer:
    """Texts, then steps, within a number of minutes, interrupted and taken up again at will.

    Args:
        target: the model that the draft is for.
        out: the folder of the results.
        asked: the command line.
    """

    def __init__(self, target: Decoder, out: Path, asked: argparse.Namespace) -> None:
        self.target, self.out, self.asked, self.work = target, out, asked, out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self._progress = self.work / "progress.json"
        self.spent = json.loads(self._progress.read_text()) if self._progress.exists() else {"texts": 0.0, "steps": 0.0}
        self._end = time.perf_counter() + (asked.slice or math.inf)

    @property
    def is_out_of_time(self) -> bool:
        """Whether this call has to end."""
        return time.perf_counter() >= self._end

    def _note(self, kind: str, seconds: float) -> None:
        self.spent[kind] += seconds
        _write(self._progress, lambda path: path.write_text(json.dumps(self.spent)))

    def collect(self) -> bool:
        """Make texts until their share of the time is spent. Returns whether it is."""
        budget, writer = 60 * self.asked.minutes * self.asked.texts_share, None
        number = len(list(self.work.glob("texts_*.pt")))
        while self.spent["texts"] < budget:
            if self.is_out_of_time:
                return False
            start = time.perf_counter()
            writer = writer or Writer(self.target)
            texts = [tuple(text) for text in writer.group(number)]
            _write(self.work / f"texts_{number:05d}.pt", lambda path, texts=texts: torch.save(texts, path))
            number += 1
            self._note("texts", time.perf_counter() - start)
            tokens = sum(len(tokens) for tokens, _ in texts)
            print(f"texts {self.spent['texts']:6.0f} of {budget:.0f} s: group {number}, {tokens} tokens", flush=True)
        return True

    def texts(self) -> list[Text]:
        """All that have been made, in order."""
        return [Text(*text) for path in sorted(self.work.glob("texts_*.pt")) for text in torch.load(path)]

    def train(self) -> bool:
        """Steps until their share of the time is spent. Returns whether it is."""
        asked, texts = self.asked, self.texts()
        held_out = max(1, min(16, len(texts) // 10))
        if len(texts) < 2:
            raise ValueError("specdec_ops.train.eagle: minutes must be enough for two texts")
        learned, kept = texts[:-held_out], texts[-held_out:]
        budget = 60 * asked.minutes * (1 - asked.texts_share)
        hot_vocab = hottest(texts, asked.hot_vocab, self.target.shape.vocab)
        teacher = Teacher(self.target, hot_vocab)
        torch.manual_seed(0)
        net = Net(self.target, asked.inner)
        optimizer = torch.optim.AdamW(net.parameters(), lr=asked.rate, betas=(0.9, 0.95), weight_decay=0.01)
        step, state = 0, self.work / "state.pt"
        if state.exists():
            saved = torch.load(state)
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
        narrow = torch.autocast("cpu", dtype=torch.bfloat16, enabled=asked.bfloat16)
        exam, lines = side_by_side(kept, asked.length), []
        start = said = time.perf_counter()
        done_before = self.spent["steps"]
        while True:
            seconds = done_before + time.perf_counter() - start
            ended = seconds >= budget
            if ended or self.is_out_of_time or time.perf_counter() - said > 10 or step == 0:
                said = time.perf_counter()
                with torch.no_grad(), narrow:
                    right = losses(net, teacher, exam, token_weight=asked.token_weight, noise=0.0).agreement.item()
                if lines:
                    mean = [sum(column) / len(lines) for column in zip(*lines, strict=True)]
                    self._log([step, round(seconds, 1), *(round(value, 5) for value in (*mean, right))])
                    lines = []
                print(
                    f"steps {seconds:6.0f} of {budget:.0f} s: step {step}, held-out agreement {right:.1%}", flush=True
                )
                if ended or self.is_out_of_time:
                    break
            rate = (
                asked.rate * min(1.0, (step + 1) / 30) * (0.05 + 0.95 * math.cos(math.pi / 2 * seconds / budget) ** 2)
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = torch.randperm(len(learned), generator=torch.Generator().manual_seed(step))[: asked.batch]
            batch = side_by_side([learned[place] for place in chosen.tolist()], asked.length)
            with narrow:
                found = losses(net, teacher, batch, token_weight=asked.token_weight, noise=asked.noise)
            optimizer.zero_grad(set_to_none=True)
            found.loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            step += 1
            lines.append([value.item() for value in found])
        saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        _write(state, lambda path: torch.save(saved, path))
        about = {
            "command": _command(asked),
            "steps": step,
            "text_tokens": sum(len(text.tokens) for text in texts),
            "held_out_agreement": round(right, 4),
        }
        net.draft(self.target, hot_vocab).save(self.out, self.target, weights=asked.save, about=about)
        self._note("steps", time.perf_counter() - start)
        return ended

    def _log(self, row: list) -> None:
        path = self.out / "loss.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            csv.writer(file).writerows([COLUMNS, row] if is_new else [row])


def _write(path: Path, write) -> None:
    """A file that is whole or not there."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


def _command(asked: argparse.Namespace) -> str:
    """Without the folders of this machine, and without what changes nothing."""
    words = ["python", "-m", "specdec_ops.train.eagle"]
    for name, value in vars(asked).items():
        if value is True:
            words.append(f"--{name}")
        elif name != "slice" and value not in (None, False):
            is_path = name in ("target", "out")
            words += [f"--{name.replace('_', '-')}", Path(value).name if is_path else str(value)]
    return shlex.join(words)


def plot(out: Path) -> None:
    """The loss curve, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    with (out / "loss.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for name in ("loss", "rows"):
        axes.plot(steps, [row[name] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="loss")
    other = axes.twinx()
    other.plot(steps, [row["held_out_agreement"] for row in rows], "k--", label="held-out agreement")
    other.set(ylim=(0, 1), ylabel="held-out agreement")
    axes.legend(loc="upper right")
    figure.savefig(out / "loss.png", dpi=120)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m specdec_ops.train.eagle", description="Train a draft for drafts.Eagle.")
    made.add_argument("--target", required=True, help="a folder with a Hugging Face model, or a GGUF file")
    made.add_argument("--out", required=True, help="the folder of the draft")
    made.add_argument("--minutes", type=float, default=20.0, help="of work in all (default: 20)")
    made.add_argument("--texts-share", type=float, default=0.4, help="of the minutes, for texts (default: 0.4)")
    made.add_argument("--slice", type=float, help="end after so many seconds; the same command goes on")
    made.add_argument("--hot-vocab", type=int, default=8192, help="tokens that it can draft (default: 8192)")
    made.add_argument("--inner", type=int, help="of its MLP (default: the target's)")
    made.add_argument("--length", type=int, default=256, help="the most rows of a text (default: 256)")
    made.add_argument("--batch", type=int, default=4, help="texts of a step (default: 4)")
    made.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate (default: 5e-4)")
    made.add_argument("--token-weight", type=float, default=0.1, help="of the cross-entropy (default: 0.1)")
    made.add_argument("--noise", type=float, default=0.1, help="in standard deviations of a feature (default: 0.1)")
    made.add_argument("--bfloat16", action="store_true", help="multiply in it: faster where the CPU has it")
    made.add_argument("--save", choices=("int8", "bfloat16", "float32"), default="int8", help="form of the weights")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when the draft is made, 3 when a slice has ended before that."""
    from specdec_ops.integrations.transformers import load

    asked = parser().parse_args(arguments)
    try:
        trainer = Trainer(load(asked.target), Path(asked.out), asked)
        if not (trainer.collect() and trainer.train()):
            print("the slice has ended; the same command goes on", flush=True)
            return 3
        plot(trainer.out)
    except (ValueError, TypeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"the draft is in {trainer.out}: specdec_ops.drafts.Eagle.load({str(trainer.out)!r}, target)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
