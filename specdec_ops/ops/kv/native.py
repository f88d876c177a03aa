"""Calls of the compiled kernels of kv_propagate. Nothing is checked here; the public op has done so.

The order of arguments is that of csrc/bindings/kv.cpp.
"""

import torch

from specdec_ops._core.native import _DTYPE_CODES, MAX_INT32, _address, _module, _stream

_MAX_LAYERS = 32  # of a call, as in csrc/kv/params.h


def kv_propagate_cpu(hidden, *others) -> None:
    """See specdec_ops.ops.kv.reference_kv_propagate for the arguments. One call for each 32 layers."""
    threads = torch.get_num_threads()
    for arguments in _calls(hidden, *others):
        _module().kv_propagate_cpu(*arguments, threads)


def kv_propagate_cuda(hidden, *others) -> None:
    """See specdec_ops.ops.kv.reference_kv_propagate for the arguments. One launch for each 32 layers."""
    device, stream = _stream(hidden.device)
    for arguments in _calls(hidden, *others):
        _module().kv_propagate_cuda(*arguments, device, stream)


def _calls(
    hidden,
    norm_weights,
    k_weights,
    v_weights,
    norm_eps,
    cosines,
    sines,
    interleaved,
    requests,
    slots,
    page_table,
    k_caches,
    v_caches,
):
    """The arguments of each call, all the same but for the layers."""
    requests, slots, page_table = (
        None if tensor is None else tensor.contiguous() for tensor in (requests, slots, page_table)
    )
    first, second, kv_heads, head_dim = k_caches[0].shape
    if page_table is None:
        sizes = (min(first, MAX_INT32), second, 0, 0)
    else:
        sizes = (page_table.shape[0], page_table.shape[1] * second, min(first, MAX_INT32), second)
    norms = norm_weights or [None] * len(k_caches)
    layers = [
        (
            (_address(norm), 0 if norm is None else _DTYPE_CODES[norm.dtype]),
            (k_weight.data_ptr(), v_weight.data_ptr()),
            (k_cache.data_ptr(), v_cache.data_ptr()),
            k_cache.stride()[:3],
            v_cache.stride()[:3],
        )
        for norm, k_weight, v_weight, k_cache, v_cache in zip(
            norms, k_weights, v_weights, k_caches, v_caches, strict=True
        )
    ]
    pairs = 0 if cosines is None else cosines.shape[1]
    for start in range(0, len(layers), _MAX_LAYERS):
        yield (
            (hidden.data_ptr(), _DTYPE_CODES[hidden.dtype], hidden.stride(0)),
            layers[start : start + _MAX_LAYERS],
            norm_eps,
            (_address(cosines), _address(sines), pairs, interleaved),
            (_address(requests), slots.data_ptr(), _address(page_table)),
            (*hidden.shape, kv_heads, head_dim),
            sizes,
        )
