"""Accepted rows and shared pages in Triton: bits of K and V move in place, in one launch for all layers of one tensor.

A program owns BLOCK elements of a row of K or V, of one layer and one request, and walks the request's path: each move
is read and then written before the next. csrc/kv/places.h tells why ascending nodes make that right in place. A
barrier follows each move, since the compiler may let one thread read what another one writes.

Pages come first, in a launch of their own, a program making all copies of its elements in their order. Every row that
moves is read once and written once; what stays costs nothing.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.kv.cache_layers import grouped

BLOCK = 1024
# Dims and strides are an engine's own: that they are multiples of 16 is what makes accesses of 16 bytes.
_VOLATILE = ["steps", "pages", "page_size", "max_pages", "capacity", "kv_heads", "count"]


@triton.jit
def _place(page_table, request, slot, wanted, pages, page_size, max_pages):
    """Whether a request has this slot, its page (or the request) and the slot inside. Nothing is read unless wanted."""
    if page_table is not None:
        page = tl.load(page_table + request * max_pages + slot // page_size, mask=wanted, other=-1)
        return wanted & (page >= 0) & (page < pages), page.to(tl.int64), slot % page_size
    else:
        return wanted, request, slot


@triton.jit(do_not_specialize=_VOLATILE)
def kv_commit_kernel(
    nodes, context_lens, page_table, k_cache, v_cache, steps, pages, page_size, max_pages, capacity, kv_heads, k_layer,
    k_first, k_slot, k_head, k_dim, v_layer, v_first, v_slot, v_head, v_dim, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of a row, batch, K of each layer and then V of each layer)."""
    layers = tl.num_programs(2) // 2
    layer = (tl.program_id(2) % layers).to(tl.int64)
    request = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(2) < layers:
        _commit(nodes, context_lens, page_table, k_cache + layer * k_layer, request, element, steps, pages, page_size,
                max_pages, capacity, kv_heads, k_first, k_slot, k_head, k_dim)  # fmt: skip
    else:
        _commit(nodes, context_lens, page_table, v_cache + layer * v_layer, request, element, steps, pages, page_size,
                max_pages, capacity, kv_heads, v_first, v_slot, v_head, v_dim)  # fmt: skip


@triton.jit
def _commit(
    nodes, context_lens, page_table, cache, request, element, steps, pages, page_size, max_pages, capacity,
    kv_heads, stride_first, stride_slot, stride_head, dim,
):  # fmt: skip
    exists = element < kv_heads * dim
    column = cache + (element // dim).to(tl.int64) * stride_head + element % dim
    start = tl.load(context_lens + request).to(tl.int64)
    going = start >= 0
    last = tl.full([], -1, tl.int32)
    for rank in range(steps):
        node = tl.load(nodes + request * steps + rank)
        going = going & (node > last) & (start + node < capacity)
        last = node
        moves = going & (node != rank)
        there, page, slot = _place(page_table, request, start + node, moves, pages, page_size, max_pages)
        room, new_page, new_slot = _place(page_table, request, start + rank, moves, pages, page_size, max_pages)
        going = going & ((node == rank) | (there & room))
        if moves & there & room:
            values = tl.load(column + page * stride_first + slot * stride_slot, mask=exists, other=0)
            tl.store(column + new_page * stride_first + new_slot * stride_slot, values, mask=exists)
            tl.debug_barrier()


@triton.jit(do_not_specialize=_VOLATILE)
def kv_copy_pages_kernel(
    copies, k_cache, v_cache, count, pages, kv_heads, k_layer, k_first, k_slot, k_head, k_dim, v_layer, v_first, v_slot,
    v_head, v_dim, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (slots of a page, blocks of a row, K of each layer and then V of each layer)."""
    layers = tl.num_programs(2) // 2
    layer = (tl.program_id(2) % layers).to(tl.int64)
    slot = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(2) < layers:
        _copy_pages(copies, k_cache + layer * k_layer + slot * k_slot, element, count, pages, kv_heads, k_first, k_head,
                    k_dim)  # fmt: skip
    else:
        _copy_pages(copies, v_cache + layer * v_layer + slot * v_slot, element, count, pages, kv_heads, v_first, v_head,
                    v_dim)  # fmt: skip


@triton.jit
def _copy_pages(copies, cache, element, count, pages, kv_heads, stride_first, stride_head, dim):
    exists = element < kv_heads * dim
    column = cache + (element // dim).to(tl.int64) * stride_head + element % dim
    for i in range(count):
        source = tl.load(copies + 2 * i).to(tl.int64)
        target = tl.load(copies + 2 * i + 1).to(tl.int64)
        if (source >= 0) & (source < pages) & (target >= 0) & (target < pages):
            values = tl.load(column + source * stride_first, mask=exists, other=0)
            tl.store(column + target * stride_first, values, mask=exists)
            tl.debug_barrier()


def kv_commit(arguments, outputs) -> None:
    """Launch on checked arguments; reference_kv_commit.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/kv/contract.py.
    """
    nodes, copies = arguments.nodes, arguments.copies
    batch, steps = nodes.shape
    with on(nodes.device):
        for _, k, v, page_table, capacity in grouped(arguments, outputs.k_caches, outputs.v_caches):
            layers, pages, page_size, kv_heads, _ = k.shape
            width = kv_heads * max(k.shape[4], v.shape[4])
            strides = [size for cache in (k, v) for size in (*cache.stride()[:4], cache.shape[4])]
            if copies is not None and len(copies) and page_table is not None and k.numel():
                kv_copy_pages_kernel[page_size, triton.cdiv(width, BLOCK), 2 * layers](
                    copies, k, v, len(copies), pages, kv_heads, *strides, BLOCK=BLOCK
                )
            if batch and steps:
                kv_commit_kernel[triton.cdiv(width, BLOCK), batch, 2 * layers](
                    nodes, arguments.context_lens, page_table, k, v, steps, pages, max(page_size, 1),
                    0 if page_table is None else page_table.shape[1], capacity, kv_heads, *strides, BLOCK=BLOCK,
                )  # fmt: skip
