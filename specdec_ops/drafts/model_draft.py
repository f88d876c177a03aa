"""`ModelDraft`, `ModelProposer`: what drafts that are models have in common: their cache, and how it follows a text."""

from __future__ import annotations

import functools
import itertools
import time
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.cache import Cache, Sequence
from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Output, Rows, Shape
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree
from specdec_ops.vocab_map import VocabMap

from .base import Draft, Proposer
from .vocabulary import vocab_map_for

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.request import Request

_CHUNK = 256  # rows of a pass over a prompt


@functools.lru_cache(maxsize=256)
def chains(sizes: tuple[int, ...], device: torch.device) -> Topology:
    """Chains of these lengths, one for each request; packed if they differ."""
    if len(set(sizes)) == 1:
        return Tree.chain(sizes[0]).to(device)
    return Topology.from_trees(map(Tree.chain, sizes), device, packed=True)


def draft_cache(shape: Shape, extra: int = 0, *, max_batch: int, max_length: int, max_slots: int) -> Cache:
    """A draft's own cache, for as much text as the target's pages hold; see `Draft.bind`.

    Args:
        shape: of the draft.
        extra: slots of each request beyond those of the target.
        max_batch: the most requests at once.
        max_length: the most slots of a request.
        max_slots: of all requests together. Each may leave all but one slot of its last page empty.
    """
    page_size = 16
    each, together = max_length + extra, max_slots + max_batch * extra
    return Cache(shape, min(max_batch * -(-each // page_size), -(-together // page_size) + max_batch), page_size)


class ModelDraft(Draft):
    """A draft that is a language model with the target's tokenizer.

    Attributes:
        model: the language model.
        vocab_map: as the user gave it; see `vocab_map_for`.
    """

    def __init__(self, model: Model, vocab_map: VocabMap | None = None) -> None:
        if not hasattr(model, "forward") or not hasattr(model, "shape"):
            must = "a model of specdec_ops.integrations.transformers.load"
            raise TypeError(argument_error("drafts", "model", must, model))
        self.model, self.vocab_map, self.max_positions = model, vocab_map, model.shape.max_positions


class ModelProposer(Proposer):
    """The cache of a model that drafts, and what its tokens are.

    The cache holds a request's text but for the tokens that the model has not run yet: the last one, and after a round
    in which everything was accepted also the one before.
    """

    def __init__(self, draft: ModelDraft, target: Model, *, is_coupled: bool, **limits) -> None:
        self.vocab_map = vocab_map_for(draft.model, target, draft.vocab_map)
        self.draft, self.model, self.is_coupled = draft, draft.model, is_coupled
        self.cache = draft_cache(draft.model.shape, **limits)

    def forward(self, rows: Rows, want: torch.Tensor | bool = True) -> Output:
        """Of rows of target tokens. With a map its logits are [wanted rows, draft_vocab].

        Tokens that the draft has no entry for are read as its entry 0.
        """
        if self.vocab_map is not None:
            entries = self.vocab_map.target_to_draft[rows.tokens.clamp(min=0).long()]
            rows = rows._replace(tokens=entries.clamp(min=0))
        output = self.model.forward(rows, self.cache, want=want)
        if output.logits is None or self.vocab_map is None:
            return output
        return output._replace(logits=output.logits[:, : self.vocab_map.draft_vocab])

    def seconds_of_level(self, requests: int) -> float | None:
        """Of a pass over one row for each request, in pages that nobody has. See `Proposer.seconds_of_level`."""
        device, pool = self.cache.device, self.cache.pool
        pages = pool.take(requests) if device.type == "cpu" else None  # elsewhere a clock would have to wait for it
        if pages is None:
            return None
        zeros = torch.zeros(requests, dtype=torch.int32)
        rows = Rows(zeros[:, None], chains((1,), device), zeros, torch.tensor(pages, dtype=torch.int32)[:, None])
        try:
            marks = [time.perf_counter()]
            for _ in range(2):  # the first also makes what later ones have
                self.forward(rows)
                marks.append(time.perf_counter())
        finally:
            pool.drop(pages)
        return min(end - start for start, end in itertools.pairwise(marks))

    def start(self, request: Request) -> None:
        """The pages of the longest beginning of its text that are known, if any."""
        sequence, pool = Sequence(), self.cache.pool
        sequence.pages = pool.find_prefix(request.ids[:-1])
        sequence.length = len(sequence.pages) * pool.page_size
        request.draft_state = sequence

    def reserve(self, request: Request) -> bool:
        """See `Proposer.reserve`."""
        return self.cache.reserve(request.draft_state, request.tree_start + self.draft.max_nodes)

    def drop(self, request: Request) -> None:
        """Give its pages back; what they hold stays known."""
        sequence = request.draft_state
        if sequence is not None:
            self.cache.pool.register(request.ids[: sequence.length], sequence.pages)
            self.cache.drop(sequence)
            request.draft_state = None

    def retract(self, request: Request, length: int) -> None:
        """Forget the keys and values of what comes after. Pages that are known for a text are not written again."""
        request.draft_state.length = min(request.draft_state.length, length)
        self.drop(request)
        self.start(request)

    def catch_up(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run what the cache does not have yet, node 0 included.

        Returns:
            logits of node 0, [batch, vocab], its row before the final norm, [batch, dim], and the page table of the
            draft's cache, with room for the tree.
        """
        requests, page_table = batch.requests, self._reserve(batch)
        self._run_chunks(requests, _CHUNK)
        sizes = tuple(len(request.ids) - request.draft_state.length for request in requests)
        ends = (torch.tensor(sizes).cumsum(0) - 1).to(self.cache.device)
        output = self._run_text(requests, sizes, want=ends)
        return output.logits, output.hidden.index_select(0, ends), page_table

    def catch_up_to_last(self, batch: Batch) -> torch.Tensor:
        """Run what the cache does not have yet, but not the last token. Returns the page table, as `catch_up`."""
        page_table = self._reserve(batch)
        self._run_chunks(batch.requests, 1 + _CHUNK)
        missing = {r: len(r.ids) - 1 - r.draft_state.length for r in batch.requests}
        behind = [request for request, count in missing.items() if count > 0]
        if behind:
            self._run_text(behind, tuple(missing[request] for request in behind), want=False)
        return page_table

    def _run_chunks(self, requests: list[Request], most: int) -> None:
        """Run texts in chunks, which are the same whoever is beside them, until at most `most` tokens are left."""
        for request in requests:
            while len(request.ids) - request.draft_state.length > most:
                self._run_text([request], (_CHUNK,), want=False)

    def _reserve(self, batch: Batch) -> torch.Tensor:
        """The page table of the draft's cache, with room for the tree."""
        if not all(map(self.reserve, batch.requests)):
            raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        return self.cache.page_table([request.draft_state for request in batch.requests])

    def _run_text(self, requests: list[Request], sizes: tuple[int, ...], want: torch.Tensor | bool) -> Output:
        """Run the next tokens of texts."""
        device, states = self.cache.device, [request.draft_state for request in requests]
        tokens = [r.ids[s.length : s.length + size] for r, s, size in zip(requests, states, sizes, strict=True)]
        lengths = torch.tensor([state.length for state in states], dtype=torch.int32).to(device)
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        tokens = torch.tensor(tokens, dtype=torch.int32).to(device)
        rows = Rows(tokens, chains(sizes, device), lengths, self.cache.page_table(states))
        output = self.forward(rows, want)
        for request, state, size in zip(requests, states, sizes, strict=True):
            state.length += size
            if size > 1:
                self.cache.pool.register(request.ids[: state.length], state.pages)
        return output
