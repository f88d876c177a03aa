"""Tree attention: every query row attends to the whole context and to its own ancestors among the draft nodes.

What a program does.  One program owns one block of query rows of one (request, KV head) and one split of that request's
slots. Rows are the tree's rows times the query heads that share the KV head, flattened token-major: block row m is
tree row m // GROUP and head m % GROUP of the group. So one `tl.dot` serves all the heads of a group, whatever the
ratio of heads (XQA packs its rows the same way), each byte of K and V is read once per row block, and the rows of one
tree row lie together, which is what makes their ancestor words one cached line.

The loop over slots has two phases, in the manner of FlashAttention-2's online softmax:
  plain    tiles of BLOCK_N slots of the context that all rows see. No mask is loaded and nothing is compared. Nearly
           all of the time is spent here. SGLang's `skip_prefix_custom_mask` showed what masking this part costs.
  masked   with a window the tiles in which some row's window begins, then the tail: the rest of the context behind its
           last whole tile, and the nodes. Visibility is bit j % 64 of ancestor word j // 64 of the row. Tiles stay
           aligned to the slots (so a tile stays inside a page), hence a tile's 64 bits straddle two words; they are
           joined by a shift, with the words before the first one (the context) all ones. Nodes after the block's last
           row are nobody's ancestors: the loop ends there.

What a row does not see may be NaN or Inf. Its score is replaced, whatever it is; but its value is multiplied by a
weight of 0, and 0 * NaN is NaN. So masked tiles look at their values, and a program that has met such a one adds up all
values once more, slot by slot, each for the rows that see it.

Bytes moved, per request: K and V once per KV head and row block (row blocks of one KV head are neighbours in the grid,
so the later ones read L2), q and out once, 8 bytes per row, 64 nodes and tail tile, and with S splits
2 * S * (dim + 2) * 4 bytes per row of scratch (mostly L2 as well).

Split over the slots, as Flash-Decoding does, so that one long request fills the device. The number of splits S is
worked out on the device from the request's own context length: one split per SPLIT_SLOTS slots, at most `max_splits`;
beyond that the splits grow. It never looks at the batch, and the partial results are merged in the order of the slots
by a second kernel, so a request's result does not depend on its neighbours. The bits do depend on the shape of the call
(max_queries * GROUP picks the block, as a library picks a GEMM), hence on the padded width, but on nothing else. The
grid has room for as many splits as the cache's capacity (or the window) admits; programs without a split leave at once,
and a request with a single split writes its result directly.

Head dimensions that are no power of two are padded, in registers and shared memory only, or handled in two pieces
(80 = 64 + 16, 96 = 64 + 32): two small dots in place of one padded to twice the work. The launch, in
tree_attention.py, decides.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tree_attention_sums import Cache, Keys, Rows, Scoring, scores, sum_again

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that change from call to call: no recompilation for a value that happens to be 1 or a multiple of 16. They
# are no members of tuples, for which that can't be had.
_VOLATILE = [
    "request_begin", "batch", "heads", "max_queries", "tokens", "nodes", "words", "capacity", "page_size",
    "pages", "query_start", "window", "num_splits", "max_splits", "ancestors_batch_stride", "ancestors_node_stride",
    "depths_batch_stride", "num_nodes_stride", "page_table_stride",
]  # fmt: skip
_VOLATILE_POINTERS = [
    "ancestors", "depths", "num_nodes", "offsets", "context_lens", "page_table", "query_starts", "sinks",
    "alibi_slopes",
]  # fmt: skip


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:  # Triton's interpreter would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(at, d, readable, CHECKED: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr):
    """Rows `at` of K or V, columns `d`: without a predicate where every slot and every column is there."""
    if CHECKED:
        mask = readable[:, None]
        if PADDED:
            mask = mask & (d < DIM)[None, :]
        return tl.load(at[:, None] + d[None, :], mask=mask, other=0.0)
    elif PADDED:
        return tl.load(at[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    else:
        return tl.load(at[:, None] + d[None, :])


@triton.jit
def _some_nonfinite(v):
    """1 if there is a NaN or an Inf, else 0."""
    return tl.max(tl.max(tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1), 1), 0)


@triton.jit
def _request_rows(request, batch, max_queries, tokens, offsets, num_nodes, num_nodes_stride, nodes, query_start,
                  query_starts):  # fmt: skip
    """First row in q, rows that are the request's own, rows that it must write, first node, number of nodes."""
    first = tl.zeros([], tl.int64)
    own = max_queries
    written = max_queries
    if offsets is not None:
        row = tl.minimum(tl.maximum(tl.load(offsets + request), 0), tokens)
        own = tl.minimum(tl.maximum(tl.load(offsets + request + 1), row), tokens) - row
        # Rows of q after the last request are padding, and the last request's programs blank them.
        written = tl.where(request == batch - 1, tokens - row, own)
        first = row.to(tl.int64)
    start = query_start
    if query_starts is not None:
        start += tl.load(query_starts + request)
    count = 0
    if num_nodes is not None:
        count = tl.minimum(tl.maximum(tl.load(num_nodes + request * num_nodes_stride), 0), nodes)
    return first, own, written, start, count


@triton.jit
def _splits(
    context, window, num_splits, max_splits, SPLIT_SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr
):
    """First slot, slots per split (whole tiles) and number of splits of a request: a function of its context alone."""
    first = 0
    if WINDOW:
        first = tl.maximum(context - window + 1, 0) // BLOCK_N * BLOCK_N
    wanted = tl.where(num_splits > 0, num_splits, tl.cdiv(context - first, SPLIT_SLOTS))
    wanted = tl.maximum(tl.minimum(wanted, max_splits), 1)
    size = tl.maximum(tl.cdiv(tl.cdiv(context - first, wanted), BLOCK_N), 1) * BLOCK_N
    return first, size, tl.maximum(tl.cdiv(context - first, size), 1)


@triton.jit
def _finish(acc0, acc1, maximum, total, head, sinks, real, out_scale, DIM1: tl.constexpr):
    """Join the sink, normalise; rows without anything visible give 0 and -inf. `maximum` is in units of log2."""
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        joined = tl.maximum(maximum, sink)
        safe = tl.where(joined == float("-inf"), 0.0, joined)
        scale = tl.exp2(maximum - safe)
        total = total * scale + tl.exp2(sink - safe)
        acc0 = acc0 * scale[:, None]
        if DIM1 > 0:
            acc1 = acc1 * scale[:, None]
        maximum = joined
    some = real & (total != 0.0)  # a NaN is something seen
    inverse = tl.where(some, out_scale / total, 0.0)
    acc0 = tl.where(some[:, None], acc0 * inverse[:, None], 0.0)
    if DIM1 > 0:
        acc1 = tl.where(some[:, None], acc1 * inverse[:, None], 0.0)
    lse = tl.where(some, (maximum + tl.log2(total)) * LN2, float("-inf"))
    return acc0, acc1, lse


class Softmax(NamedTuple):
    """Sums of the online softmax over the slots so far. acc1 is for the second piece of the head dimension."""

    acc0: tl.tensor
    acc1: tl.tensor
    maximum: tl.tensor  # of the scores, in units of log2
    total: tl.tensor  # of the weights


class Slots(NamedTuple):
    """Tiles that start in [begin, end), of which those from `edge` on lie `gap` slots further. No row sees a slot below
    `lowest` or from `limit` on.
    """

    begin: tl.tensor
    end: tl.tensor
    edge: tl.tensor
    gap: tl.tensor
    lowest: tl.tensor
    limit: tl.tensor


@triton.jit
def _attend(
    softmax, q0, q1, cache, rows, scoring, slots, DIM: tl.constexpr, DIM0: tl.constexpr, DIM1: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGING: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Softmax after these slots, and a number. A page that does not exist reads as zeros.

    MASKED: every slot is masked by what the rows see; without it the rows see all slots, and edge and gap are unused.
    The number is above 0 if a value wasn't finite: then the sums of rows that don't see it are not right.
    """
    acc0, acc1, maximum, total = softmax
    k, v, request, page_row, page_size, pages = cache
    real, position, context, ancestors, words, depths, slope = rows
    begin, end, edge, gap, lowest, limit = slots
    column = tl.arange(0, BLOCK_N)
    d0 = tl.arange(0, DIM0)
    CHECKED: tl.constexpr = MASKED or PAGING > 0
    nonfinite = 0
    for tile in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED else None):
        start = tile
        if MASKED and WINDOW:
            start += tl.where(tile < edge, 0, gap)
        slot = start + column
        # Slots that no row of this block can see are not read: whatever lies there may be a NaN.
        inside = (slot < limit) & (slot >= lowest)
        readable = inside
        if PAGING == 0:
            page = request.to(tl.int64)
            offset = slot.to(tl.int64)
        elif PAGING == 1:  # a tile lies inside one page
            number = tl.load(page_row + start // page_size)
            page = number.to(tl.int64)
            offset = (start % page_size + column).to(tl.int64)
            there = (number + tl.zeros_like(column) >= 0) & (number + tl.zeros_like(column) < pages)
        else:
            number = tl.load(page_row + slot // page_size, mask=inside, other=-1)
            page = number.to(tl.int64)
            offset = (slot % page_size).to(tl.int64)
            there = (number >= 0) & (number < pages)
        if PAGING > 0:
            readable = (inside & there) if MASKED else there
        k_at = k.start + page * k.page_stride + offset * k.slot_stride
        v_at = v.start + page * v.page_stride + offset * v.slot_stride

        k0 = _load(k_at, d0, readable, CHECKED, DIM0 > DIM, DIM)
        s = _dot(q0, tl.trans(k0), tl.zeros([q0.shape[0], BLOCK_N], tl.float32), WIDEN)
        if DIM1 > 0:
            d1 = DIM0 + tl.arange(0, DIM1)
            k1 = _load(k_at, d1, readable, CHECKED, DIM0 + DIM1 > DIM, DIM)
            s = _dot(q1, tl.trans(k1), s, WIDEN)

        distance = 0
        if (MASKED and WINDOW) or slope is not None:
            slot_position = slot
            if MASKED and depths is not None:
                node = slot - context
                depth = tl.load(depths + node, mask=(node >= 0) & (slot < limit), other=0)
                slot_position = tl.where(node >= 0, context + depth, slot)
            distance = position[:, None] - slot_position[None, :]
        s = scores(s, distance, None if slope is None else slope[:, None], scoring, SOFTCAP)
        if MASKED:
            visible = inside[None, :]
            if ancestors is not None:
                bit = start - context
                word = (bit >> 6) + tl.zeros_like(position)
                shift = bit & 63
                low = tl.load(ancestors + word, mask=real & (word >= 0) & (word < words), other=0)
                low = tl.where(word < 0, -1, low).to(tl.uint64, bitcast=True)
                high = tl.load(ancestors + word + 1, mask=real & (word >= -1) & (word + 1 < words), other=0)
                high = tl.where(word < -1, -1, high).to(tl.uint64, bitcast=True)
                bits = (low >> shift.to(tl.uint64)) | ((high << 1) << (63 - shift).to(tl.uint64))
                half = bits.to(tl.uint32)[:, None]
                if BLOCK_N > 32:
                    half = tl.where(column[None, :] < 32, half, (bits >> 32).to(tl.uint32)[:, None])
                visible = visible & (((half >> (column & 31).to(tl.uint32)[None, :]) & 1) != 0)
            if WINDOW:
                visible = visible & (distance >= 0) & (distance < scoring.window)
            s = tl.where(visible, s, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        safe = new_maximum
        if MASKED:  # a row that has seen nothing yet
            safe = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = tl.exp2(maximum - safe)
        p = tl.exp2(s - safe[:, None])
        total = total * decay + tl.sum(p, 1)
        maximum = new_maximum

        v0 = _load(v_at, d0, readable, CHECKED, DIM0 > DIM, DIM)
        p = p.to(v0.dtype)
        acc0 = _dot(p, v0, acc0 * decay[:, None], WIDEN)
        if MASKED:
            nonfinite = tl.maximum(nonfinite, _some_nonfinite(v0))
        if DIM1 > 0:
            v1 = _load(v_at, d1, readable, CHECKED, DIM0 + DIM1 > DIM, DIM)
            acc1 = _dot(p, v1, acc1 * decay[:, None], WIDEN)
            if MASKED:
                nonfinite = tl.maximum(nonfinite, _some_nonfinite(v1))
    return Softmax(acc0, acc1, maximum, total), nonfinite


@triton.jit(do_not_specialize=_VOLATILE, do_not_specialize_on_alignment=_VOLATILE_POINTERS)
def tree_attention_kernel(
    queries, k_cache, v_cache, output, scratch, scales, ancestors, depths, num_nodes, offsets, context_lens, page_table,
    query_starts, sinks, alibi_slopes,
    ancestors_batch_stride, ancestors_node_stride, depths_batch_stride, num_nodes_stride, page_table_stride,
    request_begin, batch, heads, max_queries, tokens, nodes, words, capacity, page_size, pages, query_start,
    window, num_splits, max_splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM0: tl.constexpr, DIM1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_SLOTS: tl.constexpr, PAGING: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (requests * kv_heads * row blocks, splits). See the head of the file. The tuples hold this.

    queries             q, its strides by request, row and head
    k_cache, v_cache    the cache, its strides by page (or request), slot and KV head
    output              out, its strides by request, row and head, lse or None
    scratch             split_out, split_stats; both None without SPLIT
    scales              logit_scale and softcap as in Scoring, out_scale
    """
    q, q_batch_stride, q_row_stride, q_head_stride = queries
    out, out_batch_stride, out_row_stride, out_head_stride, lse = output
    split_out, split_stats = scratch
    logit_scale, softcap, out_scale = scales
    row_blocks = tl.cdiv(max_queries * GROUP, BLOCK_M)
    kv_heads = heads // GROUP
    row_block = tl.program_id(0) % row_blocks
    kv_head = tl.program_id(0) // row_blocks % kv_heads
    local_request = tl.program_id(0) // (row_blocks * kv_heads)
    request = request_begin + local_request
    split = tl.program_id(1)

    context = tl.minimum(tl.maximum(tl.load(context_lens + request), 0), capacity)
    first_slot, split_size, splits = _splits(context, window, num_splits, max_splits, SPLIT_SLOTS, BLOCK_N, WINDOW)
    if split >= splits:
        return
    q_first, own_rows, written_rows, start_node, count = _request_rows(
        request, batch, max_queries, tokens, offsets, num_nodes, num_nodes_stride, nodes, query_start, query_starts
    )

    d0 = tl.arange(0, DIM0)
    d1 = DIM0 + tl.arange(0, DIM1 if DIM1 > 0 else 16)
    lane = tl.arange(0, BLOCK_M)
    q += request.to(tl.int64) * q_batch_stride + q_first * q_row_stride
    out += request.to(tl.int64) * out_batch_stride + q_first * out_row_stride
    if lse is not None:
        lse += (q_first if offsets is not None else request.to(tl.int64) * max_queries) * heads

    if offsets is not None:  # noqa: SIM102 (known at compile time, the next one is not)
        # Padding: rows from max_queries on (more rows than nodes, or rows after the last request), and those before the
        # first request.
        if (split == 0) & (row_block == row_blocks - 1):
            zero0 = tl.zeros([BLOCK_M, DIM0], out.dtype.element_ty)
            for piece in range(2):
                begin = tl.where(piece == 0, max_queries, -q_first)
                before = tl.where(request == 0, q_first, 0).to(tl.int32)
                count_rows = tl.where(piece == 0, written_rows - max_queries, before)
                for m0 in range(0, count_rows * GROUP, BLOCK_M):
                    m = m0 + lane
                    inside = m < count_rows * GROUP
                    at_row = begin + m // GROUP
                    at = at_row * out_row_stride + (kv_head * GROUP + m % GROUP) * out_head_stride
                    tl.store(out + at[:, None] + d0[None, :], zero0, mask=inside[:, None] & (d0 < DIM)[None, :])
                    if DIM1 > 0:
                        zero1 = tl.zeros([BLOCK_M, DIM1], out.dtype.element_ty)
                        tl.store(out + at[:, None] + d1[None, :], zero1, mask=inside[:, None] & (d1 < DIM)[None, :])
                    if lse is not None:
                        tl.store(lse + at_row * heads + kv_head * GROUP + m % GROUP, float("-inf"), mask=inside)

    m = row_block * BLOCK_M + lane
    row = m // GROUP
    head = kv_head * GROUP + m % GROUP
    node = start_node + row
    real = row < own_rows
    if ancestors is not None:
        real = real & (node >= 0) & (node < count)
    some_real = tl.max(real.to(tl.int32), 0) > 0
    if SPLIT:  # noqa: SIM102
        if (splits > 1) & (some_real == 0):
            return

    # The tail ends after the block's last node; slots beyond the cache do not exist.
    position = tl.zeros([BLOCK_M], tl.int32) + context
    limit = context
    row_ancestors = None
    row_depths = None
    if ancestors is not None:
        last_node = tl.max(tl.where(real, node, -1), 0)
        limit = tl.minimum(context + last_node + 1, capacity)
        row_ancestors = (ancestors + request.to(tl.int64) * ancestors_batch_stride
                         + node.to(tl.int64) * ancestors_node_stride)  # fmt: skip
        if WINDOW or alibi_slopes is not None:
            row_depths = depths + request.to(tl.int64) * depths_batch_stride
            position += tl.load(row_depths + node, mask=real, other=0)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head) * LOG2E
    lowest = 0
    all_see = 0
    if WINDOW:
        lowest = tl.maximum(tl.min(tl.where(real, position, 2147483647), 0) - window + 1, 0)
        all_see = tl.maximum(tl.max(tl.where(real, position, 0), 0) - window + 1, 0)

    q_at = q + row.to(tl.int64) * q_row_stride + head.to(tl.int64) * q_head_stride
    q0 = tl.load(q_at[:, None] + d0[None, :], mask=real[:, None] & (d0 < DIM)[None, :], other=0.0)
    acc0 = tl.zeros([BLOCK_M, DIM0], tl.float32)
    q1 = 0.0
    acc1 = 0.0
    if DIM1 > 0:
        q1 = tl.load(q_at[:, None] + d1[None, :], mask=real[:, None] & (d1 < DIM)[None, :], other=0.0)
        acc1 = tl.zeros([BLOCK_M, DIM1], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    k = Keys(k_cache[0] + kv_head.to(tl.int64) * k_cache[3], k_cache[1], k_cache[2])
    v = Keys(v_cache[0] + kv_head.to(tl.int64) * v_cache[3], v_cache[1], v_cache[2])
    page_row = None
    if PAGING > 0:
        page_row = page_table + request.to(tl.int64) * page_table_stride
    whole = context // BLOCK_N * BLOCK_N
    begin = first_slot + split * split_size
    end = tl.minimum(begin + split_size, whole)
    edge = begin
    if WINDOW:
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)
        edge = tl.minimum(tl.maximum(tl.cdiv(all_see, BLOCK_N) * BLOCK_N, begin), tl.maximum(end, begin))
    tail_end = limit
    if split < splits - 1:
        tail_end = whole
    if some_real == 0:
        end = begin
        edge = begin
        tail_end = whole
    cache = Cache(k, v, request, page_row, page_size, pages)
    rows = Rows(real, position, context, row_ancestors, words, row_depths, slope)
    scoring = Scoring(logit_scale, softcap, window)
    softmax = Softmax(acc0, acc1, maximum, total)
    softmax, _ = _attend(
        softmax, q0, q1, cache, rows, scoring, Slots(edge, end, 0, 0, lowest, limit),
        DIM, DIM0, DIM1, BLOCK_N, PAGING, False, WINDOW, SOFTCAP, WIDEN,
    )  # fmt: skip
    masked_begin = whole
    if WINDOW:
        masked_begin = begin
        tail_end = edge + tl.maximum(tail_end - whole, 0)
    softmax, nonfinite = _attend(
        softmax, q0, q1, cache, rows, scoring, Slots(masked_begin, tail_end, edge, whole - edge, lowest, limit),
        DIM, DIM0, DIM1, BLOCK_N, PAGING, True, WINDOW, SOFTCAP, WIDEN,
    )  # fmt: skip
    acc0, acc1, maximum, total = softmax
    if nonfinite > 0:
        last = tl.where(split < splits - 1, end, limit)
        again_at = q + row.to(tl.int64) * q_row_stride + head.to(tl.int64) * q_head_stride
        acc0, acc1, total = sum_again(
            again_at, maximum, cache, rows, scoring, begin, last, lowest, DIM, DIM0, DIM1, PAGING, WINDOW, SOFTCAP
        )

    if SPLIT:  # noqa: SIM102
        if splits > 1:
            at = ((local_request * max_splits + split).to(tl.int64) * max_queries + row) * heads + head
            tl.store(split_stats + at * 2, maximum, mask=real)
            tl.store(split_stats + at * 2 + 1, total, mask=real)
            tl.store(split_out + at[:, None] * DIM + d0[None, :], acc0, mask=real[:, None] & (d0 < DIM)[None, :])
            if DIM1 > 0:
                tl.store(split_out + at[:, None] * DIM + d1[None, :], acc1, mask=real[:, None] & (d1 < DIM)[None, :])
            return
    acc0, acc1, row_lse = _finish(acc0, acc1, maximum, total, head, sinks, real, out_scale, DIM1)
    inside = row < tl.minimum(written_rows, max_queries)
    out_at = out + row.to(tl.int64) * out_row_stride + head.to(tl.int64) * out_head_stride
    tl.store(out_at[:, None] + d0[None, :], acc0.to(out.dtype.element_ty), mask=inside[:, None] & (d0 < DIM)[None, :])
    if DIM1 > 0:
        tl.store(out_at[:, None] + d1[None, :], acc1.to(out.dtype.element_ty),
                 mask=inside[:, None] & (d1 < DIM)[None, :])  # fmt: skip
    if lse is not None:
        tl.store(lse + row.to(tl.int64) * heads + head, row_lse, mask=inside)
