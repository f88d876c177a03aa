"""The definition of kv_commit."""

import torch

from .contract import layers_of
from .reference_kv_propagate import places_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kv_commit(arguments, outputs) -> None:
    """Copy pages, then move the accepted rows of every request, in every layer.

    The arguments and outputs: specdec_ops/ops/kv/contract.py.
    """
    for layer in range(layers_of(outputs)):
        for caches in (outputs.k_caches, outputs.v_caches):
            cache = bits_of_layer(caches, layer)
            table = table_of_layer(arguments, layer)
            if arguments.copies is not None and table is not None:
                copy_pages(cache, arguments.copies)
            move_rows(cache, arguments.nodes.long(), arguments.context_lens.long(), table)


def bits_of_layer(caches, layer) -> torch.Tensor:
    """A layer's cache [batch, slots, kv_heads, dim] (or of pages) as integers, which is what moves."""
    cache = caches[0][layer] if caches[0].dim() == 5 else caches[layer]
    return cache.view(_BITS[cache.dtype.itemsize])


def table_of_layer(arguments, layer) -> torch.Tensor | None:
    """A layer's page table, or None where it is dense."""
    index = arguments.table_of[layer]
    return arguments.page_tables[index] if index >= 0 else None


def copy_pages(cache, copies) -> None:
    """One after the other, in their order. Those of pages that do not exist are skipped."""
    for source, target in copies.tolist():
        if 0 <= source < len(cache) and 0 <= target < len(cache):
            cache[target] = cache[source].clone()


def move_rows(cache, nodes, context_lens, table) -> None:
    """Row context_lens[b] + nodes[b, i] to context_lens[b] + i, for ascending i, as long as the path is sound."""
    requests = torch.arange(len(nodes), device=nodes.device)
    capacity = cache.shape[1] if table is None else table.shape[1] * cache.shape[1]
    going = context_lens >= 0
    last = torch.full_like(context_lens, -1)
    for rank in range(nodes.shape[1]):
        node = nodes[:, rank]
        source, target = context_lens + node, context_lens + rank
        going = going & (node > last) & (source < capacity)
        there, _ = places_of(requests, source, table, cache)
        room, _ = places_of(requests, target, table, cache)
        moves = going & (node != rank)
        going = going & ~(moves & ~(there & room))
        moves = moves & going
        _, read = places_of(requests[moves], source[moves], table, cache)
        _, written = places_of(requests[moves], target[moves], table, cache)
        cache[written] = cache[read]
        last = node
