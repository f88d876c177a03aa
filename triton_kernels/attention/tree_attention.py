"""Launch of the tree attention kernels: block shapes, splits and scratch. The kernels: tree_attention_kernels.py.

Scratch holds float32 [requests, splits, max_queries, heads, dim]. When the whole batch would need more than
SCRATCH_BYTES, the batch is served in several launches, one after the other, through the same scratch; one request's
need is the floor. Launches depend on shapes alone: nothing syncs, and the call can be captured in a CUDA graph.

Nothing is tuned at run time: block shapes come from a table, so that the same call always runs the same program.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from specdec_ops.triton_kernels.common.launch import batch_stride, on

from .tree_attention_join import merge_splits_kernel
from .tree_attention_kernels import tree_attention_kernel

MERGE_ROWS, MERGE_PARTS = 2, 16  # of a program, and under way at a time: 32 numbers of dim 256 in a thread
SCRATCH_BYTES = 256 * 2**20
LOG2E = 1.4426950408889634
MAX_INT32 = 2**31 - 1
MAX_SLOTS = 2**30  # of a request; slots are counted in 32 bits


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Compile-time shape of one launch: rows and slots per tile, slots per split, warps and pipeline stages."""

    rows: int
    slots: int
    split_slots: int
    warps: int
    stages: int


def split_dim(dim: int, rows: int) -> tuple[int, int]:
    """The pieces in which a head dimension is handled: powers of two, the second one 0 where one piece will do.

    Padding costs arithmetic, never bytes: padded columns are not read. So blocks of few rows, which wait for memory,
    take one padded piece. (There, Triton would also give every warp the same work: the second piece is narrower than
    the block.) So do dims above 128, where two accumulators would spill.
    """
    padded = triton.next_power_of_2(dim)
    first = padded // 2
    rest = max(16, triton.next_power_of_2(dim - first))
    return (first, rest) if rows >= 64 and dim <= 128 and rest < first else (padded, 0)


def block_shape(rows: int, dim: int, element_size: int, major: int, paged: bool) -> BlockShape:
    """The launch's shape, from the rows that share a KV head, the dim, the bytes per element and the GPU's generation.

    The table holds the largest tiles found that compile without spilling, with every feature on and off, dense and
    paged (tests/package/test_triton_aot.py holds it to that). Besides registers, two things decide. Prefetch: 32 to 64
    KiB of K and V under way per multiprocessor. And the split: at least eight slots for each row of the block, so that
    the scratch (8 * dim bytes per row, written and read) stays at a quarter of what the split reads (4 * dim bytes per
    slot of a 16-bit cache); and never under 256, so that its pipeline is worth filling.
    """
    wide, narrow, hopper = dim > 128, dim <= 64, major in (9, 10)
    if element_size == 4:  # no tensor cores: operands go through registers, which leaves no room for a pipeline
        return BlockShape(16, 32 if narrow or wide else 64, 256, 4 if narrow else 8, 1)
    stages = 2 if wide else 3
    if paged:  # page ids are prefetched as well, and Triton deals the stages out in equal shares
        stages = 2 * stages - 1
    if rows <= 16:
        return BlockShape(16, 64, 256, 4, stages)
    if rows <= 32:
        return BlockShape(32, 64 if hopper and not wide else 32, 256, 4, stages)
    if wide:
        return BlockShape(64, 32, 512, 8, stages)
    slots = 64 if narrow or hopper else 32  # Hopper's and Blackwell's MMA take q from shared memory
    return BlockShape(64, slots, 512, 4, stages) if rows <= 64 else BlockShape(128, slots, 1024, 8, stages)


def max_splits(kv_heads: int, capacity: int, window: int, num_splits: int, shape: BlockShape) -> int:
    """Upper bound of the splits of one request: 256 programs over the KV heads, 16 to 128 splits, or `num_splits`."""
    if window > 0:
        capacity = min(capacity, window + shape.slots)
    if num_splits > 0:
        return max(1, min(num_splits, triton.cdiv(capacity, shape.slots)))
    most = min(128, max(16, 256 // triton.next_power_of_2(kv_heads)))
    return max(1, min(most, triton.cdiv(capacity, shape.split_slots)))


def max_queries_of(arguments) -> int:
    """The most rows of one request: a packed one has no more than there is room for nodes."""
    rows = arguments.q.shape[-3]
    packed = arguments.offsets is not None and arguments.ancestors is not None
    return min(rows, arguments.ancestors.shape[1]) if packed else rows


def tree_attention(arguments, outputs) -> None:
    """Launch tree attention on checked arguments; specdec_ops/ops/attention/contract.py tells what they are.

    Writes `out` and, unless it is None, `lse`. Whatever the numbers on the device are, nothing outside of the tensors
    is read: lengths are clamped to the cache's capacity, offsets to the rows of q, and a page that does not exist reads
    as zeros.
    """
    q, k_cache, v_cache, page_table = arguments.q, arguments.k_cache, arguments.v_cache, arguments.page_table
    ancestors, depths, offsets = arguments.ancestors, arguments.depths, arguments.offsets
    softcap, window, num_splits = arguments.softcap, arguments.window, arguments.num_splits
    num_nodes = None if ancestors is None else arguments.num_nodes
    out, lse = outputs
    batch, (heads, dim), kv_heads = arguments.context_lens.shape[0], q.shape[-2:], k_cache.shape[2]
    max_queries = max_queries_of(arguments)
    group = heads // kv_heads
    shape = block_shape(max_queries * group, dim, q.element_size(), _major(q.device), page_table is not None)
    page_size, pages = k_cache.shape[1], min(k_cache.shape[0], MAX_INT32)
    paging, capacity = 0, page_size
    if page_table is not None:
        paging, capacity = 1 if page_size % shape.slots == 0 else 2, page_table.shape[1] * page_size
    capacity, page_size = min(capacity, MAX_SLOTS), min(page_size, MAX_INT32)
    splits = max_splits(kv_heads, capacity, window, num_splits, shape)

    requests, split_out, split_stats = batch, None, None
    if splits > 1:
        rows = splits * max_queries * heads
        requests = min(batch, max(1, SCRATCH_BYTES // (rows * (dim + 2) * 4)))
        split_out = torch.empty((requests * rows, dim), dtype=torch.float32, device=q.device)
        split_stats = torch.empty((requests * rows, 2), dtype=torch.float32, device=q.device)

    # Packed rows have no stride by request.
    queries = (q, 0, *q.stride()[:2]) if offsets is not None else (q, *q.stride()[:3])
    output = (out, 0, *out.stride()[:2], lse) if offsets is not None else (out, *out.stride()[:3], lse)
    scratch = (split_out, split_stats)
    scale, out_scale, query_start = arguments.scale, arguments.out_scale, arguments.query_start
    context_lens, query_starts, sinks = arguments.context_lens, arguments.query_starts, arguments.sinks
    scales = (scale / softcap if softcap > 0.0 else scale * LOG2E, softcap * LOG2E, out_scale)
    keys, values = (k_cache, *k_cache.stride()[:3]), (v_cache, *v_cache.stride()[:3])
    dim0, dim1 = split_dim(dim, shape.rows)
    num_nodes_stride = batch_stride(num_nodes)
    nodes, words, node_stride = (0, 0, 0) if ancestors is None else (*ancestors.shape[1:], ancestors.stride(1))
    # Scores are rounded before the maximum, which is one of them, is taken away: one fma for both would give the
    # greatest score of a row another exponent than 0, and with scores of 1e9 an infinite weight or none.
    common = dict(SPLIT_SLOTS=shape.split_slots, BLOCK_N=shape.slots, WINDOW=window > 0, enable_fp_fusion=False)
    with on(q.device):
        for first in range(0, batch, requests):
            count = min(requests, batch - first)
            blocks = triton.cdiv(max_queries * group, shape.rows)
            tree_attention_kernel[(count * kv_heads * blocks, splits)](
                queries, keys, values, output, scratch, scales, ancestors, depths, num_nodes, offsets, context_lens,
                page_table, query_starts, sinks, arguments.alibi_slopes,
                batch_stride(ancestors), node_stride, batch_stride(depths), num_nodes_stride,
                0 if page_table is None else page_table.stride(0),
                first, batch, heads, max_queries, q.shape[0], nodes, words, capacity, page_size, pages, query_start,
                window, num_splits, splits, GROUP=group, DIM=dim, DIM0=dim0, DIM1=dim1, BLOCK_M=shape.rows,
                PAGING=paging, SOFTCAP=softcap > 0.0, SPLIT=splits > 1, WIDEN=not q.is_cuda, num_warps=shape.warps,
                num_stages=shape.stages, **common,
            )  # fmt: skip
            if splits > 1:
                merge_splits_kernel[(triton.cdiv(max_queries * heads, MERGE_ROWS), count)](
                    output, scratch, out_scale, num_nodes, offsets, context_lens, query_starts, sinks,
                    num_nodes_stride, first, batch, heads, max_queries, q.shape[0], nodes, capacity, query_start,
                    window, num_splits, splits, DIM=dim, PADDED_DIM=triton.next_power_of_2(dim), ROWS=MERGE_ROWS,
                    PARTS=MERGE_PARTS, TREE=ancestors is not None, num_warps=4, num_stages=3, **common,
                )  # fmt: skip


@functools.cache
def _major(device):
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
