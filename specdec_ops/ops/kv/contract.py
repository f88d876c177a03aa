"""The contracts of the KV ops: what their implementations take and write."""

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


def _commit_pieces(arguments: KvCommitArguments, outputs: KvCommitOutputs):
    """As many calls as it takes for each to have at most MAX_LAYERS."""
    count = layers_of(outputs)
    if count <= MAX_LAYERS:
        yield arguments, outputs
        return
    for start in range(0, count, MAX_LAYERS):
        layers = slice(start, start + MAX_LAYERS)
        yield (
            arguments._replace(table_of=arguments.table_of[layers]),
            outputs._replace(**_layers(outputs, layers)),
        )


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


def _gather_pieces(arguments: GatherLayerKvArguments, outputs: GatherLayerKvOutputs):
    count = layers_of(arguments)
    if count <= MAX_LAYERS:
        yield arguments, outputs
        return
    for start in range(0, count, MAX_LAYERS):
        layers = slice(start, start + MAX_LAYERS)
        yield (
            arguments._replace(table_of=arguments.table_of[layers], **_layers(arguments, layers)),
            GatherLayerKvOutputs(outputs.out[:, layers]),
        )


gather_layer_kv = Operator(
    "gather_layer_kv",
    GatherLayerKvArguments,
    GatherLayerKvOutputs,
    _make_rows,
    answers=lambda arguments, outputs: outputs.out.numel() == 0,
    pieces=_gather_pieces,
)
