"""Speculative decoding of a real pair of language models, with nothing to download, and a proof that it is lossless.

python examples/ngram_decode.py             the whole of it: minutes
python examples/ngram_decode.py --quick     shorter texts and fewer samples: half a minute

The target is a byte n-gram model of order 8, the draft one of order 4 (see ngram_model.py). Each round drafts a tree
with `sample_children`, scores all of its nodes with the target in one call, and lets one of the acceptance rules decide
what stays. Three things are checked, and the program fails if one does not hold:

- greedy decoding through every tree gives the bytes of plain greedy decoding;
- `match_accept` gives the bytes of plain sampling with `sample_tokens` at the same seed;
- every other lossless rule draws from the target's law: the joint distribution of the first three bytes, by a G test.

Then it prints how many bytes each call of the target gives, by rule and tree, and draws them if matplotlib is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable

import torch

from specdec_ops import (
    Acceptance,
    Topology,
    Tree,
    chain_accept,
    greedy_accept,
    match_accept,
    sample_children,
    sample_tokens,
    tree_accept,
)

if __package__:
    from .ngram_model import VOCAB, Counts, NgramModel, advance, context_of, standard_library
else:
    from ngram_model import VOCAB, Counts, NgramModel, advance, context_of, standard_library

TREES = {
    "chain of 5": Tree.chain(6),
    "fork 4, 4 deep": Tree.fork(4, 3, root=True),
    "4x2x2x1": Tree.from_branching((4, 2, 2, 1), root=True),
    "2x4x3x1x1": Tree.from_branching((2, 4, 3, 1, 1), root=True),
}
PROMPTS = (b"import ", b"class ", b"    def ", b"        return ", b"# This ", b'    """', b"    for ", b"raise ")
FALSE_ALARM = 1e-6  # of each test of a law, were the seeds not fixed
LEAST_EXPECTED = 20  # of a cell of such a test


@dataclasses.dataclass(frozen=True)
class Models:
    """A target and a draft over the same vocabulary of 256 bytes."""

    target: NgramModel
    draft: NgramModel


def load(draft_order: int = 4) -> Models:
    """Count the standard library: about a second. Draft and target agree on about two bytes in three."""
    counts = Counts(standard_library())
    return Models(NgramModel(counts, 8), NgramModel(counts, draft_order))


@dataclasses.dataclass(frozen=True)
class Round:
    """What a rule gets to see: a drafted tree and the target's opinion of it."""

    target_logits: torch.Tensor  # [batch, nodes, 256]
    tokens: torch.Tensor  # int32 [batch, nodes]
    draft_logits: torch.Tensor  # [batch, nodes, 256]; row n is what the children of node n come from
    topology: Topology
    options: dict  # seeds, positions, temperature


@dataclasses.dataclass(frozen=True)
class Rule:
    """An acceptance rule, and the kind of draft that it is lossless for."""

    name: str
    proposals: str  # "greatest": the draft's most likely bytes. "distinct", "repeated": drawn without, with replacement
    accept: Callable[[Round], Acceptance]
    chains_only: bool = False


def _greedy(drafted: Round) -> Acceptance:
    return greedy_accept(drafted.target_logits, drafted.tokens, drafted.topology)


def _match(drafted: Round) -> Acceptance:
    return match_accept(drafted.target_logits, drafted.tokens, drafted.topology, **drafted.options)


def _chain(rule: str) -> Callable[[Round], Acceptance]:
    def accept(drafted: Round) -> Acceptance:
        tokens, rows = drafted.tokens[:, 1:], drafted.draft_logits[:, :-1]
        return chain_accept(drafted.target_logits, tokens, rows, rule=rule, **drafted.options)

    return accept


def _tree(rule: str, proposals: str) -> Callable[[Round], Acceptance]:
    def accept(drafted: Round) -> Acceptance:
        rows = None if proposals == "greatest" else drafted.draft_logits
        repeated = proposals == "repeated" and rule != "kseq"  # kseq always takes repeated draws
        given = (drafted.target_logits, drafted.tokens, drafted.topology, rows)
        return tree_accept(*given, rule=rule, replacement=repeated, **drafted.options)

    return accept


GREEDY = Rule("greedy, temperature 0", "greatest", _greedy)
MATCH = Rule("match", "greatest", _match)
SAMPLING_RULES = (
    Rule("token", "distinct", _chain("token"), chains_only=True),
    Rule("block", "distinct", _chain("block"), chains_only=True),
    Rule("recursive", "distinct", _tree("recursive", "distinct")),
    Rule("recursive, repeated draws", "repeated", _tree("recursive", "repeated")),
    Rule("recursive, top children", "greatest", _tree("recursive", "greatest")),
    Rule("traversal", "distinct", _tree("traversal", "distinct")),
    Rule("traversal, repeated draws", "repeated", _tree("traversal", "repeated")),
    Rule("traversal, top children", "greatest", _tree("traversal", "greatest")),
    Rule("target_only, top children", "greatest", _tree("target_only", "greatest")),
    Rule("kseq, repeated draws", "repeated", _tree("kseq", "repeated")),
)
RULES = (*SAMPLING_RULES, Rule("match, top children", "greatest", _match))


def draft(
    models: Models, tree: Tree, topology: Topology, proposals: str, contexts: torch.Tensor, options: dict
) -> Round:
    """Grow a tree below each context, level by level, and score its nodes with one call of the target.

    Args:
        models: the target and the draft.
        tree: level-ordered, with one root: the last committed byte.
        topology: the same as tensors.
        proposals: how children are chosen, see Rule.
        contexts: int64 [batch].
        options: seeds, positions and temperature, which drafting and acceptance share.
    """
    batch, nodes = len(contexts), len(tree)
    tokens = torch.full((batch, nodes), -1, dtype=torch.int32)
    draft_logits = torch.zeros(batch, nodes, VOCAB)
    path = contexts[:, None].repeat(1, nodes)  # the context of every node
    temperature = 0.0 if proposals == "greatest" else options["temperature"]
    noise = {name: options[name] for name in ("seeds", "positions")}
    levels = tree.levels.tolist()
    for start, stop, end in zip(levels, levels[1:], levels[2:], strict=False):
        parents = torch.tensor(tree.parents[stop:end].tolist())
        ranks = (parents[:, None] == parents).tril(-1).sum(1)  # among its siblings, which are all on this level
        rows = models.draft(path[:, start:stop])
        children = sample_children(
            rows,
            int(ranks.max()) + 1,
            replacement=proposals == "repeated",
            first_parent=start,
            temperature=temperature,
            **noise,
        )
        draft_logits[:, start:stop] = rows
        tokens[:, stop:end] = children.tokens[:, parents - start, ranks]
        path[:, stop:end] = advance(path[:, parents], tokens[:, stop:end])
    return Round(models.target(path), tokens, draft_logits, topology, options)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Texts of one length, and what they cost."""

    tokens: torch.Tensor
    """int64 [batch, length]."""
    given: torch.Tensor
    """int64 [batch]: bytes that the rounds gave, the ones beyond `length` included."""
    calls: torch.Tensor
    """int64 [batch]: calls of the target, which are rounds."""

    @property
    def texts(self) -> list[str]:
        return [bytes(row).decode("latin-1") for row in self.tokens.tolist()]

    def tokens_per_call(self) -> tuple[float, float]:
        """The mean over all rounds, and its standard error from the spread between requests."""
        mean = (self.given.sum() / self.calls.sum()).item()
        residuals = self.given - mean * self.calls
        return mean, (residuals.square().sum().sqrt() / self.calls.sum()).item()


def decode(
    models: Models,
    rule: Rule,
    tree: Tree,
    prompts: Iterable[bytes],
    length: int,
    *,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> Decoded:
    """Speculative decoding of a batch. Requests that have `length` bytes leave the batch, which changes nobody's text.

    Args:
        models: the target and the draft.
        rule: how drafts are made and accepted.
        tree: the shape of every draft.
        prompts: one per request.
        length: bytes to decode.
        seeds: int64 [batch]; by default the requests' numbers.
        temperature: of the target and, unless the rule drafts its top bytes, of the draft.
    """
    prompts, topology = list(prompts), tree.to("cpu")
    seeds = torch.arange(len(prompts)) if seeds is None else seeds
    contexts = torch.tensor([context_of(prompt) for prompt in prompts])
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32)  # positions of node 0
    tokens = torch.full((len(prompts), length + tree.depth + 1), -1)
    given, calls = torch.zeros(len(prompts), dtype=torch.int64), torch.zeros(len(prompts), dtype=torch.int64)
    while True:
        active = (given < length).nonzero()[:, 0]
        if not len(active):
            return Decoded(tokens[:, :length], given, calls)
        options = {"seeds": seeds[active], "positions": last[active], "temperature": temperature}
        accepted = rule.accept(draft(models, tree, topology, rule.proposals, contexts[active], options))
        columns = given[active, None] + torch.arange(accepted.tokens.shape[1])
        kept = accepted.tokens >= 0
        tokens[active[:, None].expand_as(kept)[kept], columns[kept]] = accepted.tokens[kept].long()
        for step in accepted.tokens.long().unbind(1):
            contexts[active] = advance(contexts[active], step)
        given[active] += kept.sum(1)
        last[active] += kept.sum(1).int()
        calls[active] += 1


def decode_plainly(model: NgramModel, prompts: Iterable[bytes], length: int, *, seeds, temperature: float = 1.0):
    """One byte per call, with `sample_tokens`: what speculative decoding must not change. int64 [batch, length]."""
    prompts = list(prompts)
    contexts = torch.tensor([context_of(prompt) for prompt in prompts])
    next_position = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    tokens = torch.empty(len(prompts), length, dtype=torch.int64)
    for step in range(length):
        sampled = sample_tokens(model(contexts), seeds=seeds, positions=next_position + step, temperature=temperature)
        tokens[:, step] = sampled
        contexts = advance(contexts, sampled.long())
    return tokens


# ---- the three checks


def check_greedy(models: Models, length: int) -> int:
    """Greedy decoding through every tree equals plain greedy decoding. Returns how many bytes it compared."""
    seeds = torch.zeros(len(PROMPTS), dtype=torch.int64)
    plain = decode_plainly(models.target, PROMPTS, length, seeds=seeds, temperature=0.0)
    for name, tree in TREES.items():
        tokens = decode(models, GREEDY, tree, PROMPTS, length, temperature=0.0).tokens
        assert torch.equal(tokens, plain), f"greedy decoding with the {name} differs from plain greedy decoding"
    return len(TREES) * plain.numel()


def check_match(models: Models, length: int, temperature: float = 1.0) -> int:
    """match_accept equals plain sampling at the same seed, whatever is drafted. Returns how many bytes it compared."""
    seeds = torch.arange(len(PROMPTS)) - (1 << 62)
    plain = decode_plainly(models.target, PROMPTS, length, seeds=seeds, temperature=temperature)
    for name, tree in TREES.items():
        for proposals in ("greatest", "distinct"):
            rule = dataclasses.replace(MATCH, proposals=proposals)
            tokens = decode(models, rule, tree, PROMPTS, length, seeds=seeds, temperature=temperature).tokens
            assert torch.equal(tokens, plain), f"match_accept with the {name} differs from plain sampling"
    return 2 * len(TREES) * plain.numel()


def cells_of(model: NgramModel, prompt: bytes, length: int, draws: int) -> dict[tuple[int, ...], float]:
    """Cells of the joint law of the next `length` bytes, with their exact probabilities.

    A cell is a prefix. Bytes that are expected at least LEAST_EXPECTED times in `draws` get cells of their own, byte
    after byte; the others share the cell of the prefix before them, and where that is still too rare, the cell ().
    """
    cells = {(): 0.0}
    frontier = {(): (context_of(prompt), 1.0)}
    for depth in range(length):
        contexts = torch.tensor([context for context, _ in frontier.values()])
        rows = model(contexts).double().softmax(-1)
        longer = {}
        for (prefix, (context, mass)), row in zip(frontier.items(), rows, strict=True):
            joint = row * mass
            frequent = (joint * draws >= LEAST_EXPECTED).nonzero()[:, 0].tolist()
            for byte in frequent:
                key, probability = (*prefix, byte), joint[byte].item()
                following = advance(torch.tensor(context), torch.tensor(byte)).item()
                if depth + 1 < length:
                    longer[key] = following, probability
                else:
                    cells[key] = probability
            rest = mass - joint[frequent].sum().item()
            key = prefix if rest * draws >= LEAST_EXPECTED else ()
            cells[key] = cells.get(key, 0.0) + rest
        frontier = longer
    return cells


def g_test(tokens: torch.Tensor, cells: dict[tuple[int, ...], float]) -> tuple[float, int, float]:
    """G statistic of tokens [draws, length] against the cells, its degrees of freedom, and the chance of a larger G."""
    observed = dict.fromkeys(cells, 0)
    parents = {key[:size] for key in cells for size in range(len(key))}
    for row in map(tuple, tokens.tolist()):
        size = 0
        while size < len(row) and row[: size + 1] in parents:
            size += 1
        key = next((key for key in (row[: size + 1], row[:size]) if key in observed), ())
        observed[key] += 1
    draws = len(tokens)
    g = 2 * sum(n * math.log(n / (draws * cells[key])) for key, n in observed.items() if n)
    freedom = len(cells) - 1
    tail = torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(g / 2).double())
    return g, freedom, tail.item()


def check_law(models: Models, rule: Rule, draws: int, seed: int = 0) -> tuple[float, int, float]:
    """The joint law of three bytes, decoded `draws` times in as many rounds as they take, against the target's."""
    prompt, length = b"\n    def ", 3
    tree = Tree.chain(4) if rule.chains_only else Tree.from_branching((3, 2, 1), root=True)
    tokens = []
    for first in range(0, draws, 2048):
        seeds = torch.arange(first, min(draws, first + 2048)) + (seed << 32)
        tokens.append(decode(models, rule, tree, [prompt] * len(seeds), length, seeds=seeds).tokens)
    return g_test(torch.cat(tokens), cells_of(models.target, prompt, length, draws))


# ---- what it gains


def acceptance_lengths(models: Models, length: int = 48, copies: int = 4) -> list[dict]:
    """Bytes per call of the target, for every rule on every tree it is for, at temperature 1; and greedy, at 0.

    Args:
        models: the target and the draft.
        length: bytes of each text.
        copies: texts per prompt.

    Returns:
        One dict per tree and rule: tree, nodes, depth, rule, temperature, tokens_per_call, standard_error, calls.
    """
    prompts = PROMPTS * copies
    lines = []
    for name, tree in TREES.items():
        chain = tree.depth == len(tree) - 1
        for rule in (*RULES, GREEDY):
            if rule.chains_only and not chain:
                continue
            temperature = 0.0 if rule is GREEDY else 1.0
            decoded = decode(models, rule, tree, prompts, length, temperature=temperature)
            mean, error = decoded.tokens_per_call()
            lines.append(
                {
                    **{"tree": name, "nodes": len(tree), "depth": tree.depth, "rule": rule.name},
                    **{"temperature": temperature, "tokens_per_call": mean, "standard_error": error},
                    "calls": int(decoded.calls.sum()),
                }
            )
    return lines


def table(lines: list[dict]) -> list[str]:
    """The acceptance lengths as text: a line per rule, a column per tree."""
    trees = list(dict.fromkeys(line["tree"] for line in lines))
    rules = list(dict.fromkeys(line["rule"] for line in lines))
    found = {(line["rule"], line["tree"]): line for line in lines}
    rows = ["bytes per call of the target".ljust(28) + "".join(tree.rjust(16) for tree in trees)]
    for rule in rules:
        cells = [found.get((rule, tree)) for tree in trees]
        shown = ["" if c is None else f"{c['tokens_per_call']:.2f} ±{c['standard_error']:.2f}" for c in cells]
        rows.append(rule.ljust(28) + "".join(cell.rjust(16) for cell in shown))
    return rows


def plot(lines: list[dict], path) -> str:
    """Draw the acceptance lengths. Returns one line that says where, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    trees = list(dict.fromkeys(line["tree"] for line in lines))
    rules = list(dict.fromkeys(line["rule"] for line in lines))
    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    colours = matplotlib.colormaps["tab20"]
    for place, rule in enumerate(rules):
        mine = [line for line in lines if line["rule"] == rule]
        at = [trees.index(line["tree"]) + (place - len(rules) / 2) * 0.8 / len(rules) for line in mine]
        heights, errors = ([line[name] for line in mine] for name in ("tokens_per_call", "standard_error"))
        axes.bar(at, heights, 0.75 / len(rules), yerr=errors, label=rule, color=colours(place), error_kw={"lw": 0.7})
    nodes = {line["tree"]: line["nodes"] for line in lines}
    axes.set_xticks(range(len(trees)), [f"{tree}\n{nodes[tree]} nodes" for tree in trees])
    axes.set_ylabel("bytes per call of the target")
    axes.set_title("byte n-gram models of the Python standard library: order 8 as the target", fontsize=10)
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path}"


def run(models: Models, length: int, draws: int, sizes: tuple[int, int], plot_path: str | None) -> int:
    """Decode, check, count and draw. Returns 1 if some rule does not follow the target's law.

    Args:
        models: the target and the draft.
        length: of the texts that are printed and compared with plain decoding.
        draws: texts in each test of a law.
        sizes: length and copies for acceptance_lengths.
        plot_path: where to draw, or None.
    """
    tree = TREES["4x2x2x1"]
    decoded = decode(models, MATCH, tree, PROMPTS, length)
    for prompt, text in zip(PROMPTS, decoded.texts, strict=True):
        print(f"[{prompt.decode()}]{text[:160]}\n")
    print(f"greedy equals plain greedy decoding: {check_greedy(models, length)} bytes")
    print(f"match_accept equals plain sampling at the same seed: {check_match(models, length)} bytes")
    wrong = 0
    print(f"laws of the first three bytes, {draws} texts each, against the target's (chance of a larger G):")
    for seed, rule in enumerate(SAMPLING_RULES):
        g, freedom, tail = check_law(models, rule, draws, seed)
        wrong += tail < FALSE_ALARM
        print(f"  {rule.name:28} G {g:7.1f}, {freedom} degrees of freedom: {tail:.3f}")
    lines = acceptance_lengths(models, *sizes)
    print()
    print("\n".join(table(lines)))
    if plot_path is not None:
        print(plot(lines, plot_path))
    if wrong:
        print(f"{wrong} rules do not follow the target's law", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speculative decoding of byte n-gram models, checked and counted.")
    parser.add_argument("--quick", action="store_true", help="shorter texts and fewer samples: half a minute")
    parser.add_argument("--draft-order", type=int, default=4, help="order of the draft, 1 to 7")
    parser.add_argument("--plot", default="ngram_decode.png", help="where to draw the bytes per call")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rows of 256 bytes are too short to be worth a second thread
    try:
        sizes = (160, 8192, (48, 4)) if options.quick else (600, 65536, (256, 8))
        return run(load(options.draft_order), *sizes, None if options.no_plot else options.plot)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(main())
