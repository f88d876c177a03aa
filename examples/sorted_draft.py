"""One sorted draft for several targets at once, in one process: the scenario of S2D (Kavehzadeh et al., 2024).

The draft is made once, of the first layers of one of the models; the others need its tokenizer: fine-tuned ones, larger
or smaller ones, quantised ones. Each engine keeps keys and values of its own. A token leaves the draft at
the first exit that is sure enough of it, and every answer is what its target alone would say.

python -m specdec_ops.train.soft --target MODEL --out DRAFT --distill 1     makes a draft
python examples/sorted_draft.py DRAFT MODEL [MODEL ...]                     folders of Hugging Face, or GGUF files
"""

from __future__ import annotations

import argparse
import dataclasses

from specdec_ops import drafts
from specdec_ops.decode import Decoder, Engine, Result, Sampling

QUESTIONS = ("Why is the sky blue?", "Write a Python function that reverses a string.", "Name three large cities.")


@dataclasses.dataclass(frozen=True)
class Served:
    """What one target has said.

    left: how many drafted tokens left at each exit.
    layer_rows: rows of the draft's layers that were run, those that were caught up with included.
    """

    results: list[Result]
    left: list[int]
    layer_rows: int

    @property
    def tokens_per_call(self) -> float:
        """Tokens for each pass of the target."""
        return sum(r.stats.tokens for r in self.results) / sum(r.stats.target_calls for r in self.results)


def serve(draft: drafts.Sorted, targets: list[Decoder], prompts: list, sampling: Sampling) -> list[Served]:
    """All prompts by all targets, which take turns: a round of one lies between two rounds of another."""
    engines = [Engine(target, draft, adapt=False) for target in targets]
    numbers = [[engine.submit(prompt, sampling) for prompt in prompts] for engine in engines]
    results: list[dict[int, Result]] = [{} for _ in engines]
    while not all(engine.is_idle for engine in engines):
        for engine, found in zip(engines, results, strict=True):
            found |= {chunk.request: chunk.result for chunk in engine.step() if chunk.result is not None}
    served = []
    for engine, found, order in zip(engines, results, numbers, strict=True):
        counts = engine.proposer.counts
        served.append(Served([found[number] for number in order], counts.left, counts.layer_rows))
    return served


def asked(target: Decoder, question: str) -> str:
    """A question in the form of the model's chats, if it has one."""
    if getattr(target.tokenizer, "chat_template", None) is None:
        return question
    chat = [{"role": "user", "content": question}]
    return target.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode with several targets and one sorted draft.")
    parser.add_argument("draft", help="a folder that specdec_ops.train.soft has written")
    parser.add_argument("models", nargs="+", help="targets: folders of Hugging Face models, or GGUF files")
    parser.add_argument("--thresholds", type=float, nargs="+", help="one for each exit (default: those in the folder)")
    parser.add_argument("--tree", action="store_true", help="draft trees")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: 64)")
    arguments = parser.parse_args()
    from specdec_ops.integrations.transformers import load

    options = {"tree": drafts.TreeShape()} if arguments.tree else {}
    if arguments.thresholds:
        options["thresholds"] = arguments.thresholds
    draft = drafts.Sorted.load(arguments.draft, **options)
    targets = [load(model) for model in arguments.models]
    prompts, sampling = [asked(targets[0], q) for q in QUESTIONS], Sampling(max_tokens=arguments.tokens)
    for target, served in zip(targets, serve(draft, targets, prompts, sampling), strict=True):
        shares = ", ".join(
            f"{n / sum(served.left):.0%} after {e}" for n, e in zip(served.left, draft.exits, strict=True)
        )
        print(f"\n{target.name}: {served.tokens_per_call:.2f} tokens a pass; of what was drafted {shares} layers;")
        print(f"{served.layer_rows / sum(served.left):.1f} rows of layers for each drafted token, prompts included")
        for question, result in zip(QUESTIONS, served.results, strict=True):
            print(f"  {question} -> {result.text.strip()[:200]!r}")


if __name__ == "__main__":
    main()
