"""New rows of K and V into the cache, rotated, and their queries, in Triton: one launch.

A program owns eight heads of one row, of Q, of K or of V, as two tiles [heads, pairs]: the first elements of all pairs
and the second ones. So a rotation happens in registers, for pairs (i, pairs + i) and (2 i, 2 i + 1) alike; elements
beyond the rotated ones are pairs that are not turned. Every element is read once and written once. The program finds
its row's place in the cache itself, from the topology, the lengths and the page table.

Caches in 8 bits are written as bytes, rounded by integer arithmetic: GPUs before Hopper have no instruction for e4m3.
"""

import torch
import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.linear.products import narrowed, widened

HEADS = 8
PLAIN, FLOAT8_E4M3, FLOAT8_E5M2, INT8 = 0, 1, 2, 3
CODES = {torch.float8_e4m3fn: FLOAT8_E4M3, torch.float8_e5m2: FLOAT8_E5M2, torch.int8: INT8}
_VOLATILE = [
    "rows", "batch", "queries", "query_start", "nodes", "trees", "capacity", "pages", "page_size", "table_positions",
    "page_table_stride", "norm_eps", "k_scale", "v_scale",
]  # fmt: skip


@triton.jit
def _float8_code(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """As cache_code.h: below the normal numbers an addition rounds, above them the bits are rounded as an integer."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    REBIAS: tl.constexpr = (127 - BIAS) << 23
    ADDEND_BITS: tl.constexpr = (127 + SHIFT + 1 - BIAS) << 23
    ADDEND: tl.constexpr = 2.0 ** (SHIFT + 1 - BIAS)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    below = (magnitude.to(tl.float32, bitcast=True) + ADDEND).to(tl.int32, bitcast=True) - ADDEND_BITS
    normal = (magnitude - REBIAS + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)) >> SHIFT
    code = tl.where(magnitude < ((128 - BIAS) << 23), below, normal)
    code = tl.where(magnitude > (LARGEST << SHIFT) + REBIAS, LARGEST, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _int8_code(x):
    within = tl.where(x == x, tl.minimum(tl.maximum(x, -127.0), 127.0), 0.0)
    return ((within + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def _stored(x, scale, kind: tl.constexpr, CODE: tl.constexpr, WIDEN: tl.constexpr):
    """What the cache holds of x [heads, pairs]."""
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if CODE == 0:
        return narrowed(x, kind, WIDEN)
    elif CODE == 1:
        return _float8_code(x, 3, 7, 0x7E)
    elif CODE == 2:
        return _float8_code(x, 2, 15, 0x7B)
    else:
        return _int8_code(x)


@triton.jit
def _request_of(offsets, batch, row):
    """The last request that starts at this row or before it; below 0 or at least batch: none."""
    low = tl.full([], 0, tl.int32)
    high = low + batch + 1
    while low < high:
        middle = low + (high - low) // 2
        begins = tl.load(offsets + middle).to(tl.int64) <= row
        low = tl.where(begins, middle + 1, low)
        high = tl.where(begins, high, middle)
    return low.to(tl.int64) - 1


@triton.jit
def _place(
    row, depths, num_nodes, offsets, context_lens, query_starts, requests, slots, positions, page_table, batch, queries,
    query_start, nodes, trees, capacity, pages, page_size, table_positions, page_table_stride,
    PACKED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """As append_row.h: whether a row is rotated, by which position, whether it is stored, and where."""
    request = row * 0
    within = request
    if not PACKED:
        request = row // queries
        within = row - request * queries
    elif offsets is not None:
        request = _request_of(offsets, batch, row)
        first = tl.load(offsets + request, mask=(request >= 0) & (request < batch), other=0).to(tl.int64)
        within = row - first
    elif requests is not None:
        request = tl.load(requests + row).to(tl.int64)
    known = (request >= 0) & (request < batch)
    exists = known
    node = row * 0
    depth = node
    context = node
    if PACKED and offsets is None:
        exists = row >= 0
    else:
        node = within + query_start
        if query_starts is not None:
            node += tl.load(query_starts + request, mask=known, other=0)
        exists = known & (node >= 0)
        depth = node
        if depths is not None:
            tree = tl.minimum(request, trees - 1)
            exists = exists & (node < nodes) & (node < tl.load(num_nodes + tree, mask=known, other=0))
            if offsets is not None:
                exists = exists & (within < nodes)
            depth = tl.load(depths + tree * nodes + node, mask=exists, other=0).to(tl.int64)
        if context_lens is not None:
            context = tl.load(context_lens + request, mask=known, other=-1).to(tl.int64)
            exists = exists & (context >= 0)
    position = row * 0
    if TURNED:
        position = context + depth
        if positions is not None:
            position = tl.load(positions + row).to(tl.int64)
        exists = exists & (position >= 0) & (position < table_positions)
    slot = context + node
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    stored = exists & known & (slot >= 0) & (slot < capacity)
    first = request
    if page_table is not None:
        at = page_table + request * page_table_stride + slot // page_size
        first = tl.load(at, mask=stored, other=-1).to(tl.int64)
        stored = stored & (first >= 0) & (first < pages)
        slot = slot % page_size
    # The interpreter hands scalars on as numbers: as integers they mean the same everywhere.
    return tl.where(exists, 1, 0), position, tl.where(stored, 1, 0), first, slot


@triton.jit
def _turned_heads(
    x, head, there, stride_head, first, second, dim, angle, rotated, cosines, sines, weight, norm_eps
):  # fmt: skip
    """The first and second elements of the pairs of some heads, float32 [heads, pairs]."""
    at = x + head.to(tl.int64)[:, None] * stride_head
    firsts = widened(tl.load(at + first[None, :], mask=there[:, None] & (first < dim)[None, :], other=0.0))
    seconds = widened(tl.load(at + second[None, :], mask=there[:, None] & (second < dim)[None, :], other=0.0))
    if weight is not None:
        squares = tl.sum(firsts * firsts, 1) + tl.sum(seconds * seconds, 1)
        inverse = (1.0 / tl.sqrt(squares / dim + norm_eps))[:, None]
        firsts *= inverse * widened(tl.load(weight + first, mask=first < dim, other=0.0))[None, :]
        seconds *= inverse * widened(tl.load(weight + second, mask=second < dim, other=0.0))[None, :]
    if cosines is not None:
        cosine = tl.load(cosines + angle, mask=rotated, other=1.0)[None, :]
        sine = tl.load(sines + angle, mask=rotated, other=0.0)[None, :]
        before = firsts
        firsts = before * cosine - seconds * sine
        seconds = seconds * cosine + before * sine
    return firsts, seconds


@triton.jit
def _scales(scale, scales, head, heads):
    result = tl.zeros(head.shape, tl.float32) + scale
    if scales is not None:
        result = tl.load(scales + head, mask=head < heads, other=1.0)
    return result


@triton.jit(do_not_specialize=_VOLATILE)
def kv_append_kernel(
    k, v, q, depths, num_nodes, offsets, context_lens, query_starts, requests, slots, positions, page_table, cosines,
    sines, q_norm_weight, k_norm_weight, k_scales, v_scales, k_cache, v_cache, q_out,
    rows, batch, queries, query_start, nodes, trees, capacity, pages, page_size, table_positions, page_table_stride,
    norm_eps, k_scale, v_scale, heads, kv_heads, k_dim, v_dim, pairs,
    k_batch, k_row, k_head, v_batch, v_row, v_head, q_batch, q_row, q_head, out_batch, out_row, out_head,
    k_cache_first, k_cache_slot, k_cache_head, v_cache_first, v_cache_slot, v_cache_head,
    PACKED: tl.constexpr, INTERLEAVED: tl.constexpr, CODE: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, blocks of heads of Q, then of K, then of V)."""
    row = tl.program_id(0).to(tl.int64)
    exists, position, stored, first_index, slot = _place(
        row, depths, num_nodes, offsets, context_lens, query_starts, requests, slots, positions, page_table, batch,
        queries, query_start, nodes, trees, capacity, pages, page_size, table_positions, page_table_stride, PACKED,
        cosines is not None,
    )  # fmt: skip
    request = row * 0
    index = row
    if not PACKED:
        request = row // queries
        index = row - request * queries
    pair = tl.arange(0, BLOCK_P)
    first = pair * 2
    second = pair * 2 + 1
    plain_first = first
    plain_second = second
    if not INTERLEAVED:
        first = tl.where(pair < pairs, pair, first)
        second = tl.where(pair < pairs, pairs + pair, second)
    angle = position * pairs + pair
    each_head = tl.zeros([HEADS], tl.int32)
    each_pair = tl.zeros([BLOCK_P], tl.int32)
    q_blocks = tl.cdiv(heads, HEADS)
    kv_blocks = tl.cdiv(kv_heads, HEADS)
    block = tl.program_id(1)
    kind: tl.constexpr = k.dtype.element_ty
    if block < q_blocks:
        if q is not None:
            head = block * HEADS + tl.arange(0, HEADS)
            there = (each_head + exists > 0) & (head < heads)
            firsts, seconds = _turned_heads(
                q + request * q_batch + index * q_row, head, there, q_head, first, second, k_dim, angle,
                (each_pair + exists > 0) & (pair < pairs), cosines, sines, q_norm_weight, norm_eps,
            )  # fmt: skip
            firsts = tl.where(there[:, None], firsts, 0.0)
            seconds = tl.where(there[:, None], seconds, 0.0)
            there = (head < heads)[:, None]
            q_at = q_out + request * out_batch + index * out_row + head.to(tl.int64)[:, None] * out_head
            tl.store(q_at + first[None, :], narrowed(firsts, kind, WIDEN), mask=there & (first < k_dim)[None, :])
            tl.store(q_at + second[None, :], narrowed(seconds, kind, WIDEN), mask=there & (second < k_dim)[None, :])
    elif block < q_blocks + kv_blocks:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        there = (each_head + stored > 0) & (head < kv_heads)
        firsts, seconds = _turned_heads(
            k + request * k_batch + index * k_row, head, there, k_head, first, second, k_dim, angle,
            (each_pair + stored > 0) & (pair < pairs), cosines, sines, k_norm_weight, norm_eps,
        )  # fmt: skip
        scale = _scales(k_scale, k_scales, head, kv_heads)
        there = there[:, None]
        k_at = k_cache + first_index * k_cache_first + slot * k_cache_slot + head.to(tl.int64)[:, None] * k_cache_head
        tl.store(
            k_at + first[None, :], _stored(firsts, scale, kind, CODE, WIDEN), mask=there & (first < k_dim)[None, :]
        )
        tl.store(
            k_at + second[None, :], _stored(seconds, scale, kind, CODE, WIDEN), mask=there & (second < k_dim)[None, :]
        )
    else:
        head = (block - q_blocks - kv_blocks) * HEADS + tl.arange(0, HEADS)
        there = (each_head + stored > 0) & (head < kv_heads)
        firsts, seconds = _turned_heads(
            v + request * v_batch + index * v_row, head, there, v_head, plain_first, plain_second, v_dim, angle,
            pair < pairs, None, None, None, norm_eps,
        )  # fmt: skip
        scale = _scales(v_scale, v_scales, head, kv_heads)
        there = there[:, None]
        v_at = v_cache + first_index * v_cache_first + slot * v_cache_slot + head.to(tl.int64)[:, None] * v_cache_head
        tl.store(
            v_at + plain_first[None, :],
            _stored(firsts, scale, kind, CODE, WIDEN),
            mask=there & (plain_first < v_dim)[None, :],
        )
        tl.store(
            v_at + plain_second[None, :],
            _stored(seconds, scale, kind, CODE, WIDEN),
            mask=there & (plain_second < v_dim)[None, :],
        )


def _strides(tensor, packed: bool) -> tuple[int, int, int]:
    """From one request, row and head to the next."""
    if tensor is None:
        return 0, 0, 0
    return (0, *tensor.stride()[:2]) if packed else tensor.stride()[:3]


def kv_append(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_kv_append.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/kv/contract.py.
    """
    a, (k_cache, v_cache, q_out) = arguments, outputs
    packed, paged = a.k.dim() == 3, a.page_table is not None
    code = CODES.get(k_cache.dtype, PLAIN)
    if code != PLAIN:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    rows = a.k.shape[0] if packed else a.k.shape[0] * a.k.shape[1]
    heads, (kv_heads, k_dim), v_dim = 0 if a.q is None else a.q.shape[-2], a.k.shape[-2:], a.v.shape[-1]
    leading, page_size = k_cache.shape[:2]
    batch = len(a.page_table) if paged else leading
    if a.offsets is not None:
        batch = len(a.offsets) - 1
    trees, nodes = (1, 0) if a.depths is None else a.depths.shape
    positions, pairs = (0, 0) if a.cosines is None else a.cosines.shape
    with on(a.k.device):
        kv_append_kernel[(rows, triton.cdiv(heads, HEADS) + 2 * triton.cdiv(kv_heads, HEADS))](
            a.k, a.v, a.q, a.depths, a.num_nodes, a.offsets, a.context_lens, a.query_starts, a.requests, a.slots,
            a.positions, a.page_table, a.cosines, a.sines, a.q_norm_weight, a.k_norm_weight, a.k_scales, a.v_scales,
            k_cache, v_cache, q_out, rows, batch, a.k.shape[-3], a.query_start, nodes, trees,
            a.page_table.shape[1] * page_size if paged else page_size, leading, max(page_size, 1), positions,
            a.page_table.stride(0) if paged else 0, a.norm_eps, a.k_scale, a.v_scale, heads, kv_heads, k_dim, v_dim,
            pairs, *_strides(a.k, packed), *_strides(a.v, packed), *_strides(a.q, packed), *_strides(q_out, packed),
            *k_cache.stride()[:3], *v_cache.stride()[:3], PACKED=packed, INTERLEAVED=a.interleaved, CODE=code,
            HEADS=HEADS, BLOCK_P=triton.next_power_of_2(triton.cdiv(max(k_dim, v_dim), 2)), WIDEN=not a.k.is_cuda,
            num_warps=4,
        )  # fmt: skip
