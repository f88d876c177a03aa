"""`ModelDraft`, `ModelProposer`: what drafts that are models have in common: their cache, and how it follows a text."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from specdec_ops.decode.cache import Cache, Sequence
from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Rows
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree

from .base import Draft, Drafted, Proposer

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.request import Request
    from specdec_ops.ops.acceptance.accept import Acceptance

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
        levels_run: levels of a tree below node 0 that the model itself runs, so that its cache has their keys.
    """

    levels_run: int

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
        self.levels_run = draft.levels_run
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

    def retract(self, request: Request, length: int) -> None:
        """Forget the keys and values of what comes after."""
        request.draft_state.length = min(request.draft_state.length, length)

    def catch_up(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run what the cache does not have yet, node 0 included.

        Returns:
            logits of node 0, [batch, vocab], and the page table of the draft's cache, with room for the tree.
        """
        requests = batch.requests
        sequences = [request.draft_state for request in requests]
        for request, sequence in zip(requests, sequences, strict=True):
            if not self.cache.reserve(sequence, len(request.ids) - 1 + self.draft.max_nodes):
                raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        page_table = self.cache.page_table(sequences)
        while True:
            pending = [request.ids[s.length :] for request, s in zip(requests, sequences, strict=True)]
            sizes = tuple(min(len(tokens), _CHUNK) for tokens in pending)
            is_last = sizes == tuple(map(len, pending))
            rows = self._rows(pending, sizes, sequences, page_table)
            ends = torch.tensor(sizes).cumsum(0) - 1 if is_last else False
            output = self.model.forward(rows, self.cache, want=ends.to(self.cache.device) if is_last else False)
            for sequence, size in zip(sequences, sizes, strict=True):
                sequence.length += size
            if is_last:
                return output.logits, page_table
            for request, sequence in zip(requests, sequences, strict=True):
                sequence.length = min(sequence.length, len(request.ids) - 1)  # who is there already asks again

    def _rows(self, pending, sizes, sequences, page_table) -> Rows:
        device = self.cache.device
        tokens = [tokens[:size] for tokens, size in zip(pending, sizes, strict=True)]
        lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32).to(device)
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        return Rows(torch.tensor(tokens, dtype=torch.int32).to(device), chains(sizes, device), lengths, page_table)

    def observe(self, batch: Batch, drafted: Drafted, acceptance: Acceptance, accepted: list[int]) -> None:
        """Keep what was accepted. Nodes of the last level were never run."""
        contexts = batch.context_lens
        if not drafted.is_chain:
            sequences = [request.draft_state for request in batch.requests]
            self.cache.commit(acceptance.nodes, contexts, self.cache.page_table(sequences))
        for request, count in zip(batch.requests, accepted, strict=True):
            sequence = request.draft_state
            sequence.length += min(count, self.levels_run)
            sequence.length = min(sequence.length, len(request.ids) - 1)
