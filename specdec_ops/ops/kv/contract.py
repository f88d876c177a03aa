"""The contracts of the ops of this family: what their implementations take and write."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from specdec_ops._core.library import Operator

MAX_LAYERS = 32
"""Of a call of an implementation: what the parameters of a launch have room for (kMostKvLayers)."""


class KvAppendArguments(NamedTuple):
    """Rows of K, V and Q, and what says where they go and by what angles they turn.

    The last dimension of k, v, q and the caches is contiguous, all else is contiguous altogether. A row has a request
    and, unless packed rows come without offsets, a node of it: padded rows [batch, queries, ...] by their place, packed
    rows [tokens, ...] by offsets.
    """

    k: torch.Tensor
    """[batch, queries, kv_heads, dim], or packed [tokens, kv_heads, dim]"""
    v: torch.Tensor
    """like k; its dim may be another"""
    q: torch.Tensor | None
    """like k, with heads of its own"""
    depths: torch.Tensor | None
    """int32 [batch or 1, nodes]; None: every node exists, and its depth is its number"""
    num_nodes: torch.Tensor | None
    """int32 [batch or 1]"""
    offsets: torch.Tensor | None
    """int32 [batch + 1]: the first packed row of each request"""
    context_lens: torch.Tensor | None
    """int32 [batch]; None only with slots, and with positions if rows are rotated"""
    query_starts: torch.Tensor | None
    """int32 [batch]: a request's first row is node query_start + query_starts[request]"""
    query_start: int
    requests: torch.Tensor | None
    """int32 [tokens], of packed rows without offsets; None: they are all of request 0"""
    slots: torch.Tensor | None
    """int32 [batch, queries] or [tokens]; None: context_lens + node"""
    positions: torch.Tensor | None
    """like slots; None: context_lens + depth"""
    page_table: torch.Tensor | None
    """int32 [batch, max_pages]"""
    cosines: torch.Tensor | None
    """float32 [positions, pairs], float64 with float64 rows; None: no rotation"""
    sines: torch.Tensor | None
    """like cosines"""
    interleaved: bool
    """pairs are elements 2i and 2i + 1, else i and pairs + i"""
    q_norm_weight: torch.Tensor | None
    """[dim], in k's dtype or float32; None: no norm"""
    k_norm_weight: torch.Tensor | None
    """the same"""
    norm_eps: float
    k_scale: float
    """what the cache's numbers are multiplied with to get keys, for all heads"""
    k_scales: torch.Tensor | None
    """float32 [kv_heads]; counts in place of k_scale"""
    v_scale: float
    v_scales: torch.Tensor | None


class KvAppendOutputs(NamedTuple):
    """Caches that are written to, and the rotated queries. The last dimension of each is contiguous."""

    k_cache: torch.Tensor
    """[batch, slots, kv_heads, dim], or [pages, page_size, kv_heads, dim] with page_table; of k's dtype or 8 bits"""
    v_cache: torch.Tensor
    """the same with v's dim, of k_cache's dtype"""
    q_out: torch.Tensor | None
    """like q. It may be q. Rows that have no position are 0"""


kv_append = Operator(
    "kv_append",
    KvAppendArguments,
    KvAppendOutputs,
    None,
    answers=lambda arguments, outputs: 0 in arguments.k.shape[:-2],
)


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
