"""K and V of all layers at some slots, as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec_ops._core.checks import argument_error, describe_dtype, device_error, strides_error

from . import contract
from .cache_layers import check_int32, check_layers

_OP = "gather_layer_kv"


def gather_layer_kv(
    k_caches: Sequence[torch.Tensor] | torch.Tensor,
    v_caches: Sequence[torch.Tensor] | torch.Tensor,
    slots: torch.Tensor,
    *,
    requests: torch.Tensor | None = None,
    page_table: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Stack what all layers of a target know of some tokens: the input of layer self-attention.

    For row r and layer l the result holds, one kv head after the other, K and then V of slot `slots[r]` of request
    `requests[r]`: `[K_0 | V_0 | K_1 | V_1 | ...]`. Mixture of Attentions (Zimmer et al., 2025) feeds its draft so; keys
    are taken as they are cached, rotated. It replaces `torch.cat` of K and V in each layer and a `torch.stack` of all,
    which write everything twice.

    On CUDA tensors one launch serves up to 32 layers. The torch backend waits for the device there; nothing else does.

    Args:
        k_caches: the layers' caches, each `[batch, slots, kv_heads, dim]`, or `[pages, page_size, kv_heads, dim]` with
            a page table; or one tensor `[layers, ...]` of them. All of one dtype of 1, 2, 4 or 8 bytes, kv_heads and
            dim; they may differ in slots, pages and strides. The last dimension is contiguous.
        v_caches: like k_caches. V may have another dim than K.
        slots: int32 or int64 `[rows]`. A row of a slot, request or page that does not exist (-1, say) is zeros, in the
            layers where that is so.
        requests: int32 or int64 `[rows]`: the request of each row. None: all are of request 0.
        page_table: int32 or int64 `[batch, max_pages]`: slot j of request b is in page
            `page_table[b, j // page_size]`. Or a sequence with one for each layer, None for those that are dense.
        out: where to write, in the caches' dtype, contiguous but for its rows.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("gather_layer_kv")`.

    Returns:
        `[rows, layers, kv_heads * (k_dim + v_dim)]`, `out` if it is given.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or a cache requires grad.
    """
    layers = check_layers(_OP, k_caches, v_caches, page_table)
    k, v = layers.k_caches[0], layers.v_caches[0]
    if not layers.alike or v.dtype != k.dtype:
        _check_rows("k_caches", layers.k_caches, k.dtype, k)
        _check_rows("v_caches", layers.v_caches, k.dtype, v)
    slots = check_int32(_OP, "slots", "[rows]", slots, k.device, 1)
    rows = slots.shape[0]
    if requests is not None:
        requests = check_int32(_OP, "requests", f"[{rows}]", requests, k.device, 1)
        if requests.shape[0] != rows:
            raise ValueError(argument_error(_OP, "requests", f"int32 or int64 [{rows}]", requests))
    arguments = contract.GatherLayerKvArguments(
        slots, requests, layers.page_tables, layers.table_of, layers.k_caches, layers.v_caches
    )
    if out is None:
        return contract.gather_layer_kv(arguments, backend).out
    shape = (rows, contract.layers_of(arguments), k.shape[-2] * (k.shape[-1] + v.shape[-1]))
    must = f"{describe_dtype(k.dtype)} {list(shape)}"
    if not isinstance(out, torch.Tensor) or out.dtype != k.dtype:
        raise TypeError(argument_error(_OP, "out", must, out))
    if out.shape != shape:
        raise ValueError(argument_error(_OP, "out", must, out))
    if out.device != k.device:
        raise ValueError(device_error(_OP, "out", k.device, out))
    if rows and not out[0].is_contiguous():
        raise ValueError(strides_error(_OP, "out", "contiguous but for its rows", out))
    contract.gather_layer_kv(arguments, backend, contract.GatherLayerKvOutputs(out))
    return out


def _check_rows(name: str, caches, dtype: torch.dtype, first: torch.Tensor) -> None:
    """Check that all layers have rows of one kind."""
    kv_heads, dim = first.shape[-2:]
    for index, cache in enumerate(caches):
        if cache.dtype != dtype:
            must = f"of k_caches[0]'s dtype {describe_dtype(dtype)}"
            raise TypeError(argument_error(_OP, f"{name}[{index}]", must, cache))
        if cache.shape[-2:] != (kv_heads, dim):
            must = f"of {kv_heads} kv_heads and a dim of {dim}, as all layers"
            raise ValueError(argument_error(_OP, f"{name}[{index}]", must, cache))
