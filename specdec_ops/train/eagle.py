"""Train a draft for `Eagle`: `python -m specdec_ops.train.eagle --target FILE_OR_FOLDER --out FOLDER`.

Texts come first: the target's own answers to questions that it has thought up itself, with the target's last rows over
them. Then the layer learns, as EAGLE's does (Li et al., 2024), to tell each row from the row before it and the token
between. What counts most is the cross-entropy between what the target's head makes of either, as in EAGLE-3 (Li et al.,
2025), from which it also has the second pass over each text, that goes on from the rows of the first. The start is the
best linear map. AdamW, with a rate that rises and falls.

The folder OUT gets draft.safetensors and draft.json, which `drafts.Eagle.load` reads, and what `trainer` writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
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
NORM_EPS = 1e-5
CHOICES = 32  # of the target, that the draft learns from
DECAY = 0.8
RIDGE = 1e-3  # of each square, for `Net.fit`
_ROWS = 256  # whose logits are in memory at once
_EXAM_PASSES = 3
_ALIKE = 16  # batches that are made of the same texts, sorted by length


class KeysValues(NamedTuple):
    """Of a pass: [batch, kv_heads, length, head_dim] each, keys rotated."""

    keys: torch.Tensor
    values: torch.Tensor


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
        self.sizes["norm_eps"] = NORM_EPS
        self._rope = attention.rope
        heads, width = attention.heads + 2 * attention.kv_heads, attention.heads * attention.head_dim

        def start(out: int, columns: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(out, columns) / columns**0.5)

        # Attention and MLP add nothing yet: what is there at first is fc alone, which `fit` makes a good guess.
        self.fc = start(dim, 2 * dim)
        self.qkv, self.out = start(heads * attention.head_dim, dim), torch.nn.Parameter(torch.zeros(dim, width))
        self.up, self.down = start(2 * inner, dim), torch.nn.Parameter(torch.zeros(dim, inner))
        self.attention_norm, self.mlp_norm = (torch.nn.Parameter(torch.ones(dim)) for _ in range(2))

    @torch.no_grad()
    def fit(self, parts: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Make fc the linear map of embeddings and features that is nearest to the features after them.

        It is worth about as much as the first minute of training, and takes seconds.

        Args:
            parts: embeddings [rows, dim], the features before them, and their own features.
        """
        dim = len(self.fc)
        squares, products = torch.zeros(2 * dim, 2 * dim), torch.zeros(2 * dim, dim)
        for embedded, before, features in parts:
            given = torch.cat((embedded, before), dim=-1)
            squares += given.T @ given
            products += given.T @ features
        squares += RIDGE * squares.diagonal().clamp(min=1e-6).diag()
        self.fc.copy_(torch.linalg.solve(squares, products).T)

    def forward(self, embedded: torch.Tensor, features: torch.Tensor, earlier: Sequence[KeysValues] = ()):
        """One pass over texts, of which row i knows tokens up to i and features before it.

        Args:
            embedded: [batch, length, dim].
            features: like embedded: of the position before.
            earlier: keys and values of earlier passes. Those of the first one are of true features. In pass n a row has
                gone on by itself for n steps: it sees the first pass's rows up to n before it, and of the n-1 positions
                between, those of one later pass each. That is what the engine's draft sees n levels below its root.

        Returns:
            rows like embedded, and keys and values of this pass.
        """
        x = _product(torch.cat((embedded, features), dim=-1), self.fc)
        attended, own = self._attention(_normed(x, self.attention_norm), earlier)
        x = x + attended
        gate, value = _product(_normed(x, self.mlp_norm), self.up).chunk(2, dim=-1)
        return x + _product(functional.silu(gate) * value, self.down), own

    def _attention(self, x: torch.Tensor, earlier: Sequence[KeysValues]) -> tuple[torch.Tensor, KeysValues]:
        heads, kv_heads = self.sizes["heads"], self.sizes["kv_heads"]
        qkv = _product(x, self.qkv).unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q, k = self._rotated(q), self._rotated(k)
        own = KeysValues(k, v)
        if earlier:
            attended = _attend_after(q, (*earlier, own))
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return _product(attended.transpose(1, 2).flatten(2), self.out), own

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


def _attend_after(q: torch.Tensor, passes: Sequence[KeysValues]) -> torch.Tensor:
    """[batch, heads, length, head_dim]: what `Net.forward` says of rows that went on by themselves. q is like it."""
    group = q.shape[1] // passes[0].keys.shape[1]
    steps, length = len(passes) - 1, q.shape[2]
    wide = [tuple(part.repeat_interleave(group, dim=1) for part in each) for each in passes]
    scores = (q @ wide[0][0].transpose(-1, -2)).float()
    is_seen = torch.ones(length, length, dtype=torch.bool).tril(-steps)
    scores = [scores.masked_fill(~is_seen, -torch.inf)]
    values = []
    for number, (keys, value) in enumerate(wide[1:], start=1):
        back = steps - number
        scores.append((q * keys.roll(back, dims=2)).sum(-1, keepdim=True).float())
        values.append(value.roll(back, dims=2))
    weights = (torch.cat(scores, dim=-1) * q.shape[-1] ** -0.5).softmax(-1)
    attended = weights[..., :length] @ wide[0][1]
    for number, value in enumerate(values):
        attended = attended + weights[..., length + number, None] * value
    return attended


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, NORM_EPS)


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


class Law(NamedTuple):
    """What the target would say after each row: its likeliest entries of the hot vocabulary, which add up to 1."""

    entries: torch.Tensor
    """int64 [rows, choices], the likeliest first"""
    shares: torch.Tensor
    """float32 like entries"""


class Teacher:
    """The target's head over the hot vocabulary, and its embedding.

    Args:
        target: the target.
        hot_vocab: int64 [entries], or None: all.
    """

    def __init__(self, target: Decoder, hot_vocab: torch.Tensor | None) -> None:
        self._target, self._softcap = target, target.logit_softcap
        head, bias = _dense(target.head, target.shape.dim), target.head.bias
        self._head = head if hot_vocab is None else head[hot_vocab]
        self._bias = bias if bias is None or hot_vocab is None else bias[hot_vocab]
        self._narrow_head = self._head.bfloat16()

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """[..., entries] of features [..., dim]."""
        logits, softcap = _product(features, self._head, self._bias), self._softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    @torch.no_grad()
    def law(self, features: torch.Tensor) -> Law:
        """Of features [rows, dim]."""
        likeliest = self.logits(features).topk(min(CHOICES, len(self._head)), dim=-1)
        return Law(likeliest.indices, likeliest.values.softmax(-1))

    def cross_entropy(self, features: torch.Tensor, law: Law) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what the head makes of features [rows, dim], with a law: the mean of rows, and how many agree.

        A row agrees if its likeliest entry is the law's.
        """
        return _CrossEntropy.apply(features, self, law)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length, dim] of tokens [batch, length]."""
        batch, length = tokens.shape
        rows = Rows(tokens, Tree.chain(length).to("cpu"), torch.zeros(batch, dtype=torch.int32), None)
        return self._target.embed(rows).view(batch, length, -1).float()


class _CrossEntropy(torch.autograd.Function):
    """`Teacher.cross_entropy`. The gradient is made along with the loss, some rows at a time.

    So logits of a few rows stay in the processor's cache, where autograd would go over those of all rows many times.
    """

    @staticmethod
    def forward(context, features: torch.Tensor, teacher: Teacher, law: Law) -> tuple[torch.Tensor, torch.Tensor]:
        is_narrow = torch.is_autocast_enabled("cpu")
        head = teacher._narrow_head if is_narrow else teacher._head
        rows = features.to(head.dtype)
        total, right, gradients = 0.0, 0, []
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            logits = (rows[part] @ head.T).float()
            if teacher._bias is not None:
                logits += teacher._bias
            if teacher._softcap is not None:
                logits = torch.tanh(logits / teacher._softcap) * teacher._softcap
            entries, shares = law.entries[part], law.shares[part]
            right += (logits.argmax(-1) == entries[:, 0]).sum()
            logs = logits.log_softmax(-1)
            total -= (logs.gather(1, entries) * shares).sum()
            gradient = logs.exp_().scatter_add_(1, entries, -shares)
            if teacher._softcap is not None:
                gradient *= 1 - (logits / teacher._softcap).square()
            gradients.append((gradient.to(head.dtype) @ head).float())
        context.save_for_backward(torch.cat(gradients) / len(rows))
        agreement = right / len(rows)
        context.mark_non_differentiable(agreement)
        return total / len(rows), agreement

    @staticmethod
    def backward(context, of_mean: torch.Tensor, _) -> tuple:
        return context.saved_tensors[0] * of_mean, None, None


class Losses(NamedTuple):
    """Of a batch."""

    loss: torch.Tensor
    rows: torch.Tensor
    """SmoothL1 of the first pass"""
    tokens: torch.Tensor
    """cross-entropy of the first pass"""
    agreement: torch.Tensor
    """[passes]: the share of rows whose likeliest token is the target's"""


class Pairs(NamedTuple):
    """Texts side by side, [batch, length]: a token, the feature before it and its own.

    `counts` says which rows are learned from. Of these is the law, in their order.
    """

    tokens: torch.Tensor
    before: torch.Tensor
    features: torch.Tensor
    counts: torch.Tensor
    law: Law


def side_by_side(texts: Sequence[Text], laws: Sequence[Law], longest: int, first: int = 0) -> Pairs:
    """The leading `longest` rows of each text, padded; those from `first` on count."""
    length = min(longest, max(len(text.features) for text in texts))
    dim = texts[0].features.shape[1]
    tokens = torch.zeros(len(texts), length, dtype=torch.int32)
    features = torch.zeros(len(texts), length + 1, dim)
    counts = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        count = min(length, len(text.features))
        tokens[row, :count] = text.tokens[:count]
        features[row, 1 : count + 1] = text.features[:count].float()
        counts[row, first:count] = True
    law = Law(*(torch.cat([part[first:length] for part in parts]) for parts in zip(*laws, strict=True)))
    return Pairs(tokens, features[:, :-1], features[:, 1:], counts, law)


def losses(net: Net, teacher: Teacher, pairs: Pairs, *, row_weight: float, noise: float, passes: int = 1) -> Losses:
    """Cross-entropy with the target's law plus row_weight times SmoothL1 of rows, means over rows that count.

    Args:
        net: the draft.
        teacher: the target.
        pairs: a batch.
        row_weight: of SmoothL1.
        noise: features that go in are moved by up to so many times their standard deviation.
        passes: in each but the first, features are what the pass before has made of the position before. Each counts
            `DECAY` times as much as the one before.
    """
    before, embedded, counts = pairs.before, teacher.embed(pairs.tokens), pairs.counts
    if noise:
        moved = (torch.rand_like(before) * 2 - 1) * (noise * pairs.features[counts].std())
        before = torch.where(before.any(dim=-1, keepdim=True), before + moved, before)
    earlier, total, found = [], 0.0, []
    law = pairs.law
    for number in range(passes):
        made, own = net(embedded, before, earlier)
        if number:  # the first rows have nothing to go on from
            kept = counts.clone()
            kept[:, :number] = False
            law = Law(*(part[kept[pairs.counts]] for part in pairs.law))
            counts = kept
        guess = made[counts]
        rows = functional.smooth_l1_loss(guess, pairs.features[counts])
        tokens, agreement = teacher.cross_entropy(guess, law)
        total = total + DECAY**number * (tokens + row_weight * rows)
        found.append((rows.detach(), tokens.detach(), agreement))
        earlier.append(own)
        before = functional.pad(made, (0, 0, 1, 0))[:, :-1]
    return Losses(total, *found[0][:2], torch.stack([agreement for *_, agreement in found]))


def hottest(texts: list[Text], entries: int, vocab: int) -> torch.Tensor | None:
    """int64 [entries], ascending: the most frequent tokens, then those of the lowest ids. None if that is all."""
    if entries >= vocab:
        return None
    counts = torch.zeros(vocab, dtype=torch.float64)
    for text in texts:
        counts += torch.bincount(text.tokens.long(), minlength=vocab)
    counts -= torch.arange(vocab) / vocab  # among equals the lower id, which merges of a tokenizer make the shorter one
    return counts.topk(entries).indices.sort().values


def common_prefix(texts: Sequence[Text]) -> int:
    """How many tokens all texts begin with, such as a chat template's."""
    shortest = min(len(text.features) for text in texts)
    alike = torch.stack([text.tokens[:shortest] for text in texts])
    return int((alike == alike[0]).all(0).int().cumprod(0).sum()) if len(texts) > 1 else 0


class Eagle(Task):
    """The layer of `drafts.Eagle`.

    Args:
        target: the model that the draft is for.
        texts: of it.
        asked: the command line.
    """

    columns = ("loss", "rows", "tokens", "agreement")
    checks = tuple(f"held_out_agreement_{depth}" for depth in range(1, _EXAM_PASSES + 1))

    def __init__(self, target: Decoder, texts: list[Text], asked: argparse.Namespace) -> None:
        self.target, self.asked = target, asked
        held_out = max(1, min(16, len(texts) // 10))
        self._learned, self._tokens = texts[:-held_out], sum(len(text.tokens) for text in texts)
        self._first = common_prefix(texts)
        self.hot_vocab = hottest(self._learned, asked.hot_vocab, target.shape.vocab)
        self._teacher, self._laws = Teacher(target, self.hot_vocab), {}
        self._exam = self._side_by_side(
            texts[-held_out:], [self._teacher.law(t.features.float()) for t in texts[-held_out:]]
        )
        torch.manual_seed(0)
        self.module = Net(target, asked.inner)

    def _side_by_side(self, texts, laws) -> Pairs:
        return side_by_side(texts, laws, self.asked.length, self._first)

    def start(self) -> None:
        """See `Task.start`."""
        self.module.fit(
            (self._teacher.embed(text.tokens[None, 1:-1])[0][first:], features[:-1][first:], features[1:][first:])
            for text in self._learned
            for first, features in [(max(self._first - 1, 0), text.features.float())]
        )

    def losses(self, step: int) -> tuple[torch.Tensor, ...]:
        """See `Task.losses`."""
        chosen = self._batch(step)
        for place in chosen:
            if place not in self._laws:
                self._laws[place] = self._teacher.law(self._learned[place].features.float())
        batch = self._side_by_side([self._learned[place] for place in chosen], [self._laws[place] for place in chosen])
        # Later passes are learned in every second step: they cost as much as the first, and go on from what it learns.
        found = self._losses(batch, self.asked.noise, self.asked.passes if step % 2 else 1)
        return *found[:3], found.agreement[0]

    def _batch(self, step: int) -> list[int]:
        """Places of texts of about one length. Every text comes once an epoch, in an order that the epoch decides."""
        size = self.asked.batch
        epoch, place = divmod(step, max(1, len(self._learned) // size))
        order = torch.randperm(len(self._learned), generator=torch.Generator().manual_seed(epoch)).tolist()
        start = place // _ALIKE * _ALIKE * size
        near = sorted(order[start : start + _ALIKE * size], key=lambda text: len(self._learned[text].tokens))
        return near[place % _ALIKE * size :][:size]

    def held_out(self) -> list[float]:
        """See `Task.held_out`."""
        return self._losses(self._exam, 0.0, _EXAM_PASSES).agreement.tolist()

    def _losses(self, batch: Pairs, noise: float, passes: int) -> Losses:
        row_weight = self.asked.row_weight
        return losses(self.module, self._teacher, batch, row_weight=row_weight, noise=noise, passes=passes)

    def save(self, folder: Path, about: dict) -> None:
        """See `Task.save`."""
        draft = self.module.draft(self.target, self.hot_vocab)
        draft.save(folder, self.target, weights=self.asked.save, about=about | {"text_tokens": self._tokens})


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = trainer.parser(PROGRAM, "Train a draft for drafts.Eagle.")
    made.set_defaults(rate=1e-3, length=320)
    made.add_argument("--inner", type=int, help="of its MLP (default: the target's)")
    made.add_argument("--passes", type=int, default=2, help="levels of drafting that it learns (default: 2)")
    made.add_argument("--row-weight", type=float, default=0.1, help="of SmoothL1 over rows (default: 0.1)")
    made.add_argument("--noise", type=float, default=0.0, help="in standard deviations of a feature (default: 0)")
    trainer.add_draft_options(made)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The program. See `trainer.run`."""
    asked = parser().parse_args(arguments)
    return trainer.run(PROGRAM, asked, lambda target, texts: Eagle(target, texts, asked))


if __name__ == "__main__":
    sys.exit(main())
