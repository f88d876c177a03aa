"""`Engine`: decodes many requests at once, with a draft or without."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from specdec_ops._core import alloc
from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.drafts.base import Draft, Drafted, Proposer
from specdec_ops.drafts.model_draft import chains
from specdec_ops.ops.acceptance.accept import Acceptance
from specdec_ops.ops.acceptance.sample import sample_tokens
from specdec_ops.status import AcceptStatus
from specdec_ops.topology import Topology

from . import rules
from .answers import Answers, as_prompts
from .batch import Batch, Law
from .cache import Cache
from .diagnose import Diagnosis, Prompt, diagnose
from .model import Model
from .pace import Adaptation, Plan
from .request import Request, State
from .result import Chunk
from .rows import Rows
from .sampling import Sampling
from .scheduler import Scheduler

_OP = "Engine"


class Engine(Answers):
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
        self.on_round: Callable[[int, list[int], dict[str, float]], None] | None = None
        self._nodes = 1 if draft is None else draft.max_nodes
        self._target_roots = 1 if draft is None else draft.target_roots
        slots = max_length + self._nodes
        self.cache = Cache(target.shape, max_batch * -(-slots // page_size) if pages is None else pages, page_size)
        self.proposer: Proposer | None = None
        if draft is not None:
            is_coupled = self.rule == "match"
            room = self.cache.pool.pages * page_size
            limits = {"max_batch": max_batch, "max_length": min(slots, room), "max_slots": room}
            self.proposer = draft.bind(target, is_coupled=is_coupled, **limits)
            most = 1 + (draft.max_depth or draft.max_nodes - 1)
            least = 1 + (draft.min_depth or most - 1)
            self._adaptation = Adaptation(draft.weighs_rows, most, self.proposer.seconds_of_level, least)
        self._longest = min(max_length, self.cache.pool.pages * page_size - self._nodes)  # text of one request
        if self._longest < 2:
            raise ValueError(argument_error(_OP, "pages", f"enough for {self._nodes + 2} slots", pages))
        self.scheduler = Scheduler(self.cache, draft, self.proposer, max_batch=max_batch, nodes=self._nodes)
        self._requests: dict[int, Request] = {}
        self._laws: dict[tuple, Law] = {}
        self._device = target.shape.device
        super().__init__()

    def __repr__(self) -> str:
        running = len(self.scheduler.running)
        waiting = len(self._requests) - running
        return f"<Engine of {self.target!r} with {self.draft}, rule {self.rule}: {running} run, {waiting} wait>"

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
        if self.scheduler.drafts_for(request):
            request.target_roots = self._target_roots
        self._requests[request.number] = request
        self.scheduler.add(request)
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

    def _withdraw(self, number: int) -> None:
        self._requests.pop(number).finish("cancelled")

    def pause(self, number: int) -> None:
        """Let a request take part in no round until `resume`; its prompt is run all the same.

        It keeps its pages while nobody needs them. Then it gives them up, and its text is run again when it resumes.
        """
        request = self._requests.get(number)
        if request is not None:
            request.is_paused = True

    def resume(self, number: int) -> None:
        """Let a paused request go on."""
        request = self._requests.get(number)
        if request is not None and request.is_paused:
            self.scheduler.resume(request)

    @property
    def longest_text(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._longest

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._requests

    @property
    def is_busy(self) -> bool:
        """Whether a step has anything to do. It has not while all requests are paused."""
        return self.scheduler.has_waiting or any(
            request.state is State.FINISHED
            or not request.is_paused
            or (request.state is State.RUNNING and not request.is_prefilled)
            for request in self._requests.values()
        )

    # One step.

    def step(self) -> list[Chunk]:
        """One round. Returns what is new: a piece for each request that has got on, with its result if it ends."""
        self.scheduler.admit()
        self._prefill()
        running = [r for r in self.scheduler.running if r.state is State.RUNNING and not r.is_paused]
        ready = [request for request in running if request.is_prefilled]
        for speculate in (True, False):
            group = [request for request in ready if self.scheduler.drafts_for(request) is speculate]
            group = self.scheduler.with_pages(group, self._nodes if speculate else 1)
            if group:
                self._round(group, self.draft if speculate else None)
        return self._report()

    def _prefill(self) -> None:
        """One pass over what is missing of texts, in chunks."""
        room, parts = self._prefill_rows, []
        for request in self.scheduler.running:
            missing = request.tree_start - request.sequence.length
            if missing > 0 and room > 0 and request.state is State.RUNNING:
                parts.append((request, min(missing, room)))
                room -= parts[-1][1]
        if not parts:
            return
        sequences, sizes = [request.sequence for request, _ in parts], tuple(size for _, size in parts)
        tokens = [request.ids[request.sequence.length :][:size] for request, size in parts]
        rows = self._rows(tokens, sizes, chains(sizes, self._device), sequences)
        rootless: list[Request] = []  # have no candidates for their next token yet
        ends: list[int] = []
        starts = list(itertools.accumulate(sizes, initial=0))
        for (request, size), end in zip(parts, starts[1:], strict=True):
            if (
                request.target_roots > 1
                and not request.candidates
                and request.tree_start == request.sequence.length + size
            ):
                rootless.append(request)
                ends.append(end - 1)
        want = torch.tensor(ends).to(self._device) if ends else False
        began = time.perf_counter()
        logits, hidden = self.target.forward(rows, self.cache, want=want)
        if self._adaptation is not None and self._device.type == "cpu":  # elsewhere a clock would have to wait for it
            self._adaptation.record_prompt(sum(sizes), time.perf_counter() - began)
        for (request, size), row in zip(parts, starts, strict=False):
            self._show(request, hidden[row : row + size])
            request.sequence.length += size
            if request.is_prefilled:
                self.cache.pool.register(request.ids[:-1], request.sequence.pages)
        if rootless:
            self._draw_candidates(rootless, logits)

    def _draw_candidates(self, requests: list[Request], logits: torch.Tensor) -> None:
        """The first candidates for the next tokens of texts, of the target's logits [batch, vocab] after them.

        They have the noise of plain sampling, which takes the first of them. Those of later rounds the rule draws.
        """
        law = self._law(requests)
        logits = law.without_improbable(logits[:, None])
        positions = torch.tensor([request.tree_start for request in requests], dtype=torch.int32).to(self._device)
        drawn = sample_tokens(
            logits[:, 0], seeds=law.seeds, positions=positions, count=self._target_roots, **law.filters
        )
        is_valid = logits.amax(dim=(1, 2)).isfinite()
        logprobs = None
        if any(request.sampling.logprobs for request in requests):
            logprobs = law.logprobs(logits)[:, 0].gather(1, drawn.long().clamp(min=0)).tolist()
        table = torch.cat((is_valid.int()[:, None], drawn), dim=1).tolist()  # the one copy to the host
        for place, (request, (sound, *tokens)) in enumerate(zip(requests, table, strict=True)):
            if sound:
                request.set_candidates(tokens, None if logprobs is None else logprobs[place])
            else:
                request.finish("invalid")

    def _rows(self, tokens, sizes, topology: Topology, sequences) -> Rows:
        lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32).to(self._device)
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        tokens = torch.tensor(tokens, dtype=torch.int32).to(self._device)
        return Rows(tokens, topology, lengths, self.cache.page_table(sequences))

    def _round(self, requests: list[Request], draft: Draft | None) -> None:
        law = self._law(requests)
        may_adapt = draft is not None and self._adapt and (law.is_greedy or self.rule == "match")
        may_adapt = may_adapt and self._target_roots == 1
        adaptation = self._adaptation if may_adapt else None
        plan: Plan = "plain" if draft is None else "draft"
        if adaptation is not None:
            plan = adaptation.plan(len(requests))
        drafts, marks = plan == "draft", [time.perf_counter()]
        batch = Batch(requests, self.cache, law, adaptation and adaptation.seconds_of_rows(len(requests)))
        if drafts:
            drafted = self.proposer.propose(batch)
        else:
            rows = 2 if plan == "probe" else 1
            tokens = batch.last_tokens[:, None].expand(-1, rows).contiguous()
            drafted = Drafted(tokens, chains((rows,), self._device), is_chain=True)
        marks.append(time.perf_counter())
        logits, hidden = self._score(batch, drafted)
        logits = law.without_improbable(logits)
        marks.append(time.perf_counter())
        acceptance, candidates = self._accept(draft, batch, logits, drafted)
        if not drafted.is_chain:
            self.cache.commit(acceptance.nodes, batch.context_lens, batch.page_table)
        logprobs = self._logprobs(batch, logits, acceptance, candidates)
        columns = [acceptance.num_accepted[:, None], acceptance.status[:, None], acceptance.tokens]
        table = torch.cat(columns if candidates is None else [*columns, candidates], dim=1)
        rows = table.tolist()  # the one copy to the host
        if self.draft is not None and self.draft.wants_hidden:
            for place, (request, (count, *_)) in enumerate(zip(requests, rows, strict=True)):
                path = hidden[place, : count + 1]
                if not drafted.is_chain:
                    path = hidden[place].index_select(0, acceptance.nodes[place, : count + 1].clamp(min=0))
                self._show(request, path)
        accepted = self._take(requests, rows, drafted, logprobs)
        if drafts:
            self.proposer.observe(batch, drafted, acceptance, accepted)
        marks.append(time.perf_counter())
        if adaptation is not None:
            rows, given = sum(drafted.sizes or (drafted.tokens.numel(),)), sum(accepted) / len(accepted) + 1
            adaptation.record(len(requests), plan, rows, marks[1] - marks[0], marks[-1] - marks[1], given)
            self._warn_of_loss(adaptation)
        if self.on_round is not None and drafts:
            spans = dict(zip(("draft", "score", "rest"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
            depth = acceptance.nodes.shape[1] - 1
            self.on_round(min(depth, draft.max_depth or depth), accepted, spans)

    def _accept(
        self, draft: Draft | None, batch: Batch, logits: torch.Tensor, drafted: Drafted
    ) -> tuple[Acceptance, torch.Tensor | None]:
        return rules.accept(self.rule, draft, batch, logits, drafted)

    def _take(self, requests: list[Request], table, drafted: Drafted, logprobs) -> list[int]:
        """Give the requests what a round brought: rows of (accepted, status, tokens, candidates). Returns the first."""
        sizes = drafted.sizes or [drafted.tokens.shape[1]] * len(requests)
        for place, (request, (count, status, *tokens)) in enumerate(zip(requests, table, strict=True)):
            request.stats.target_calls += 1
            request.stats.drafted += sizes[place] - request.target_roots
            request.stats.accepted += count
            if status & AcceptStatus.TARGET_INVALID:
                request.finish("invalid")
                continue
            request.sequence.length += count + 1
            found = None if logprobs is None else logprobs[place]
            roots = request.target_roots
            if roots > 1:
                found = None if found is None else [request.logprob_of_root(tokens[0]), *found]
                request.set_candidates(tokens[-roots:], None if found is None else found[-roots:])
            request.take(tokens[: count + 1], found, self._longest)
        return [row[0] for row in table]

    def _warn_of_loss(self, adaptation: Adaptation) -> None:
        if adaptation.loss is not None and not self._has_warned:
            self._has_warned = True
            decodes = "would decode at no more than" if adaptation.is_bound else "decodes at"
            warnings.warn(
                f"specdec_ops.{_OP}: this draft {decodes} {adaptation.loss:.2f}x the speed of plain decoding here, so "
                "it is left out and tried again now and then; Engine.diagnose() tells why",
                stacklevel=4,
            )

    def _show(self, request: Request, hidden: torch.Tensor) -> None:
        """Hand rows of the target's last layer to a draft that wants them."""
        if self.scheduler.drafts_for(request) and self.draft.wants_hidden:
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

    def _logprobs(self, batch: Batch, logits: torch.Tensor, acceptance, candidates) -> list[list[float]] | None:
        """Of the tokens that follow those of the path, under the target's distributions; None if nobody asks.

        Those are the emitted tokens. With candidates the path has its root, which is none of them, and the candidates'
        come last.
        """
        if not any(request.sampling.logprobs for request in batch.requests):
            return None
        nodes = acceptance.nodes.long().clamp(min=0)
        path = logits.gather(1, nodes[:, :, None].expand(-1, -1, logits.shape[-1]))
        laws, tokens = batch.law.logprobs(path), acceptance.tokens.long().clamp(min=0)
        if candidates is None:
            return laws.gather(2, tokens[:, :, None]).squeeze(2).tolist()
        below = laws[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
        end = acceptance.num_accepted.long()[:, None, None].expand(-1, 1, laws.shape[2])
        following = laws.gather(1, end).squeeze(1).gather(1, candidates.long().clamp(min=0))
        return torch.cat((below, following), dim=1).tolist()

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
                if request in self.scheduler.running:
                    self.scheduler.release(request)
                del self._requests[request.number]
                chunks.append(Chunk(request.number, text, tokens, request.result()))
            elif tokens:
                chunks.append(Chunk(request.number, text, tokens))
        return chunks

    # Why it is as fast as it is.

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
            return diagnose(self, as_prompts(prompts), max_tokens)
        finally:
            self._adapt = adapt
