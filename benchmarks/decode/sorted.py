"""Sorted drafts (S2D) on real weights: one draft, three targets, thresholds against fixed exits and a single exit.

`python -m benchmarks.decode --system sorted --sorted FOLDER --single FOLDER --tuned FOLDER` wants what
`specdec_ops.train.soft` and `benchmarks.decode.fine_tune` have written. The targets are SmolLM2-135M-Instruct, made
float32 from its GGUF file; the same with fine-tuned layers; int8; and the 4-bit blocks of the file as they lie: the
fewer bytes a pass of the target reads, the more a draft has to save. Each seed has prompts of its own; contestants take
turns on each prompt, and their ratios are paired by prompt. All drafts share the weights of one model. At a temperature
above 0, too, every text has to be that of plain decoding with the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness.machine import ROOT, describe
from specdec_ops import drafts
from specdec_ops.decode import Decoder, chat_prompt
from specdec_ops.drafts.weights import dense_weight, make_layer, norms, projections, sizes_of
from specdec_ops.integrations.transformers import load
from specdec_ops.ops.linear.quantized_weight import quantize_linear

from . import contestants, fine_tune, measure, prompts, results
from .contestants import Contestant, Run, Task
from .demo import model_file

THRESHOLDS = ((0.5, 0.5, 0.0), (0.75, 0.7, 0.0), (0.9, 0.85, 0.0))
TREE = drafts.TreeShape(levels=4, width=3, branching=4, nodes=10)

# The paper's cost of a pass in GB of fp16 weights: a layer of the draft, its head, and each target.
PAPER_LAYER, PAPER_HEAD, PAPER_TARGETS = 0.405, 0.262, {"7B": 13.5, "13B": 26.0, "70B": 137.9}
# Its speed-ups on MT-Bench at temperature 0, for the targets 7B, 13B and 70B: S2D by thresholds, then fixed exits.
PAPER = {
    "S2D .5 .5 0": (1.34, 1.38, 1.92),
    "S2D .75 .7 0": (1.24, 1.35, 1.94),
    "S2D .9 .85 0": (1.20, 1.32, 1.93),
    "first exit": (1.38, 1.38, 1.83),
    "second exit": (1.16, 1.31, 1.92),
    "last exit": (1.17, 1.23, 1.91),
    "single exit": (1.19, 1.21, 1.94),
    "tree, first exit": (1.99, 1.95, None),
    "tree, S2D .5 .5 0": (2.00, 1.93, None),
}
# At temperature 1. The thresholds are not said; at temperature 0 these are the best ones of the targets.
PAPER_SAMPLED = {
    "S2D .5 .5 0": (1.27, 1.38, None),
    "S2D .75 .7 0": (None, None, 1.98),
    "first exit": (1.30, 1.35, None),
    "second exit": (1.26, 1.32, None),
    "last exit": (1.07, 1.20, None),
    "single exit": (1.16, 1.10, None),
    "tree, first exit": (1.86, 1.74, None),
    "tree, S2D .5 .5 0": (1.84, 1.77, None),
}
TARGETS = ("base", "tuned", "int8", "blocks")
COLUMNS = (
    *(
        "target",
        "temperature",
        "seed",
        "contestant",
        "problem",
        "requests",
        "tokens",
        "calls",
        "drafted",
        "tokens_per_call",
    ),
    *("layer_rows", "layer_passes", "head_passes", "left_first", "left_second", "left_last"),
    *("c", "t_rows", "host_ms", "tokens_per_second", "measured", "measured_low", "measured_high", "modelled"),
    *(f"modelled_{name}" for name in PAPER_TARGETS),
    *(f"paper_{name}" for name in PAPER_TARGETS),
    *results.MACHINE,
    "command",
)


@dataclasses.dataclass
class Form:
    """One way to draft with the sorted draft, and what it has cost: sums over its runs, prompts left out."""

    contestant: Contestant
    draft: drafts.Sorted | None
    costs: list[dict] = dataclasses.field(default_factory=list)


def name_of(thresholds: tuple[float, ...]) -> str:
    """As the paper writes them."""
    return "S2D " + " ".join(f"{value:g}".removeprefix("0") or "0" for value in thresholds)


def drafts_of(asked) -> dict[str, drafts.Sorted]:
    """All that take part, by name. Weights are read once for each."""
    one = drafts.Sorted.load(asked.sorted, steps=asked.steps)
    options = {"hot_vocab": one.hot_vocab, "head": asked.head}

    def of(exits, thresholds, **more) -> drafts.Sorted:
        return drafts.Sorted(one.model, exits, thresholds, **{"steps": asked.steps, **options, **more})

    made = {name_of(thresholds): of(one.exits, thresholds) for thresholds in THRESHOLDS}
    places = ("first exit", "second exit", "last exit")
    made |= {name: of((layers,), (0.0,)) for name, layers in zip(places, one.exits, strict=True)}
    if asked.single:
        single = drafts.Sorted.load(asked.single)
        made["single exit"] = drafts.Sorted(single.model, single.exits, (0.0,), steps=asked.steps, **options)
    made["tree, first exit"] = of(one.exits[:1], (0.0,), tree=TREE)
    made |= {f"tree, {name_of(t)}": of(one.exits, t, tree=TREE) for t in THRESHOLDS[: 1 + asked.all_trees * 2]}
    return made


def remade(model: Decoder, make: Callable) -> Decoder:
    """A model with other weights of its projections and its head: what `make` gives for each."""

    def of(part):
        return dataclasses.replace(part, weight=make(part.weight))

    layers = [
        make_layer(
            sizes_of(layer),
            {name: of(part) for name, part in projections(layer).items()} | norms(layer),
            layer.attention.rope,
        )
        for layer in model.layers
    ]
    return dataclasses.replace(model, layers=layers, head=of(model.head))


def targets_of(asked) -> Iterator[tuple[str, Decoder]]:
    """Names and models, each made when its turn comes."""
    blocks = load(model_file())
    for name in asked.target:
        if name == "base":
            yield "base, float32", remade(blocks, dense_weight)
        elif name == "int8":
            yield "base, int8", remade(blocks, lambda weight: quantize_linear(dense_weight(weight)))
        elif name == "tuned":
            yield "fine-tuned, float32", fine_tune.load(asked.tuned, remade(blocks, dense_weight))
        else:
            yield "base, 4-bit blocks", blocks


def forms_of(target: Decoder, made: dict[str, drafts.Sorted], length: int) -> list[Form]:
    """Plain decoding, then each draft."""
    sizes = {"weights": "", "max_batch": 1, "max_length": length, "adapt": False}
    forms = [Form(contestants.ours("plain", target, None, **sizes), None)]
    return forms + [Form(contestants.ours(name, target, draft, **sizes), draft) for name, draft in made.items()]


def _costs(before: dict, after: dict) -> dict:
    return {
        name: [new - old for new, old in zip(after[name], before[name], strict=True)]
        if name == "left"
        else after[name] - before[name]
        for name in after
    }


def run_seed(
    forms: list[Form], ids: list[list[int]], seed: int, temperature: float, length: int, eos, tell
) -> list[measure.Entry]:
    """Everyone answers each prompt, in an order that turns round from prompt to prompt."""
    entries = [measure.Entry(form.contestant) for form in forms]
    warm = Task([ids[0]], temperature, 8, eos)
    for form in forms:
        form.contestant.run(warm)
        form.costs.clear()  # of an earlier seed, if there was one
    for number, prompt in enumerate(ids):
        pairs = list(zip(forms, entries, strict=True))
        for form, entry in pairs if number % 2 == 0 else pairs[::-1]:
            proposer = form.contestant.proposer
            first = None if proposer is None else _first_draft(proposer)
            entry.runs.append(form.contestant.run(Task([prompt], temperature, length, eos, 1000 * seed + number)))
            if proposer is not None:
                form.costs.append(_costs(first[0], dataclasses.asdict(proposer.counts)))
        tell(number, len(ids))
    return entries


def _first_draft(proposer) -> list[dict]:
    """Filled with the counts of just after the first draft of the next run, which has read the prompt."""
    noted = [dataclasses.asdict(proposer.counts)]
    propose = proposer.propose

    def noting(batch):
        drafted = propose(batch)
        noted[0] = dataclasses.asdict(proposer.counts)
        proposer.propose = propose
        return drafted

    proposer.propose = noting
    return noted


def rows_of(target: str, seed: int, temperature: float, forms: list[Form], entries: list[measure.Entry]) -> list[dict]:
    """A line for each contestant."""
    paper = PAPER_SAMPLED if temperature else PAPER
    plain, one = entries[0].runs, contestants.one_row_seconds(entries[0].runs, 1)
    rows = []
    for form, entry in zip(forms, entries, strict=True):
        name, runs = form.contestant.name, entry.runs
        row = {"target": target, "temperature": temperature, "seed": seed, "contestant": name}
        row |= {"problem": entry.problem, "requests": len(runs)}
        rows.append(row)
        if entry.problem:
            continue
        taken, drafting = (
            [s for run in runs for s in getattr(run, what)] for what in ("pass_seconds", "draft_seconds")
        )
        seconds, calls = sum(run.seconds for run in runs), sum(run.calls for run in runs)
        timed = sum(run.timed for run in runs)
        row |= {"tokens": sum(run.tokens for run in runs), "calls": calls, "tokens_per_second": timed / seconds}
        row["tokens_per_call"] = timed / max(1, len(taken))
        row["t_rows"] = np.mean(taken) / one
        row["host_ms"] = 1e3 * (seconds - sum(taken) - sum(drafting)) / len(taken)
        ratio = measure.ratio_of(runs, plain)
        row |= dict(zip(("measured", "measured_low", "measured_high"), ratio, strict=True))
        if form.draft is None:
            continue
        row["c"] = np.mean(drafting) / one
        row["modelled"] = row["tokens_per_call"] / (row["c"] + row["t_rows"])
        row |= _of_draft(form, row["tokens_per_call"])
        row |= {f"paper_{k}": v for k, v in zip(PAPER_TARGETS, paper.get(name, ()), strict=False) if v is not None}
    return rows


def _of_draft(form: Form, tokens_per_call: float) -> dict:
    """Rows and passes for each drafted token (or level of a tree), and what they would come to at the paper's sizes.

    Its exits are after 6, 9 and 12 layers, where ours are after 2, 4 and 6.
    """
    left = np.sum([cost["left"] for cost in form.costs], axis=0)
    drafted = max(1, int(left.sum()))
    row = {"drafted": drafted}
    sums = {k: sum(cost[k] for cost in form.costs) for k in ("layer_rows", "layer_passes", "head_passes")}
    row |= {name: value / drafted for name, value in sums.items()}
    shares = left / drafted
    if len(shares) == 3:
        row |= dict(zip(("left_first", "left_second", "left_last"), shares, strict=True))
    steps = form.draft.max_depth
    for name, size in PAPER_TARGETS.items():
        layers = 6 + (row["layer_passes"] - 2) * 3 / 2
        of_draft = steps * (layers * PAPER_LAYER + row["head_passes"] * PAPER_HEAD)
        row[f"modelled_{name}"] = tokens_per_call / (1 + of_draft / size)
    return row


def summary(rows: list[dict]) -> list[dict]:
    """The mean over seeds of each target's contestants, with the lowest and highest speed-up among the seeds."""
    found = []
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cell = (f"{row['target']}, T = {float(row['temperature']):g}", row["contestant"])
        cells.setdefault(cell, []).extend([] if row["problem"] else [row])
    for (target, name), some in cells.items():
        if not some:
            continue
        line = {"target": target, "contestant": name, "seeds": len(some)}
        for column in COLUMNS[5:-1]:
            values = [float(row[column]) for row in some if _is_number(row.get(column))]
            line[column] = sum(values) / len(values) if values else None
        speeds = [float(row["measured"]) for row in some if _is_number(row.get("measured"))]
        line |= {"lowest": min(speeds), "highest": max(speeds)} if speeds else {}
        found.append(line)
    return found


def _is_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def table(rows: list[dict]) -> list[str]:
    """Lines for the screen."""
    head = ("tok/call", "layers", "heads", "1st", "2nd", "last", "c", "t(rows)", "x plain", "seeds", "modelled")
    lines = [f"{'target':26} {'draft':22} " + " ".join(f"{word:>8}" for word in (*head, *PAPER_TARGETS, "paper"))]
    columns = (
        "tokens_per_call",
        "layer_passes",
        "head_passes",
        "left_first",
        "left_second",
        "left_last",
        "c",
        "t_rows",
    )
    for line in summary(rows):
        figures = [_shown(line[column]) for column in columns] + [_shown(line["measured"])]
        figures.append(f"{line['lowest']:.2f}-{line['highest']:.2f}" if "lowest" in line else "")
        figures += [_shown(line[column]) for column in ("modelled", *(f"modelled_{name}" for name in PAPER_TARGETS))]
        figures.append("/".join(_shown(line[f"paper_{name}"]) or "-" for name in PAPER_TARGETS))
        lines.append(f"{line['target']:26} {line['contestant']:22} " + " ".join(f"{word:>8}" for word in figures))
    return lines


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw(rows: list[dict], path: Path) -> str:
    """Speed-ups of each target's contestants, measured and modelled at the paper's sizes, and where tokens leave."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    lines = [line for line in summary(rows) if line["contestant"] != "plain"]
    targets = list(dict.fromkeys(line["target"] for line in lines))
    names = list(dict.fromkeys(line["contestant"] for line in lines))
    figure, panels = pyplot.subplots(1, len(targets) + 1, figsize=(3.4 * len(targets) + 4.4, 0.4 * len(names) + 1.8))
    panels = np.atleast_1d(panels)
    for axes, target in zip(panels[:-1], targets, strict=True):
        for line in (line for line in lines if line["target"] == target):
            place = names.index(line["contestant"])
            axes.barh(place, line["measured"], color=results.OURS, height=0.6)
            axes.plot([line["lowest"], line["highest"]], [place] * 2, color="black", linewidth=1)
            axes.plot(line["modelled"], place, "o", color=results.THEIRS, markersize=4)
            axes.text(line["measured"], place + 0.42, f" {line['tokens_per_call']:.2f} a call", fontsize=6, va="center")
        axes.axvline(1, color=results.LINE, linewidth=1)
        axes.set_title(f"{target}\nbar: measured x plain, dot: modelled", fontsize=8)
    shares = panels[-1]
    for line in (line for line in lines if line["target"] == targets[0] and line["left_first"] is not None):
        start = 0.0
        for column, color in (("left_first", "#9ec5e8"), ("left_second", "#4f8fc9"), ("left_last", "#1f5fa8")):
            shares.barh(names.index(line["contestant"]), line[column], left=start, color=color, height=0.6)
            start += line[column]
    shares.set_title("tokens (levels of trees) that leave\nat the first, second, last exit", fontsize=8)
    for axes in panels:
        axes.set_yticks(range(len(names)), labels=names if axes is panels[0] else [], fontsize=7)
        axes.set_ylim(len(names) - 0.4, -0.7)
        axes.tick_params(axis="x", labelsize=7)
    first = rows[0]
    words = ("machine", "isa", "threads", "torch", "commit", "date")
    figure.suptitle(
        "SmolLM2-135M-Instruct, one sorted draft: " + ", ".join(str(first[word]) for word in words), fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path.name}"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m benchmarks.decode --system sorted", description=__doc__.splitlines()[0])
    made.add_argument("--sorted", required=True, help="a folder of specdec_ops.train.soft")
    made.add_argument("--single", help="one with a single exit, after as many layers")
    made.add_argument("--tuned", help="a folder of benchmarks.decode.fine_tune")
    made.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    made.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    made.add_argument("--count", type=int, default=2, help="prompts of each set for each seed (default: 2)")
    made.add_argument("--tokens", type=int, default=64, help="the most tokens of an answer (default: 64)")
    made.add_argument("--steps", type=int, default=4, help="tokens of a chain (default: 4)")
    made.add_argument("--head", choices=("int8", "float"), default="int8", help="of the draft (default: int8)")
    made.add_argument("--all-trees", action="store_true", help="trees with all thresholds, not the first alone")
    made.add_argument("--out", type=Path, help="the CSV; the plot goes beside it")
    made.add_argument("--append", action="store_true", help="to that file")
    return made


def main(arguments: list[str]) -> int:
    """Runs target after target and seed after seed; each is on the disk when it is done."""
    asked = parser().parse_args(arguments)
    asked.head = None if asked.head == "float" else asked.head
    if "tuned" in asked.target and not asked.tuned:
        asked.target.remove("tuned")
    began = time.perf_counter()
    out = asked.out or ROOT / "benchmarks" / "results" / "local" / "decode-sorted.csv"
    every: list[dict] = results.read(out) if asked.append and out.exists() else []
    fixed = describe("cpu", arguments)
    fixed["command"] = fixed["command"].replace("benchmarks.run", "benchmarks.decode --system sorted")
    sets = {name: prompts.load(name, asked.count * (1 + max(asked.seed))) for name in prompts.PACKAGES}
    made = drafts_of(asked)
    for target_name, target in targets_of(asked):
        eos, fresh = tuple(target.eos), not every
        ids = {
            seed: [
                target.tokenizer.encode(chat_prompt(target, question))
                for some in sets.values()
                for question in some[seed :: 1 + max(asked.seed)]
            ]
            for seed in asked.seed
        }
        longest = max(len(prompt) for some in ids.values() for prompt in some) + asked.tokens + 8
        forms = forms_of(target, made, longest)
        for temperature, seed in itertools.product(asked.temperature, asked.seed):

            def tell(number, of, cell=f"{target_name}, T = {temperature:g}, seed {seed}"):
                said = f"[{time.perf_counter() - began:5.0f} s] {cell}: {number + 1} of {of}"
                print(said, file=sys.stderr, flush=True)

            entries = run_seed(forms, ids[seed], seed, temperature, asked.tokens, eos, tell)
            check(entries)
            rows = [row | fixed for row in rows_of(target_name, seed, temperature, forms, entries)]
            results.write(out, rows, fresh, COLUMNS)
            fresh = False
            every += rows
    print("\n".join(table(every)))
    print(draw(every, out.with_suffix(".png")))
    return 0


def check(entries: list[measure.Entry]) -> None:
    """Text must be that of plain decoding, or there is no time."""
    expected: list[Run] = entries[0].runs
    for entry in entries[1:]:
        for number, (run, plain) in enumerate(zip(entry.runs, expected, strict=True)):
            if run.answers != plain.answers:
                entry.problem = f"WRONG: the text of prompt {number} is not that of plain decoding"
