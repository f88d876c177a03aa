"""`diagnose`: why a draft speeds a target up as much as it does, or doesn't."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from specdec_ops.drafts.base import Draft, Drafted
from specdec_ops.drafts.model_draft import chains
from specdec_ops.tree import Tree

from .batch import Batch, Law
from .cache import Cache
from .cache import Sequence as Pages
from .model import Model
from .request import Request
from .result import Result
from .rows import Rows
from .sampling import Sampling

_CHUNK = 256  # rows of a pass over a text
Prompt = str | Sequence[int]


class Engine(Protocol):
    """What a diagnosis asks of the engine."""

    target: Model
    draft: Draft
    rule: str
    cache: Cache
    on_round: Callable[[int, list[int], dict[str, float]], None] | None

    def encode(self, prompt: Prompt) -> list[int]: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Result]: ...


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `Engine.diagnose` found. `print` it.

    Attributes:
        agreement: for depths 1, 2, ...: how often the draft's tree, made afresh at a place of the target's own text,
            has the text's next tokens down to this depth.
        accepted: for the same depths: how often the engine accepted that far. Much less than `agreement` means that
            something is wired wrongly: another tokenizer, a cache that does not follow the text.
        pass_ms: rows to milliseconds of a pass of the target.
        draft_ms: milliseconds that the draft takes for a round.
        other_ms: milliseconds of a round beside draft and pass: acceptance, commit, the host.
        tokens_per_call: what a round gave.
        predicted: speed-up over plain decoding that follows from these.
        measured: seconds per token of plain decoding over those with the draft.
    """

    agreement: tuple[float, ...]
    accepted: tuple[float, ...]
    pass_ms: dict[int, float]
    draft_ms: float
    other_ms: float
    tokens_per_call: float
    predicted: float
    measured: float

    @property
    def cost_ratio(self) -> float:
        """c: a draft's round over a pass of one row."""
        return self.draft_ms / self.pass_ms[1]

    def __str__(self) -> str:
        one = self.pass_ms[1]
        times = ", ".join(f"t({rows}) {ms:.1f} ms ({ms / one:.2f}x)" for rows, ms in self.pass_ms.items())
        depths = "\n".join(
            f"  depth {depth}: {fresh:5.0%} afresh, {engine:5.0%} in the engine"
            for depth, (fresh, engine) in enumerate(zip(self.agreement, self.accepted, strict=True), 1)
        )
        verdict = "pays" if self.measured > 1 else "does not pay"
        return (
            f"the draft {verdict}: {self.measured:.2f}x plain decoding measured, {self.predicted:.2f}x predicted\n"
            f"tokens per pass of the target: {self.tokens_per_call:.2f}\n"
            f"passes of the target: {times}\n"
            f"a round: draft {self.draft_ms:.2f} ms (c = {self.cost_ratio:.2f}), the rest {self.other_ms:.2f} ms\n"
            f"how far drafts agree with the target:\n{depths}"
        )


def diagnose(engine: Engine, prompts: list[Prompt], max_tokens: int) -> Diagnosis:
    """See `Engine.diagnose`."""
    sampling = Sampling(max_tokens=max_tokens, eos=())
    texts = [engine.encode(prompt) for prompt in prompts]
    plain_seconds, answers = _timed(engine, texts, dataclasses.replace(sampling, speculate=False))
    rounds: list[tuple[int, list[int], dict[str, float]]] = []
    engine.on_round = lambda *seen: rounds.append(seen)
    try:
        draft_seconds, drafted = _timed(engine, texts, sampling)
    finally:
        engine.on_round = None
    counts = [count for _, accepted, _ in rounds for count in accepted]
    depth = max((tree_depth for tree_depth, _, _ in rounds), default=1)
    accepted = tuple(sum(count >= d for count in counts) / max(len(counts), 1) for d in range(1, depth + 1))
    draft_ms, rest_ms = (
        1e3 * statistics.median(seconds[name] for _, _, seconds in rounds) for name in ("draft", "rest")
    )
    score_ms = 1e3 * statistics.median(seconds["score"] for _, _, seconds in rounds)
    pass_ms = _pass_times(engine, texts[0])
    tokens = sum(result.stats.tokens for result in drafted) / sum(result.stats.target_calls for result in drafted)
    predicted = tokens * (pass_ms[1] + rest_ms) / (draft_ms + score_ms + rest_ms)
    full = [text + result.tokens for text, result in zip(texts, answers, strict=True)]
    agreement = _agreement(engine, full, [len(text) for text in texts], depth)
    return Diagnosis(agreement, accepted, pass_ms, draft_ms, rest_ms, tokens, predicted, plain_seconds / draft_seconds)


def _timed(engine: Engine, texts: list[list[int]], sampling: Sampling):
    """Seconds, prefill left out, of texts one at a time, and the results."""
    seconds, results = 0.0, []
    for text in texts:
        engine.generate([text], dataclasses.replace(sampling, max_tokens=1))  # its prompt is in the cache now
        start = time.perf_counter()
        results += engine.generate([text], sampling)
        seconds += time.perf_counter() - start
    return seconds, results


def _pass_times(engine: Engine, text: list[int]) -> dict[int, float]:
    """Milliseconds of a pass of the target over chains of 1, 2, 4, ... rows after a text, the median of five."""
    target, cache = engine.target, engine.cache
    request = Request(text, Sampling(), (), None)
    times = {}
    try:
        for rows in (1, 2, 4, 8, 16, 32):
            if not cache.reserve(request.sequence, len(text) + rows):
                break
            table = cache.page_table([request.sequence])
            length = torch.tensor([len(text)], dtype=torch.int32).to(cache.device)
            tokens = torch.tensor([(text * rows)[:rows]], dtype=torch.int32).to(cache.device)
            taken = []
            for _ in range(5):
                start = time.perf_counter()
                target.forward(Rows(tokens, chains((rows,), cache.device), length, table), cache)
                taken.append(time.perf_counter() - start)
            times[rows] = 1e3 * statistics.median(taken)
    finally:
        cache.drop(request.sequence)
    return times


def _agreement(engine: Engine, texts: list[list[int]], starts: list[int], depth: int) -> tuple[float, ...]:
    """How often a tree that is made afresh at a place of a text has its next tokens, down to each depth."""
    hits, places = [0] * depth, 0
    slots = max(map(len, texts)) + engine.draft.max_nodes
    proposer = engine.draft.bind(  # of its own: nothing that the engine's has in its cache plays a part
        engine.target, max_batch=1, max_length=slots, max_slots=slots, is_coupled=engine.rule == "match"
    )
    for text, start in zip(texts, starts, strict=True):
        hidden = _last_rows(engine, text) if engine.draft.wants_hidden else None
        for end in range(start, max(start + 1, len(text) - depth + 1), max(1, (len(text) - start) // 32)):
            request = Request(text[:end], Sampling(), (), None)
            request.sequence.length = end - 1
            proposer.start(request)
            if hidden is not None:
                proposer.see(request, 0, hidden[: end - 1])
            try:
                batch = Batch([request], engine.cache, Law.of([request], engine.cache.device))
                found = _depth_of_match(proposer.propose(batch), text[end:])
            finally:
                proposer.drop(request)
            places += 1
            for level in range(min(found, depth)):
                hits[level] += 1
    return tuple(count / max(places, 1) for count in hits)


def _last_rows(engine: Engine, text: list[int]) -> torch.Tensor:
    """[tokens, dim]: the target's last rows over a text, run alone, in chunks like those of a prompt."""
    cache, sequence, parts = engine.cache, Pages(), []
    if not cache.reserve(sequence, len(text)):
        raise RuntimeError("specdec_ops.Engine: diagnose needs enough pages for a prompt and its answer")
    try:
        table = cache.page_table([sequence])
        for start in range(0, len(text), _CHUNK):
            tokens = torch.tensor([text[start : start + _CHUNK]], dtype=torch.int32).to(cache.device)
            length = torch.tensor([start], dtype=torch.int32).to(cache.device)
            rows = Rows(tokens, chains((tokens.shape[1],), cache.device), length, table)
            parts.append(engine.target.forward(rows, cache, want=False).hidden)
    finally:
        cache.drop(sequence)
    return torch.cat(parts)


def _depth_of_match(drafted: Drafted, following: list[int]) -> int:
    size = drafted.sizes[0] if drafted.sizes else drafted.tokens.shape[1]
    tree = Tree.from_parents(drafted.topology.parents[0, :size].tolist())
    tokens, node, depth = drafted.tokens[0].tolist(), 0, 0
    for token in following:
        children = [child for child in range(size) if tree.parents[child] == node and tokens[child] == token]
        if not children:
            break
        node, depth = children[0], depth + 1
    return depth
