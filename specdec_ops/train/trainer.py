"""What the trainings of drafts share: a number of minutes, texts, steps, slices, and what is written meanwhile.

A training is a `Task`; `run` is its program. The folder OUT gets the draft; loss.csv (and loss.png where matplotlib is
installed); and a folder `work` with texts and the state of training, which nobody needs afterwards. The same command
goes on where it was interrupted.
"""

from __future__ import annotations

import abc
import argparse
import csv
import importlib.util
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from specdec_ops.decode.decoder import Decoder

from .texts import Text, Writer

_SAY = 10.0  # seconds between two lines of progress, at least, and
_CHECKS = 0.05  # the most of the time that goes into looking at texts that are held out
_WARM_UP = 30  # steps until the rate is at its height
_LOWEST = 0.05  # of the highest rate, at the end


class Task(abc.ABC):
    """What is trained.

    Attributes:
        module: whose parameters are trained, those that require a gradient.
        columns: names of what `losses` gives, for the CSV.
        checks: names of what `held_out` gives, shares from 0 to 1.
    """

    module: torch.nn.Module
    columns: tuple[str, ...] = ("loss",)
    checks: tuple[str, ...] = ("held_out_agreement",)

    def start(self) -> None:  # noqa: B027 -- most have nothing to do here
        """Before the first step of all, and not when training is taken up again."""

    @abc.abstractmethod
    def losses(self, step: int) -> Sequence[torch.Tensor]:
        """Scalars of the batch of a step; the first is what is minimised.

        A function of the step and the parameters: torch's own noise is seeded with the step before the call.
        """

    @abc.abstractmethod
    def held_out(self) -> Sequence[float]:
        """How it does on texts that it does not learn from. Called without gradients."""

    @abc.abstractmethod
    def save(self, folder: Path, about: dict) -> None:
        """Write the draft as it is now, with what its JSON shall say besides."""


class Trainer:
    """Texts, then steps, within a number of minutes, interrupted and taken up again at will.

    Args:
        target: the model that the draft is for.
        program: the name of the module whose program this is.
        asked: its command line, see `parser`.
    """

    def __init__(self, target: Decoder, program: str, asked: argparse.Namespace) -> None:
        self.target, self.asked, self._program = target, asked, program
        self.out = Path(asked.out)
        self.work = self.out / "work"
        self.texts_folder = self.work if asked.texts is None else Path(asked.texts)
        for folder in (self.work, self.texts_folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._end = time.perf_counter() + (asked.slice or math.inf)

    @property
    def is_out_of_time(self) -> bool:
        """Whether this call has to end."""
        return time.perf_counter() >= self._end

    def collect(self) -> bool:
        """Make texts until their share of the time is spent. Returns whether it is."""
        budget, writer = 60 * self.asked.minutes * self.asked.texts_share, None
        clock = self.texts_folder / "texts.seconds"
        number, spent = len(list(self.texts_folder.glob("texts_*.pt"))), _seconds(clock)
        while spent < budget:
            if self.is_out_of_time:
                return False
            start = time.perf_counter()
            writer = writer or Writer(self.target)
            texts = [tuple(text) for text in writer.group(number)]
            path = self.texts_folder / f"texts_{number:05d}.pt"
            write_whole(path, lambda part, texts=texts: torch.save(texts, part))
            number += 1
            spent += time.perf_counter() - start
            write_whole(clock, lambda part, spent=spent: part.write_text(str(spent)))
            tokens = sum(len(tokens) for tokens, _ in texts)
            print(f"texts {spent:6.0f} of {budget:.0f} s: group {number}, {tokens} tokens", flush=True)
        return True

    def texts(self) -> list[Text]:
        """All that have been made, in order.

        Raises:
            ValueError: there are fewer than two.
        """
        paths = sorted(self.texts_folder.glob("texts_*.pt"))
        texts = [Text(*text) for path in paths for text in torch.load(path, mmap=True)]
        if len(texts) < 2:
            raise ValueError(f"{self._program}: minutes must be enough for two texts, got {self.asked.minutes:g}")
        return texts

    def train(self, task: Task) -> bool:
        """Steps until their share of the time is spent. Returns whether it is."""
        asked, state, clock = self.asked, self.work / "state.pt", self.work / "steps.seconds"
        learned = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=asked.rate, betas=(0.9, 0.95), weight_decay=0.01)
        step = 0
        if state.exists():
            saved = torch.load(state)
            task.module.load_state_dict(saved["module"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
        else:
            task.start()
        budget, before = 60 * asked.minutes * (1 - asked.texts_share), _seconds(clock)
        narrow = torch.autocast("cpu", dtype=torch.bfloat16, enabled=asked.bfloat16)
        lines: list[list[float]] = []
        start = said = time.perf_counter()
        pause = _SAY
        while True:
            seconds = before + time.perf_counter() - start
            ends = seconds >= budget or self.is_out_of_time
            if ends or time.perf_counter() - said > pause or step == 0:
                asked_at = time.perf_counter()
                with torch.no_grad(), narrow:
                    found = list(task.held_out())
                said = time.perf_counter()
                pause = max(_SAY, (said - asked_at) / _CHECKS)
                if lines:
                    means = [sum(column) / len(lines) for column in zip(*lines, strict=True)]
                    self._log(task, [step, round(seconds, 1), *(round(value, 5) for value in (*means, *found))])
                    lines = []
                shares = ", ".join(f"{name} {share:.1%}" for name, share in zip(task.checks, found, strict=True))
                print(f"steps {seconds:6.0f} of {budget:.0f} s: step {step}, {shares}", flush=True)
                if ends:
                    break
            for group in optimizer.param_groups:
                group["lr"] = asked.rate * _of_highest_rate(step, seconds / budget)
            torch.manual_seed(step)
            with narrow:
                losses = task.losses(step)
            optimizer.zero_grad(set_to_none=True)
            losses[0].backward()
            torch.nn.utils.clip_grad_norm_(learned, 0.5)
            optimizer.step()
            step += 1
            lines.append([loss.item() for loss in losses])
        saved = {"module": task.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        write_whole(state, lambda part: torch.save(saved, part))
        about = {"command": command(self._program, asked), "steps": step}
        task.save(self.out, about | {name: round(share, 4) for name, share in zip(task.checks, found, strict=True)})
        spent = before + time.perf_counter() - start
        write_whole(clock, lambda part: part.write_text(str(spent)))
        return seconds >= budget

    def _log(self, task: Task, row: list) -> None:
        path = self.out / "loss.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            names = ("step", "seconds", *task.columns, *task.checks)
            csv.writer(file).writerows([names, row] if is_new else [row])


def _of_highest_rate(step: int, spent: float) -> float:
    """Rises over the first steps, and falls along a cosine with the share of the time that is spent."""
    return min(1.0, (step + 1) / _WARM_UP) * (_LOWEST + (1 - _LOWEST) * math.cos(math.pi / 2 * min(spent, 1.0)) ** 2)


def _seconds(clock: Path) -> float:
    return float(clock.read_text()) if clock.exists() else 0.0


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """A file that is whole or not there."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


def command(program: str, asked: argparse.Namespace) -> str:
    """Without the folders of this machine, and without what changes nothing."""
    words = ["python", "-m", program]
    for name, value in vars(asked).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif name != "slice" and value not in (None, False):
            words += [option, Path(value).name if name in ("target", "draft", "out", "texts") else str(value)]
    return shlex.join(words)


def plot(out: Path, task: Task) -> None:
    """loss.png of loss.csv, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    with (out / "loss.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row[task.columns[0]] for row in rows], label=task.columns[0])
    axes.set(xlabel="step", ylabel="loss")
    other = axes.twinx()
    for name in task.checks:
        other.plot(steps, [row[name] for row in rows], "--", label=name.replace("_", " "))
    other.set(ylim=(0, 1))
    figure.legend(loc="outside upper right", ncols=1 + len(task.checks))
    figure.savefig(out / "loss.png", dpi=120)


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """Of the command line, with the options of every training."""
    made = argparse.ArgumentParser(f"python -m {program}", description=description)
    made.add_argument("--target", required=True, help="a folder with a Hugging Face model, or a GGUF file")
    made.add_argument("--out", required=True, help="the folder of the draft")
    made.add_argument("--texts", help="a folder of texts that several trainings share (default: OUT/work)")
    made.add_argument("--minutes", type=float, default=20.0, help="of work in all (default: %(default)s)")
    made.add_argument("--texts-share", type=float, default=0.4, help="of the minutes, for texts (default: %(default)s)")
    made.add_argument("--slice", type=float, help="end after so many seconds; the same command goes on")
    made.add_argument("--length", type=int, default=256, help="the most rows of a text (default: %(default)s)")
    made.add_argument("--batch", type=int, default=4, help="texts of a step (default: %(default)s)")
    made.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate (default: %(default)s)")
    made.add_argument("--bfloat16", action="store_true", help="multiply in it: faster where the CPU has it")
    return made


def add_draft_options(made: argparse.ArgumentParser) -> None:
    """Of drafts that have a head of their own and are saved by `specdec_ops.drafts.checkpoint`."""
    made.add_argument("--hot-vocab", type=int, default=8192, help="tokens that it can draft (default: 8192)")
    made.add_argument("--save", choices=("int8", "bfloat16", "float32"), default="int8", help="form of the weights")


def load_model(path: str) -> Decoder:
    """A folder with a Hugging Face model, or a GGUF file."""
    from specdec_ops.integrations.transformers import load

    return load(path)


def run(program: str, asked: argparse.Namespace, make: Callable[[Decoder, list[Text]], Task | None]) -> int:
    """The program of a training.

    Args:
        program: the name of its module.
        asked: its command line.
        make: the task of a target and texts; None if the slice has ended before all is there for it.

    Returns:
        0 when the draft is made, 3 when a slice has ended before that, 2 after an error.
    """
    try:
        trainer = Trainer(load_model(asked.target), program, asked)
        if not trainer.collect():
            is_done = False
        else:
            task = make(trainer.target, trainer.texts())
            is_done = task is not None and trainer.train(task)
    except (ValueError, TypeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    if not is_done:
        print("the slice has ended; the same command goes on", flush=True)
        return 3
    plot(trainer.out, task)
    print(f"the draft is in {trainer.out}")
    return 0
