"""Decode a prompt: `python -m specdec_ops.decode --model FOLDER --draft ngram "Once upon a time"`."""

from __future__ import annotations

import argparse
import os
import sys
import time

from specdec_ops.decode import Engine, Sampling
from specdec_ops.drafts import Chain, Eagle, Ngram
from specdec_ops.drafts.checkpoint import is_draft

DRAFTS = "ngram, none, or a folder or GGUF file with a trained draft or a smaller model (default: ngram)"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m specdec_ops.decode", description=__doc__)
    made.add_argument("prompt", help="the text to go on with, or with --chat a question; - reads it from the input")
    made.add_argument("--model", required=True, help="a folder with a Hugging Face model, or a GGUF file")
    made.add_argument("--draft", default="ngram", help=DRAFTS)
    made.add_argument("--steps", type=int, default=5, help="tokens that a model drafts (default: 5)")
    made.add_argument("--rule", default="auto", help="the acceptance rule (default: a lossless one for the draft)")
    made.add_argument("--weights", choices=("int8", "bfloat16"), help="quantise the weights of the model")
    made.add_argument("--max-tokens", type=int, default=128)
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--top-k", type=int, default=0)
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    made.add_argument("--diagnose", action="store_true", help="measure why the draft speeds up as much as it does")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the answer as it comes, and below it what it cost."""
    from specdec_ops.integrations.transformers import load

    asked = parser().parse_args(arguments)
    try:
        if asked.draft not in ("ngram", "none") and not os.path.exists(asked.draft):
            must = "ngram, none, or a folder or file that exists"
            raise ValueError(f"specdec_ops.decode: --draft must be {must}, got {asked.draft!r}")
        target = load(asked.model, weights=asked.weights)
        if asked.draft in ("ngram", "none"):
            draft = Ngram() if asked.draft == "ngram" else None
        elif is_draft(asked.draft):
            draft = Eagle.load(asked.draft, target)
        else:
            draft = Chain(load(asked.draft, weights=asked.weights), asked.steps)
        engine = Engine(target, draft, asked.rule, max_batch=1)
        prompt = sys.stdin.read() if asked.prompt == "-" else asked.prompt
        if asked.chat:
            prompt = chat_prompt(target, prompt)
        names = ("temperature", "top_k", "top_p", "seed", "max_tokens")
        sampling = Sampling(**{name: getattr(asked, name) for name in names})
        if asked.diagnose:
            print(engine.diagnose(prompt, max_tokens=asked.max_tokens))
            return 0
        return stream(engine, prompt, sampling)
    except (ValueError, TypeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


def chat_prompt(target, question: str) -> str:
    """The question in the chat template of the target's tokenizer."""
    if getattr(target.tokenizer, "chat_template", None) is None:
        raise ValueError("specdec_ops.decode: --chat needs a model whose tokenizer has a chat template")
    messages = [{"role": "user", "content": question}]
    return target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def stream(engine: Engine, prompt: str, sampling: Sampling) -> int:
    """Print an answer while it grows."""
    start, result = time.perf_counter(), None
    first = None
    for chunk in engine.stream(prompt, sampling):
        first = first or time.perf_counter()
        print(chunk.text, end="", flush=True)
        result = chunk.result
    seconds = time.perf_counter() - first
    rate = (len(result.tokens) - 1) / seconds if seconds > 0 else 0.0
    stats = result.stats
    print(
        f"\n\n[{len(result.tokens)} tokens, {rate:.1f} a second after {first - start:.2f} s for the first, "
        f"{stats.tokens_per_call:.2f} per pass of the target; ended by {result.finish_reason}]",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
