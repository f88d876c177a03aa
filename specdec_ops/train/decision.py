"""Train what stops a draft: `python -m specdec_ops.train.decision --target FILE_OR_FOLDER --draft FOLDER --out FOLDER`.

As improved multi-candidate decoding has it (Lu et al., 2024). Examples come from texts of the target: after every few
of their tokens the target draws ten candidates for the next one, the draft draws a token after each, at temperature 1
both, and its worth is `min(1, p / q)`, the chance that the target accepts it. A small network learns to tell that from
what the draft knows at the candidate: its last row after its final norm ("hidden": dim-512-256-1, worth as it is), or
entropy and top-10 probabilities ("confidence": 11-44-1, a draw of accepted or not, both equally often). Binary
cross-entropy; AdamW.

The paper's texts were what its decoding said; these are the target's own answers, so that examples serve lossless
decoding too. Its networks trained for ten passes over the examples; here the minutes decide. As there, the network that
does best on held-out examples is kept: the one that orders the most pairs of an accepted and another one rightly.

The folder OUT gets draft.safetensors and draft.json, which `drafts.Decision.load` reads, and what `trainer` writes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from specdec_ops import drafts
from specdec_ops.decode.cache import Cache, Sequence
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.rows import Output, Rows
from specdec_ops.drafts import checkpoint
from specdec_ops.drafts.stop import confidence
from specdec_ops.ops.acceptance.sample import sample_children, sample_tokens
from specdec_ops.tree import Tree

from . import trainer
from .texts import Text
from .trainer import Task

PROGRAM = "specdec_ops.train.decision"
_CHUNK = 256  # rows of a pass over a text
_FIRST = 8  # tokens of a text before its first candidates
_INNER = {"confidence": (44,), "hidden": (512, 256)}


class Examples(NamedTuple):
    """What the draft knows at a candidate, and what its next token is worth."""

    confidence: torch.Tensor
    """float32 [examples, 11]: see `drafts.Decision`"""
    hidden: torch.Tensor
    """float16 [examples, dim]"""
    worth: torch.Tensor
    """float32 [examples]: min(1, p / q)"""


class Gatherer:
    """Makes examples of texts.

    Args:
        target: the model that verifies.
        draft: the model that drafts.
        longest: the most tokens of a text.
        width: candidates after a token.
        every: tokens of a text from one group of candidates to the next.
    """

    def __init__(self, target: Decoder, draft: Decoder, longest: int, *, width: int = 10, every: int = 6) -> None:
        self._models, self._width, self._every, self._longest = (target, draft), width, every, longest
        self._forest = Tree.fork(width, 0).to(target.shape.device)
        slots = longest + width
        self._caches = [Cache(model.shape, -(-slots // 16)) for model in self._models]
        self._tables = []
        for cache in self._caches:
            sequence = Sequence()
            cache.reserve(sequence, slots)
            self._tables.append(cache.page_table([sequence]))

    def examples(self, text: Text, number: int) -> Examples:
        """Of one text. The same number gives the same draws."""
        tokens = text.tokens[: self._longest].to(torch.int32)
        target, found = self._models[0], []
        for model in range(2):
            for start in range(0, len(tokens), _CHUNK):
                part = tokens[None, start : start + _CHUNK]
                self._run(model, part, Tree.chain(part.shape[1]).to(part.device), start, want=False)
        rows = target.head(text.features[: len(tokens)].to(target.shape.dtype))  # of the target, after each token
        if target.logit_softcap is not None:
            rows = torch.tanh(rows / target.logit_softcap) * target.logit_softcap
        # From the end: candidates stand in the slots of the tokens behind them, which are not needed any more.
        for length in range(len(rows), _FIRST, -self._every):
            noise = {"seeds": number, "positions": length}
            roots = sample_tokens(rows[length - 1 : length], count=self._width, **noise)
            judged, drafted = (self._run(model, roots, self._forest, length) for model in range(2))
            children = sample_children(drafted.logits[None], 1, **noise)
            p = judged.logits.float().log_softmax(-1)
            q = drafted.logits.float().log_softmax(-1)
            log_ratio = (p - q).gather(1, children.tokens[0].long())[:, 0]
            worth = log_ratio.clamp(max=0).exp()
            hidden = self._models[1].norm(drafted.hidden)
            found.append(Examples(confidence(drafted.logits), hidden.half(), worth))
        return Examples(*(torch.cat(part).clone() for part in zip(*found, strict=True)))

    def _run(self, model: int, tokens: torch.Tensor, topology, start: int, want: bool = True) -> Output:
        rows = Rows(tokens, topology, torch.tensor([start], dtype=torch.int32), self._tables[model])
        return self._models[model].forward(rows, self._caches[model], want=want)


def gather(
    target: Decoder, draft: Decoder, texts: list[Text], asked: argparse.Namespace
) -> tuple[Examples, Examples] | None:
    """Examples of texts to learn from and of others, an eighth, to be examined with; None if the slice ends before.

    Each text's are kept in a file of OUT/work.
    """
    end = time.perf_counter() + (asked.slice or math.inf)
    work, gatherer, found, count, said = Path(asked.out) / "work", None, [], 0, 0.0
    for number, text in enumerate(texts):
        if count >= asked.examples and len(found) > 1:
            break
        if len(text.tokens) <= _FIRST + 1:
            continue
        path = work / f"examples_{number:05d}.pt"
        if not path.exists():
            if time.perf_counter() > end:
                return None
            gatherer = gatherer or Gatherer(target, draft, asked.length, width=asked.width, every=asked.every)
            made = tuple(gatherer.examples(text, number))
            trainer.write_whole(path, lambda part, made=made: torch.save(made, part))
        found.append(Examples(*torch.load(path)))
        count += len(found[-1].worth)
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            print(f"examples: {count} of {asked.examples}, of {len(found)} texts", flush=True)
    if len(found) < 2:
        raise ValueError(f"{PROGRAM}: texts must be at least two of more than {_FIRST + 1} tokens, got {len(found)}")
    held_out = max(1, len(found) // 8)
    return tuple(Examples(*map(torch.cat, zip(*part, strict=True))) for part in (found[:-held_out], found[-held_out:]))


class Network(torch.nn.Module):
    """Layers with ReLU between them; the last one has one output, a logit.

    Args:
        sizes: inputs, and outputs of each layer but the last.

    Attributes:
        layers: that are trained.
        best: a copy of them from when they did best, and how well that was.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*pair) for pair in itertools.pairwise((*sizes, 1)))
        self.best = copy.deepcopy(self.layers).requires_grad_(False)
        self.register_buffer("best_area", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows] of [rows, inputs]."""
        return self.scores(self.layers, x)

    def keep(self, found: float) -> None:
        """Copy the layers as they are if they have never done as well."""
        if found > self.best_area:
            self.best.load_state_dict(self.layers.state_dict())
            self.best_area.fill_(found)

    @staticmethod
    def scores(layers: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        """[rows] of [rows, inputs], by some layers."""
        for layer in layers[:-1]:
            x = layer(x).relu()
        return layers[-1](x)[:, 0]


class Decision(Task):
    """The network of `drafts.Decision`.

    Args:
        draft: the model whose rows it reads.
        examples: to learn from, and to be examined with.
        asked: the command line.
    """

    checks = ("held_out_accuracy", "held_out_auc")

    def __init__(self, draft: Decoder, examples: tuple[Examples, Examples], asked: argparse.Namespace) -> None:
        self.draft, self.asked, self._examples = draft, asked, examples
        torch.manual_seed(0)
        self._inputs, self._labels, self._exam, self._exam_worth = *self._of(examples[0]), *self._of(examples[1])
        self._accepted = torch.rand(len(self._exam_worth)) < self._exam_worth  # what would have been
        if asked.labels == "hard":
            self._inputs, self._labels = _balanced(self._inputs, self._labels)
        inner = asked.inner or _INNER[asked.features]
        self.module = Network((self._inputs.shape[1], *inner))

    def _of(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(examples, self.asked.features).float(), examples.worth

    def losses(self, step: int) -> tuple[torch.Tensor]:
        """See `Task.losses`."""
        chosen = torch.randint(len(self._labels), (self.asked.batch,))
        scores = self.module(self._inputs[chosen])
        return (functional.binary_cross_entropy_with_logits(scores, self._labels[chosen]),)

    def held_out(self) -> tuple[float, float]:
        """Of the best so far: shares of held-out rows judged rightly at the threshold, and of pairs in right order."""
        self.module.keep(area(self.module(self._exam), self._accepted))
        scores = self.module.scores(self.module.best, self._exam).sigmoid()
        right = (scores > self.asked.threshold) == self._accepted
        return right.float().mean().item(), area(scores, self._accepted)

    def save(self, folder: Path, about: dict) -> None:
        """See `Task.save`."""
        layers = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in self.module.best]
        found = drafts.Decision(layers, self.asked.features, self.asked.threshold)
        about |= {"examples": len(self._examples[0].worth), "accepted": round(self._accepted.float().mean().item(), 4)}
        found.save(folder, self.draft, about)


def _balanced(inputs: torch.Tensor, worth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows drawn as accepted or not, as many of one as of the other."""
    accepted = torch.rand(len(worth)) < worth
    kinds = [kind.nonzero()[:, 0] for kind in (accepted, ~accepted)]
    fewest = min(map(len, kinds))
    if not fewest:
        raise ValueError(f"{PROGRAM}: examples must be some that are accepted and some that are not, got one kind")
    chosen = torch.cat([kind[torch.randperm(len(kind))[:fewest]] for kind in kinds])
    return inputs[chosen], accepted[chosen].float()


def area(scores: torch.Tensor, accepted: torch.Tensor) -> float:
    """Of pairs of an accepted row and another, the share in which the accepted one has the greater score."""
    order = scores.double().sort().values
    low, high = (torch.searchsorted(order, scores.double(), right=right) for right in (False, True))
    ranks = (low + high + 1).double() / 2  # of equals the mean
    ones, zeros = int(accepted.sum()), int((~accepted).sum())
    if not (ones and zeros):
        return 0.5
    return (float(ranks[accepted].sum()) - ones * (ones + 1) / 2) / (ones * zeros)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = trainer.parser(PROGRAM, "Train a network for drafts.Decision.")
    made.add_argument(
        "--draft", help="a folder with the model that drafts, or of specdec_ops.train.soft (default: the target)"
    )
    made.add_argument("--draft-layers", type=int, help="leading layers of it that are the draft (default: all)")
    made.add_argument("--features", choices=tuple(_INNER), default="confidence", help="(default: confidence)")
    made.add_argument("--labels", choices=("soft", "hard"), help="(default: hard for confidence, soft for hidden)")
    made.add_argument("--inner", type=int, nargs="+", help="sizes between (default: 44, or 512 256)")
    made.add_argument("--threshold", type=float, default=0.4, help="that is saved with it (default: 0.4)")
    made.add_argument("--examples", type=int, default=20000, help="as many, or a few more (default: 20000)")
    made.add_argument("--width", type=int, default=10, help="candidates after a token (default: 10)")
    made.add_argument("--every", type=int, default=6, help="tokens from candidates to candidates (default: 6)")
    made.set_defaults(batch=50, rate=1e-3, minutes=2.0, length=320)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The program. See `trainer.run`."""
    asked = parser().parse_args(arguments)
    if asked.labels is None:
        asked.labels = "soft" if asked.features == "hidden" else "hard"

    def make(target: Decoder, texts: list[Text]) -> Decision | None:
        draft = draft_of(target, asked.draft, asked.draft_layers)
        examples = gather(target, draft, texts, asked)
        return None if examples is None else Decision(draft, examples, asked)

    return trainer.run(PROGRAM, asked, make)


def draft_of(target: Decoder, path: str | None, layers: int | None) -> Decoder:
    """The model that drafts.

    Args:
        target: which it is itself without a path.
        path: of a model, or of what `specdec_ops.train.soft` has made.
        layers: leading layers, under its final norm and head; None: all.

    Raises:
        ValueError: it has fewer layers.
    """
    if path is not None and checkpoint.is_draft(path):
        model = drafts.Sorted.load(path).model
    else:
        model = target if path is None else trainer.load_model(path)
    return model if layers is None else model.first_layers(layers)


if __name__ == "__main__":
    sys.exit(main())
