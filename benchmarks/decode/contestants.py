"""Those who decode: Hugging Face's loops, economize, and our engine. Each times itself in one way.

The clock starts when every request of a call has its first token, so that prompts are left out, and stops when the
first of them ends: a batch is timed while it is whole. How long the last of its requests goes on alone says nothing of
a server, where others would have taken the places of those that have ended.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch

from specdec_ops.decode import Engine, Sampling
from specdec_ops.drafts import Proposer

Prompts = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What one call is to do: answer these prompts at once.

    seed: of the first prompt; the others follow.
    """

    prompts: Prompts
    temperature: float
    length: int
    eos: tuple[int, ...]
    seed: int = 0


@dataclasses.dataclass
class Run:
    """What one call gave.

    answers: tokens of each request; an EOS is the last.
    seconds: since each request had its first token, until the first one ended.
    timed: tokens that came in that time.
    calls: passes of the target over all requests, the prompt's counted where it gave a token.
    pass_seconds, pass_rows: of each pass of the target within that time; empty where it can't be seen.
    draft_seconds: of each draft.
    """

    answers: list[list[int]]
    seconds: float
    timed: int
    calls: int
    pass_seconds: list[float] = dataclasses.field(default_factory=list)
    pass_rows: list[int] = dataclasses.field(default_factory=list)
    draft_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))


@dataclasses.dataclass
class Contestant:
    """One way to decode.

    role: "hugging face", "library", "ours plain" or "ours".
    weights: in what form it reads the same weights. "float32", or "blocks": those of the GGUF file as they lie.
    run: does a task.
    equals_plain: whether its sampled text has to be that of our plain loop at the same seed.
    refuses: why it can't do a cell, of batch and temperature, or "".
    proposer: of our engine, if it has a draft.
    """

    name: str
    role: str
    weights: str
    run: Callable[[Task], Run]
    equals_plain: bool = False
    refuses: Callable[[int, float], str] = lambda batch, temperature: ""
    proposer: Proposer | None = None


class Meter:
    """How long passes of a model took, and over how many rows."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.rows: list[int] = []

    def clear(self) -> None:
        """Forget all."""
        self.seconds.clear()
        self.rows.clear()

    def add(self, seconds: float, rows: int) -> None:
        """A pass is over."""
        self.seconds.append(seconds)
        self.rows.append(rows)


def _metered_forward(forward, meter: Meter):
    @functools.wraps(forward)  # generate looks at its parameters
    def metered(*arguments, **options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        start = time.perf_counter()
        output = forward(*arguments, **options)
        meter.add(time.perf_counter() - start, ids.numel())
        return output

    return metered


# Hugging Face.


class _Clock:
    """A stopping criterion that stops nothing: it notes when the first tokens were there, and the first EOS."""

    def __init__(self, prompt_length: int, eos: tuple[int, ...]) -> None:
        self._prompt_length, self._eos = prompt_length, torch.tensor(eos, dtype=torch.int64)
        self.start: float | None = None
        self.end: float | None = None
        self.tokens = self.tokens_at_end = 0  # of a request

    def __call__(self, ids: torch.Tensor, scores, **_) -> torch.Tensor:
        seen = self.tokens_at_end
        if self.end is None:
            self.tokens_at_end = ids.shape[1] - self._prompt_length
        if self.start is None:
            self.start, self.tokens = time.perf_counter(), self.tokens_at_end
        if self.end is None and torch.isin(ids[:, self._prompt_length + seen :], self._eos).any():
            self.end = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def padded(prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with padding on the left, and the mask of what is none."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def until_end(tokens: list[int], eos: tuple[int, ...]) -> list[int]:
    """An answer without what follows its EOS."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


def hugging_face(name: str, model, *, assistant=None, **options) -> Contestant:
    """`generate`, plain, or with an assistant model, or with `prompt_lookup_num_tokens`."""
    drafts = assistant is not None or bool(options)
    meter, drafting = Meter(), Meter()

    def run(task: Task) -> Run:
        ids, mask = padded(task.prompts)
        clock, forward = _Clock(ids.shape[1], task.eos), model.forward
        sampled = {"temperature": task.temperature, "top_k": 0, "top_p": 1.0} if task.temperature > 0 else {}
        meter.clear()
        drafting.clear()
        torch.manual_seed(task.seed)
        model.forward = _metered_forward(forward, meter)
        if assistant is not None:
            assistant_forward = assistant.forward
            assistant.forward = _metered_forward(assistant_forward, drafting)
            options["assistant_model"] = assistant
        try:
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=task.temperature > 0,
                max_new_tokens=task.length,
                eos_token_id=list(task.eos) or None,
                pad_token_id=task.eos[0] if task.eos else 0,
                stopping_criteria=[clock],
                **sampled,
                **options,
            )
            end = clock.end or time.perf_counter()
        finally:
            del model.forward
            if assistant is not None:
                del assistant.forward
        answers = [until_end(row, task.eos) for row in out[:, ids.shape[1] :].tolist()]
        calls = len(meter.seconds) if drafts else sum(map(len, answers))
        timed = sum(max(0, min(len(answer), clock.tokens_at_end) - clock.tokens) for answer in answers)
        draft_seconds = [sum(drafting.seconds) / max(1, len(meter.seconds))] if assistant is not None else []
        passes = (meter.seconds[1:], meter.rows[1:])
        return Run(answers, end - clock.start, timed, calls, *passes, draft_seconds)

    def refuses(batch: int, temperature: float) -> str:
        return "it takes one request at a time" if drafts and batch > 1 else ""

    return Contestant(name, "hugging face", "float32", run, refuses=refuses)


# economize.


def economize_lookup(model, tokens: int) -> Contestant:
    """Its prompt lookup on the same unmodified model, with chains of `tokens`."""
    import economize
    from economize.techniques.lookup import LookupConfig

    decoding = {
        greedy: economize.DecodeConfig(cycle_length=tokens + 1, **({} if greedy else {"verifier": "rejection"}))
        for greedy in (True, False)
    }
    wrapped = economize.apply(model, LookupConfig(), decoding=decoding[True])

    def run(task: Task) -> Run:
        lengths = [len(prompt) for prompt in task.prompts]
        seen = [0] * len(lengths)
        started: list[tuple[float, int]] = []
        ended: list[tuple[float, int]] = []

        def stop(place: int):
            def is_end(ids: torch.Tensor) -> bool:
                seen[place] = len(ids) - lengths[place]
                if not started and all(seen):
                    started.append((time.perf_counter(), sum(seen)))
                is_last = int(ids[-1]) in task.eos
                if started and not ended and (is_last or seen[place] >= task.length):
                    ended.append((time.perf_counter(), sum(seen)))
                return is_last

            return is_end

        selectors = None
        if task.temperature > 0:
            selectors = [economize.TopPSampler(task.temperature, seed=task.seed + n) for n in range(len(lengths))]
        results = wrapped.decode_batch(
            [torch.tensor(prompt) for prompt in task.prompts],
            task.length,
            decoding=decoding[task.temperature == 0],
            selectors=selectors,
            stops=[stop(place) for place in range(len(lengths))],
        )
        end = time.perf_counter()
        answers = [result.tokens.tolist() for result in results]
        start, before = started[0]
        end, after = ended[0] if ended else (end, sum(map(len, answers)))
        calls = sum(len(result.cost.events) for result in results)
        return Run(answers, end - start, after - before, calls)

    return Contestant("economize, prompt lookup", "library", "float32", run)


def without_economize() -> str:
    """Why it takes no part, or ""."""
    return "" if importlib.util.find_spec("economize") else "economize is not installed"


# Our engine.


def metered(model, meter: Meter):
    """The same model of the engine, whose passes with logits are timed."""
    model = copy.copy(model)
    forward = model.forward

    def timed(rows, cache, *, want=True, **options):
        start = time.perf_counter()
        output = forward(rows, cache, want=want, **options)
        if want is not False:
            meter.add(time.perf_counter() - start, rows.count)
        return output

    model.forward = timed
    return model


def ours(name: str, target, draft, *, weights: str, max_batch: int, **options) -> Contestant:
    """Our engine with its other options, plain without a draft."""
    meter, draft_seconds = Meter(), []
    engine = Engine(metered(target, meter), draft, max_batch=max_batch, **options)
    if draft is not None:
        propose = engine.proposer.propose

        def timed_propose(batch):
            start = time.perf_counter()
            drafted = propose(batch)
            draft_seconds.append(time.perf_counter() - start)
            return drafted

        engine.proposer.propose = timed_propose

    def run(task: Task) -> Run:
        numbers = [
            engine.submit(prompt, Sampling(task.temperature, seed=task.seed + n, max_tokens=task.length, eos=task.eos))
            for n, prompt in enumerate(task.prompts)
        ]
        places = {number: place for place, number in enumerate(numbers)}
        counts, results, start, before, first = [0] * len(numbers), [None] * len(numbers), None, 0, (0, 0)
        end, after, last = None, 0, (0, 0)
        meter.clear()
        draft_seconds.clear()
        while not engine.is_idle:
            for chunk in engine.step():
                place = places[chunk.request]
                counts[place] += len(chunk.tokens)
                if chunk.result is not None:
                    results[place] = chunk.result
            if start is None and all(counts):
                start, before = time.perf_counter(), sum(counts)
                first = (len(meter.seconds), len(draft_seconds))
            if end is None and any(results):
                end, after, last = time.perf_counter(), sum(counts), (len(meter.seconds), len(draft_seconds))
                if start is None:  # one has ended before all have begun
                    start, before, first = end, after, last
        return Run(
            [result.tokens for result in results],
            end - start,
            after - before,
            sum(result.stats.target_calls for result in results),
            meter.seconds[first[0] : last[0]],
            meter.rows[first[0] : last[0]],
            draft_seconds[first[1] : last[1]],
        )

    role = "ours plain" if draft is None else "ours"
    return Contestant(name, role, weights, run, equals_plain=engine.rule == "match", proposer=engine.proposer)


def one_row_seconds(runs: list[Run], batch: int) -> float | None:
    """The median of passes with one row for each request; None if there was none."""
    taken = [s for run in runs for s, rows in zip(run.pass_seconds, run.pass_rows, strict=True) if rows == batch]
    return statistics.median(taken) if taken else None
