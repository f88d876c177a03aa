"""Early exit of a sorted draft: how deep its tokens go, what they cost and what they lose, as thresholds move.

The draft of toy_draft.py (trained first if it isn't in the cache) reads on in text that it has not seen, and guesses
each next byte: once along the text itself, as under a target that writes it, and once along its own greedy words, which
repeat themselves and so are easier. A token leaves at the first exit whose probability reaches the threshold
(`early_exit`); the layers behind that exit catch up when a later token needs them (`LayerCache`). Each setting is
compared with the full depth at every token, and timed, taking turns, against always running the full depth without any
check.

python examples/sorted_exit.py             table, and a plot beside the cached weights
python examples/sorted_exit.py --quick     with a tiny model, in half a minute, training included
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch

from specdec_ops import LayerCache, early_exit, exit_confidence

if __package__:
    from examples import toy_draft
else:
    import toy_draft

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SAME = 1e-4  # logits this near to the highest are equal: two ways of summing float32 may differ in which one is first


@dataclasses.dataclass
class Decoded:
    """What the draft said along one text."""

    tokens: list[int]
    """Its guess of each byte behind the prompt."""
    depths: list[int]
    """The layer at which each token left."""
    rows: int = 0
    """Layers run, times their rows, without the prompt's: a token that is caught up with counts here."""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: one threshold over all prompts."""

    threshold: float
    per_exit: dict[int, int]
    """Tokens that left at each layer."""
    agreement: float
    """The part of tokens that the full depth would have chosen after the same text."""
    right: float
    """The part that was the text's own next byte."""
    depth: float
    """Average layer at which tokens left: layers that had to run, one after another, per token."""
    rows: float
    """Rows of layers per token, those of catch-ups included."""
    time_saved: float
    """Median over prompts of 1 - time / time of the full depth."""


def run_group(model: toy_draft.SortedDraft, cache: LayerCache, group: int, decoded: Decoded) -> torch.Tensor:
    """The layers up to the next exit, over all rows that wait for them; the newest rows."""
    run = cache.run(group)
    hidden = run.hidden
    for index in cache.layers(group):
        hidden = model.layers[index](
            hidden, run.positions, lambda q, k, v, index=index: cache.attend(run, index, q, k.contiguous(), v)
        )
    decoded.rows += len(cache.layers(group)) * len(hidden)
    return cache.finish(run, hidden)


@torch.inference_mode()
def decode(
    model: toy_draft.SortedDraft,
    prompt: torch.Tensor,
    text: torch.Tensor,
    threshold: float | None,
    own: bool = False,
) -> Decoded:
    """Guess every byte of `text` [rows] behind `prompt` [rows].

    After each guess comes the text's byte or, with `own`, the guess itself. A threshold of None: always the full depth,
    checked nowhere before.
    """
    settings = model.settings
    cache = LayerCache(
        settings.exits, len(prompt) + len(text), settings.heads, settings.dim // settings.heads, settings.dim
    )
    head = {"head": model.head.weight, "norm_weight": model.norm.weight, "norm_eps": model.norm.eps}
    decoded, last = Decoded([], []), len(settings.exits) - 1
    start, rows = time.perf_counter(), prompt
    for step in range(len(text)):
        cache.append(model.embedding(rows))
        for group, depth in enumerate(settings.exits):
            newest = run_group(model, cache, group, decoded)[-1:]
            if group == last:
                confidence = exit_confidence(newest, **head)
            elif threshold is None or step == 0:  # S2D runs the prompt through all layers
                continue
            else:
                decision = early_exit(newest, threshold=threshold, **head)
                if not decision.exited.item():  # the one place that waits for the device
                    continue
                confidence = decision.confidence
            decoded.depths.append(depth)
            break
        decoded.tokens.append(confidence.token.item())
        rows = confidence.token.long() if own else text[step : step + 1]
    decoded.seconds = time.perf_counter() - start
    decoded.rows -= (len(prompt) - 1) * settings.exits[-1]
    return decoded


@torch.inference_mode()
def agreeing(model: toy_draft.SortedDraft, prompt: torch.Tensor, text: torch.Tensor, tokens: list[int]) -> int:
    """How many guesses along `text` the full depth would have made, by one pass over all of it without a cache."""
    guesses = torch.tensor(tokens)
    logits = model(torch.cat([prompt, text])[None, :-1])[-1][0, len(prompt) - 1 :]
    return int((logits.gather(1, guesses[:, None])[:, 0] >= logits.max(1).values - SAME).sum())


def measure(model: toy_draft.SortedDraft, texts: torch.Tensor, own: bool, thresholds=THRESHOLDS) -> list[Line]:
    """Every threshold on every text [texts, rows], in turn with the full depth, which is the first line."""
    contestants = (None, *thresholds)
    first = texts.shape[1] // 4
    pairs = [(text[:first], text[first:]) for text in texts]
    decode(model, *pairs[0], 0.5)  # the first call of everything
    results = [[decode(model, *pair, threshold, own) for threshold in contestants] for pair in pairs]
    lines = []
    for index, threshold in enumerate(contestants):
        column = [row[index] for row in results]
        depths = [depth for decoded in column for depth in decoded.depths]
        equal = right = 0
        for (prompt, text), decoded in zip(pairs, column, strict=True):
            tokens = decoded.tokens
            equal += agreeing(model, prompt, torch.tensor(tokens) if own else text, tokens)
            right += sum(guess == byte for guess, byte in zip(tokens, text.tolist(), strict=True))
        lines.append(
            Line(
                threshold=float("inf") if threshold is None else threshold,
                per_exit={depth: depths.count(depth) for depth in model.settings.exits},
                agreement=equal / len(depths),
                right=right / len(depths),
                depth=statistics.mean(depths),
                rows=sum(decoded.rows for decoded in column) / len(depths),
                time_saved=statistics.median(1 - row[index].seconds / row[0].seconds for row in results),
            )
        )
    return lines


def show(title: str, lines: list[Line]) -> None:
    print(f"\n{title}")
    exits = "".join(f"{f'exit {depth}':>9}" for depth in lines[0].per_exit)
    print(f"{'threshold':>10}{exits}{'agreement':>11}{'right':>8}{'depth':>7}{'layer rows':>12}{'time saved':>12}")
    for line in lines:
        name = "full depth" if line.threshold == float("inf") else f"{line.threshold:.2f}"
        counts = "".join(f"{count:9}" for count in line.per_exit.values())
        print(
            f"{name:>10}{counts}{line.agreement:11.1%}{line.right:8.1%}{line.depth:7.2f}{line.rows:12.2f}{line.time_saved:12.0%}",
            flush=True,
        )


def plot(lines: list[Line], file: Path) -> None:
    """Tokens per exit as bars; agreement and time saved as lines. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = lines[1:]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    names, below = [f"{line.threshold:.1f}" for line in lines], [0.0] * len(lines)
    shades = ("#1f5fa8", "#7aa6d6", "#d1661b", "#3c8d40", "#8e4585")
    for shade, depth in zip(shades, lines[0].per_exit, strict=False):
        parts = [line.per_exit[depth] / sum(line.per_exit.values()) for line in lines]
        left.bar(names, parts, bottom=below, color=shade, label=f"layer {depth}")
        below = [a + b for a, b in zip(below, parts, strict=True)]
    left.set_ylabel("part of the tokens that left at")
    curves = {"agreement": ("agrees with the full depth", "#3c8d40"), "time_saved": ("time saved", "#d1661b")}
    for value, (label, colour) in curves.items():
        right.plot(names, [getattr(line, value) for line in lines], marker="o", color=colour, label=label)
    right.axhline(0, color="#999999", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("threshold on the highest probability")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    print(f"plot in {file}")


def main(arguments: list[str] | None = None) -> dict[str, list[Line]]:
    parser = argparse.ArgumentParser(description="Early exit of a sorted draft, as thresholds move.")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--retrain", action="store_true", help="even if the weights are cached")
    parser.add_argument("--texts", type=int, help="pieces of held-out text (12; 3 with --quick)")
    parser.add_argument("--plot", type=Path, help="where to write the plot (beside the weights)")
    given = parser.parse_args(arguments)
    settings = toy_draft.QUICK if given.quick else toy_draft.Settings()
    if given.quick:
        torch.set_num_threads(1)  # too small for two
    model, history = toy_draft.load(settings, retrain=given.retrain)
    torch.set_num_threads(1)  # one row of 256 numbers is over before a second thread has started
    print(f"training loss {history[0]:.2f} -> {statistics.mean(history[-20:]):.2f} nats per byte, mean of the exits")
    generator = torch.Generator().manual_seed(2)
    count = given.texts or (3 if given.quick else 12)
    texts = toy_draft.windows(toy_draft.corpus()[1], count, settings.context, generator)
    tables = {}
    for title, own in (("along the text", False), ("along its own words", True)):
        tables[title] = measure(model, texts, own)
        show(title, tables[title])
    plot(tables["along the text"], given.plot or toy_draft.cache_file(settings).with_suffix(".png"))
    return tables


if __name__ == "__main__":
    main()
