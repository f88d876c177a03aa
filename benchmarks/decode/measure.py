"""Cells and their rows: contestants take turns on the same prompts, and wrong text gets no time."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.harness.contestant import short

from .contestants import Contestant, Run, Task, one_row_seconds

NEAR_TIE = {"float32": 0.01, "blocks": 0.5}
"""By how much less than its best logit the model may like a greedy token.

Float32 sums in another order differ by far less. Blocks are multiplied with rounded rows; how far that moves logits has
not been measured, so the second figure is a guess on the wide side.
"""
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Unit:
    """Prompts that are answered at once, of one set ("mixed": of all)."""

    name: str
    prompts: list[list[int]]
    seed: int


def units_of(prompts: dict[str, list[list[int]]], batch: int) -> list[Unit]:
    """Of one prompt each, or of `batch` out of all sets in turn. What is left over at the end is left out."""
    if batch == 1:
        return [Unit(name, [prompt], 1000 * n) for name, some in prompts.items() for n, prompt in enumerate(some)]
    longest = max(map(len, prompts.values()))
    turns = [some[n] for n in range(longest) for some in prompts.values() if n < len(some)]
    starts = range(0, len(turns) - batch + 1, batch)
    return [Unit("mixed", turns[start : start + batch], 1000 * start) for start in starts]


@dataclasses.dataclass
class Entry:
    """A contestant in a cell: its run of each unit, and what is said of its texts."""

    contestant: Contestant
    runs: list[Run] = dataclasses.field(default_factory=list)
    problem: str = ""
    texts: str = ""


def run_cell(
    contestants: Sequence[Contestant],
    units: Sequence[Unit],
    temperature: float,
    length: int,
    eos: tuple[int, ...],
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Entry]:
    """Everyone does unit after unit, in an order that turns round from unit to unit. Each is run once before."""
    entries = [Entry(contestant) for contestant in contestants]
    batch = len(units[0].prompts)
    for entry in entries:
        entry.problem = entry.contestant.refuses(batch, temperature)
    there = [entry for entry in entries if not entry.problem]
    for entry in there:
        _run(entry, Task(units[0].prompts, temperature, min(length, 8), eos))
        entry.runs.clear()
    for number, unit in enumerate(units):
        for place, entry in enumerate(there if number % 2 == 0 else there[::-1]):
            tell(number * len(there) + place, len(units) * len(there))
            _run(entry, Task(unit.prompts, temperature, length, eos, unit.seed))
    return entries


def _run(entry: Entry, task: Task) -> None:
    if entry.problem:
        return
    try:
        entry.runs.append(entry.contestant.run(task))
    except Exception as error:  # one that fails must not end the run
        entry.problem = f"fails: {short(error)}"


def check(entries: list[Entry], units: Sequence[Unit], temperature: float, logits_of: Callable) -> None:
    """Judge the texts. Who is wrong gets a problem, and with it no time.

    Greedy: each token must be one that the target likes best, up to a near-tie; `texts` tells where the first text
    that is not Hugging Face's parts from it. Sampled: with rule "match" the text of our plain loop at the same seed.

    Args:
        entries: of a cell.
        units: of the cell.
        temperature: of the cell.
        logits_of: of token ids, [length, vocab]: Hugging Face's model.
    """
    base = next((entry for entry in entries if entry.contestant.role == "hugging face" and not entry.problem), None)
    plain = {e.contestant.weights: e for e in entries if e.contestant.role == "ours plain" and not e.problem}
    for entry in entries:
        if entry.problem or not entry.runs or any(answer is None for run in entry.runs for answer in run.answers):
            continue
        if temperature == 0:
            _check_greedy(entry, base, units, logits_of)
        elif entry.contestant.role == "ours" and entry.contestant.equals_plain:
            _check_sampled(entry, plain.get(entry.contestant.weights))


def _check_greedy(entry: Entry, base: Entry | None, units: Sequence[Unit], logits_of: Callable) -> None:
    allowed = NEAR_TIE[entry.contestant.weights]
    equal, partings = 0, []
    for number, (unit, run) in enumerate(zip(units, entry.runs, strict=True)):
        for place, (prompt, answer) in enumerate(zip(unit.prompts, run.answers, strict=True)):
            rows = logits_of(prompt + answer)[len(prompt) - 1 : -1]
            gaps = rows.amax(-1) - rows.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
            wrong = (~(gaps <= allowed)).nonzero()  # NaN is wrong
            if len(wrong):
                token = int(wrong[0])
                gap = f"{float(gaps[token]):.2g} below the best logit"
                entry.problem = f"WRONG: token {token} of prompt {number}.{place} is {gap}"
                return
            theirs = base.runs[number].answers[place] if base is not None else answer
            parting = first_difference(answer, theirs)
            equal += parting is None
            if parting is not None:
                partings.append(f"{number}.{place} at {parting} by {float(gaps[min(parting, len(gaps) - 1)]):.1e}")
    total = equal + len(partings)
    entry.texts = f"{equal} of {total} equal" + (f"; parts in prompt {', '.join(partings[:3])}" if partings else "")


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """The first token that is not the same; None if there is none."""
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _check_sampled(entry: Entry, plain: Entry | None) -> None:
    if plain is None:
        return
    for number, (run, other) in enumerate(zip(entry.runs, plain.runs, strict=True)):
        for place, (answer, expected) in enumerate(zip(run.answers, other.answers, strict=True)):
            parting = first_difference(answer, expected)
            if parting is not None:
                entry.problem = f"WRONG: prompt {number}.{place} parts from plain sampling at token {parting}"
                return
    entry.texts = "equal to plain sampling"


def ratio_of(runs: list[Run], to: list[Run]) -> tuple[float, float, float] | tuple[str, str, str]:
    """How many times as many tokens per second, over the same prompts, with its 95% interval.

    The interval is that of 2000 bootstrap samples of the prompts (of the groups of prompts with a batch above 1); it
    is empty with fewer than 3.
    """
    seconds, other = (np.array([run.seconds for run in some]) for some in (runs, to))
    tokens, others = (np.array([run.timed for run in some], dtype=float) for some in (runs, to))
    if not (seconds.sum() and others.sum() and tokens.sum()):
        return "", "", ""

    def rate(chosen) -> np.ndarray:
        ours = tokens[chosen].sum(-1) / seconds[chosen].sum(-1)
        theirs = np.maximum(others[chosen].sum(-1), 1e-9) / other[chosen].sum(-1)
        return ours / theirs  # of the same runs exactly 1

    ratio = float(rate(np.arange(len(runs))))
    if len(runs) < 3:
        return ratio, "", ""
    drawn = np.random.default_rng(0).integers(len(runs), size=(RESAMPLES, len(runs)))
    low, high = np.percentile(rate(drawn), (2.5, 97.5))
    return ratio, float(low), float(high)


def rows_of(entries: list[Entry], units: Sequence[Unit], temperature: float) -> list[dict]:
    """The lines of a cell: for each set of prompts, and for all, what each contestant did."""
    names = dict.fromkeys(unit.name for unit in units)
    groups = {name: [n for n, unit in enumerate(units) if unit.name == name] for name in names}
    if len(groups) > 1:
        groups["all"] = list(range(len(units)))
    batch = len(units[0].prompts)
    rows = []
    for name, chosen in groups.items():
        for entry in entries:
            row = {"prompts": name, "batch": batch, "temperature": temperature, "requests": len(chosen) * batch}
            contestant = entry.contestant
            row |= {"contestant": contestant.name, "role": contestant.role, "weights": contestant.weights}
            row |= {"problem": entry.problem, "texts": entry.texts}
            if not entry.problem and entry.runs:
                row |= _figures(entry, entries, chosen, batch)
            rows.append(row)
    return rows


def _figures(entry: Entry, entries: list[Entry], chosen: list[int], batch: int) -> dict:
    def runs_of(role: str, weights: str | None = None) -> list[Run]:
        usable = (other for other in entries if other.contestant.role == role and not other.problem and other.runs)
        found = next((other for other in usable if weights in (None, other.contestant.weights)), None)
        return [] if found is None else [found.runs[n] for n in chosen]

    runs = [entry.runs[n] for n in chosen]
    contestant = entry.contestant
    seconds, timed, calls = (sum(getattr(run, what) for run in runs) for what in ("seconds", "timed", "calls"))
    row = {
        "tokens": sum(run.tokens for run in runs),
        "tokens_per_call": sum(r.tokens for r in runs) / calls if calls else "",
    }
    row["tokens_per_second"] = timed / seconds if seconds else ""
    plain = runs_of("hugging face") if contestant.role == "hugging face" else runs_of("ours plain", contestant.weights)
    one = one_row_seconds(plain, batch)
    taken = [second for run in runs for second in run.pass_seconds]
    if taken and one:
        row["pass_ms"] = 1e3 * statistics.mean(taken)
        row["rows"] = statistics.mean(count for run in runs for count in run.pass_rows)
        row["t_rows"] = statistics.mean(taken) / one
        drafting = [second for run in runs for second in run.draft_seconds]
        row["c"] = statistics.mean(drafting) / one if drafting else ""
        if contestant.role.startswith("ours"):
            row["host_ms"] = 1e3 * (seconds - sum(taken) - sum(drafting)) / len(taken)
    for name, base in (("hf", runs_of("hugging face")), ("plain", runs_of("ours plain", contestant.weights))):
        if base:
            values = ratio_of(runs, base)
            row |= dict(zip((f"ratio_{name}", f"ratio_{name}_low", f"ratio_{name}_high"), values, strict=True))
    return row
