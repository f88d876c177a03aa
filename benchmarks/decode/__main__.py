"""Tokens per second of real models: Hugging Face's loops, economize, llama.cpp, OpenVINO and our engine.

`python -m benchmarks.decode --quick` takes under two minutes on two cores. Longer runs can be cut into pieces with
`--batch`, `--temperature` and `--prompts`, which `--append` puts into one file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.machine import ROOT, describe
from specdec_ops import drafts
from specdec_ops.decode import Decoder, chat_prompt
from specdec_ops.integrations.transformers import load

from . import contestants, measure, other_engines, prompts, results
from .contestants import Contestant, Run
from .demo import EAGLE, hugging_face, model_file


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is run: prompts of each set, tokens of each answer, and the cells."""

    count: int
    length: int
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]


PRESETS = {
    "quick": Preset(1, 40, (1,), (0.0,)),
    "standard": Preset(8, 96, (1, 4, 8), (0.0, 0.7, 1.0)),
    "full": Preset(80, 256, (1, 4, 8), (0.0, 0.7, 1.0)),
}
OTHERS_ROLE = "library"
SYSTEMS = ("mixture_of_attentions", "multi_candidate", "remote", "sorted")
"""Those with tables of their own, each in a module of its name: what its paper claims, and what is so here."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The target in its forms.

    original: of Hugging Face, in float32.
    float32: the same weights for the engine.
    blocks: those of the GGUF file, as they lie there.
    """

    original: object
    float32: Decoder
    blocks: Decoder

    def target(self, weights: str) -> Decoder:
        """Of the engine."""
        return self.float32 if weights == "float32" else self.blocks


def ngram(asked, models: Models, weights: str) -> list[tuple[str, Callable]]:
    """Needs nothing."""
    return [("ours, n-grams", drafts.Ngram)]


def chain(asked, models: Models, weights: str) -> list[tuple[str, Callable]]:
    """A smaller model, or the target in a cheaper form: see --draft."""
    made = []
    for name in asked.draft:
        if name == "blocks" and weights == "blocks":
            continue  # it would draft for itself
        model = draft_model(name, models, weights)
        made.append((f"ours, chain of {asked.steps}, {name}", lambda model=model: drafts.Chain(model, asked.steps)))
    return made


def draft_model(name: str, models: Models, weights: str) -> Decoder:
    """The first layers of the target, its GGUF blocks, or another model."""
    if name == "blocks":
        return models.blocks
    target = models.target(weights)
    if name.startswith("layers:"):
        count = int(name.removeprefix("layers:"))
        return dataclasses.replace(target, shape=target.shape._replace(layers=count), layers=target.layers[:count])
    return load(name)


def assistant(name: str, models: Models):
    """The same for Hugging Face, whose loop runs no GGUF blocks: the nearest to them is a copy in bfloat16."""
    from transformers import AutoModelForCausalLM

    if name == "blocks":
        return copy.deepcopy(models.original).to(torch.bfloat16)
    if name.startswith("layers:"):
        made = copy.deepcopy(models.original)
        made.model.layers = made.model.layers[: int(name.removeprefix("layers:"))]
        made.config.num_hidden_layers = len(made.model.layers)
        return made
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


def eagle(asked, models: Models, weights: str) -> list[tuple[str, Callable]]:
    """A trained layer, see --eagle."""
    return [("ours, EAGLE", lambda: drafts.Eagle.load(asked.eagle, models.target(weights)))]


DRAFTS = (ngram, chain, eagle)
"""Each gives, of the arguments, pairs of a name and what makes a draft. One more draft is one more function."""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m benchmarks.decode", description=__doc__.splitlines()[0])
    presets = made.add_mutually_exclusive_group()
    for name in PRESETS:
        presets.add_argument(f"--{name}", dest="preset", action="store_const", const=name)
    made.set_defaults(preset="quick")
    made.add_argument("--system", choices=SYSTEMS, help="the tables of one system instead; it has options of its own")
    made.add_argument("--batch", type=int, nargs="+", help="requests at once")
    made.add_argument("--temperature", type=float, nargs="+")
    made.add_argument("--prompts", nargs="+", choices=tuple(prompts.PACKAGES), default=list(prompts.PACKAGES))
    made.add_argument("--count", type=int, help="prompts of each set")
    made.add_argument("--tokens", type=int, help="the most tokens of an answer")
    made.add_argument(
        "--draft",
        nargs="+",
        default=[],
        help="what drafts in Chain and in assisted generation: a folder with a smaller model, layers:N (the target's "
        "first layers, not trained for it), or blocks (of the GGUF file, for float32; bfloat16 for Hugging Face)",
    )
    made.add_argument("--steps", type=int, default=5, help="tokens that the smaller model drafts (default: 5)")
    made.add_argument(
        "--eagle", default=str(EAGLE), help="a folder with a trained EAGLE layer (default: that of the demo)"
    )
    made.add_argument("--lookup-tokens", type=int, default=4, help="that the peers' prompt lookups draft (default: 4)")
    made.add_argument("--only", help="only contestants with this in their name, and the plain ones")
    made.add_argument("--no-others", action="store_true", help="leave llama.cpp and OpenVINO out")
    made.add_argument("--out", type=Path, help="the CSV; the plot goes beside it")
    made.add_argument("--append", action="store_true", help="to that file")
    return made


def in_process(asked, models: Models, max_batch: int, max_length: int) -> list[Contestant]:
    """Contestants of this process, in the order of their rows."""
    model = models.original
    lookup = {"prompt_lookup_num_tokens": asked.lookup_tokens}
    found = [contestants.hugging_face("generate", model)]
    for name in asked.draft:
        said = "bfloat16" if name == "blocks" else name
        found.append(contestants.hugging_face(f"generate, assisted, {said}", model, assistant=assistant(name, models)))
    found.append(contestants.hugging_face("generate, prompt lookup", model, **lookup))
    reason = contestants.without_economize()
    if reason:
        found.append(Contestant("economize, prompt lookup", "library", "float32", _never, refuses=lambda *_: reason))
    else:
        found.append(contestants.economize_lookup(model, asked.lookup_tokens))
    sizes = {"max_batch": max_batch, "max_length": max_length, "rule": "match"}  # whose sampled texts can be checked
    for weights in ("float32", "blocks"):
        target = models.target(weights)
        found.append(contestants.ours("ours plain", target, None, weights=weights, **sizes))
        for make in DRAFTS:
            for name, draft in make(asked, models, weights):
                found.append(contestants.ours(name, target, draft(), weights=weights, **sizes))
    if asked.only:
        found = [one for one in found if asked.only in one.name or one.name in ("generate", "ours plain")]
    return found


def _never(task) -> Run:
    raise RuntimeError("it takes no part")


def others(asked, path: Path, units, temperature: float, length: int, eos) -> list[measure.Entry]:
    """llama.cpp and OpenVINO: the same prompts one at a time, each engine in a process of its own."""
    entries = []
    for engine in other_engines.ENGINES:
        for kind in other_engines.KINDS:
            contestant = Contestant(f"{engine}, {kind}", OTHERS_ROLE, "blocks", _never)
            entry = measure.Entry(contestant, problem=other_engines.missing(engine))
            entries.append(entry)
            if not entry.problem and len(units[0].prompts) > 1:
                entry.problem = "it is given one request at a time"
            if entry.problem:
                continue
            task = {"model": str(path), "kind": kind, "prompts": [unit.prompts[0] for unit in units]}
            task |= {"length": length, "temperature": temperature, "eos": list(eos)}
            task |= {"draft_tokens": asked.lookup_tokens, "threads": torch.get_num_threads()}
            try:
                for done in other_engines.run(engine, task):
                    entry.runs.append(_run_of(done))
            except Exception as error:
                entry.problem = f"fails: {measure.short(error)}"
            entry.texts = "not compared"
    return entries


def _run_of(done: dict) -> Run:
    tokens = done["timed"] + 1
    return Run(
        [done["tokens"] or [0] * tokens], done["seconds"], done["timed"], done["calls"] or 0
    )  # 0: it doesn't say


def main(arguments: list[str] | None = None) -> int:
    """Runs cell after cell; each is on the disk when it is done. With `--system NAME`, the tables of one system."""
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--system", choices=SYSTEMS)
    system, rest = chosen.parse_known_args(arguments)
    if system.system is not None:
        return importlib.import_module(f"{__package__}.{system.system}").main(rest)
    asked = parser().parse_args(arguments)
    preset, began = PRESETS[asked.preset], time.perf_counter()
    warnings.simplefilter("ignore")
    try:
        return run(asked, preset, began, sys.argv[1:] if arguments is None else arguments)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def run(asked, preset: Preset, began: float, arguments: list[str]) -> int:
    """See `main`."""
    path = model_file()
    batches, temperatures = asked.batch or preset.batches, asked.temperature or preset.temperatures
    length = asked.tokens or preset.length
    questions = {name: prompts.load(name, asked.count or preset.count) for name in asked.prompts}
    say = progress(began)
    say(f"loading {path.name}")
    blocks = load(path)
    model = hugging_face(path)
    float32 = load(model, blocks.tokenizer)
    eos = tuple(blocks.eos)
    ids = {
        name: [blocks.tokenizer.encode(chat_prompt(blocks, question)) for question in some]
        for name, some in questions.items()
    }
    longest = max(len(prompt) for some in ids.values() for prompt in some) + length + 8
    there = in_process(asked, Models(model, float32, blocks), max(batches), longest)
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    out = asked.out or ROOT / "benchmarks" / "results" / "local" / f"{today}-decode-{asked.preset}.csv"
    fixed = describe("cpu", arguments) | results.versions() | {"model": path.name}
    fixed["command"] = fixed["command"].replace("benchmarks.run", "benchmarks.decode")
    every: list[dict] = results.read(out) if asked.append and out.exists() else []
    fresh = not every

    def logits_of(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0]

    for batch in batches:
        units = measure.units_of(ids, batch)
        if not units:
            say(f"batch {batch} is left out: there are fewer prompts")
            continue
        for temperature in temperatures:
            cell = f"batch {batch}, T = {temperature:g}"
            entries = measure.run_cell(
                there, units, temperature, length, eos, lambda done, of, cell=cell: say(f"{cell}: {done} of {of}", done)
            )
            say(f"{cell}: checking texts")
            measure.check(entries, units, temperature, logits_of)
            if not asked.no_others:
                say(f"{cell}: other engines")
                entries += others(asked, path, units, temperature, length, eos)
            rows = [row | fixed for row in measure.rows_of(entries, units, temperature)]
            results.write(out, rows, header=fresh)
            fresh = False
            every += rows
            print("\n".join(results.table(rows)), flush=True)
    print(results.draw(every, out.with_suffix(".png")))
    print(f"lines: {out.name}")
    return 0


def progress(began: float) -> Callable[..., None]:
    """Says what is done now, on the error output, with the seconds since the start; of counted steps every eighth."""

    def say(text: str, step: int = 0) -> None:
        if step % 8 == 0:
            print(f"[{time.perf_counter() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
