"""`ModelDraft`, `ModelProposer`: what drafts that are models have in common: their cache, and how it follows a text."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from specdec_ops.decode.cache import Cache, Sequence
from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Output, Rows
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree

from .base import Draft, Proposer

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


class ModelDraft(Draft):
    """A draft that is a language model with the target's tokenizer.

    Attributes:
        model: the language model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model


class ModelProposer(Proposer):
    """The cache of a model that drafts.

    It holds a request's text but for the tokens that the model has not run yet: the last one, and after a round in
    which everything was accepted also the one before.
    """

    def __init__(self, draft: ModelDraft, target: Model, *, max_batch: int, max_length: int, is_coupled: bool) -> None:
        shape = draft.model.shape
        if shape.vocab != target.shape.vocab:
            raise ValueError(
                f"specdec_ops.drafts: the draft must have the target's vocabulary of {target.shape.vocab} tokens, "
                f"got {shape.vocab}"
            )
        self.draft, self.model, self.is_coupled = draft, draft.model, is_coupled
        page_size = 16
        self.cache = Cache(shape, max_batch * -(-max_length // page_size), page_size)

    def start(self, request: Request) -> None:
        """An empty cache."""
        request.draft_state = Sequence()

    def drop(self, request: Request) -> None:
        """Give its pages back."""
        if request.draft_state is not None:
            self.cache.drop(request.draft_state)
            request.draft_state = None

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
        sequences = [request.draft_state for request in batch.requests]
        for request, sequence in zip(batch.requests, sequences, strict=True):
            if not self.cache.reserve(sequence, request.tree_start + self.draft.max_nodes):
                raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        return self.cache.page_table(sequences)

    def _run_text(self, requests: list[Request], sizes: tuple[int, ...], want: torch.Tensor | bool) -> Output:
        """Run the next tokens of texts."""
        device, states = self.cache.device, [request.draft_state for request in requests]
        tokens = [r.ids[s.length : s.length + size] for r, s, size in zip(requests, states, sizes, strict=True)]
        lengths = torch.tensor([state.length for state in states], dtype=torch.int32).to(device)
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        tokens = torch.tensor(tokens, dtype=torch.int32).to(device)
        rows = Rows(tokens, chains(sizes, device), lengths, self.cache.page_table(states))
        output = self.model.forward(rows, self.cache, want=want)
        for state, size in zip(states, sizes, strict=True):
            state.length += size
        return output
