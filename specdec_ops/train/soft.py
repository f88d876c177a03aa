"""Make a draft for `Sorted` of any model's first layers: `python -m specdec_ops.train.soft --target FILE --out FOLDER`.

Sorted fine-tuning, SoFT (Kavehzadeh et al., 2024): the first layers up to each exit are sub-models that share the final
norm and the head, and the loss is the mean of their losses in one pass. The loss of an exit is the cross-entropy of the
next token; with `--distill` so much of it is that of the target's whole distribution, which the target's last rows
over its own answers tell. Layers and norm are trained from the target's own; embedding and head stay the target's.

Texts are the target's own answers. The folder OUT gets draft.safetensors and draft.json, which `drafts.Sorted.load`
reads, and what `trainer` writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from specdec_ops import drafts
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.rows import Rows
from specdec_ops.drafts.weights import dense_weight
from specdec_ops.tree import Tree

from . import trainer
from .eagle import hottest
from .sorted_net import SortedNet
from .texts import Text
from .trainer import Task

PROGRAM = "specdec_ops.train.soft"


class Lines(NamedTuple):
    """Texts side by side. What lies behind the end of one is looked at by nobody."""

    embedded: torch.Tensor
    """float32 [batch, length, dim]"""
    features: torch.Tensor
    """float32 [rows, dim]: the target's last rows, of those rows that are there"""
    following: torch.Tensor
    """int64 [rows]: the next token as an entry of the hot vocabulary, -1 where it is none"""
    there: torch.Tensor
    """bool [batch, length]"""


class Soft(Task):
    """The leading layers of a target, with a loss at each exit.

    Args:
        target: where the layers, the embedding and the head come from.
        texts: of it.
        asked: the command line.
    """

    def __init__(self, target: Decoder, texts: list[Text], asked: argparse.Namespace) -> None:
        exits = tuple(asked.exits)
        if sorted(set(exits)) != list(exits) or not 1 <= exits[0] <= exits[-1] <= len(target.layers):
            must = f"ascending from 1 to the target's {len(target.layers)} layers"
            raise ValueError(f"{PROGRAM}: exits must be {must}, got {exits}")
        if len(asked.thresholds) != len(exits):
            raise ValueError(f"{PROGRAM}: thresholds must be one for each exit, got {asked.thresholds}")
        if target.logit_softcap is not None:
            must = "a model without a soft cap of its logits, which drafts.Sorted refuses"
            raise ValueError(f"{PROGRAM}: target must be {must}, got {target!r}")
        self.target, self.asked, self.exits = target, asked, exits
        held_out = max(1, min(16, len(texts) // 10))
        self._learned, self._tokens = texts[:-held_out], sum(len(text.tokens) for text in texts)
        self.hot_vocab = hottest(self._learned, asked.hot_vocab, target.shape.vocab)
        head, bias = dense_weight(target.head.weight), target.head.bias
        self._head = head if self.hot_vocab is None else head[self.hot_vocab]
        self._bias = bias if bias is None or self.hot_vocab is None else bias[self.hot_vocab]
        self._entries = torch.arange(target.shape.vocab)
        if self.hot_vocab is not None:
            self._entries = torch.full((target.shape.vocab,), -1)
            self._entries[self.hot_vocab] = torch.arange(len(self.hot_vocab))
        self._exam = self._lines(texts[-held_out:])
        self.columns = ("loss", *(f"loss_{layers}" for layers in exits))
        self.checks = tuple(f"agreement_{layers}" for layers in exits)
        self.module = SortedNet(target, exits)

    def losses(self, step: int) -> list[torch.Tensor]:
        """See `Task.losses`: the mean, and that of each exit."""
        chosen = torch.randperm(len(self._learned))[: self.asked.batch].tolist()
        lines, distill = self._lines([self._learned[place] for place in chosen]), self.asked.distill
        with torch.no_grad():
            wanted = self._logits(lines.features).softmax(-1) if distill else None
        losses = []
        for rows in self.module(lines.embedded):
            logits = self._logits(rows[lines.there])
            loss = logits.new_zeros(())
            if distill < 1:
                loss = loss + (1 - distill) * functional.cross_entropy(logits, lines.following, ignore_index=-1)
            if distill:
                loss = loss + distill * functional.cross_entropy(logits, wanted)
            losses.append(loss)
        return [torch.stack(losses).mean(), *losses]

    def held_out(self) -> list[float]:
        """See `Task.held_out`: at each exit, how often its likeliest token is the target's."""
        wanted = self._logits(self._exam.features).argmax(-1)
        rows = self.module(self._exam.embedded)
        return [(self._logits(some[self._exam.there]).argmax(-1) == wanted).float().mean().item() for some in rows]

    def _lines(self, texts: list[Text]) -> Lines:
        length = min(self.asked.length, max(len(text.features) for text in texts))
        tokens = torch.zeros(len(texts), length + 1, dtype=torch.int64)
        there = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            count = min(length, len(text.features))
            tokens[row, : count + 1] = text.tokens[: count + 1]
            there[row, :count] = True
        features = torch.cat([text.features[:length].float() for text in texts])
        rows = Rows(tokens[:, :-1], Tree.chain(length).to("cpu"), torch.zeros(len(texts), dtype=torch.int32), None)
        embedded = self.target.embed(rows).view(len(texts), length, -1).float()
        return Lines(embedded, features, self._entries[tokens[:, 1:][there]], there)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [rows, entries] of rows after the final norm."""
        return functional.linear(rows, self._head, self._bias).float()

    def save(self, folder: Path, about: dict) -> None:
        """See `Task.save`."""
        draft = drafts.Sorted(
            self.module.decoder(), self.exits, self.asked.thresholds, hot_vocab=self.hot_vocab, head=None
        )
        draft.save(folder, self.target, weights=self.asked.save, about=about | {"text_tokens": self._tokens})


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = trainer.parser(PROGRAM, "Make a draft for drafts.Sorted of a model's first layers.")
    made.add_argument("--exits", type=int, nargs="+", default=[2, 4, 6], help="layer counts (default: 2 4 6)")
    made.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.5, 0.5, 0.0], help="saved with the draft (default: 0.5 0.5 0)"
    )
    made.add_argument("--distill", type=float, default=0.0, help="share of the target's distribution (default: 0)")
    trainer.add_draft_options(made)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The program. See `trainer.run`."""
    asked = parser().parse_args(arguments)
    return trainer.run(PROGRAM, asked, lambda target, texts: Soft(target, texts, asked))


if __name__ == "__main__":
    sys.exit(main())
