"""`Chain`: a small model drafts one token after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.acceptance.sample import sample_children
from specdec_ops.tree import MAX_NODES, Tree

from .base import Drafted
from .model_draft import ModelDraft

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch


class Chain(ModelDraft):
    """Speculative decoding as Leviathan et al. (2023) and Chen et al. (2023) have it: `steps` tokens of a small model.

    Args:
        model: the draft, with the target's tokenizer.
        steps: tokens of each draft, from 1.

    Raises:
        TypeError, ValueError: steps is no int from 1 on.
    """

    proposals = "distinct"
    is_chain = True

    def __init__(self, model: Model, steps: int = 5) -> None:
        super().__init__(model)
        if not is_int(steps):
            raise TypeError(argument_error("drafts.Chain", "steps", "an int", steps))
        if not 1 <= steps < MAX_NODES:
            raise ValueError(argument_error("drafts.Chain", "steps", f"from 1 to {MAX_NODES - 1}", steps))
        self.steps, self.max_nodes, self._levels_run = steps, steps + 1, steps - 1

    def propose(self, batch: Batch) -> Drafted:
        """A chain for each request. The draft runs each of its tokens but the last."""
        topology = Tree.chain(self.max_nodes).to(self.cache.device)
        logits, page_table = self.catch_up(batch)
        tokens, rows = [batch.last_tokens], []
        for step in range(self.steps):
            if step:
                pass_rows = Rows(tokens[-1][:, None], topology, batch.context_lens, page_table, query_start=step)
                logits = self.model.forward(pass_rows, self.cache).logits
            rows.append(logits)
            tokens.append(self._draw(batch, logits, step))
        rows.append(logits)  # of the last node, which has no children
        draft_logits = None if self.is_coupled else torch.stack(rows, dim=1)
        return Drafted(torch.stack(tokens, dim=1), topology, draft_logits, is_chain=True)

    def _draw(self, batch: Batch, logits: torch.Tensor, step: int) -> torch.Tensor:
        """int32 [batch]: the child of node `step`."""
        if self.is_coupled:
            return batch.draw_as_target(logits[:, None], step + 1, 1)[:, 0, 0]
        drawn = sample_children(logits[:, None], 1, first_parent=step, **batch.noise, **batch.law.filters)
        return drawn.tokens[:, 0, 0]
