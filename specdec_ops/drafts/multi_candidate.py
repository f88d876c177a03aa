"""`MultiCandidate`: a small model drafts a tree of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.acceptance.sample import sample_children
from specdec_ops.tree import Tree

from .base import Drafted
from .model_draft import ModelDraft

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch


class MultiCandidate(ModelDraft):
    """Multi-candidate speculative decoding (Yang et al., 2024): several children of every node, drawn from the draft.

    Args:
        model: the draft, with the target's tokenizer.
        branching: children of each node, level by level: `(4, 2, 2, 1)` is a tree of 4 + 8 + 16 + 16 nodes.
        replacement: whether siblings may repeat. Without, more is accepted.

    Raises:
        TypeError, ValueError: as `Tree.from_branching`.
    """

    def __init__(self, model: Model, branching: Sequence[int] = (4, 2, 2, 1), *, replacement: bool = False) -> None:
        super().__init__(model)
        self.tree = Tree.from_branching(branching, root=True)
        self.branching = tuple(branching)
        self.proposals = "repeated" if replacement else "distinct"
        self.max_nodes, self._levels_run = len(self.tree), len(self.branching) - 1
        self.is_chain = set(self.branching) == {1}

    def propose(self, batch: Batch) -> Drafted:
        """A tree for each request, of one shape. The draft runs each level but the last in one pass."""
        device, levels = self.cache.device, self.tree.levels.tolist()
        topology = self.tree.to(device)
        tokens = batch.last_tokens.new_full((len(batch), self.max_nodes), -1)
        tokens[:, 0] = batch.last_tokens
        logits, page_table = self.catch_up(batch)
        draft_logits = logits.new_zeros(len(batch), self.max_nodes, logits.shape[-1])
        for level, count in enumerate(self.branching):
            start, stop, end = levels[level : level + 3]
            if level:
                rows = Rows(tokens[:, start:stop], topology, batch.context_lens, page_table, query_start=start)
                logits = self.model.forward(rows, self.cache).logits
            logits = logits.view(len(batch), stop - start, -1)
            draft_logits[:, start:stop] = logits
            tokens[:, stop:end] = self._draw(batch, logits, count, start, level).flatten(1)
        return Drafted(tokens, topology, None if self.is_coupled else draft_logits, is_chain=self.is_chain)

    def _draw(self, batch: Batch, logits: torch.Tensor, count: int, start: int, level: int) -> torch.Tensor:
        """int32 [batch, rows, count]: children of the nodes from `start` on."""
        if self.is_coupled:
            return batch.draw_as_target(logits, level + 1, count)
        replacement = self.proposals == "repeated"
        noise, filters = batch.noise, batch.law.filters
        return sample_children(logits, count, replacement=replacement, first_parent=start, **noise, **filters).tokens
