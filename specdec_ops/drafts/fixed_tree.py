"""`FixedTreeProposer`: a small model drafts trees of one shape, level by level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.acceptance.sample import sample_children
from specdec_ops.tree import Tree
from specdec_ops.vocab_map import VocabMap

from .base import Drafted
from .model_draft import ModelDraft, ModelProposer

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch


class FixedTreeDraft(ModelDraft):
    """A small model, and how many children the nodes of each level have.

    Attributes:
        tree: its shape.
        branching: children of each node, level by level.
    """

    def __init__(
        self,
        model: Model,
        branching: tuple[int, ...],
        *,
        replacement: bool = False,
        vocab_map: VocabMap | None = None,
    ) -> None:
        super().__init__(model, vocab_map)
        self.tree, self.branching = Tree.from_branching(branching, root=True), branching
        self.proposals = "repeated" if replacement else "distinct"
        self.max_nodes, self.max_depth, self.levels_run = len(self.tree), len(branching), len(branching) - 1
        self.is_chain = set(branching) == {1}

    def bind(self, target: Model, **limits) -> FixedTreeProposer:
        """See `Draft.bind`."""
        return FixedTreeProposer(self, target, **limits)


class FixedTreeProposer(ModelProposer):
    """Draws the children of all nodes of a level at once."""

    draft: FixedTreeDraft

    def __init__(self, draft: FixedTreeDraft, target: Model, **options) -> None:
        super().__init__(draft, target, **options)
        self._trees: dict[int, Tree] = {len(draft.branching): draft.tree}  # by their levels

    def propose(self, batch: Batch) -> Drafted:
        """A tree for each request, of one shape. The model runs each level but the last in one pass."""
        draft, branching = self.draft, self.draft.branching[: self.levels]
        tree = self._tree(len(branching))
        levels, topology, self.levels_run = tree.levels.tolist(), tree.to(self.cache.device), len(branching) - 1
        tokens = batch.last_tokens.new_full((len(batch), len(tree)), -1)
        tokens[:, 0] = batch.last_tokens
        logits, page_table = self.catch_up(batch)
        draft_logits = None if self.is_coupled else logits.new_zeros(len(batch), len(tree), logits.shape[-1])
        for level, count in enumerate(branching):
            start, stop, end = levels[level : level + 3]
            if level:
                rows = Rows(tokens[:, start:stop], topology, batch.context_lens, page_table, query_start=start)
                logits = self.forward(rows)
            logits = logits.view(len(batch), stop - start, -1)
            if draft_logits is not None:
                draft_logits[:, start:stop] = logits
            tokens[:, stop:end] = self._draw(batch, logits, count, start, level).flatten(1)
        return Drafted(
            tokens,
            topology,
            draft_logits,
            vocab_map=None if draft_logits is None else self.vocab_map,
            is_chain=draft.is_chain,
        )

    def _tree(self, levels: int) -> Tree:
        if levels not in self._trees:
            self._trees[levels] = self.draft.tree.truncate(levels)
        return self._trees[levels]

    def _draw(self, batch: Batch, logits: torch.Tensor, count: int, start: int, level: int) -> torch.Tensor:
        """int32 [batch, rows, count]: children of the nodes from `start` on."""
        if self.is_coupled:
            return batch.draw_as_target(logits, level + 1, count, self.vocab_map)
        options = {"replacement": self.draft.proposals == "repeated", "vocab_map": self.vocab_map}
        return sample_children(logits, count, first_parent=start, **options, **batch.noise, **batch.law.filters).tokens
