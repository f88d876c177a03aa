"""Train a draft for `Eagle`: `python -m specdec_ops.train.eagle --target FILE_OR_FOLDER --out FOLDER`.

Texts come first: the target's own answers to questions that it has thought up itself, with the target's last rows over
them. Then the layer learns, as EAGLE's does (Li et al., 2024), to tell each row from the row before it and the token
between: SmoothL1 over the rows, and 0.1 times the cross-entropy between what the target's head makes of either; noise
on the rows that go in. AdamW, with a rate that rises and falls.

The folder OUT gets draft.safetensors and draft.json, which `drafts.Eagle.load` reads, and what `trainer` writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from specdec_ops import drafts
from specdec_ops.decode.decoder import Decoder, Projection
from specdec_ops.decode.rows import Rows
from specdec_ops.drafts.eagle import parts
from specdec_ops.ops.linear.linear import linear
from specdec_ops.tree import Tree

from . import trainer
from .texts import Text
from .trainer import Task

PROGRAM = "specdec_ops.train.eagle"


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

    def draft(self, target: Decoder, hot_vocab: torch.Tensor | None, **options) -> drafts.Eagle:
        """What it has learned so far, as a draft."""
        weights = {name: getattr(self, name).detach().clone() for name in ("fc", "qkv", "out", "up", "down")}
        norms = {name: getattr(self, name).detach().clone() for name in ("attention_norm", "mlp_norm")}
        return drafts.Eagle(*parts(weights, norms, self.sizes, target), hot_vocab, **options)


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


class Eagle(Task):
    """The layer of `drafts.Eagle`.

    Args:
        target: the model that the draft is for.
        texts: of it.
        asked: the command line.
    """

    columns = Losses._fields

    def __init__(self, target: Decoder, texts: list[Text], asked: argparse.Namespace) -> None:
        self.target, self.asked = target, asked
        held_out = max(1, min(16, len(texts) // 10))
        self._learned, self._tokens = texts[:-held_out], sum(len(text.tokens) for text in texts)
        self._exam = side_by_side(texts[-held_out:], asked.length)
        self.hot_vocab = hottest(self._learned, asked.hot_vocab, target.shape.vocab)
        self._teacher = Teacher(target, self.hot_vocab)
        torch.manual_seed(0)
        self.module = Net(target, asked.inner)

    def losses(self, step: int) -> Losses:
        """See `Task.losses`."""
        chosen = torch.randperm(len(self._learned))[: self.asked.batch].tolist()
        batch = side_by_side([self._learned[place] for place in chosen], self.asked.length)
        return self._losses(batch, self.asked.noise)

    def held_out(self) -> tuple[float]:
        """See `Task.held_out`."""
        return (self._losses(self._exam, 0.0).agreement.item(),)

    def _losses(self, batch: Pairs, noise: float) -> Losses:
        return losses(self.module, self._teacher, batch, token_weight=self.asked.token_weight, noise=noise)

    def save(self, folder: Path, about: dict) -> None:
        """See `Task.save`."""
        draft = self.module.draft(self.target, self.hot_vocab)
        draft.save(folder, self.target, weights=self.asked.save, about=about | {"text_tokens": self._tokens})


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = trainer.parser(PROGRAM, "Train a draft for drafts.Eagle.")
    made.add_argument("--hot-vocab", type=int, default=8192, help="tokens that it can draft (default: 8192)")
    made.add_argument("--inner", type=int, help="of its MLP (default: the target's)")
    made.add_argument("--token-weight", type=float, default=0.1, help="of the cross-entropy (default: 0.1)")
    made.add_argument("--noise", type=float, default=0.1, help="in standard deviations of a feature (default: 0.1)")
    made.add_argument("--save", choices=("int8", "bfloat16", "float32"), default="int8", help="form of the weights")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The program. See `trainer.run`."""
    asked = parser().parse_args(arguments)
    return trainer.run(PROGRAM, asked, lambda target, texts: Eagle(target, texts, asked))


if __name__ == "__main__":
    sys.exit(main())
