"""The contracts of the KV ops: what their implementations take and write."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from specdec_ops._core.library import Operator

MAX_LAYERS = 32
"""Of a call of an implementation: what the parameters of a launch have room for (kMaxKvLayers)."""


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
    may_be={"q_out": ("q",)},
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


def _pieces_of(count: int, arguments, outputs, piece: Callable[[slice], tuple]) -> Iterable[tuple]:
    """As many calls as it takes for each to have at most MAX_LAYERS of `count`; `piece` makes that of some layers."""
    if count <= MAX_LAYERS:
        return ((arguments, outputs),)
    return map(piece, (slice(start, start + MAX_LAYERS) for start in range(0, count, MAX_LAYERS)))


def _propagate_pieces(arguments: KvPropagateArguments, outputs: KvPropagateOutputs) -> Iterable[tuple]:
    def piece(layers: slice) -> tuple:
        return (
            arguments._replace(
                norm_weights=arguments.norm_weights[layers],
                k_weights=arguments.k_weights[layers],
                v_weights=arguments.v_weights[layers],
            ),
            KvPropagateOutputs(outputs.k_caches[layers], outputs.v_caches[layers]),
        )

    return _pieces_of(len(outputs.k_caches), arguments, outputs, piece)


kv_propagate = Operator(
    "kv_propagate",
    KvPropagateArguments,
    KvPropagateOutputs,
    None,
    answers=lambda arguments, outputs: arguments.hidden.shape[0] == 0,
    pieces=_propagate_pieces,
)


# Layers of caches, in the contracts of ops that move rows. `k_caches` and `v_caches` are lists with an entry for each
# layer, [batch, slots, kv_heads, dim] where it is dense, [pages, page_size, kv_heads, dim] where it has a page table;
# or with one entry for all layers, [layers, ...]. Their last dimension is contiguous. K and V of a layer may
# differ in their dim.


class KvCommitArguments(NamedTuple):
    """Accepted paths, and copies of pages that come first."""

    nodes: torch.Tensor
    """int32 [batch, steps], contiguous: a path of ascending nodes that ends at the first that does not ascend"""
    context_lens: torch.Tensor
    """int32 [batch], contiguous"""
    page_tables: list[torch.Tensor]
    """int32 [batch, max_pages], contiguous"""
    table_of: list[int]
    """for each layer the index of its page table; -1: dense"""
    copies: torch.Tensor | None
    """int32 [count, 2], contiguous: pages, source and target, in the layers that have a page table. Made in order"""


class KvCommitOutputs(NamedTuple):
    """Caches whose rows are moved, as bits of any dtype of 1, 2, 4 or 8 bytes."""

    k_caches: list[torch.Tensor]
    """K of the layers; see above"""
    v_caches: list[torch.Tensor]
    """V of the layers"""


def layers_of(part: tuple) -> int:
    """How many layers a call's caches have."""
    first = part.k_caches[0]
    return first.shape[0] if first.dim() == 5 else len(part.k_caches)


def _layers(part: tuple, layers: slice) -> dict[str, list[torch.Tensor]]:
    """Some of the layers of a call's caches."""
    both = {"k_caches": part.k_caches, "v_caches": part.v_caches}
    if part.k_caches[0].dim() == 5:
        return {name: [caches[0][layers]] for name, caches in both.items()}
    return {name: caches[layers] for name, caches in both.items()}


def _commit_pieces(arguments: KvCommitArguments, outputs: KvCommitOutputs) -> Iterable[tuple]:
    def piece(layers: slice) -> tuple:
        return arguments._replace(table_of=arguments.table_of[layers]), outputs._replace(**_layers(outputs, layers))

    return _pieces_of(layers_of(outputs), arguments, outputs, piece)


def _nothing_to_commit(arguments: KvCommitArguments, outputs: KvCommitOutputs) -> bool:
    return arguments.nodes.numel() == 0 and (arguments.copies is None or len(arguments.copies) == 0)


kv_commit = Operator(
    "kv_commit", KvCommitArguments, KvCommitOutputs, None, answers=_nothing_to_commit, pieces=_commit_pieces
)


class GatherLayerKvArguments(NamedTuple):
    """Slots, and the caches of all layers."""

    slots: torch.Tensor
    """int32 [rows], contiguous. What does not exist gives zeros"""
    requests: torch.Tensor | None
    """int32 [rows], contiguous; None: all rows are of request 0"""
    page_tables: list[torch.Tensor]
    """int32 [batch, max_pages], contiguous"""
    table_of: list[int]
    """for each layer the index of its page table; -1: dense"""
    k_caches: list[torch.Tensor]
    """K of the layers, all of one dtype, kv_heads and dim; see above"""
    v_caches: list[torch.Tensor]
    """V of the layers, of that dtype too"""


class GatherLayerKvOutputs(NamedTuple):
    """A row for each slot."""

    out: torch.Tensor
    """[rows, layers, kv_heads * (k_dim + v_dim)], contiguous but for its rows"""


def _make_rows(arguments: GatherLayerKvArguments, empty) -> GatherLayerKvOutputs:
    k, v = arguments.k_caches[0], arguments.v_caches[0]
    width = k.shape[-2] * (k.shape[-1] + v.shape[-1])
    return GatherLayerKvOutputs(empty((arguments.slots.shape[0], layers_of(arguments), width), k.dtype, k.device))


def _gather_pieces(arguments: GatherLayerKvArguments, outputs: GatherLayerKvOutputs) -> Iterable[tuple]:
    def piece(layers: slice) -> tuple:
        return (
            arguments._replace(table_of=arguments.table_of[layers], **_layers(arguments, layers)),
            GatherLayerKvOutputs(outputs.out[:, layers]),
        )

    return _pieces_of(layers_of(arguments), arguments, outputs, piece)


gather_layer_kv = Operator(
    "gather_layer_kv",
    GatherLayerKvArguments,
    GatherLayerKvOutputs,
    _make_rows,
    answers=lambda arguments, outputs: outputs.out.numel() == 0,
    pieces=_gather_pieces,
)
