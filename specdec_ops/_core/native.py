"""Calls into the compiled module: the one place where tensors become addresses, sizes, strides and a stream.

Nothing is checked here; the public ops have done so. The order of arguments is that of csrc/bindings/module.cpp.
"""

import functools

import torch

from . import alloc, loader

MAX_SLOTS = 2**30  # of a request: kernels count slots in 32 bits. Caches may have more, that nobody reaches
MAX_INT32 = 2**31 - 1
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/common/types.h


@functools.cache
def _module():
    module, reason = loader.load()
    if module is None:
        raise RuntimeError(f"specdec_ops: {reason}")
    return module


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's index and the handle of the stream that PyTorch uses there now."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def build_topology_cpu(parents, *others):
    """See _build_topology_arguments."""
    _module().build_topology_cpu(*_build_topology_arguments(parents, *others), torch.get_num_threads())


def build_topology_cuda(parents, *others):
    """See _build_topology_arguments."""
    _module().build_topology_cuda(*_build_topology_arguments(parents, *others), *_stream(parents.device))


def _build_topology_arguments(
    parents, num_nodes, parents_out, depths, ancestors, first_child, next_sibling, num_nodes_out, status
):
    batch, nodes, words = ancestors.shape
    return (
        parents.data_ptr(),
        num_nodes.data_ptr(),
        parents_out.data_ptr(),
        depths.data_ptr(),
        ancestors.data_ptr(),
        first_child.data_ptr(),
        next_sibling.data_ptr(),
        num_nodes_out.data_ptr(),
        status.data_ptr(),
        batch,
        nodes,
        words,
    )


def merge_states_cpu(out_a, *others):
    """See _merge_states_arguments."""
    _module().merge_states_cpu(*_merge_states_arguments(out_a, *others), torch.get_num_threads())


def merge_states_cuda(out_a, *others):
    """See _merge_states_arguments."""
    _module().merge_states_cuda(*_merge_states_arguments(out_a, *others), *_stream(out_a.device))


def _merge_states_arguments(out_a, lse_a, out_b, lse_b, out, lse):
    return (
        out_a.data_ptr(),
        lse_a.data_ptr(),
        out_b.data_ptr(),
        lse_b.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        lse.numel(),
        out.shape[-1],
        _DTYPE_CODES[out.dtype],
    )


def tree_attention_cpu(q, *others):
    """See _tree_attention_arguments."""
    _module().tree_attention_cpu(*_tree_attention_arguments(q, *others), 0, 0, torch.get_num_threads())


def tree_attention_cuda(q, k_cache, *others):
    """See _tree_attention_arguments.

    A call whose requests may be split needs two more pieces of memory. Scratch, which may hold anything, belongs to
    this call: PyTorch hands it on in the order of the stream. Counters are zero before and after each call, and belong
    to one stream at a time; see _counters.
    """
    arguments = _tree_attention_arguments(q, k_cache, *others)
    batch, _, heads, kv_heads, dim = arguments[-9]
    out, lse = others[-2:]
    if batch == 0:  # a packed q whose rows belong to nobody
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    device, stream = _stream(q.device)
    max_queries, num_splits = others[9], others[-3]
    slots = arguments[-8][0]
    float8 = k_cache.dtype == torch.float8_e4m3fn
    floats, counters = _scratch_sizes(batch, max_queries, heads, kv_heads, dim, slots, num_splits, float8)
    scratch = counter = None
    if counters:
        scratch = alloc.empty((floats,), torch.float32, q.device)
        counter = _counters(q.device, stream, counters)
    _module().tree_attention_cuda(*arguments, _address(scratch), _address(counter), device, stream)


@functools.lru_cache(maxsize=1024)
def _scratch_sizes(*sizes) -> tuple[int, int]:
    """Of batch, max_queries, heads, kv_heads, dim, slots, num_splits, and whether the caches are fp8."""
    return _module().tree_attention_scratch(*sizes)


_zeroed: dict[tuple, torch.Tensor] = {}


def _counters(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """Zeroed int32 counters for the next call on this stream.

    Calls on one stream run one after another, and each leaves zeros, so they share one tensor that lives on. A call
    that is captured into a CUDA graph gets counters of its own, zeroed by the graph in each replay: they live in the
    graph's memory, and a graph may be replayed on any stream, beside others.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
    counters = _zeroed.get((device, stream))
    if counters is None or counters.shape[0] < count:
        size = max(1024, 1 << (count - 1).bit_length())
        counters = _zeroed[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return counters


def _tree_attention_arguments(
    q,
    k_cache,
    v_cache,
    ancestors,
    depths,
    num_nodes,
    offsets,
    context_lens,
    page_table,
    query_starts,
    query_start,
    max_queries,
    scale,
    window,
    softcap,
    sinks,
    alibi_slopes,
    out_scale,
    num_splits,
    out,
    lse,
):
    q_strides, out_strides = q.stride()[:-1], out.stride()[:-1]
    if offsets is not None:
        q_strides, out_strides = (0, *q_strides), (0, *out_strides)
    if page_table is None:
        cache_sizes, page_table_stride = (min(k_cache.shape[1], MAX_SLOTS), 0, 0), 0
    else:
        pages, page_size = k_cache.shape[:2]
        slots = min(page_table.shape[1] * page_size, MAX_SLOTS)
        cache_sizes = slots, min(pages, MAX_INT32), min(page_size, MAX_INT32)
        page_table_stride = page_table.stride(0)
    if ancestors is None:
        topology_sizes = (0, 0, 1)
    else:
        topology_batch, nodes, words = ancestors.shape
        topology_sizes = (nodes, words, topology_batch)
    return (
        q.data_ptr(),
        q_strides,
        k_cache.data_ptr(),
        k_cache.stride()[:-1],
        v_cache.data_ptr(),
        v_cache.stride()[:-1],
        out.data_ptr(),
        out_strides,
        _address(lse),
        _address(ancestors),
        _address(depths),
        _address(num_nodes),
        _address(offsets),
        context_lens.data_ptr(),
        _address(page_table),
        page_table_stride,
        _address(query_starts),
        _address(sinks),
        _address(alibi_slopes),
        (_DTYPE_CODES[q.dtype], k_cache.dtype == torch.float8_e4m3fn),
        (context_lens.shape[0], q.shape[-3], q.shape[-2], k_cache.shape[2], q.shape[-1]),
        cache_sizes,
        topology_sizes,
        query_start,
        scale,
        window,
        softcap,
        out_scale,
        num_splits,
    )
