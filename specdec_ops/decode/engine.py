"""`Engine`: decodes many requests at once, with a draft or without."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import torch

from specdec_ops._core import alloc
from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.drafts.base import Draft, Drafted, Proposer
from specdec_ops.drafts.model_draft import chains
from specdec_ops.ops.acceptance.accept import Acceptance
from specdec_ops.status import AcceptStatus
from specdec_ops.topology import Topology

from . import rules
from .batch import Batch, Law
from .cache import Cache
from .diagnose import Diagnosis, Prompt, diagnose
from .model import Model
from .pace import Adaptation
from .progress import bar
from .request import Request, State
from .result import Chunk, Result
from .rows import Rows
from .sampling import Sampling

_OP = "Engine"


def _renumbered(chunk: Chunk, place: int) -> Chunk:
    """The same piece under the place of its prompt."""
    result = chunk.result and dataclasses.replace(chunk.result, request=place)
    return dataclasses.replace(chunk, request=place, result=result)


class Engine:
    """Speculative decoding of a target model with a draft; plain decoding without.

    With the names of `specdec_ops.decode` and `specdec_ops.integrations.transformers`::

        engine = Engine(load("folder"), drafts.Ngram())
        for result in engine.generate(["The sea is", "Once upon"], Sampling(max_tokens=64)):
            print(result.text, result.finish_reason, result.stats.tokens_per_call)

    A round: prompts are run in chunks, the draft proposes a tree for each request, one pass of the target scores all
    nodes, the rule decides what stays, the cache is committed, and one copy brings tokens to the host. Requests join
    and leave between rounds. Keys and values lie in pages: prompts that begin alike share the pages of what they have
    in common. When pages run out, the newest request gives its own back and waits; what it has said so far is kept.

    What a request says depends on its prompt, its `Sampling`, the draft and the rule, and not on the other requests.
    With temperature 0, and with rule "match", it is what the target alone would say; other rules keep the target's
    distribution ("typical" and "longest_path" don't, which is why no one gets them unasked).

    Args:
        target: the model, as `specdec_ops.integrations.transformers.load` makes it.
        draft: from `specdec_ops.drafts`; None decodes plainly. Other engines may have the same one.
        rule: "auto", or one by name: see `specdec_ops.decode.rules.choose`.
        max_batch: the most requests that run at once.
        max_length: the most tokens of prompt and answer of a request; by default, and at most, what target and draft
            have positions for, 4096 at the default.
        pages: of the target's cache; by default enough for max_batch requests of max_length.
        page_size: slots of a page.
        prefill_rows: the most prompt tokens of a pass.
        adapt: leave the draft out while rounds with it take longer per token than without, and say so once. Only where
            that changes no text: at temperature 0, and with rule "match".

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, the rule is not lossless for the draft, or the draft does not fit.
    """

    def __init__(
        self,
        target: Model,
        draft: Draft | None = None,
        rule: str = "auto",
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        pages: int | None = None,
        page_size: int = 16,
        prefill_rows: int = 256,
        adapt: bool = True,
    ) -> None:
        if draft is not None and not isinstance(draft, Draft):
            raise TypeError(argument_error(_OP, "draft", "a specdec_ops.drafts.Draft or None", draft))
        if not hasattr(target, "forward") or not hasattr(target, "shape"):
            must = "a model of specdec_ops.integrations.transformers.load"
            raise TypeError(argument_error(_OP, "target", must, target))
        most = target.shape.max_positions
        if draft is not None and draft.max_positions is not None:
            most = min(most, draft.max_positions)
        max_length = min(most, 4096) if max_length is None else max_length
        for name, value, high in (
            ("max_batch", max_batch, 4096),
            ("max_length", max_length, most),
            ("page_size", page_size, 1024),
            ("prefill_rows", prefill_rows, 1024),
        ):
            if not is_int(value):
                raise TypeError(argument_error(_OP, name, "an int", value))
            if not 1 <= value <= high:
                raise ValueError(argument_error(_OP, name, f"from 1 to {high}", value))
        self.target, self.draft, self.rule = target, draft, rules.choose(rule, draft)
        self.max_batch, self.max_length, self._prefill_rows = max_batch, max_length, prefill_rows
        self._adapt, self._has_warned = adapt, False
        self._adaptation: Adaptation | None = None
        if draft is not None:
            self._adaptation = Adaptation(draft.weighs_rows, 1 + (draft.max_depth or draft.max_nodes - 1))
        self.on_round: Callable[[int, list[int], dict[str, float]], None] | None = None
        self._nodes = 1 if draft is None else draft.max_nodes
        slots = max_length + self._nodes
        self.cache = Cache(target.shape, max_batch * -(-slots // page_size) if pages is None else pages, page_size)
        self.proposer: Proposer | None = None
        if draft is not None:
            is_coupled = self.rule == "match"
            room = self.cache.pool.pages * page_size
            limits = {"max_batch": max_batch, "max_length": min(slots, room), "max_slots": room}
            self.proposer = draft.bind(target, is_coupled=is_coupled, **limits)
        self._longest = min(max_length, self.cache.pool.pages * page_size - self._nodes)  # text of one request
        if self._longest < 2:
            raise ValueError(argument_error(_OP, "pages", f"enough for {self._nodes + 2} slots", pages))
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[Request] = []
        self._requests: dict[int, Request] = {}
        self._laws: dict[tuple, Law] = {}
        self._device = target.shape.device
        self._inboxes: dict[int, collections.deque[Chunk]] = {}  # of the answers that `astream` waits for
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        running, waiting = len(self._running), len(self._requests) - len(self._running)
        return f"<Engine of {self.target} with {self.draft}, rule {self.rule}: {running} run, {waiting} wait>"

    # Requests come and go.

    def submit(self, prompt: Prompt, sampling: Sampling | None = None) -> int:
        """Let a request wait for its turn. Returns its number.

        Args:
            prompt: a string, or token ids, at least one.
            sampling: greedy by default.

        Raises:
            TypeError, ValueError: the prompt or an option can't be served.
        """
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise TypeError(argument_error(_OP, "sampling", "a specdec_ops.decode.Sampling", sampling))
        if sampling.stop and self.target.tokenizer is None:
            raise ValueError(f"specdec_ops.{_OP}: stop must be empty for a target without a tokenizer")
        request = Request(self.encode(prompt), sampling, self.target.eos, self.target.tokenizer)
        self._requests[request.number] = request
        self._waiting.append(request)
        return request.number

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked. See `submit`."""
        if isinstance(prompt, str):
            if self.target.tokenizer is None:
                raise TypeError(argument_error(_OP, "prompt", "token ids for a target without a tokenizer", prompt))
            ids = self.target.tokenizer.encode(prompt)
        else:
            ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            ids = list(ids) if isinstance(ids, Sequence) else [None]
            if not all(map(is_int, ids)):
                raise TypeError(argument_error(_OP, "prompt", "a string or a sequence of token ids", prompt))
        vocab = self.target.shape.vocab
        if not ids or not all(0 <= token < vocab for token in ids):
            raise ValueError(f"specdec_ops.{_OP}: prompt must have at least one token, all ids below {vocab}")
        if len(ids) >= self._longest:
            raise ValueError(f"specdec_ops.{_OP}: prompt must have fewer than {self._longest} tokens, got {len(ids)}")
        return ids

    def cancel(self, number: int) -> None:
        """End a request. Its pages are free at the next step; one that has ended already is left alone."""
        request = self._requests.get(number)
        if request is not None:
            request.finish("cancelled")

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._requests

    # One step.

    def step(self) -> list[Chunk]:
        """One round. Returns what is new: a piece for each request that has got on, with its result if it ends."""
        self._admit()
        self._prefill()
        ready = [request for request in self._running if request.is_prefilled and request.state is State.RUNNING]
        for speculate in (True, False):
            group = [request for request in ready if self._drafts_for(request) is speculate]
            group = self._with_pages(group, self._nodes if speculate else 1)
            if group:
                self._round(group, self.draft if speculate else None)
        return self._report()

    def _drafts_for(self, request: Request) -> bool:
        return self.draft is not None and request.sampling.speculate

    def _admit(self) -> None:
        """Waiting requests get pages for their text, in their order, while there are any."""
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            if request.state is not State.WAITING:
                self._waiting.popleft()
                continue
            sequence, pool = request.sequence, self.cache.pool
            shares = not (self._drafts_for(request) and self.draft.wants_hidden)
            sequence.pages = pool.find_prefix(request.ids[:-1]) if shares else []
            sequence.length = len(sequence.pages) * pool.page_size
            if not self.cache.reserve(sequence, len(request.ids) - 1 + self._nodes):
                self.cache.drop(sequence)
                if not self._running:
                    raise RuntimeError(f"specdec_ops.{_OP}: the cache has too few pages for a request that fitted")
                return
            if request.stats.target_calls == 0:
                request.stats.cached_prompt_tokens = sequence.length
            self._waiting.popleft()
            request.state = State.RUNNING
            self._running.append(request)
            if self._drafts_for(request):
                self.proposer.start(request)

    def _with_pages(self, group: list[Request], nodes: int) -> list[Request]:
        """Those of the group that have room for their trees; the newest requests give pages up for the others."""
        for request in group:
            while request.state is State.RUNNING and not self._has_room(request, nodes):
                if len(self._running) == 1:
                    raise RuntimeError(f"specdec_ops.{_OP}: there are too few pages for a request that fitted")
                self._send_back(max(self._running, key=lambda running: running.number))
        return [request for request in group if request.state is State.RUNNING]

    def _has_room(self, request: Request, nodes: int) -> bool:
        """Take what pages the next round of a request needs, of the target's cache and of the draft's."""
        if not self.cache.reserve(request.sequence, len(request.ids) - 1 + nodes):
            return False
        return not self._drafts_for(request) or self.proposer.reserve(request)

    def _send_back(self, request: Request) -> None:
        """A running request waits again, before all others; its text so far becomes a part of what is run first."""
        self._release(request)
        request.state = State.WAITING
        self._waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self._running.remove(request)
        self.cache.pool.register(request.ids[: request.sequence.length], request.sequence.pages)
        self.cache.drop(request.sequence)
        if self._drafts_for(request):
            self.proposer.drop(request)

    def _prefill(self) -> None:
        """One pass over what is missing of texts, in chunks."""
        room, parts = self._prefill_rows, []
        for request in self._running:
            missing = len(request.ids) - 1 - request.sequence.length
            if missing > 0 and room > 0 and request.state is State.RUNNING:
                parts.append((request, min(missing, room)))
                room -= parts[-1][1]
        if not parts:
            return
        sequences, sizes = [request.sequence for request, _ in parts], tuple(size for _, size in parts)
        tokens = [request.ids[request.sequence.length :][:size] for request, size in parts]
        rows = self._rows(tokens, sizes, chains(sizes, self._device), sequences)
        hidden = self.target.forward(rows, self.cache, want=False).hidden
        for (request, size), row in zip(parts, itertools.accumulate(sizes, initial=0), strict=False):
            self._show(request, hidden[row : row + size])
            request.sequence.length += size
            if request.is_prefilled:
                self.cache.pool.register(request.ids[:-1], request.sequence.pages)

    def _rows(self, tokens, sizes, topology: Topology, sequences) -> Rows:
        lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32).to(self._device)
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        tokens = torch.tensor(tokens, dtype=torch.int32).to(self._device)
        return Rows(tokens, topology, lengths, self.cache.page_table(sequences))

    def _round(self, requests: list[Request], draft: Draft | None) -> None:
        law = self._law(requests)
        may_adapt = draft is not None and self._adapt and (law.is_greedy or self.rule == "match")
        adaptation = self._adaptation if may_adapt else None
        drafts = draft is not None and (adaptation is None or adaptation.wants_draft(len(requests)))
        marks = [time.perf_counter()]
        batch = Batch(requests, self.cache, law, adaptation and adaptation.seconds_of_rows(len(requests)))
        if drafts:
            drafted = self.proposer.propose(batch)
        else:
            drafted = Drafted(batch.last_tokens[:, None], chains((1,), self._device), is_chain=True)
        marks.append(time.perf_counter())
        logits, hidden = self._score(batch, drafted)
        logits = law.without_improbable(logits)
        marks.append(time.perf_counter())
        acceptance = self._accept(draft, batch, logits, drafted)
        if not drafted.is_chain:
            self.cache.commit(acceptance.nodes, batch.context_lens, batch.page_table)
        logprobs = self._logprobs(batch, logits, acceptance)
        table = torch.cat((acceptance.num_accepted[:, None], acceptance.status[:, None], acceptance.tokens), dim=1)
        for place, request in enumerate(requests):
            self._show(request, hidden[place], acceptance.nodes[place])
        accepted = self._take(requests, table.tolist(), drafted, logprobs)  # the one copy to the host
        if drafts:
            self.proposer.observe(batch, drafted, acceptance, accepted)
        marks.append(time.perf_counter())
        if adaptation is not None:
            rows, given = sum(drafted.sizes or (drafted.tokens.numel(),)), sum(accepted) / len(accepted) + 1
            adaptation.record(len(requests), drafts, rows, marks[1] - marks[0], marks[-1] - marks[1], given)
            self._warn_of_loss(adaptation.loss)
        if self.on_round is not None and drafts:
            spans = dict(zip(("draft", "score", "rest"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
            depth = acceptance.nodes.shape[1] - 1
            self.on_round(min(depth, draft.max_depth or depth), accepted, spans)

    def _accept(self, draft: Draft | None, batch: Batch, logits: torch.Tensor, drafted: Drafted) -> Acceptance:
        return rules.accept(self.rule, draft, batch, logits, drafted)

    def _take(self, requests: list[Request], table, drafted: Drafted, logprobs) -> list[int]:
        """Give the requests what a round brought: rows of (accepted, status, tokens). Returns the first."""
        sizes = drafted.sizes or [drafted.tokens.shape[1]] * len(requests)
        for place, (request, (count, status, *tokens)) in enumerate(zip(requests, table, strict=True)):
            request.stats.target_calls += 1
            request.stats.drafted += sizes[place] - 1
            request.stats.accepted += count
            if status & AcceptStatus.TARGET_INVALID:
                request.finish("invalid")
                continue
            request.sequence.length += count + 1
            request.take(tokens[: count + 1], None if logprobs is None else logprobs[place], self._longest)
        return [row[0] for row in table]

    def _warn_of_loss(self, speedup: float | None) -> None:
        if speedup is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"specdec_ops.{_OP}: this draft decodes at {speedup:.2f}x the speed of plain decoding here, so it "
                "is left out and tried again now and then; Engine.diagnose() tells why",
                stacklevel=4,
            )

    def _show(self, request: Request, hidden: torch.Tensor, nodes: torch.Tensor | None = None) -> None:
        """Hand rows of the target's last layer to a draft that wants them: all, or those of the accepted path."""
        if self._drafts_for(request) and self.draft.wants_hidden:
            hidden = hidden if nodes is None else hidden.index_select(0, nodes[nodes >= 0])
            self.proposer.see(request, request.sequence.length, hidden)

    def _score(self, batch: Batch, drafted: Drafted) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's logits and last rows of all nodes, [batch, nodes, vocab] and [batch, nodes, dim]."""
        shape, sizes = drafted.tokens.shape, drafted.sizes
        if sizes is None or len(set(sizes)) == 1:
            rows = Rows(drafted.tokens, drafted.topology, batch.context_lens, batch.page_table)
            output = self.target.forward(rows, self.cache)
            return output.logits.view(*shape, -1), output.hidden.view(*shape, -1)
        there = torch.cat([torch.arange(size) + place * shape[1] for place, size in enumerate(sizes)]).to(self._device)
        tokens = drafted.tokens.view(-1).index_select(0, there)
        rows = Rows(tokens, drafted.topology, batch.context_lens, batch.page_table)
        output = self.target.forward(rows, self.cache)
        padded = (  # rows of no node are never looked at, so nothing fills them
            alloc.empty((shape.numel(), some.shape[-1]), some.dtype, some.device).index_copy_(0, there, some)
            for some in output
        )
        return tuple(rows.view(*shape, -1) for rows in padded)

    def _logprobs(self, batch: Batch, logits: torch.Tensor, acceptance) -> list[list[float]] | None:
        """Of the emitted tokens, under the distributions that they were drawn from; None if nobody asks."""
        if not any(request.sampling.logprobs for request in batch.requests):
            return None
        nodes = acceptance.nodes.long().clamp(min=0)
        path = logits.gather(1, nodes[:, :, None].expand(-1, -1, logits.shape[-1]))
        tokens = acceptance.tokens.long().clamp(min=0)
        return batch.law.logprobs(path).gather(2, tokens[:, :, None]).squeeze(2).tolist()

    def _law(self, requests: list[Request]) -> Law:
        """The settings as tensors, made once for each group of requests."""
        key = tuple(request.number for request in requests)
        if key not in self._laws:
            self._laws = {key: Law.of(requests, self._device)} | dict(list(self._laws.items())[:7])
        return self._laws[key]

    def _report(self) -> list[Chunk]:
        chunks = []
        for request in list(self._requests.values()):
            text, tokens = request.news()
            if request.state is State.FINISHED:
                if request in self._running:
                    self._release(request)
                del self._requests[request.number]
                chunks.append(Chunk(request.number, text, tokens, request.result()))
            elif tokens:
                chunks.append(Chunk(request.number, text, tokens))
        return chunks

    # Whole answers, and streams of them.

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        progress=False,
    ) -> list[Result]:
        """Decode prompts to their ends.

        Args:
            prompts: strings or lists of token ids; a single one is a list of one.
            sampling: of all, or one for each.
            progress: show a progress bar of prompts that are done (needs tqdm).

        Returns:
            Results in the order of the prompts.
        """
        results: dict[int, Result] = {}
        prompts = self._prompts(prompts)
        with bar(len(prompts), progress) as shown:
            for chunk in self.stream(prompts, sampling):
                if chunk.result is not None:
                    results[chunk.request] = chunk.result
                    shown.update(1)
        return [results[place] for place in range(len(prompts))]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[Chunk]:
        """Decode prompts and yield pieces of their answers as they come. Closing the iterator cancels what is left."""
        places = self._submit_all(self._prompts(prompts), sampling)
        try:
            while places:
                for chunk in self.step():
                    place = places.get(chunk.request)
                    if place is not None:
                        yield _renumbered(chunk, place)
                        if chunk.result is not None:
                            del places[chunk.request]
        finally:
            for number in places:
                self.cancel(number)

    async def astream(self, prompt: Prompt, sampling: Sampling | None = None) -> AsyncIterator[Chunk]:
        """`stream` of one prompt for asyncio. Any number of them share the engine's rounds."""
        number = self.submit(prompt, sampling)
        inbox = self._inboxes[number] = collections.deque()
        try:
            done = False
            while not done:
                async with self._turn:
                    if not inbox:
                        for chunk in await asyncio.to_thread(self.step):
                            if chunk.request in self._inboxes:
                                self._inboxes[chunk.request].append(chunk)
                while inbox:
                    chunk = inbox.popleft()
                    done = chunk.result is not None
                    yield _renumbered(chunk, 0)
                await asyncio.sleep(0)
        finally:
            del self._inboxes[number]
            self.cancel(number)

    def diagnose(self, prompts: Prompt | Sequence[Prompt], *, max_tokens: int = 64) -> Diagnosis:
        """Measure where time goes and how far draft and target agree. Takes a few answers' time; the engine is idle.

        Most reports of few accepted tokens are about wiring: `agreement` and `accepted` of the result tell them apart
        from a draft that is weak.

        Args:
            prompts: typical ones.
            max_tokens: of each answer.

        Raises:
            RuntimeError: the engine has no draft, or is at work.
        """
        if self.draft is None:
            raise RuntimeError(f"specdec_ops.{_OP}: diagnose needs an engine with a draft")
        if not self.is_idle:
            raise RuntimeError(f"specdec_ops.{_OP}: diagnose needs an idle engine, {len(self._requests)} requests run")
        adapt, self._adapt = self._adapt, False
        try:
            return diagnose(self, self._prompts(prompts), max_tokens)
        finally:
            self._adapt = adapt

    @staticmethod
    def _prompts(prompts) -> list[Prompt]:
        if not isinstance(prompts, Sequence | torch.Tensor):
            must = "strings or sequences of token ids, one or more"
            raise TypeError(argument_error(_OP, "prompts", must, prompts))
        if isinstance(prompts, torch.Tensor):
            prompts = prompts.tolist()
        if isinstance(prompts, str) or (len(prompts) and is_int(prompts[0])):
            return [prompts]
        return list(prompts)

    def _submit_all(self, prompts: list[Prompt], sampling) -> dict[int, int]:
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"specdec_ops.{_OP}: sampling must be one or {len(prompts)}, got {len(each)}")
        places: dict[int, int] = {}
        try:
            for place, (prompt, settings) in enumerate(zip(prompts, each, strict=True)):
                places[self.submit(prompt, settings)] = place
        except Exception:
            for number in places:
                self._requests.pop(number).finish("cancelled")
            raise
        return places
