"""`ModelDraft`, `ModelProposer`: what drafts that are models have in common: their cache, and how it follows a text."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.cache import Cache, Sequence
from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Rows, Shape
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree
from specdec_ops.vocab_map import VocabMap

from .base import Draft, Drafted, Proposer
from .vocabulary import vocab_map_for

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
        levels_run: levels of a tree below node 0 that the model itself runs, so that its cache has their keys.
    """

    levels_run: int

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

    def forward(self, rows: Rows, want: torch.Tensor | bool = True) -> torch.Tensor | None:
        """Logits [wanted rows, vocab] of rows of target tokens, or [wanted rows, draft_vocab] with a map; or None.

        Tokens that the draft has no entry for are read as its entry 0.
        """
        if self.vocab_map is not None:
            entries = self.vocab_map.target_to_draft[rows.tokens.clamp(min=0).long()]
            rows = rows._replace(tokens=entries.clamp(min=0))
        logits = self.model.forward(rows, self.cache, want=want).logits
        return logits if logits is None or self.vocab_map is None else logits[:, : self.vocab_map.draft_vocab]

    def start(self, request: Request) -> None:
        """The pages of the longest beginning of its text that are known, if any."""
        sequence, pool = Sequence(), self.cache.pool
        sequence.pages = pool.find_prefix(request.ids[:-1])
        sequence.length = len(sequence.pages) * pool.page_size
        request.draft_state = sequence

    def reserve(self, request: Request) -> bool:
        """See `Proposer.reserve`."""
        return self.cache.reserve(request.draft_state, len(request.ids) - 1 + self.draft.max_nodes)

    def drop(self, request: Request) -> None:
        """Give its pages back; what they hold stays known."""
        sequence = request.draft_state
        if sequence is not None:
            self.cache.pool.register(request.ids[: sequence.length], sequence.pages)
            self.cache.drop(sequence)
            request.draft_state = None

    def catch_up(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run what the cache does not have yet, node 0 included.

        Returns:
            logits of node 0, [batch, vocab], and the page table of the draft's cache, with room for the tree.
        """
        requests = batch.requests
        sequences = [request.draft_state for request in requests]
        if not all(map(self.reserve, requests)):
            raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        page_table = self.cache.page_table(sequences)
        while True:
            pending = [request.ids[s.length :] for request, s in zip(requests, sequences, strict=True)]
            sizes = tuple(min(len(tokens), _CHUNK) for tokens in pending)
            is_last = sizes == tuple(map(len, pending))
            rows = self._rows(pending, sizes, sequences, page_table)
            ends = torch.tensor(sizes).cumsum(0) - 1 if is_last else False
            logits = self.forward(rows, ends.to(self.cache.device) if is_last else False)
            for request, sequence, size in zip(requests, sequences, sizes, strict=True):
                sequence.length += size
                if size > 1:
                    self.cache.pool.register(request.ids[: sequence.length], sequence.pages)
            if is_last:
                return logits, page_table
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
            sequence.length += min(count, self.draft.levels_run)
            sequence.length = min(sequence.length, len(request.ids) - 1)
