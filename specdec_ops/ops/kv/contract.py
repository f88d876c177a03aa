"""The contract of kv_propagate: what its implementations take and write."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from specdec_ops._core.library import Operator

MAX_LAYERS = 32
"""Of a call of an implementation: what the parameters of a launch have room for (kMostKvLayers)."""


class KvPropagateArguments(NamedTuple):
    """Hidden rows, the projections of the layers that were skipped, and where their keys and values go.

    Lists have an entry for each layer. All is contiguous, but for the rows of hidden.
    """

    hidden: torch.Tensor
    """[rows, dim]"""
    norm_weights: list[torch.Tensor]
    """[dim], or an empty list: no norm"""
    k_weights: list[torch.Tensor]
    """[kv_heads * head_dim, dim]"""
    v_weights: list[torch.Tensor]
    """like k_weights"""
    norm_eps: float
    cosines: torch.Tensor | None
    """[rows, pairs], of the angle of each rotated pair; None: no rotation"""
    sines: torch.Tensor | None
    """like cosines"""
    interleaved: bool
    """pairs are elements 2i and 2i + 1, else i and pairs + i"""
    requests: torch.Tensor | None
    """int32 [rows]; None: all rows are of request 0"""
    slots: torch.Tensor
    """int32 [rows]. A row whose slot does not exist, or whose request does not, is not stored"""
    page_table: torch.Tensor | None
    """int32 [batch, max_pages]"""


class KvPropagateOutputs(NamedTuple):
    """Caches that are written to, one for each layer. Their last dimension is contiguous."""

    k_caches: list[torch.Tensor]
    """[batch, slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim] with page_table"""
    v_caches: list[torch.Tensor]
    """like k_caches"""


def _pieces(
    arguments: KvPropagateArguments, outputs: KvPropagateOutputs
) -> Iterator[tuple[KvPropagateArguments, KvPropagateOutputs]]:
    """As many calls as it takes for each to have at most MAX_LAYERS."""
    for start in range(0, len(outputs.k_caches), MAX_LAYERS):
        layers = slice(start, start + MAX_LAYERS)
        yield (
            arguments._replace(
                norm_weights=arguments.norm_weights[layers],
                k_weights=arguments.k_weights[layers],
                v_weights=arguments.v_weights[layers],
            ),
            KvPropagateOutputs(outputs.k_caches[layers], outputs.v_caches[layers]),
        )


kv_propagate = Operator(
    "kv_propagate",
    KvPropagateArguments,
    KvPropagateOutputs,
    None,
    answers=lambda arguments, outputs: arguments.hidden.shape[0] == 0,
    pieces=_pieces,
)
