"""Train a draft for `MixtureOfAttentions`: `python -m specdec_ops.train.mixture_of_attentions --target F --out FOLDER`.

Texts come first: the target's own answers to questions that it has thought up itself. The target then runs beside the
training, and gives the keys and values of all its layers for the texts of the next steps; they are kept until those
steps are done, and never written. Rows learn under the masks of drafting (Zimmer et al., 2025): each goes on from the
last refresh point before it, as if the target had verified the text up to there and nothing since. Refresh points lie
`--every` tokens apart, drawn anew for each text and step. In the first `--staircase` steps self-attention of ever fewer
texts only sees tokens after the refresh point.

The loss is the cross-entropy with the target's law, as for `specdec_ops.train.eagle`, plus SmoothL1 of rows; with
`--target-layers` half of that is over rows after the target's final norm, half over those that enter its last layers.

The folder OUT gets draft.safetensors and draft.json, which `specdec_ops.drafts.MixtureOfAttentions` loads, and what
`trainer` writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from specdec_ops.decode.cache import Cache
from specdec_ops.decode.cache import Sequence as Pages
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.rows import Rows
from specdec_ops.drafts.mixture_of_attentions_parts import Sizes
from specdec_ops.tree import Tree

from . import trainer
from .eagle import Law, Teacher, common_prefix, hottest
from .mixture_of_attentions_net import Made, Masks, Net, masks, refresh_starts
from .texts import Text
from .trainer import Task

PROGRAM = "specdec_ops.train.mixture_of_attentions"
_ALIKE = 16  # batches that are made of the same texts, sorted by length; their keys and values are in memory at once
_FIT = 192  # texts that the start is fitted to
_EXAM_DISTANCES = 3


class Known(NamedTuple):
    """What the target knows of texts side by side.

    `stacked` is [batch, length, layers, stacked], keys and values; `entering` [batch, length, dim], the rows that enter
    the target's last layers, or None if the draft uses none of those.
    """

    stacked: torch.Tensor
    entering: torch.Tensor | None


class Texts(NamedTuple):
    """A batch: tokens and features are [batch, length] and [batch, length, dim], of which `counts` are learned from."""

    tokens: torch.Tensor
    features: torch.Tensor
    counts: torch.Tensor
    law: Law
    known: Known


class Losses(NamedTuple):
    """Of a batch."""

    loss: torch.Tensor
    rows: torch.Tensor
    """SmoothL1"""
    tokens: torch.Tensor
    """cross-entropy"""
    agreement: torch.Tensor
    """the share of rows whose likeliest token is the target's"""


class Beside:
    """The target, which runs texts as the engine does and says what is in its cache then.

    Args:
        target: the target.
        target_layers: of whose last layers the rows that enter them are wanted; 0: none are.
        dtype: of what it says.
    """

    def __init__(self, target: Decoder, target_layers: int, dtype: torch.dtype = torch.float32) -> None:
        self._target, self._split, self._dtype = target, len(target.layers) - target_layers, dtype

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> Known:
        """Of tokens [batch, length]."""
        batch, length = tokens.shape
        target, device = self._target, self._target.shape.device
        cache = Cache(target.shape, batch * -(-length // 16), 16)
        pages = [Pages() for _ in range(batch)]
        for each in pages:
            cache.reserve(each, length)
        table = cache.page_table(pages)
        start = torch.zeros(batch, dtype=torch.int32, device=device)
        rows = Rows(tokens.to(device), Tree.chain(length).to(device), start, table)
        is_split = self._split < len(target.layers)
        hidden = target.forward(rows, cache, layers=(0, self._split), want=False).hidden
        if is_split:
            target.forward(rows, cache, layers=(self._split, len(target.layers)), hidden=hidden, want=False)
        slots = torch.arange(length, device=device).repeat(batch)
        requests = torch.arange(batch, device=device).repeat_interleave(length)
        stacked = cache.layer_kv(slots, requests, table).to("cpu", self._dtype).unflatten(0, (batch, length))
        return Known(stacked.clone(), hidden.cpu().float().unflatten(0, (batch, length)).clone() if is_split else None)


def losses(
    net: Net,
    teacher: Teacher,
    texts: Texts,
    seen: Sequence[Masks],
    *,
    row_weight: float,
    share: float = 1.0,
) -> list[Losses]:
    """Cross-entropy with the target's law plus row_weight times SmoothL1 of rows, means over rows that count.

    Args:
        net: the draft.
        teacher: the target.
        texts: a batch.
        seen: what rows see. The target's states are the same for all of these, so they are made once.
        row_weight: of SmoothL1.
        share: of tokens that layer self-attention learns from, see `Net.states`.
    """
    embedded = teacher.embed(texts.tokens).to(net.join.dtype)
    states = net.states(texts.known.stacked, share)
    return [_of(net(embedded, states, one, texts.known.stacked), teacher, texts, row_weight) for one in seen]


def _of(made: Made, teacher: Teacher, texts: Texts, row_weight: float) -> Losses:
    counts, entering = texts.counts, texts.known.entering
    guess = made.features[counts]
    rows = functional.smooth_l1_loss(guess, texts.features[counts].to(guess.dtype))
    if entering is not None:
        rows = 0.5 * (rows + functional.smooth_l1_loss(made.crossed[counts], entering[counts].to(guess.dtype)))
    tokens, agreement = teacher.cross_entropy(guess, texts.law)
    return Losses(tokens + row_weight * rows, rows.detach(), tokens.detach(), agreement)


class MixtureOfAttentions(Task):
    """The draft of `specdec_ops.drafts.MixtureOfAttentions`.

    Args:
        target: the model that the draft is for.
        texts: of it.
        asked: the command line.
    """

    columns = ("loss", "rows", "tokens", "agreement")
    checks = tuple(f"held_out_agreement_{distance}" for distance in range(1, _EXAM_DISTANCES + 1))

    def __init__(self, target: Decoder, texts: list[Text], asked: argparse.Namespace) -> None:
        least, most = asked.every
        if not 1 <= least <= most:
            raise ValueError(f"{PROGRAM}: every must be two numbers from 1 on, the lesser one first, got {asked.every}")
        if not 0 <= asked.target_layers < len(target.layers):
            must = f"from 0 to {len(target.layers) - 1}"
            raise ValueError(f"{PROGRAM}: target-layers must be {must}, got {asked.target_layers}")
        self.target, self.asked = target, asked
        held_out = max(1, min(16, len(texts) // 10))
        self._learned, self._tokens = texts[:-held_out], sum(len(text.tokens) for text in texts)
        self._first = common_prefix(texts)
        self.hot_vocab = hottest(self._learned, asked.hot_vocab, target.shape.vocab)
        self._teacher, self._laws = Teacher(target, self.hot_vocab), {}
        self._beside = Beside(target, asked.target_layers, torch.bfloat16 if asked.bfloat16 else torch.float32)
        self._block, self._known = -1, {}
        self._held_out, self._exam = texts[-held_out:], []
        sizes = Sizes.of(target, inner=asked.inner, layer_inner=asked.layer_inner, target_layers=asked.target_layers)
        torch.manual_seed(0)
        self.module = Net(target, sizes)

    def start(self) -> None:
        """See `Task.start`."""
        self.module.fit(self._fitted())

    def _fitted(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        size = self.asked.batch
        for start in range(0, min(_FIT, len(self._learned)), size):
            texts = self._learned[start : start + size]
            tokens, features, counts = _side_by_side(texts, self.asked.length, self._first)
            whole = (self._beside.run(tokens).stacked, self._teacher.embed(tokens), features)
            for place, there in enumerate(counts):
                yield tuple(some[place][there] for some in whole)

    def losses(self, step: int) -> tuple[torch.Tensor, ...]:
        """See `Task.losses`."""
        texts = self._texts(step)
        seen = [self._masks(texts, step) for _ in range(self.asked.draws)]
        asked = self.asked
        found = losses(self.module, self._teacher, texts, seen, row_weight=asked.row_weight, share=asked.layer_share)
        return tuple(torch.stack(values).mean() for values in zip(*found, strict=True))

    def _masks(self, texts: Texts, step: int) -> Masks:
        """Drawn with torch's own noise, which the trainer has seeded with the step."""
        batch, length = texts.tokens.shape
        least, most = self.asked.every
        starts = []
        for every in torch.randint(least, most + 1, (batch,)).tolist():
            starts.append(refresh_starts(length, self._first, every, int(torch.randint(every, ()))))
        share = 1 - step / self.asked.staircase if self.asked.staircase else 0.0
        starts = torch.stack(starts)
        if self.asked.all_states:
            starts = torch.arange(-1, length - 1).expand(batch, -1)
        return masks(starts, torch.rand(batch) < share)

    @property
    def _batches(self) -> int:
        return max(1, len(self._learned) // self.asked.batch)

    def _batch(self, step: int) -> tuple[int, list[int]]:
        """The number of a block, and places of texts of about one length.

        An epoch decides on an order of the texts. Each block of `_ALIKE` batches comes `--reuse` times in a row, in
        other orders, so that the target's pass over it serves as often.
        """
        size, reuse = self.asked.batch, self.asked.reuse
        epoch, step = divmod(step, self._batches * reuse)
        block, step = divmod(step, _ALIKE * reuse)
        count = min(_ALIKE, self._batches - block * _ALIKE)
        visit, place = divmod(step, count)
        order = torch.randperm(len(self._learned), generator=torch.Generator().manual_seed(epoch)).tolist()
        near = order[block * _ALIKE * size :][: count * size]
        near.sort(key=lambda text: len(self._learned[text].tokens))
        number = epoch * self._batches + block
        seed = torch.Generator().manual_seed(number * reuse + visit)
        return number, near[torch.randperm(count, generator=seed)[place].item() * size :][:size]

    def _texts(self, step: int) -> Texts:
        block, chosen = self._batch(step)
        if block != self._block:
            self._block, self._known = block, {}
        for place in chosen:
            if place not in self._laws:
                self._laws[place] = self._teacher.law(self._learned[place].features.float())
        texts = [self._learned[place] for place in chosen]
        tokens, features, counts = _side_by_side(texts, self.asked.length, self._first)
        if chosen[0] not in self._known:
            self._known[chosen[0]] = self._beside.run(tokens)
        law = self._law([self._laws[place] for place in chosen])
        return Texts(tokens, features, counts, law, self._known[chosen[0]])

    def _law(self, laws: list[Law]) -> Law:
        part = slice(self._first, self.asked.length)
        return Law(*(torch.cat([some[part] for some in parts]) for parts in zip(*laws, strict=True)))

    def held_out(self) -> list[float]:
        """See `Task.held_out`: for rows so many tokens after the last verified one."""
        if not self._exam:
            texts = sorted(self._held_out, key=lambda text: len(text.tokens))
            for start in range(0, len(texts), self.asked.batch):
                part = texts[start : start + self.asked.batch]
                side = _side_by_side(part, self.asked.length, self._first)
                law = self._law([self._teacher.law(text.features.float()) for text in part])
                self._exam.append(Texts(*side, law, self._beside.run(side[0])))
        right, rows = torch.zeros(_EXAM_DISTANCES), 0
        for texts in self._exam:
            position = torch.arange(texts.tokens.shape[1])
            batch = len(texts.tokens)
            seen = [
                masks((position - distance).clamp(min=-1).expand(batch, -1), torch.zeros(batch, dtype=torch.bool))
                for distance in range(1, _EXAM_DISTANCES + 1)
            ]
            found = losses(self.module, self._teacher, texts, seen, row_weight=0.0)
            count = int(texts.counts.sum())
            right += count * torch.stack([one.agreement for one in found])
            rows += count
        return (right / rows).tolist()

    def save(self, folder: Path, about: dict) -> None:
        """See `Task.save`."""
        draft = self.module.draft(self.target, self.hot_vocab)
        draft.save(folder, self.target, weights=self.asked.save, about=about | {"text_tokens": self._tokens})


def _side_by_side(texts: Sequence[Text], longest: int, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, features, and which rows count: those from `first` on of the leading `longest` of each text, padded."""
    length = min(longest, max(len(text.features) for text in texts))
    tokens = torch.zeros(len(texts), length, dtype=torch.int32)
    features = torch.zeros(len(texts), length, texts[0].features.shape[1])
    counts = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        count = min(length, len(text.features))
        tokens[row, :count] = text.tokens[:count]
        features[row, :count] = text.features[:count].float()
        counts[row, first:count] = True
    return tokens, features, counts


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = trainer.parser(PROGRAM, "Train a draft for drafts.MixtureOfAttentions.")
    made.set_defaults(rate=1e-3, length=320)
    made.add_argument("--inner", type=int, default=336, help="of the MLPs over tokens and states (default: 336)")
    made.add_argument("--layer-inner", type=int, help="of the MLP over layers; 0: no layer self-attention")
    made.add_argument("--layer-share", type=float, default=0.25, help="of tokens that it learns from (default: 0.25)")
    made.add_argument("--target-layers", type=int, default=0, help="of the target that end a step (default: 0)")
    made.add_argument("--every", type=int, nargs=2, default=[3, 8], help="tokens between refresh points (default: 3 8)")
    made.add_argument("--staircase", type=int, default=400, help="steps in which some texts have it (default: 400)")
    made.add_argument("--all-states", action="store_true", help="rows see all states before them: an ablation")
    made.add_argument("--draws", type=int, default=2, help="of refresh points for a text in a step (default: 2)")
    made.add_argument("--reuse", type=int, default=2, help="steps for each pass of the target (default: 2)")
    made.add_argument("--row-weight", type=float, default=0.1, help="of SmoothL1 over rows (default: 0.1)")
    trainer.add_draft_options(made)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The program. See `trainer.run`."""
    asked = parser().parse_args(arguments)
    return trainer.run(PROGRAM, asked, lambda target, texts: MixtureOfAttentions(target, texts, asked))


if __name__ == "__main__":
    sys.exit(main())
