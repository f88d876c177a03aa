"""A client that drafts and a server that verifies, over lines of 10, 50 and 150 ms: calls and latency.

`python -m benchmarks.decode --system remote` decodes each prompt over each line with a per-token API (the client asks
for one token after another), with n-grams, and with the drafts that are given. The line is emulated on a clock that
jumps (`specdec_ops.remote.clock`), and models take the time that they really take, so an hour of waiting costs none;
with `--costs` they take what it says, and every run gives the same figures. Both ends run on this machine: a real
client may be slower, and a real server faster. Prompts and first tokens are not timed. A text that is not that of plain
decoding gets no figure.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.harness.machine import ROOT, describe
from specdec_ops import drafts
from specdec_ops.decode import Decoder, Engine, Sampling, chat_prompt
from specdec_ops.integrations.transformers import load
from specdec_ops.remote import Client, Link, Server
from specdec_ops.remote.clock import Inline, run

from . import prompts, results
from .demo import model_file

COLUMNS = (
    *("model", "rtt_ms", "draft", "temperature", "requests", "tokens", "calls", "calls_per_100_tokens", "accepted"),
    *("drafts_ready", "ms_per_token", "ratio_per_token_api", "bytes_per_token", "problem"),
    *("date", "commit", "machine", "isa", "threads", "specdec_ops", "torch", "python", "command"),
)
PER_TOKEN = "per-token API"


@dataclasses.dataclass(frozen=True)
class Talk:
    """One answer: its tokens, the seconds from the first round to the last, what both cost, and bytes each way."""

    tokens: list[int]
    first: int
    seconds: float
    stats: object
    bytes: int


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m benchmarks.decode --system remote", description=__doc__.splitlines()[0])
    made.add_argument("--rtt", type=float, nargs="+", default=[10.0, 50.0, 150.0], help="milliseconds of a round trip")
    made.add_argument("--count", type=int, default=1, help="prompts of each set (default: 1)")
    made.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument(
        "--draft",
        nargs="*",
        default=["layers:6"],
        help="more drafts: a folder with a saved draft or a smaller model, or layers:N (the target's first layers, "
        "not trained for it)",
    )
    made.add_argument("--steps", type=int, default=8, help="the most tokens that a smaller model drafts (default: 8)")
    made.add_argument(
        "--costs",
        type=float,
        nargs=2,
        metavar=("PASS", "DRAFT"),
        help="milliseconds of a pass of the server, of a draft",
    )
    made.add_argument("--out", type=Path, help="the CSV")
    return made


def drafts_of(asked, target: Decoder) -> dict[str, drafts.Draft | None]:
    """By their names; None asks for one token after another."""
    made: dict[str, drafts.Draft | None] = {PER_TOKEN: None, "n-grams": drafts.Ngram()}
    for name in asked.draft:
        about = Path(name) / "draft.json"
        if about.is_file():
            made[json.loads(about.read_text())["draft"]] = drafts.load(name, target)
        elif name.startswith("layers:"):
            count = int(name.removeprefix("layers:"))
            shape = target.shape._replace(layers=count)
            model = dataclasses.replace(target, shape=shape, layers=target.layers[:count])
            made[f"first {count} layers"] = drafts.Chain(model, asked.steps)
        else:
            made[Path(name).name] = drafts.Chain(load(name), asked.steps)
    return made


def talk(target: Decoder, draft, ids: list[int], sampling: Sampling, rtt: float, costs=(None, None)) -> Talk:
    """An answer over a line, on a clock of its own. A pass and a draft take `costs`, or their time."""

    async def answer() -> Talk:
        link, states = Link(rtt=rtt), draft is not None and draft.wants_hidden
        if draft is not None and draft.wants_layers:
            states = draft
        length = len(ids) + sampling.max_tokens + 8
        options = {"target": target if states else None, "connect": None, "deadline": 1e6, "give_up": 1e7}
        async with Server(target, states=states, work=Inline(costs[0]), max_batch=1, max_length=length) as server:
            options["connect"] = functools.partial(link.connect, server.accept)
            loop, first, began = asyncio.get_running_loop(), 0, 0.0
            async with Client(draft=draft, work=Inline(costs[1]), silence=1e6, **options) as client:
                async for piece in client.stream(ids, sampling):
                    if not first and piece.tokens:
                        first, began = len(piece.tokens), loop.time()
                    if piece.tokens:
                        ended = loop.time()
                result = piece.result
            return Talk(result.tokens, first, ended - began, result.stats, link.bytes_up + link.bytes_down)

    return run(answer())


def row_of(name: str, talks: list[Talk], expected: list[list[int]], api: list[Talk]) -> dict:
    """A line of the table."""
    row = {"draft": name, "requests": len(talks), "tokens": sum(len(one.tokens) for one in talks)}
    if [one.tokens for one in talks] != expected:
        return row | {"problem": "WRONG: the text is not that of plain decoding"}
    calls = sum(one.stats.calls for one in talks)
    drafted = sum(one.stats.drafted for one in talks)
    row |= {"calls": calls, "calls_per_100_tokens": 100 * calls / row["tokens"]}
    row["accepted"] = sum(one.stats.accepted for one in talks) / drafted if drafted else ""
    row["drafts_ready"] = sum(one.stats.ahead for one in talks) / calls if drafted else ""
    row["ms_per_token"] = 1e3 * sum(t.seconds for t in talks) / sum(len(t.tokens) - t.first for t in talks)
    row["bytes_per_token"] = sum(one.bytes for one in talks) / row["tokens"]
    if all(one.seconds > 0 for one in talks):
        pairs = zip(api, talks, strict=True)
        rate = [(a.seconds / (len(a.tokens) - a.first)) / (t.seconds / (len(t.tokens) - t.first)) for a, t in pairs]
        row["ratio_per_token_api"] = statistics.median(rate)
    return row


def table(rows: list[dict]) -> list[str]:
    """Lines for the screen."""
    names = {"calls_per_100_tokens": ".1f", "ms_per_token": ".1f", "ratio_per_token_api": ".2f", "accepted": ".2f"}
    names |= {"drafts_ready": ".2f", "bytes_per_token": ".0f"}
    heads = ("calls per 100", "ms a token", "x per-token", "accepted", "ready", "bytes a token")
    lines = [f"{'RTT':>6}  {'draft':18}" + "".join(f"{head:>15}" for head in heads)]
    for row in rows:
        figures = [format(row[n], form) if row.get(n) not in ("", None) else "" for n, form in names.items()]
        lines.append(f"{row['rtt_ms']:>4.0f}ms  {row['draft']:18}" + "".join(f"{figure:>15}" for figure in figures))
        if row.get("problem"):
            lines[-1] += f" {row['problem']}"
    return lines


def main(arguments: list[str]) -> int:
    """Runs line after line, and writes a CSV."""
    asked = parser().parse_args(arguments)
    began, path = time.perf_counter(), model_file()
    target = load(path)
    made = drafts_of(asked, target)
    questions = [question for name in prompts.PACKAGES for question in prompts.load(name, asked.count)]
    texts = [target.tokenizer.encode(chat_prompt(target, question)) for question in questions]
    settings = Sampling(temperature=asked.temperature, max_tokens=asked.tokens)
    samplings = [dataclasses.replace(settings, seed=seed) for seed in range(len(texts))]
    longest = max(map(len, texts)) + asked.tokens + 8
    plain = Engine(target, max_batch=1, max_length=longest)
    expected = [plain.generate([ids], one)[0].tokens for ids, one in zip(texts, samplings, strict=True)]
    kept = [place for place, tokens in enumerate(expected) if len(tokens) > asked.tokens // 4]
    fixed = describe("cpu", arguments) | {"model": path.name, "temperature": asked.temperature}
    fixed["command"] = fixed["command"].replace("benchmarks.run", "benchmarks.decode --system remote")
    rows, costs = [], (None, None) if asked.costs is None else tuple(cost / 1e3 for cost in asked.costs)
    for rtt in asked.rtt:
        api: list[Talk] = []
        for name, draft in made.items():
            print(f"[{time.perf_counter() - began:5.0f} s] {rtt:g} ms, {name}", file=sys.stderr, flush=True)
            talks = [talk(target, draft, texts[n], samplings[n], rtt / 1e3, costs) for n in kept]
            api = api or talks
            rows.append(fixed | {"rtt_ms": rtt} | row_of(name, talks, [expected[n] for n in kept], api))
    out = asked.out or ROOT / "benchmarks" / "results" / "local" / "decode-remote.csv"
    results.write(out, rows, header=True, columns=COLUMNS)
    print("\n".join(table(rows)))
    print(f"lines: {out.name}")
    return 1 if any(row.get("problem") for row in rows) else 0
