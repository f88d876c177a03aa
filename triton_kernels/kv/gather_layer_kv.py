"""K and V of all layers as rows in Triton: one launch for all layers of one tensor.

A program owns a tile of rows and one KV head of one layer: it reads K and V of the head at the rows' slots and writes
them side by side. Every slot is read once and every row written once, which is what it costs.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.kv.cache_layers import grouped
from specdec_ops.triton_kernels.kv.places import places

ROWS = 16
# Dims and strides are an engine's own: that they are multiples of 16 is what makes accesses of 16 bytes.
_VOLATILE = ["rows", "pages", "page_size", "batch", "max_pages", "capacity", "out_row", "out_layer"]


@triton.jit(do_not_specialize=_VOLATILE)
def gather_layer_kv_kernel(
    slots, requests, page_table, k_cache, v_cache, out, rows, pages, page_size, batch, max_pages, capacity, k_layer,
    k_first, k_slot, k_head, k_dim, v_layer, v_first, v_slot, v_head, v_dim, out_row, out_layer, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, kv_heads, layers)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    stored, page, slot = places(n, rows, requests, slots, page_table, pages, page_size, batch, capacity, max_pages)
    to = out + n.to(tl.int64)[:, None] * out_row + layer * out_layer + head * (k_dim + v_dim)
    exists = (n < rows)[:, None]
    d = tl.arange(0, BLOCK_K)[None, :]
    at = k_cache + layer * k_layer + (page * k_first + slot * k_slot)[:, None] + head * k_head
    values = tl.load(at + d, mask=stored[:, None] & (d < k_dim), other=0)
    tl.store(to + d, values, mask=exists & (d < k_dim))
    d = tl.arange(0, BLOCK_V)[None, :]
    at = v_cache + layer * v_layer + (page * v_first + slot * v_slot)[:, None] + head * v_head
    values = tl.load(at + d, mask=stored[:, None] & (d < v_dim), other=0)
    tl.store(to + k_dim + d, values, mask=exists & (d < v_dim))


def gather_layer_kv(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_gather_layer_kv.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/kv/contract.py.
    """
    slots, tables = arguments.slots, arguments.page_tables
    rows = len(slots)
    with on(slots.device):
        for layer, k, v, page_table, capacity in grouped(arguments, arguments.k_caches, arguments.v_caches):
            layers, pages, page_size, kv_heads, k_dim = k.shape
            out = outputs.out.view(k.dtype)[:, layer : layer + layers]
            gather_layer_kv_kernel[triton.cdiv(rows, ROWS), kv_heads, layers](
                slots, arguments.requests, page_table, k, v, out, rows, pages, max(page_size, 1),
                tables[0].shape[0] if tables else pages, 0 if page_table is None else page_table.shape[1], capacity,
                *k.stride()[:4], k_dim, *v.stride()[:4], v.shape[4], *out.stride()[:2], ROWS=ROWS,
                BLOCK_K=triton.next_power_of_2(k_dim), BLOCK_V=triton.next_power_of_2(v.shape[4]),
            )  # fmt: skip
