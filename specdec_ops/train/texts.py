"""Texts to train a draft on, and the target's last rows over them: the target's own answers, and Python's library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.engine import Engine
from specdec_ops.decode.sampling import Sampling
from specdec_ops.drafts.base import Draft, Drafted, Proposer
from specdec_ops.tree import Tree

GROUP = 8  # texts that are made together
_SOURCE_CHARACTERS = 1200  # of one excerpt

# Beginnings of what people ask for. The target goes on with them at temperature 1, and then answers itself.
BEGINNINGS = (
    *("Explain how", "Explain why", "What is the difference between", "What are the main causes of", "Tell me about"),
    *("Write a short story about", "Write a poem about", "Write an email to", "Write a blog post about", "Write a"),
    *("Give me three tips for", "Give me a recipe for", "Give an example of", "List five", "List the steps to"),
    *("How do I", "How can I improve", "How does", "How many", "Why do people", "Why is", "When did", "Who was"),
    *("Summarize the history of", "Compare", "Describe a day in the life of", "Describe the process of", "Imagine"),
    *("Translate the sentence", "Rewrite the following sentence", "Suggest a name for", "Plan a trip to", "Solve:"),
    *("Write a Python function that", "Write a Python class for", "Fix this code:", "A train leaves", "If I have"),
    *("Pretend you are", "You are a", "I feel", "Can you help me with", "What would happen if", "What should I"),
)


class Text(NamedTuple):
    """A text that the target has run."""

    tokens: torch.Tensor
    """int32 [length]"""
    features: torch.Tensor
    """float16 [length - 1, dim]: the target's last rows after its final norm, but for that of the last token"""


class Recorder(Draft, Proposer):
    """Drafts nothing, and keeps the target's last rows of texts that have ended in `texts`. For one engine."""

    proposals = "deterministic"
    wants_hidden = True
    max_nodes = 1

    def __init__(self) -> None:
        self.texts: dict[int, Text] = {}

    def bind(self, target: Decoder, **_) -> Recorder:
        """See `Draft.bind`."""
        self._target, self._root = target, Tree.chain(1).to(target.shape.device)
        return self

    def start(self, request) -> None:
        """Nothing is known yet."""
        request.draft_state = []

    def see(self, request, start: int, hidden: torch.Tensor) -> None:
        """Keep them."""
        request.draft_state.append(self._target.norm(hidden).half())

    def propose(self, batch) -> Drafted:
        """The last token alone."""
        return Drafted(batch.last_tokens[:, None], self._root, is_chain=True)

    def drop(self, request) -> None:
        """The text has ended, or has to wait and is run again."""
        if request.finish_reason in ("eos", "length", "stop"):
            features = torch.cat(request.draft_state)[: len(request.ids) - 1].clone()  # not inference mode's
            self.texts[request.number] = Text(torch.tensor(request.ids, dtype=torch.int32), features.cpu())
        request.draft_state = None


class Writer:
    """Makes groups of texts. The same number gives the same group, so making them can be interrupted.

    Args:
        target: whose texts they are. It needs a tokenizer.
        length: the most tokens of an answer.
    """

    def __init__(self, target: Decoder, length: int = 256) -> None:
        self._target, self._length = target, length
        self._recorder = Recorder()
        self._engine = Engine(target, self._recorder, max_batch=GROUP, adapt=False)
        self._before, self._after = _around_a_question(target.tokenizer)
        self._files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))

    def group(self, number: int) -> list[Text]:
        """Answers of the target, or for every second number excerpts of Python's standard library."""
        kind = self._excerpts if number % 2 else self._answers
        prompts, asked = kind(number // 2 * GROUP)
        self._recorder.texts = {}
        self._engine.generate(prompts, asked)
        return [text for text in self._recorder.texts.values() if len(text.tokens) > 2]

    def _answers(self, first: int) -> tuple[list[str], list[Sampling]]:
        numbers = range(first, first + GROUP)
        begun = [self._before + BEGINNINGS[number % len(BEGINNINGS)] for number in numbers]
        asked = [
            Sampling(temperature=1.0, top_p=0.95, max_tokens=40, stop=("\n\n",), seed=number, speculate=False)
            for number in numbers
        ]
        ended = self._engine.generate(begun, asked)
        prompts = [start + result.text.rstrip() + self._after for start, result in zip(begun, ended, strict=True)]
        heat = (0.0, 0.7, 1.0)
        return prompts, [
            Sampling(temperature=heat[number % len(heat)], max_tokens=self._length, seed=number) for number in numbers
        ]

    def _excerpts(self, first: int) -> tuple[list[str], list[Sampling]]:
        return list(self._cut(range(first, first + GROUP))), [Sampling(max_tokens=1, eos=())] * GROUP

    def _cut(self, numbers: range) -> Iterator[str]:
        for number in numbers:
            text = self._files[number % len(self._files)].read_text(errors="replace")
            start = number // len(self._files) * _SOURCE_CHARACTERS % max(1, len(text) - _SOURCE_CHARACTERS)
            yield text[start : start + _SOURCE_CHARACTERS] or "\n"


def _around_a_question(tokenizer) -> tuple[str, str]:
    """What a chat template has before and after a question; for a model without one nothing and a new line."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "", "\n"
    mark = "QUESTION"
    messages = [{"role": "user", "content": mark}]
    before, _, after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).partition(
        mark
    )
    return before, after
