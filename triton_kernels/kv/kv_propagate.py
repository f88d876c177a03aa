"""K and V of skipped layers in Triton: norm, both projections, rotation and store, in one launch per layer.

A program owns a block of rows and BLOCK_P pairs of elements of one KV head, of K or of V, and multiplies the weight
rows of both elements of each pair: so the rotation needs nothing from anybody else and happens in registers, for pairs
(i, pairs + i) and (2 i, 2 i + 1) alike. Elements beyond the rotated ones, and those of V, are pairs that are turned by
an angle of 0. The layer's 2 * kv_heads * head_dim * dim weights are read once per 64 rows, which is what it costs.

The RMSNorm comes first: each program adds up the squares of its rows (rows * dim elements through L2, an eighth of its
weights with 16 rows of bfloat16) and rounds the normed rows to their type, as engines do. Scaling the finished products
would spare that pass, but hidden * norm_weight may overflow float16.

A launch per layer, not one for all: the addresses of the layers' tensors are arguments, and a table of them would have
to be copied to the device. Rows without a place (slot, request or page) are multiplied and not stored; nothing syncs.
"""

import torch
import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.kv.places import places
from specdec_ops.triton_kernels.linear.products import narrowed, product, widened

_VOLATILE = [
    "rows", "pages", "page_size", "kv_heads", "head_dim", "pairs", "batch", "capacity", "page_table_stride",
    "k_page_stride", "k_slot_stride", "k_head_stride", "v_page_stride", "v_slot_stride", "v_head_stride", "norm_eps",
    "angles_stride",
]  # fmt: skip


@triton.jit
def _row_scales(hidden_at, exists, dim, norm_eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / root of the mean square of each row."""
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, dim, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        x = widened(tl.load(hidden_at[:, None] + d[None, :], mask=exists[:, None] & (d < dim)[None, :], other=0.0))
        squares += x * x
    return 1.0 / tl.sqrt(tl.sum(squares, 1) / dim + norm_eps)


@triton.jit(do_not_specialize=_VOLATILE)
def kv_propagate_kernel(
    hidden, norm_weight, k_weight, v_weight, cosines, sines, requests, slots, page_table, k_cache, v_cache,
    hidden_stride, dim, rows, pages, page_size, kv_heads, head_dim, pairs, batch, capacity, page_table_stride,
    k_page_stride, k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, angles_stride, norm_eps,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of pairs, 2 * kv_heads, row blocks): K of all heads, then V."""
    head = tl.program_id(1) % kv_heads
    of_values = tl.program_id(1) >= kv_heads
    weight = k_weight
    cache = k_cache
    page_stride = k_page_stride
    slot_stride = k_slot_stride
    head_stride = k_head_stride
    turned = pairs
    if of_values:
        weight = v_weight
        cache = v_cache
        page_stride = v_page_stride
        slot_stride = v_slot_stride
        head_stride = v_head_stride
        turned = pairs * 0

    n = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    exists = n < rows
    hidden_at = hidden + n.to(tl.int64) * hidden_stride
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = pair * 2
    second = pair * 2 + 1
    if not INTERLEAVED:
        first = tl.where(pair < pairs, pair, first)
        second = tl.where(pair < pairs, pairs + pair, second)
    width = head.to(tl.int64) * head_dim
    first_at = weight + (width + tl.minimum(first, head_dim - 1)) * dim
    second_at = weight + (width + tl.minimum(second, head_dim - 1)) * dim

    scale = tl.full([ROWS], 1.0, tl.float32)
    if norm_weight is not None:
        scale = _row_scales(hidden_at, exists, dim, norm_eps, ROWS, BLOCK_K)
    firsts = tl.zeros([ROWS, BLOCK_P], tl.float32)
    seconds = tl.zeros([ROWS, BLOCK_P], tl.float32)
    for start in range(0, dim, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        x = tl.load(hidden_at[:, None] + d[None, :], mask=exists[:, None] & (d < dim)[None, :], other=0.0)
        if norm_weight is not None:
            norm = widened(tl.load(norm_weight + d, mask=d < dim, other=0.0))
            x = narrowed(widened(x) * scale[:, None] * norm[None, :], hidden.dtype.element_ty, WIDEN)
        if EVEN:
            first_weights = tl.load(first_at[:, None] + d[None, :])
            second_weights = tl.load(second_at[:, None] + d[None, :])
        else:
            first_weights = tl.load(first_at[:, None] + d[None, :], mask=(d < dim)[None, :], other=0.0)
            second_weights = tl.load(second_at[:, None] + d[None, :], mask=(d < dim)[None, :], other=0.0)
        firsts = product(x, tl.trans(first_weights), firsts, WIDEN)
        seconds = product(x, tl.trans(second_weights), seconds, WIDEN)

    if cosines is not None:
        angle = n.to(tl.int64)[:, None] * angles_stride + pair[None, :]
        rotated = exists[:, None] & (pair < turned)[None, :]
        cosine = tl.load(cosines + angle, mask=rotated, other=1.0)
        sine = tl.load(sines + angle, mask=rotated, other=0.0)
        before = firsts
        firsts = before * cosine - seconds * sine
        seconds = seconds * cosine + before * sine
    stored, page, slot = places(
        n, rows, requests, slots, page_table, pages, page_size, batch, capacity, page_table_stride
    )
    cache_at = (cache + page * page_stride + slot * slot_stride + head * head_stride)[:, None]
    kind: tl.constexpr = k_cache.dtype.element_ty
    tl.store(
        cache_at + first[None, :], narrowed(firsts, kind, WIDEN), mask=stored[:, None] & (first < head_dim)[None, :]
    )
    tl.store(cache_at + second[None, :], narrowed(seconds, kind, WIDEN),
             mask=stored[:, None] & (second < head_dim)[None, :])  # fmt: skip


def block_shape(rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows, pairs and elements of the dim of a step, and stages. 16 pairs cut 8 heads of 128 elements into 64 programs
    with 24 to 32 KiB of weights under way each.
    """
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if dtype == torch.float32:
        return block, 16, min(32, max(16, triton.next_power_of_2(dim))), 2
    return block, 16, min(128, max(16, triton.next_power_of_2(dim))), 4


def kv_propagate(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_kv_propagate.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/kv/contract.py.
    """
    hidden, norm_weights, cosines, page_table = (
        arguments.hidden, arguments.norm_weights, arguments.cosines, arguments.page_table
    )  # fmt: skip
    rows, dim = hidden.shape
    leading, page_size, kv_heads, head_dim = outputs.k_caches[0].shape
    batch = leading if page_table is None else len(page_table)
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    block, block_pairs, step, stages = block_shape(rows, dim, hidden.dtype)
    grid = triton.cdiv(triton.cdiv(head_dim, 2), block_pairs), 2 * kv_heads, triton.cdiv(rows, block)
    with on(hidden.device):
        for layer, (k_cache, v_cache) in enumerate(zip(outputs.k_caches, outputs.v_caches, strict=True)):
            kv_propagate_kernel[grid](
                hidden, norm_weights[layer] if norm_weights else None, arguments.k_weights[layer],
                arguments.v_weights[layer], cosines, arguments.sines, arguments.requests, arguments.slots, page_table,
                k_cache, v_cache, hidden.stride(0), dim, rows, leading, max(page_size, 1), kv_heads, head_dim,
                0 if cosines is None else cosines.shape[1], batch, capacity,
                0 if page_table is None else page_table.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
                0 if cosines is None else cosines.stride(0), arguments.norm_eps, INTERLEAVED=arguments.interleaved,
                ROWS=block, BLOCK_P=block_pairs, BLOCK_K=step, EVEN=dim % step == 0, WIDEN=not hidden.is_cuda,
                num_warps=4, num_stages=stages,
            )  # fmt: skip
