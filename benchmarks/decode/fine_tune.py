"""A short fine-tune on Python's standard library: a second target of one tokenizer, for sorted drafts.

`python -m benchmarks.decode.fine_tune --target FILE_OR_FOLDER --out FOLDER` trains the last layers and the final norm
of a model of the engine; what lies below them is run by the engine, once for each text. The folder gets the trained
layers alone, which `load` puts into the model they were made from, and what `specdec_ops.train.trainer` writes. It can
be interrupted; the same command goes on. `--texts` is a folder with other sources.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import sysconfig
from pathlib import Path

import torch
from torch.nn import functional

from specdec_ops import Tree
from specdec_ops.decode import Cache, Decoder, Rows
from specdec_ops.decode.cache import Sequence
from specdec_ops.drafts import checkpoint
from specdec_ops.drafts.weights import dense_weight, from_tensors, to_tensors
from specdec_ops.train import trainer
from specdec_ops.train.sorted_net import SortedNet

PROGRAM = "benchmarks.decode.fine_tune"
KIND = "fine_tuned"
_CHARACTERS = 8  # for a token: more than there are


def pieces(tokenizer, folder: Path, count: int, length: int) -> list[torch.Tensor]:
    """int64 [length] each, from places of sources that are the same each time.

    Raises:
        ValueError: no source of the folder is long enough.
    """
    files = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size > _CHARACTERS * length]
    if not files:
        raise ValueError(f"{PROGRAM}: texts must be sources of more than {_CHARACTERS * length} bytes, got {folder}")
    rng, found = random.Random(0), []
    while len(found) < count:
        source = rng.choice(files).read_text(errors="replace")
        start = rng.randrange(max(1, len(source) - _CHARACTERS * length))
        ids = tokenizer.encode(source[start : start + _CHARACTERS * length])
        if len(ids) >= length:
            found.append(torch.tensor(ids[:length]))
    return found


class FineTuning(trainer.Task):
    """The last layers of a model and its final norm, with the cross-entropy of the next token.

    Args:
        target: the model.
        texts: int64 [length] each, all of one length.
        asked: the command line.
    """

    checks = ("held_out_accuracy",)

    def __init__(self, target: Decoder, texts: list[torch.Tensor], asked: argparse.Namespace) -> None:
        if target.logit_softcap is not None:
            raise ValueError(f"{PROGRAM}: target must be a model without a soft cap of its logits, got {target!r}")
        if not 1 <= asked.layers <= len(target.layers):
            raise ValueError(f"{PROGRAM}: layers must be from 1 to {len(target.layers)}, got {asked.layers}")
        self.target, self.asked, self._texts = target, asked, texts
        self._below = len(target.layers) - asked.layers
        self._held_out = max(1, len(texts) // 12)
        self._entered: dict[int, torch.Tensor] = {}
        self._head, self._bias = dense_weight(target.head.weight), target.head.bias
        last = dataclasses.replace(
            target, shape=target.shape._replace(layers=asked.layers), layers=target.layers[self._below :]
        )
        self.module = SortedNet(last, (asked.layers,))

    def entered(self, place: int) -> torch.Tensor:
        """float32 [length, dim]: what enters the trained layers of a text."""
        if place not in self._entered:
            tokens = self._texts[place]
            cache, sequence = Cache(self.target.shape, -(-len(tokens) // 16)), Sequence()
            cache.reserve(sequence, len(tokens))
            topology, start = Tree.chain(len(tokens)).to("cpu"), torch.zeros(1, dtype=torch.int32)
            rows = Rows(tokens[None].to(torch.int32), topology, start, cache.page_table([sequence]))
            hidden = self.target.forward(rows, cache, layers=(0, self._below), want=False).hidden
            self._entered[place] = hidden.float().clone()  # a copy that autograd may use
        return self._entered[place]

    def _scores(self, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits float32 [rows, vocab], and what follows each row."""
        rows = self.module(torch.stack([self.entered(place) for place in places]))[0]
        following = torch.cat([self._texts[place][1:] for place in places])
        return functional.linear(rows[:, :-1].flatten(0, 1), self._head, self._bias).float(), following

    def losses(self, step: int) -> tuple[torch.Tensor]:
        """See `Task.losses`."""
        learned = torch.randperm(len(self._texts) - self._held_out)[: self.asked.batch]
        return (functional.cross_entropy(*self._scores(learned.tolist())),)

    def held_out(self) -> list[float]:
        """See `Task.held_out`: how often the likeliest token is the next one."""
        found = []
        for place in range(len(self._texts) - self._held_out, len(self._texts)):
            logits, following = self._scores([place])
            found.append((logits.argmax(-1) == following).float().mean().item())
        return [sum(found) / len(found)]

    def save(self, folder: Path, about: dict) -> None:
        """See `Task.save`."""
        tensors, said = to_tensors(self.module.decoder(), "bfloat16")
        for name in ("embedding", "head"):  # the target's own
            tensors.pop(name, None)
        checkpoint.save(folder, KIND, tensors, self.target, {"layers": self.asked.layers, "model": said} | about)


def load(folder: str | os.PathLike, target: Decoder) -> Decoder:
    """A target with the layers that were trained for it.

    Args:
        folder: that the program has written.
        target: the model that they were made from, whatever the form of its weights.

    Raises:
        ValueError: there are no such layers, or they are another model's.
    """
    tensors, about = checkpoint.load(folder, KIND, target)
    shape = target.shape
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()} | {"embedding": target.embedding}
    last = from_tensors(tensors, about["model"], dtype=shape.dtype, device=shape.device)
    layers = [*target.layers[: -about["layers"]], *last.layers]
    return dataclasses.replace(target, layers=layers, norm=last.norm, name=f"{target.name}, fine-tuned")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = trainer.parser(PROGRAM, __doc__.splitlines()[0])
    made.add_argument("--layers", type=int, default=4, help="the last ones, which are trained (default: 4)")
    made.add_argument("--pieces", type=int, default=240, help="texts of --length tokens (default: 240)")
    made.set_defaults(texts_share=0.0, minutes=6.0, length=192, batch=2, rate=1e-4)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when the model is made, 3 when a slice has ended before that, 2 after an error."""
    asked = parser().parse_args(arguments)
    folder = Path(asked.texts or sysconfig.get_path("stdlib"))
    try:
        training = trainer.Trainer(trainer.load_model(asked.target), PROGRAM, asked)
        texts = pieces(training.target.tokenizer, folder, asked.pieces, asked.length)
        task = FineTuning(training.target, texts, asked)
        is_done = training.train(task)
    except (ValueError, TypeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    if not is_done:
        print("the slice has ended; the same command goes on", flush=True)
        return 3
    trainer.plot(training.out, task)
    print(f"the model is in {training.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
