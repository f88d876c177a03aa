"""Mixture of Attentions on real weights: against EAGLE and smaller models, in one process and after a cut.

`python -m benchmarks.decode --system mixture_of_attentions --mixture FOLDER ... --table speed` decodes each prompt with
every draft, one prompt at a time; `--table cut` lets drafts go on alone after a text of the target, as a client does
that has lost its server, and asks the target what it thinks of that. Each seed has prompts of its own, and contestants
are paired by prompt. Calls to a server and latency over lines are in `--system remote`, which takes the same folders.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.machine import ROOT, describe
from specdec_ops import drafts
from specdec_ops.decode import Cache, Decoder, Engine, Rows, Sampling, chat_prompt
from specdec_ops.decode.cache import Sequence
from specdec_ops.integrations.transformers import load
from specdec_ops.remote.drafter import Drafter
from specdec_ops.tree import Tree

from . import contestants, measure, prompts, results
from .demo import EAGLE, model_file
from .sorted import check, run_seed

# Tokens a call of the target and speed-up at batch 1 and temperature 0, the mean over its six sets, of Llama-3-8B.
PAPER = {"mixture, N = 0": (4.22, 1.95), "mixture, N = 1": (4.50, 1.95), "eagle": (3.60, 1.78)}
_NEAR = 8  # tokens in which a repetition is looked for: a text that repeats itself pleases any language model
DISTANCES = (1, 2, 4, 8, 16, 32)
WORDS = ("apple", "river", "stone", "cloud", "tiger", "bread", "chair", "light", "music", "paper", "green", "horse")
COLUMNS = (
    *("table", "seed", "contestant", "problem", "requests", "tokens", "calls", "tokens_per_call", "c", "t_rows"),
    *("tokens_per_second", "x_plain", "x_plain_low", "x_plain_high", "x_eagle", "x_eagle_low", "x_eagle_high"),
    *("paper_tokens_per_call", "paper_speed_up", "steps", "held_out_agreement"),
    *("tokens_since_cut", "agreement", "nll", "nll_of_target", "same_so_far", "repeated", "exact_match"),
    *results.MACHINE,
    "command",
)


def name_of(folder: Path) -> str:
    """What a saved draft of Mixture of Attentions is called: by its kind, and by how it was trained."""
    about = json.loads((folder / "draft.json").read_text())
    name = f"mixture, N = {about['sizes']['target_layers']}"
    if not about["sizes"]["layer_inner"]:
        name += ", no LSA"
    return name + (", no CA mask" if "--all-states" in about.get("command", "") else "")


def drafts_of(asked, target: Decoder) -> dict[str, tuple[drafts.Draft, dict]]:
    """By name, each with what its JSON says."""
    made: dict[str, tuple[drafts.Draft, dict]] = {}
    for folder in map(Path, asked.mixture):
        about = json.loads((folder / "draft.json").read_text())
        made[name_of(folder)] = drafts.load(folder, target), about
    for folder in map(Path, asked.eagle):
        about = json.loads((folder / "draft.json").read_text())
        name = "eagle" if folder == Path(asked.eagle[0]) else f"eagle, {about['steps']} steps"
        made[name] = drafts.load(folder, target), about
    if asked.sorted:
        one = drafts.Sorted.load(asked.sorted)
        about = json.loads((Path(asked.sorted) / "draft.json").read_text())
        made["sorted"] = drafts.Sorted(one.model, one.exits, one.thresholds, steps=4, hot_vocab=one.hot_vocab), about
        small = drafts.Sorted(one.model, one.exits[:1], (0.0,), steps=4, hot_vocab=one.hot_vocab)
        made["independent, chain"] = small, about
        model = one.model.first_layers(one.exits[0])
        made["independent, multi-candidate"] = drafts.MultiCandidate(model, (3, 1, 1)), about
    made["n-grams"] = drafts.Ngram(), {}
    return made


def speed(asked, target: Decoder, made: dict, ids: dict[int, list[list[int]]], tell) -> list[dict]:
    """A line for each seed and contestant."""
    longest = max(len(prompt) for some in ids.values() for prompt in some) + asked.tokens + 8
    sizes = {"weights": "", "max_batch": 1, "max_length": longest, "adapt": False}

    class Form:
        """As `run_seed` wants them."""

        def __init__(self, name: str, draft) -> None:
            self.contestant, self.costs = contestants.ours(name, target, draft, **sizes), []

    forms = [Form("plain", None), *(Form(name, draft) for name, (draft, _) in made.items())]
    for form in forms:
        form.contestant.proposer = None  # no counts of layers are wanted
    rows = []
    for seed, questions in ids.items():
        entries = run_seed(
            forms, questions, seed, 0.0, asked.tokens, tuple(target.eos), lambda *n, s=seed: tell("speed", s, *n)
        )
        check(entries)
        by_name = {entry.contestant.name: entry for entry in entries}
        one = contestants.one_row_seconds(by_name["plain"].runs, 1)
        for name, entry in by_name.items():
            runs = entry.runs
            row = {"table": "speed", "seed": seed, "contestant": name, "problem": entry.problem, "requests": len(runs)}
            rows.append(row | _of_training(made.get(name, (None, {}))[1]))
            if entry.problem:
                continue
            taken, drafting = ([s for r in runs for s in getattr(r, w)] for w in ("pass_seconds", "draft_seconds"))
            timed = sum(run.timed for run in runs)
            row = rows[-1]
            row |= {"tokens": sum(r.tokens for r in runs), "calls": sum(r.calls for r in runs)}
            row |= {"tokens_per_call": timed / max(1, len(taken)), "t_rows": np.mean(taken) / one}
            row["tokens_per_second"] = timed / sum(run.seconds for run in runs)
            if drafting:
                row["c"] = np.mean(drafting) / one
            for other in ("plain", "eagle"):
                if other in by_name and not by_name[other].problem:
                    ratio = measure.ratio_of(runs, by_name[other].runs)
                    row |= dict(zip((f"x_{other}", f"x_{other}_low", f"x_{other}_high"), ratio, strict=True))
            paper = PAPER.get(name)
            if paper is not None:
                row |= dict(zip(("paper_tokens_per_call", "paper_speed_up"), paper, strict=True))
    return rows


def _of_training(about: dict) -> dict:
    found = {"steps": about.get("steps", "")}
    agreement = [value for name, value in about.items() if name.startswith("held_out_agreement")]
    return found | {"held_out_agreement": agreement[0] if agreement else ""}


def alone(draft: drafts.Draft, target: Decoder, text: list[int], states, count: int) -> list[int]:
    """What a draft says by itself after a text, as a client without its server: its likeliest path, tree after tree.

    Args:
        draft: of any kind.
        target: that it is for.
        text: of which the target has run all but the last token.
        states: what the server has sent of these, or None.
        count: the most tokens.
    """
    here = Drafter(draft, target, Sampling(max_tokens=count), len(text) + count + 16)
    if states is not None:
        here.take_states(0, states)
    said: list[int] = []
    while len(said) < count:
        tokens = here.propose([*text, *said]).likeliest()
        if not tokens or (said and not here.goes_on_alone):
            break
        said += tokens
    return said[:count]


@torch.inference_mode()
def target_rows(target: Decoder, text: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [length, vocab], rows before the final norm [length, dim], keys and values [length, layers, stacked]."""
    cache, pages = Cache(target.shape, -(-len(text) // 16)), Sequence()
    cache.reserve(pages, len(text))
    table = cache.page_table([pages])
    rows = Rows(
        torch.tensor([text], dtype=torch.int32),
        Tree.chain(len(text)).to("cpu"),
        torch.zeros(1, dtype=torch.int32),
        table,
    )
    logits, hidden = target.forward(rows, cache)
    slots = torch.arange(len(text))
    return logits, hidden, cache.layer_kv(slots, torch.zeros_like(slots), table)


def cut(asked, target: Decoder, made: dict, ids: dict[int, list[list[int]]], tell) -> list[dict]:
    """Agreement and NLL under the target against tokens since the cut, and lines of words to be said a third time.

    `same_so_far`: whether the text is still the target's. `repeated`: whether a token was said just before.
    """
    engine = Engine(target, max_batch=1)
    rows, most = [], max(DISTANCES)
    for seed, questions in ids.items():
        found: dict[str, list] = {name: [] for name in made}
        copied: dict[str, list] = {name: [] for name in made}
        chance = np.random.default_rng(seed)
        tasks = [(prompt, None) for prompt in questions]
        for _ in range(asked.copies):
            words = [str(word) for word in chance.choice(WORDS, size=5, replace=False)]
            line = " ".join(words)
            tasks.append((target.tokenizer.encode(f"{line}\n{line}\n{words[0]}"), " " + " ".join(words[1:])))
        for number, (prompt, words) in enumerate(tasks):
            answer = engine.generate([prompt], Sampling(max_tokens=asked.before + most))[0].tokens
            before = asked.before if words is None else 0
            if words is not None and not target.tokenizer.decode(answer).startswith(words):
                continue  # the target can't do it
            if len(answer) < before + most and words is None:
                continue
            text = [*prompt, *answer[:before]]
            _, hidden, stacked = target_rows(target, text[:-1])
            for name, (draft, _) in made.items():
                states = draft.states(stacked) if draft.wants_layers else hidden if draft.wants_hidden else None
                said = alone(draft, target, text, states, most)
                if words is not None:
                    copied[name].append(target.tokenizer.decode(said).startswith(words))
                    continue
                if said:
                    logits = target_rows(target, [*text, *said])[0][len(text) - 1 : -1].float()
                    logs, tokens = logits.log_softmax(-1), torch.tensor(said)
                    nll = -logs.gather(1, tokens[:, None])[:, 0]
                    agreement = (logits.argmax(-1) == tokens).float()
                    same = (tokens == torch.tensor(answer[before:])[: len(said)]).float().cumprod(0)
                    around = [float(token in said[max(0, place - _NEAR) : place]) for place, token in enumerate(said)]
                    values = (nll, agreement, -logs.amax(-1), same, torch.tensor(around))
                    found[name].append(torch.stack(values, dim=1).tolist())
            tell("cut", seed, number, len(tasks))
        for name, several in found.items():
            match = np.mean(copied[name]) if copied[name] else ""
            for low, high in zip((0, *DISTANCES[:-1]), DISTANCES, strict=True):
                some = [values for each in several for values in each[low:high]]
                row = {"table": "cut", "seed": seed, "contestant": name, "requests": len(several), "tokens": len(some)}
                row |= {"tokens_since_cut": high, "exact_match": match}
                if some:
                    names = ("nll", "agreement", "nll_of_target", "same_so_far", "repeated")
                    row |= dict(zip(names, np.mean(some, axis=0), strict=True))
                rows.append(row | _of_training(made[name][1]))
    return rows


TABLES = {"speed": speed, "cut": cut}
SHOWN = {
    "speed": ("tokens_per_call", "c", "t_rows", "x_plain", "x_eagle", "paper_tokens_per_call", "paper_speed_up"),
    "cut": ("tokens", "agreement", "nll", "nll_of_target", "same_so_far", "repeated", "exact_match"),
}


def table(rows: list[dict]) -> list[str]:
    """Lines for the screen: means over seeds, and the lowest and highest of the ratio to EAGLE."""
    lines = []
    for kind in dict.fromkeys(row["table"] for row in rows):
        some = [row for row in rows if row["table"] == kind]
        heads = SHOWN[kind]
        lines.append(f"{kind:30} since" + "".join(f"{head[:13]:>14}" for head in heads) + "  seeds")
        for name, since in dict.fromkeys((row["contestant"], row.get("tokens_since_cut", "")) for row in some):
            same = [r for r in some if (r["contestant"], r.get("tokens_since_cut", "")) == (name, since)]
            figures = []
            for head in heads:
                values = [float(r[head]) for r in same if r.get(head) not in ("", None)]
                figures.append(f"{np.mean(values):.3g}" if values else "")
            spread = sorted(float(r["x_eagle"]) for r in same if r.get("x_eagle") not in ("", None))
            spread = f"{spread[0]:.2f}-{spread[-1]:.2f}" if spread else ""
            problem = next((r["problem"] for r in same if r.get("problem")), "")
            lines.append(
                f"{name:30} {since!s:>5}" + "".join(f"{f:>14}" for f in figures) + f"  {len(same)} {spread} {problem}"
            )
    return lines


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.decode --system mixture_of_attentions", description=__doc__.splitlines()[0]
    )
    made.add_argument("--mixture", nargs="+", required=True, help="folders of specdec_ops.train.mixture_of_attentions")
    made.add_argument("--eagle", nargs="*", default=[str(EAGLE)], help="folders of specdec_ops.train.eagle")
    made.add_argument("--sorted", help="a folder of specdec_ops.train.soft: S2D, and its first layers as small models")
    made.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    made.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--count", type=int, default=2, help="prompts of each set for each seed (default: 2)")
    made.add_argument("--tokens", type=int, default=64, help="the most tokens of an answer (default: 64)")
    made.add_argument("--before", type=int, default=24, help="tokens of an answer before the cut (default: 24)")
    made.add_argument("--copies", type=int, default=4, help="lines of words to be copied, for each seed (default: 4)")
    made.add_argument("--out", type=Path, help="the CSV")
    made.add_argument("--append", action="store_true", help="to that file")
    return made


def main(arguments: list[str]) -> int:
    """Runs table after table; each is on the disk when it is done."""
    asked = parser().parse_args(arguments)
    began = time.perf_counter()
    out = asked.out or ROOT / "benchmarks" / "results" / "local" / "decode-mixture_of_attentions.csv"
    every: list[dict] = results.read(out) if asked.append and out.exists() else []
    fixed = describe("cpu", arguments)
    fixed["command"] = fixed["command"].replace("benchmarks.run", "benchmarks.decode --system mixture_of_attentions")
    target = load(model_file())
    made = drafts_of(asked, target)
    step = 1 + max(asked.seed)
    sets = [prompts.load(name, asked.count * step) for name in prompts.PACKAGES]
    ids = {
        seed: [target.tokenizer.encode(chat_prompt(target, q)) for some in sets for q in some[seed::step]]
        for seed in asked.seed
    }

    def tell(kind: str, seed: int, number: int, of: int) -> None:
        spent = time.perf_counter() - began
        print(f"[{spent:5.0f} s] {kind}, seed {seed}: {number + 1} of {of}", file=sys.stderr, flush=True)

    for kind in asked.table:
        rows = [row | fixed for row in TABLES[kind](asked, target, made, ids, tell)]
        results.write(out, rows, not every, COLUMNS)
        every += rows
    print("\n".join(table(every)))
    return 1 if any(row.get("problem") for row in every) else 0
