"""The rows of a pass, what a pass gives, and the sizes of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from specdec_ops.topology import Topology


class Rows(NamedTuple):
    """The rows of one pass: nodes of the trees of a batch of requests.

    Padded, row r of request b is node `query_start + r` of its tree; with `topology.offsets` the rows of all requests
    follow one another. Node i of request b has its key and value in slot `context_lens[b] + i`, and stands at position
    `context_lens[b] + depth(i)`.
    """

    tokens: torch.Tensor
    """int32 [batch, rows], or packed [rows]"""
    topology: Topology
    context_lens: torch.Tensor
    """int32 [batch]: slots in use before the tree"""
    page_table: torch.Tensor
    """int32 [batch, max_pages]"""
    query_start: int = 0

    @property
    def count(self) -> int:
        """Rows of the pass."""
        return self.tokens.numel()

    def positions(self) -> torch.Tensor:
        """int64 [rows]: the position of each row; 0 or less where there is no node."""
        of_nodes = self.topology.position_ids(self.context_lens).long()
        if self.topology.offsets is None:
            return of_nodes[:, self.query_start :][:, : self.tokens.shape[1]].reshape(-1)
        offsets = self.topology.offsets.long()
        row = torch.arange(self.count, device=offsets.device)
        request = torch.searchsorted(offsets[1:], row, right=True).clamp(max=len(offsets) - 2)
        node = self.query_start + row - offsets[request]
        return of_nodes.expand(len(offsets) - 1, -1)[request, node.clamp(max=of_nodes.shape[1] - 1)]


class Output(NamedTuple):
    """What a pass gives."""

    logits: torch.Tensor | None
    """[wanted rows, vocab]; None if none are wanted"""
    hidden: torch.Tensor
    """[rows, dim], before the final norm"""


class Shape(NamedTuple):
    """The sizes of a model that a cache and a draft need to know."""

    layers: int
    kv_heads: int
    head_dim: int
    dim: int
    vocab: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device
