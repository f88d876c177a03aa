"""`FixedTreeProposer`: a small model drafts trees of one shape, level by level, as deep as it pays."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import torch

from specdec_ops._core import alloc
from specdec_ops.decode.model import Model
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.acceptance.sample import sample_children
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree
from specdec_ops.vocab_map import VocabMap

from .base import Drafted
from .model_draft import ModelDraft, ModelProposer
from .stop import Stop

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.ops.acceptance.accept import Acceptance


class FixedTreeDraft(ModelDraft):
    """A small model, how many children the nodes of each level have, and when to stop before the last level.

    Attributes:
        tree: its shape. With one root that is the last token of a text, with several they are drawn by the target.
        branching: children of each node, level by level, roots excluded.
        stop: tells after each level whether to draft another one, or None.
        stops_together: whether that is one decision for all requests of a batch.
    """

    def __init__(
        self,
        model: Model,
        branching: tuple[int, ...],
        *,
        target_roots: int = 1,
        replacement: bool = False,
        stop: Stop | None = None,
        stops_together: bool = False,
        vocab_map: VocabMap | None = None,
    ) -> None:
        super().__init__(model, vocab_map)
        self.tree, self.branching = Tree.from_branching((target_roots, *branching)), branching
        self.target_roots, self.stop, self.stops_together = target_roots, stop, stops_together
        self.proposals = "repeated" if replacement else "distinct"
        self.max_nodes, self.max_depth = len(self.tree), len(branching)
        self.min_depth = None if stop is None else 1
        self.is_chain = target_roots == 1 and set(branching) == {1}

    def bind(self, target: Model, **limits) -> FixedTreeProposer:
        """See `Draft.bind`."""
        return FixedTreeProposer(self, target, **limits)


class FixedTreeProposer(ModelProposer):
    """Draws the children of all nodes of a level at once.

    The topology is made once. A round that stops after fewer levels has a leading part of it, which is a slice.
    """

    draft: FixedTreeDraft

    def __init__(self, draft: FixedTreeDraft, target: Model, *, is_coupled: bool, **limits) -> None:
        super().__init__(draft, target, is_coupled=is_coupled, **limits)
        if draft.stop is not None:
            draft.stop.check(draft.model)
            if draft.stops_together and not is_coupled:
                raise ValueError(
                    "specdec_ops.drafts: stops_together must be False but with rule='match': with other rules the text "
                    "of a request would depend on the others"
                )
        device, roots = self.cache.device, draft.target_roots
        self._topology = draft.tree.to(device)
        self._levels = draft.tree.levels.tolist()
        self._parts = [self._topology.truncate(depth) for depth in range(draft.max_depth)] + [self._topology]
        self._below_last: Topology | None = None  # the roots, below the last token of the text
        if roots > 1:
            self._below_last = Tree.from_branching((roots,), root=True).to(device)
        self._round: list[tuple[int, int]] = []  # of each request: the position of its roots, and levels below them
        self._draft_logits: torch.Tensor | None = None

    def propose(self, batch: Batch) -> Drafted:
        """A tree for each request. The model runs each level but the last in one pass."""
        draft, levels = self.draft, self._levels
        tokens = batch.last_tokens.new_full((len(batch), draft.max_nodes), -1)
        logits, hidden, page_table = self._run_roots(batch, tokens)
        draft_logits = None if self.is_coupled else self._room(len(batch), logits)
        most = draft.max_depth if self.levels is None else min(self.levels, draft.max_depth)
        depths, part, who = [most] * len(batch), batch, slice(None)  # who: the places of the part
        for level, count in enumerate(draft.branching[:most]):
            start, stop, end = levels[level : level + 3]
            parents = tokens[who, start:stop]
            if level:
                rows = Rows(parents, self._topology, part.context_lens, page_table[who], query_start=start)
                logits, hidden = self.forward(rows)
            logits = logits.view(len(part), stop - start, -1)
            drawn = self._draw(part, logits, count, start, level)
            tokens[who, stop:end] = drawn.where(parents[:, :, None] >= 0, -1).flatten(1)
            if draft_logits is not None:
                draft_logits[who, start:stop] = logits
            if draft.stop is None or level + 1 == most:
                continue
            wants = self._wants(logits, hidden, parents)
            if not all(wants):
                places = who if isinstance(who, list) else list(range(len(batch)))
                for place, wanted in zip(places, wants, strict=True):
                    depths[place] = most if wanted else level + 1
                who = [place for place, wanted in zip(places, wants, strict=True) if wanted]
                if not who:
                    break
                part = batch.part(who)
        self._round = [(request.tree_start, depth) for request, depth in zip(batch.requests, depths, strict=True)]
        return self._drafted(tokens, draft_logits, depths)

    def _run_roots(self, batch: Batch, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write the roots into tokens, and run them, with whatever of the text has not been run.

        Roots of the target stand below the last token of the text, which is run again with them. So it does not matter
        whether it has been: after a round in which all was accepted it has not.

        Returns:
            logits [batch * roots, vocab], the rows before the final norm [batch * roots, dim], and the page table.
        """
        roots = self.draft.target_roots
        if roots == 1:
            tokens[:, 0] = batch.last_tokens
            return self.catch_up(batch)
        page_table = self.catch_up_to_last(batch)
        candidates = [request.candidates + [-1] * (roots - len(request.candidates)) for request in batch.requests]
        tokens[:, :roots] = torch.tensor(candidates, dtype=torch.int32).to(tokens.device)
        under_last = torch.cat((batch.last_tokens[:, None], tokens[:, :roots]), dim=1)
        rows = Rows(under_last, self._below_last, batch.context_lens - 1, page_table)
        wanted = torch.arange(under_last.numel()).view(under_last.shape)[:, 1:].reshape(-1).to(tokens.device)
        output = self.forward(rows, wanted)
        return output.logits, output.hidden.index_select(0, wanted), page_table

    def _draw(self, batch: Batch, logits: torch.Tensor, count: int, start: int, level: int) -> torch.Tensor:
        """int32 [batch, rows, count]: children of the nodes from `start` on."""
        if self.is_coupled:
            return batch.draw_as_target(logits, level + 1, count, self.vocab_map)
        options = {"replacement": self.draft.proposals == "repeated", "vocab_map": self.vocab_map}
        return sample_children(logits, count, first_parent=start, **options, **batch.noise, **batch.law.filters).tokens

    def _wants(self, logits: torch.Tensor, hidden: torch.Tensor, parents: torch.Tensor) -> list[bool]:
        """Of each request whether to draft another level: if one of its rows wants to. Waits for the device."""
        goes_on = self.draft.stop.goes_on(logits.flatten(0, 1), hidden, self.model).view(parents.shape)
        wants = (goes_on & (parents >= 0)).any(dim=1).tolist()
        return [any(wants)] * len(wants) if self.draft.stops_together else wants

    def _room(self, batch: int, logits: torch.Tensor) -> torch.Tensor:
        """[batch, nodes, vocab] for the draft's logits. Rows of nodes without children are not written, nor read."""
        if self._draft_logits is None or len(self._draft_logits) < batch:
            shape = (batch, self.draft.max_nodes, logits.shape[-1])
            self._draft_logits = alloc.empty(shape, logits.dtype, logits.device)
        return self._draft_logits[:batch]

    def _drafted(self, tokens: torch.Tensor, draft_logits: torch.Tensor | None, depths: list[int]) -> Drafted:
        """The leading parts of the trees that were drafted."""
        nodes, topology, sizes = self._levels[max(depths) + 1], self._topology, None
        if min(depths) == max(depths):
            topology = self._parts[depths[0]]
        else:
            sizes = tuple(self._levels[depth + 1] for depth in depths)
            cut = topology.truncate(torch.tensor(depths, dtype=torch.int32).to(tokens.device))
            offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32).to(tokens.device)
            topology = dataclasses.replace(cut, offsets=offsets)
        draft_logits = None if draft_logits is None else draft_logits[:, :nodes]
        return Drafted(
            tokens[:, :nodes].contiguous(),
            topology,
            draft_logits,
            vocab_map=None if draft_logits is None else self.vocab_map,
            sizes=sizes,
            is_chain=self.draft.is_chain,
        )

    def observe(self, batch: Batch, drafted: Drafted, acceptance: Acceptance, accepted: list[int]) -> None:
        """Keep what was accepted. Nodes of a tree's last level were never run."""
        states = [request.draft_state for request in batch.requests]
        if not drafted.is_chain:
            self.cache.commit(acceptance.nodes, batch.context_lens, self.cache.page_table(states))
        for request, state, count, (start, depth) in zip(batch.requests, states, accepted, self._round, strict=True):
            state.length = min(start + min(count + 1, depth), len(request.ids) - 1)
