"""Texts to train a draft on, and the target's last rows over them: the target's own answers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.engine import Engine
from specdec_ops.decode.sampling import Sampling
from specdec_ops.drafts.base import Draft, Drafted, Proposer
from specdec_ops.tree import Tree

GROUP = 64  # texts that are made together
_BATCH = 32  # of them at once
_QUESTION = 40  # the most tokens that a question gets after its beginning

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
    *("Discuss the role of", "Describe the main principles of", "Provide an overview of", "Analyze the", "Argue for"),
    *("Read the following paragraph and", "Extract the", "Classify", "Given the following", "In which year", "Find"),
    *("A farmer has", "The sum of", "A company sells", "Write a C program to", "Implement", "Write an SQL query that"),
    *("Act as a", "Answer as if you were", "Draft a letter to", "Write a speech on", "Write a review of", "Outline"),
    *("What are some", "What are the benefits of", "What is the best way to", "What is", "Can you explain", "Is it"),
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
        self._length, self._recorder = length, Recorder()
        self._before, self._after = _around_a_question(target.tokenizer)
        template = len(target.tokenizer.encode(self._before + self._after))
        most = min(target.shape.max_positions, template + 2 * _QUESTION + length)
        self._engine = Engine(target, self._recorder, max_batch=_BATCH, max_length=most, adapt=False)

    def group(self, number: int) -> list[Text]:
        """Questions that the target thinks up, and its answers: every second one greedy, the others sampled."""
        numbers = range(number * GROUP, (number + 1) * GROUP)
        begun = [self._before + BEGINNINGS[number % len(BEGINNINGS)] for number in numbers]
        asked = [
            Sampling(temperature=1.0, top_p=0.95, max_tokens=_QUESTION, stop="\n\n", seed=number, speculate=False)
            for number in numbers
        ]
        ended = self._engine.generate(begun, asked)
        prompts = [start + result.text.rstrip() + self._after for start, result in zip(begun, ended, strict=True)]
        asked = [Sampling(temperature=0.7 * (number % 2), max_tokens=self._length, seed=number) for number in numbers]
        self._recorder.texts = {}
        self._engine.generate(prompts, asked)
        return [text for text in self._recorder.texts.values() if len(text.tokens) > 2]


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
