"""The join of tree_attention's splits: what each left of a row becomes its output and log-sum-exp."""

import triton
import triton.language as tl

from .tree_attention_kernels import _VOLATILE, _VOLATILE_POINTERS, _finish, _request_rows, _splits


@triton.jit(do_not_specialize=_VOLATILE, do_not_specialize_on_alignment=_VOLATILE_POINTERS)
def merge_splits_kernel(
    output, scratch, out_scale, num_nodes, offsets, context_lens, query_starts, sinks, num_nodes_stride,
    request_begin, batch, heads, max_queries, tokens, nodes, capacity, query_start, window, num_splits, max_splits,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SPLIT_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, requests). A program owns ROWS of the (tree row, head) pairs and adds their splits.

    PARTS splits are loaded at once, so a row waits for memory once for every PARTS of them. What is added to what
    depends on PARTS and the row's own splits alone. The other arguments are those of tree_attention_kernel.
    """
    out, out_batch_stride, out_row_stride, out_head_stride, lse = output
    split_out, split_stats = scratch
    local_request = tl.program_id(1)
    request = request_begin + local_request
    context = tl.minimum(tl.maximum(tl.load(context_lens + request), 0), capacity)
    _, _, splits = _splits(context, window, num_splits, max_splits, SPLIT_SLOTS, BLOCK_N, WINDOW)
    if splits == 1:  # written by the first kernel
        return
    q_first, own_rows, written_rows, start_node, count = _request_rows(
        request, batch, max_queries, tokens, offsets, num_nodes, num_nodes_stride, nodes, query_start, query_starts
    )
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = m // heads
    head = m % heads
    real = row < tl.minimum(own_rows, max_queries)
    if TREE:
        real = real & (start_node + row >= 0) & (start_node + row < count)
    d = tl.arange(0, PADDED_DIM)
    at = (local_request * max_splits).to(tl.int64) * max_queries * heads + m
    step = max_queries.to(tl.int64) * heads

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < splits)[:, None] & real[None, :]
        here = at[None, :] + part[:, None] * step
        peak = tl.load(split_stats + here * 2, mask=there, other=float("-inf"))
        size = tl.load(split_stats + here * 2 + 1, mask=there, other=0.0)
        at_value = split_out + here[:, :, None] * DIM + d[None, None, :]
        value = tl.load(at_value, mask=there[:, :, None] & (d < DIM)[None, None, :], other=0.0)
        joined = tl.maximum(maximum, tl.max(peak, 0))
        safe = tl.where(joined == float("-inf"), 0.0, joined)
        weight = tl.exp2(peak - safe[None, :])
        decay = tl.exp2(maximum - safe)
        total = total * decay + tl.sum(weight * size, 0)
        acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * value, 0)
        maximum = joined

    acc, _, row_lse = _finish(acc, acc, maximum, total, head, sinks, real, out_scale, 0)
    inside = row < tl.minimum(written_rows, max_queries)
    out += request.to(tl.int64) * out_batch_stride + q_first * out_row_stride
    out_at = out + row.to(tl.int64) * out_row_stride + head.to(tl.int64) * out_head_stride
    tl.store(out_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None, :])
    if lse is not None:
        lse += (q_first if offsets is not None else request.to(tl.int64) * max_queries) * heads
        tl.store(lse + row.to(tl.int64) * heads + head, row_lse, mask=inside)
