"""Layers of caches as launches take them: integers of the size of their dtype, alike in strides."""

import torch

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def grouped(arguments, k_caches, v_caches):
    """What each launch takes: its first layer, K and V, their page table or None, and how many slots a request has.

    K and V are [layers, batch, slots, kv_heads, dim], or [layers, pages, page_size, kv_heads, dim] with a table.

    A tensor of all layers is one launch. Layers in a list are one each: their addresses are arguments, and a table of
    them would have to be copied to the device.
    """
    for layer, (k, v) in enumerate(zip(k_caches, v_caches, strict=True)):
        index = arguments.table_of[layer]
        page_table = arguments.page_tables[index] if index >= 0 else None
        k, v = (cache.view(BITS[cache.dtype.itemsize]) for cache in (k, v))
        k, v = (k, v) if k.dim() == 5 else (k[None], v[None])
        yield layer, k, v, page_table, k.shape[2] * (1 if page_table is None else page_table.shape[1])
