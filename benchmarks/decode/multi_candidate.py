"""Improved multi-candidate decoding on a real pair: `python -m benchmarks.decode --system multi_candidate`.

Four tables, each a CSV with a plot beside it:

forms     static trees of one root and of two, with lossless rules and with the paper's lossy one: tokens per pass of
          the target, speed, and what the lossy rule costs: the text's log-likelihood under the target, beside that of
          the target's own texts at the same prompts and seeds
law       how far the law of a text's first token is from the target's: from below, by an event that half of the draws
          choose and the other half count
width     forks of 1 to 22 roots, with and without what stops a draft
topology  a topology that is made once and sliced, against a mask that is made anew for each round

Draft: the leading layers of the target, or of a draft that `specdec_ops.train.soft` has made of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.machine import ROOT, describe
from specdec_ops import Tree, drafts
from specdec_ops.decode import Decoder, Engine, Sampling, chat_prompt
from specdec_ops.decode.cache import Cache
from specdec_ops.decode.cache import Sequence as Pages
from specdec_ops.decode.decoder import Projection
from specdec_ops.decode.rows import Rows
from specdec_ops.integrations.transformers import load
from specdec_ops.ops.linear.quantized_weight import quantize_linear

from . import contestants, measure, prompts, results
from .demo import model_file

TABLES = ("forms", "law", "width", "topology")
RESAMPLES = 2000
WIDTHS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 21, 22)
DEPTH = 5  # of the fork, levels below the roots
COLUMNS = {
    "forms": ("form", "rule", "rows", "temperature", "requests", "tokens", "tokens_per_call", "per_call_low",
              "per_call_high", "tokens_per_second", "ratio_plain", "ratio_plain_low", "ratio_plain_high", "c", "t_rows",
              "nll", "nll_more", "nll_more_low", "nll_more_high", "problem"),
    "law": ("form", "rule", "temperature", "prompts", "draws", "tv_at_least", "low", "high"),
    "width": ("width", "stop", "rows", "temperature", "requests", "tokens_per_call", "accepted", "levels",
              "tokens_per_second", "ratio_plain", "ratio_plain_low", "ratio_plain_high", "c", "t_rows"),
    "topology": ("tree", "nodes", "context", "kind", "bytes_once", "bytes_a_round", "microseconds"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Form:
    """A draft's tree and the rule that judges it."""

    name: str
    rule: str
    branching: tuple[int, ...]
    roots: int = 1

    def draft(self, model: Decoder, stop=None) -> drafts.MultiCandidate:
        """The draft."""
        return drafts.MultiCandidate(model, self.branching, target_roots=self.roots, stop=stop)


FORMS = (
    Form("chain of 4", "block", (1, 1, 1, 1)),
    Form("4x2x2x1", "recursive", (4, 2, 2, 1)),
    Form("4x2x2x1", "traversal", (4, 2, 2, 1)),
    Form("4x2x2x1", "longest_path", (4, 2, 2, 1)),
    Form("1 root, 4x3x1x1", "recursive", (4, 3, 1, 1)),
    Form("1 root, 4x3x1x1", "traversal", (4, 3, 1, 1)),
    Form("1 root, 4x3x1x1", "longest_path", (4, 3, 1, 1)),
    Form("2 roots, (2,4,3,1,1)", "longest_path", (4, 3, 1, 1), 2),
)
PAPER = FORMS[-1]
LAWS = (FORMS[2], FORMS[3], FORMS[6], PAPER)


def parser() -> argparse.ArgumentParser:
    """Of the command line, after `--system multi_candidate`."""
    made = argparse.ArgumentParser("python -m benchmarks.decode --system multi_candidate")
    made.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    made.add_argument("--draft", help="a folder of specdec_ops.train.soft (default: the target's own layers)")
    made.add_argument("--layers", type=int, default=2, help="of it that draft (default: 2)")
    made.add_argument("--decision", nargs="*", default=[], help="folders of specdec_ops.train.decision, for the widths")
    made.add_argument("--prompts", nargs="+", choices=tuple(prompts.PACKAGES), default=["mt_bench", "gsm8k"])
    made.add_argument("--count", type=int, default=4, help="prompts of each set (default: 4)")
    made.add_argument("--seeds", type=int, default=3, help="of each prompt (default: 3)")
    made.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    made.add_argument("--temperature", type=float, default=0.7, help="of forms and law; widths have 1 (default: 0.7)")
    made.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    made.add_argument("--draws", type=int, default=400, help="of a first token (default: 400)")
    made.add_argument("--out", type=Path, help="the CSVs' name without the table's and the ending")
    made.add_argument("--append", action="store_true", help="to those files")
    return made


def small_model(target: Decoder, folder: str | None, layers: int) -> Decoder:
    """The model that drafts, its head in int8."""
    model = target if folder is None else drafts.Sorted.load(folder).model
    model = dataclasses.replace(model.first_layers(layers), tokenizer=target.tokenizer)
    if isinstance(model.head.weight, torch.Tensor):
        model = dataclasses.replace(model, head=Projection(quantize_linear(model.head.weight.float())))
    return model


@dataclasses.dataclass
class Bench:
    """What all tables have in common."""

    target: Decoder
    model: Decoder
    prompts: list[list[int]]
    asked: argparse.Namespace
    say: Callable[[str], None]

    @property
    def units(self) -> list[measure.Unit]:
        """Each prompt with each seed."""
        return [
            measure.Unit("all", [prompt], 1000 * number + seed)
            for seed in range(self.asked.seeds)
            for number, prompt in enumerate(self.prompts)
        ]

    @property
    def longest(self) -> int:
        """Of a text."""
        return max(map(len, self.prompts)) + self.asked.tokens + 8

    def contestant(self, name: str, draft, rule: str) -> contestants.Contestant:
        options = {"max_batch": 1, "max_length": self.longest, "adapt": False}
        return contestants.ours(name, self.target, draft, weights="blocks", rule=rule, **options)

    def run(self, there: Sequence[contestants.Contestant], temperature: float) -> list[measure.Entry]:
        """Everyone does prompt after prompt in turn. The first is the plain loop."""
        entries = measure.run_cell(there, self.units, temperature, self.asked.tokens, self.target.eos)
        for entry in entries:
            if entry.problem:
                raise RuntimeError(f"{entry.contestant.name}: {entry.problem}")
        return entries

    def log_likelihoods(self, entry: measure.Entry, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """Nats that each answer costs the target at the temperature (1 for greedy text), and its tokens."""
        nats, counts = [], []
        for unit, run in zip(self.units, entry.runs, strict=True):
            text, answer = unit.prompts[0] + run.answers[0], torch.tensor(run.answers[0])
            logits = logits_of(self.target, text)[len(unit.prompts[0]) - 1 : -1].float() / (temperature or 1.0)
            nats.append(-float(logits.log_softmax(-1).gather(1, answer[:, None]).sum()))
            counts.append(len(answer))
        return np.array(nats), np.array(counts)


def logits_of(model: Decoder, text: list[int]) -> torch.Tensor:
    """[length, vocab], by passes over a text."""
    cache, pages, parts = Cache(model.shape, -(-len(text) // 16)), Pages(), []
    cache.reserve(pages, len(text))
    table = cache.page_table([pages])
    for start in range(0, len(text), 64):
        tokens = torch.tensor([text[start : start + 64]], dtype=torch.int32)
        length = torch.tensor([start], dtype=torch.int32)
        parts.append(model.forward(Rows(tokens, Tree.chain(tokens.shape[1]).to("cpu"), length, table), cache).logits)
    return torch.cat(parts)


def interval(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> tuple[float, float, float]:
    """A statistic of chosen units, [..., count], and its 95% interval over bootstrap samples of them."""
    value = float(statistic(np.arange(count)))
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.percentile(statistic(drawn), (2.5, 97.5))
    return value, float(low), float(high)


def forms(bench: Bench) -> list[dict]:
    """See the module."""
    asked, temperature = bench.asked, bench.asked.temperature
    there = [bench.contestant("plain", None, "auto")]
    there += [bench.contestant(f"{form.name}, {form.rule}", form.draft(bench.model), form.rule) for form in FORMS]
    entries = bench.run(there, temperature)
    figures = {row["contestant"]: row for row in measure.rows_of(entries, bench.units, temperature)}
    plain, rows = bench.log_likelihoods(entries[0], temperature), []
    for entry, form in zip(entries, (None, *FORMS), strict=True):
        bench.say(f"likelihood of {entry.contestant.name}")
        nats, counts = bench.log_likelihoods(entry, temperature)
        calls = np.array([run.calls for run in entry.runs])

        def more(chosen, nats=nats, counts=counts):
            theirs = plain[0][chosen].sum(-1) / plain[1][chosen].sum(-1)
            return nats[chosen].sum(-1) / counts[chosen].sum(-1) - theirs

        def per_call(chosen, counts=counts, calls=calls):
            return counts[chosen].sum(-1) / calls[chosen].sum(-1)

        row = {name: figures[entry.contestant.name].get(name, "") for name in COLUMNS["forms"]}
        row |= {"form": form.name if form else "plain", "rule": form.rule if form else "", "temperature": temperature}
        row |= {"requests": len(bench.units), "nll": nats.sum() / counts.sum()}
        row |= dict(
            zip(("tokens_per_call", "per_call_low", "per_call_high"), interval(per_call, len(nats)), strict=True)
        )
        row |= dict(zip(("nll_more", "nll_more_low", "nll_more_high"), interval(more, len(nats)), strict=True))
        row["rows"] = form.draft(bench.model).max_nodes if form else 1
        rows.append(row)
    print(f"{asked.seeds} seeds of {len(bench.prompts)} prompts, {asked.tokens} tokens, T = {temperature:g}")
    return rows


def law(bench: Bench) -> list[dict]:
    """See the module. An event's share of draws less its probability is a distance from below; its mean has no bias."""
    rows, temperature, draws = [], bench.asked.temperature, bench.asked.draws
    for form in LAWS:
        engine = Engine(bench.target, form.draft(bench.model), form.rule, max_batch=4, max_length=bench.longest)
        gaps = []
        for prompt in bench.prompts:
            bench.say(f"law of {form.name}, {form.rule}")
            exact = (logits_of(bench.target, prompt)[-1].double() / temperature).softmax(-1)
            asked = [Sampling(temperature, max_tokens=1, seed=seed) for seed in range(draws)]
            drawn = [result.tokens[0] for result in engine.generate([prompt] * draws, asked)]
            half = draws // 2
            for chooses, counts in ((drawn[:half], drawn[half:]), (drawn[half:], drawn[:half])):
                shares = Counter(chooses)
                event = {token for token, count in shares.items() if count / len(chooses) > exact[token]}
                counted = sum(token in event for token in counts) / len(counts)
                gaps.append(counted - float(exact[sorted(event)].sum()))
        gaps = np.array(gaps).reshape(len(bench.prompts), 2).mean(-1)
        found = interval(lambda chosen, gaps=gaps: gaps[chosen].mean(-1), len(gaps))
        row = {"form": form.name, "rule": form.rule, "temperature": temperature, "prompts": len(gaps), "draws": draws}
        rows.append(row | dict(zip(("tv_at_least", "low", "high"), found, strict=True)))
    return rows


def width(bench: Bench) -> list[dict]:
    """See the module."""
    stops = {"": None, "probability 0.3": drafts.StopBelow("probability", 0.3)}
    for folder in bench.asked.decision:
        decision = drafts.Decision.load(folder, bench.model)
        sizes = [decision.layers[0][0].shape[1], *(len(bias) for _, bias in decision.layers)]
        stops["-".join(map(str, sizes))] = decision
    forks = [(roots, name) for roots in bench.asked.widths for name in stops]
    there, engines = [bench.contestant("plain", None, "auto")], {}
    for roots, name in forks:
        form = Form(f"{roots} roots, {name}", "longest_path", (1,) * DEPTH, roots)
        there.append(bench.contestant(form.name, form.draft(bench.model, stops[name]), form.rule))
        engines[form.name] = form
    bench.say(f"{len(forks)} forks")
    entries = bench.run(there, 1.0)
    figures = {row["contestant"]: row for row in measure.rows_of(entries, bench.units, 1.0)}
    rows = []
    for entry, (roots, name) in zip(entries[1:], forks, strict=True):
        calls = sum(run.calls for run in entry.runs)
        row = {key: figures[entry.contestant.name].get(key, "") for key in COLUMNS["width"]}
        accepted = sum(run.tokens for run in entry.runs) / calls - 1
        judged = statistics.mean(count for run in entry.runs for count in run.pass_rows)
        row |= {"width": roots, "stop": name or "none", "temperature": 1.0, "requests": len(bench.units)}
        rows.append(row | {"accepted": accepted / DEPTH, "rows": judged, "levels": judged / roots - 1})
    return rows


def topology(bench: Bench) -> list[dict]:
    """See the module. The mask is made as MCSD and its successor make it, row by row from the parent's, then joined."""
    rows, rounds = [], 30
    trees = {"(2,4,3,1,1)": Tree.from_branching((2, 4, 3, 1, 1)), "fork 16 x 6": Tree.fork(16, DEPTH)}
    for name, tree in trees.items():
        whole, parents = tree.to("cpu"), tree.parents.tolist()
        tensors = (whole.parents, whole.depths, whole.ancestors, whole.first_child, whole.next_sibling)
        once = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        def sliced(context: int, whole=whole, tree=tree):
            return whole.truncate(tree.depth - 1)

        def rebuilt(context: int, tree=tree, parents=parents):
            mask = torch.eye(len(tree), dtype=torch.bool)
            for node, parent in enumerate(parents):
                if parent >= 0:
                    mask[node, : parent + 1] = mask[parent, : parent + 1]
            return torch.cat((torch.ones(len(tree), context, dtype=torch.bool), mask), dim=1)

        def added(context: int, rebuilt=rebuilt):
            mask = rebuilt(context)
            return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))

        for context in (256, 1024, 4096):
            made = {
                "sliced topology": (sliced, once, 4),
                "mask rebuilt": (rebuilt, 0, len(tree) * (context + len(tree))),
                "mask rebuilt, as float": (added, 0, 5 * len(tree) * (context + len(tree))),
            }
            for kind, (make, kept, size) in made.items():
                taken = []
                for _ in range(rounds):
                    start = time.perf_counter()
                    make(context)
                    taken.append(time.perf_counter() - start)
                row = {"tree": name, "nodes": len(tree), "context": context, "kind": kind, "bytes_once": kept}
                rows.append(row | {"bytes_a_round": size, "microseconds": 1e6 * statistics.median(taken)})
    return rows


def draw(table: str, rows: list[dict], path: Path) -> str:
    """The plot of a table."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    number = lambda row, name: float(row[name] or "nan")  # noqa: E731
    if table == "width":
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
        for stop in dict.fromkeys(row["stop"] for row in rows):
            some = sorted((row for row in rows if row["stop"] == stop), key=lambda row: int(row["width"]))
            widths = [int(row["width"]) for row in some]
            for axes, name in zip(panels, ("tokens_per_call", "ratio_plain"), strict=True):
                axes.plot(widths, [number(row, name) for row in some], marker="o", label=f"stop: {stop}")
        for axes, name in zip(panels, ("tokens per pass of the target", "speed, times plain decoding"), strict=True):
            axes.set(xlabel="roots", ylabel=name, ylim=(0, None))
            axes.axvline(21.5, color="#999999", linestyle=":")
        panels[0].legend(fontsize=8)
    else:
        names = {"forms": ("tokens_per_call", "ratio_plain", "nll_more"), "law": ("tv_at_least",)}
        columns = names.get(table, ("microseconds",))
        labels = [
            ", ".join([*(row[name] for name in ("form", "rule") if row.get(name)), f"T = {row.get('temperature')}"])
            for row in rows
        ]
        if table == "topology":
            labels = [f"{row['tree']}, context {row['context']}: {row['kind']}" for row in rows]
        size = (3.4 * len(columns) + 3, 1 + 0.3 * len(rows))
        figure, panels = pyplot.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False)
        spans = {"tokens_per_call": ("per_call_low", "per_call_high"), "tv_at_least": ("low", "high")}
        for axes, name in zip(panels[0], columns, strict=True):
            low, high = spans.get(name, (f"{name}_low", f"{name}_high"))
            for place, row in enumerate(rows):
                axes.barh(
                    place, number(row, name), color="#1f5fa8" if "longest" not in str(row.get("rule")) else "#d1661b"
                )
                if row.get(low) not in (None, ""):
                    axes.plot([number(row, low), number(row, high)], [place, place], color="black", linewidth=1)
            axes.set_xlabel(name.replace("_", " "))
            if table == "topology":
                axes.set_xscale("log")
        panels[0][0].set_yticks(range(len(rows)), labels=labels, fontsize=8)
        panels[0][0].invert_yaxis()
    figure.suptitle(f"{rows[0]['target']} and {rows[0]['draft']}, commit {rows[0]['commit']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path.name}"


def main(arguments: list[str]) -> int:
    """Table after table; each is on the disk when it is done."""
    asked, began = parser().parse_args(arguments), time.perf_counter()
    warnings.simplefilter("ignore")

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    target = load(model_file())
    model = small_model(target, asked.draft, asked.layers)
    questions = [question for name in asked.prompts for question in prompts.load(name, asked.count)]
    ids = [target.tokenizer.encode(chat_prompt(target, question)) for question in questions]
    bench = Bench(target, model, ids, asked, say)
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    out = asked.out or ROOT / "benchmarks" / "results" / "local" / f"{today}-multi_candidate"
    kind = "its own layers" if asked.draft is None else "layers trained for it"
    about = {"target": model_file().name, "draft": f"{kind}, {asked.layers} of {target.shape.layers}"}
    fixed = about | describe("cpu", arguments)
    fixed["command"] = fixed["command"].replace("benchmarks.run", "benchmarks.decode --system multi_candidate")
    makers = {"forms": forms, "law": law, "width": width, "topology": topology}
    for table in asked.tables:
        rows = [row | fixed for row in makers[table](bench)]
        path = out.with_name(f"{out.name}-{table}.csv")
        fresh = not (asked.append and path.exists())
        results.write(path, rows, fresh, (*COLUMNS[table], *fixed))
        every = results.read(path)
        for row in every:
            print("  ".join(row[name] or "-" for name in COLUMNS[table]))
        print(draw(table, every, path.with_suffix(".png")))
    return 0
