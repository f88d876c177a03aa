"""Whether speculative decoding changes nothing: three checks on real models. The program fails if one does not hold.

python -m benchmarks.decode.lossless             the whole of it: minutes
python -m benchmarks.decode.lossless --quick     shorter texts and fewer samples: half a minute

- Greedy decoding through every tree gives the bytes of plain greedy decoding.
- `match_accept` gives the bytes of plain sampling with `sample_tokens` at the same seed.
- Every other lossless rule draws from the target's law: the joint distribution of the first three bytes, by a G test.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys

import torch

from specdec_ops import Tree

from . import ngram_decode
from .ngram_decode import GREEDY, MATCH, Models, Rule, decode, decode_plainly
from .ngram_model import NgramModel, advance, context_of

FALSE_ALARM = 1e-6  # of each test of a law, were the seeds not fixed
LEAST_EXPECTED = 20  # of a cell of such a test


def check_greedy(models: Models, length: int) -> int:
    """Greedy decoding through every tree equals plain greedy decoding. Returns how many bytes it compared."""
    seeds = torch.zeros(len(ngram_decode.PROMPTS), dtype=torch.int64)
    plain = decode_plainly(models.target, ngram_decode.PROMPTS, length, seeds=seeds, temperature=0.0)
    for name, tree in ngram_decode.TREES.items():
        tokens = decode(models, GREEDY, tree, ngram_decode.PROMPTS, length, temperature=0.0).tokens
        assert torch.equal(tokens, plain), f"greedy decoding with the {name} differs from plain greedy decoding"
    return len(ngram_decode.TREES) * plain.numel()


def check_match(models: Models, length: int, temperature: float = 1.0) -> int:
    """match_accept equals plain sampling at the same seed, whatever is drafted. Returns how many bytes it compared."""
    seeds = torch.arange(len(ngram_decode.PROMPTS)) - (1 << 62)
    plain = decode_plainly(models.target, ngram_decode.PROMPTS, length, seeds=seeds, temperature=temperature)
    for name, tree in ngram_decode.TREES.items():
        for proposals in ("greatest", "distinct"):
            rule = dataclasses.replace(MATCH, proposals=proposals)
            tokens = decode(
                models, rule, tree, ngram_decode.PROMPTS, length, seeds=seeds, temperature=temperature
            ).tokens
            assert torch.equal(tokens, plain), f"match_accept with the {name} differs from plain sampling"
    return 2 * len(ngram_decode.TREES) * plain.numel()


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


def run(models: Models, length: int, draws: int) -> int:
    """Decode, show and check. Returns 1 if some rule does not follow the target's law.

    Args:
        models: the target and the draft.
        length: of the texts that are printed and compared with plain decoding.
        draws: texts in each test of a law.
    """
    tree = ngram_decode.TREES["4x2x2x1"]
    decoded = decode(models, MATCH, tree, ngram_decode.PROMPTS, length)
    for prompt, text in zip(ngram_decode.PROMPTS, decoded.texts, strict=True):
        print(f"[{prompt.decode()}]{text[:160]}\n")
    print(f"greedy equals plain greedy decoding: {check_greedy(models, length)} bytes")
    print(f"match_accept equals plain sampling at the same seed: {check_match(models, length)} bytes")
    wrong = 0
    print(f"laws of the first three bytes, {draws} texts each, against the target's (chance of a larger G):")
    for seed, rule in enumerate(ngram_decode.SAMPLING_RULES):
        g, freedom, tail = check_law(models, rule, draws, seed)
        wrong += tail < FALSE_ALARM
        print(f"  {rule.name:28} G {g:7.1f}, {freedom} degrees of freedom: {tail:.3f}")
    if wrong:
        print(f"{wrong} rules do not follow the target's law", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode.lossless", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter texts and fewer samples: half a minute")
    parser.add_argument("--draft-order", type=int, default=4, help="order of the draft, 1 to 7")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rows of 256 bytes are too short to be worth a second thread
    try:
        return run(ngram_decode.load(options.draft_order), *((160, 8192) if options.quick else (600, 65536)))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(main())
