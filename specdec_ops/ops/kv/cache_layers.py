"""Checks of caches that come as layers, in lists or in one tensor, dense and paged. They raise for all KV ops alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from specdec_ops._core.checks import INT32_MAX, argument_error, as_int32, device_error, grad_error, strides_error

_ITEM_BYTES = (1, 2, 4, 8)
_TENSORS = "tensors (float32, bfloat16, int8, ...)"
_DENSE, _PAGED = "[batch, slots, kv_heads, dim]", "[pages, page_size, kv_heads, dim]"
_LAYOUTS = {
    (stacked, dense): ("[layers, ...] of " if stacked else "") + (_DENSE if dense else _PAGED)
    for stacked in (False, True)
    for dense in (False, True)
}
_FEW = INT32_MAX // max(_ITEM_BYTES)  # fewer elements than these need no look at each size


class CacheLayers(NamedTuple):
    """What the contracts say of layers of caches."""

    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    page_tables: list[torch.Tensor]
    table_of: list[int]
    batch: int | None
    """None where neither a page table nor a dense cache says"""
    alike: bool
    """whether all are of one shape and dtype, K and V of their own"""


def check_layers(op: str, k_caches, v_caches, page_table, *, are_pages: bool = False) -> CacheLayers:
    """Check the caches of all layers and their page tables.

    Args:
        op: whose arguments they are.
        k_caches: a sequence of tensors, or one [layers, ...].
        v_caches: the same.
        page_table: for all layers, or a sequence with one for each, or None.
        are_pages: the first dimension of caches without a table is of pages.
    """
    stacked = isinstance(k_caches, torch.Tensor) and isinstance(v_caches, torch.Tensor)
    a_table_each = page_table is not None and not isinstance(page_table, torch.Tensor)
    if stacked and not a_table_each:
        for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
            if caches.dim() != 5:
                raise ValueError(argument_error(op, name, f"[layers, ...] of {_DENSE} if it is a tensor", caches))
        layers, other_layers = k_caches.shape[0], v_caches.shape[0]
        k_caches, v_caches = [k_caches], [v_caches]
    else:
        k_caches, v_caches = _as_list(op, "k_caches", k_caches), _as_list(op, "v_caches", v_caches)
        layers, other_layers, stacked = len(k_caches), len(v_caches), False
    if layers == 0 or other_layers != layers:
        raise ValueError(
            f"specdec_ops.{op}: k_caches and v_caches must be of one number of layers of at least 1, "
            f"got {layers}, {other_layers}"
        )
    first = k_caches[0]
    if not isinstance(first, torch.Tensor):
        raise TypeError(argument_error(op, "k_caches[0]", f"one of the {_TENSORS} {_DENSE}", first))
    tables, table_of, batch = _check_tables(op, page_table, layers, first.device)
    if are_pages and page_table is None:
        tables, table_of = [torch.empty((0, 0), dtype=torch.int32, device=first.device)], [0] * layers
    batch, alike = _check_pairs(op, k_caches, v_caches, stacked, table_of, first.device, batch)
    return CacheLayers(k_caches, v_caches, tables, table_of, batch, alike)


def _check_pairs(op: str, k_caches, v_caches, stacked: bool, table_of, device, batch: int | None):
    """Check K and V of every layer; return the batch, and whether all are alike. What is like the first is passed."""
    like: tuple = ()
    alike = True
    for index, (k, v) in enumerate(zip(k_caches, v_caches, strict=True)):
        dense = table_of[index] < 0
        if (
            index > 0
            and isinstance(k, torch.Tensor)
            and isinstance(v, torch.Tensor)
            and like == (dense, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype)
            and k.device == device
            and v.device == device
            and not (k.requires_grad or v.requires_grad)
        ):
            continue
        names = ("k_caches", "v_caches") if stacked else (f"k_caches[{index}]", f"v_caches[{index}]")
        shape = _check_cache(op, names[0], k, device, stacked, dense)
        v_shape = _check_cache(op, names[1], v, device, stacked, dense)
        if v_shape != shape and v_shape[:-1] != shape[:-1]:
            raise ValueError(argument_error(op, names[1], f"like {names[0]} {list(shape)} but for its dim", v))
        if dense:
            requests = shape[1] if stacked else shape[0]
            if batch is not None and requests != batch:
                raise ValueError(argument_error(op, names[0], f"{_DENSE} with a batch of {batch}", k))
            batch = requests
        if index > 0:
            alike = False
        elif len(k_caches) > 1:
            like = dense, shape, k.stride(), k.dtype, v_shape, v.stride(), v.dtype
    return batch, alike


def _as_list(op: str, name: str, caches) -> list:
    if isinstance(caches, torch.Tensor):
        if caches.dim() != 5:
            raise ValueError(argument_error(op, name, f"[layers, ...] of {_DENSE} if it is a tensor", caches))
        return list(caches.unbind(0))
    if not isinstance(caches, list | tuple | Sequence) or isinstance(caches, str):
        raise TypeError(argument_error(op, name, f"a sequence of {_TENSORS}, or one [layers, ...]", caches))
    return list(caches)


def _check_cache(op: str, name: str, cache, device, stacked: bool, dense: bool) -> torch.Size:
    """Check one cache, and return its shape."""
    layout = _LAYOUTS[stacked, dense]
    if not isinstance(cache, torch.Tensor) or cache.itemsize not in _ITEM_BYTES:
        must = f"one of the {_TENSORS} {layout} of a dtype of 1, 2, 4 or 8 bytes"
        raise TypeError(argument_error(op, name, must, cache))
    shape = cache.shape
    if len(shape) != (5 if stacked else 4):
        raise ValueError(argument_error(op, name, layout, cache))
    if cache.device != device:
        raise ValueError(device_error(op, name, device, cache))
    if shape[-1] == 0 or shape[-2] == 0:
        raise ValueError(argument_error(op, name, f"{layout} with heads", cache))
    if cache.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(strides_error(op, name, "contiguous in its last dimension", cache))
    if not 0 < cache.numel() <= _FEW and max(*shape, shape[-1] * cache.itemsize) > INT32_MAX:
        raise ValueError(argument_error(op, name, "of sizes below 2**31", cache))
    if cache.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(op))
    return shape


def _check_tables(op: str, page_table, layers: int, device) -> tuple[list[torch.Tensor], list[int], int | None]:
    """The tables that differ, which of them each layer has, and their batch."""
    if page_table is None:
        return [], [-1] * layers, None
    if isinstance(page_table, torch.Tensor):
        table = check_int32(op, "page_table", "[batch, max_pages]", page_table, device, 2)
        return [table], [0] * layers, table.shape[0]
    if not isinstance(page_table, list | tuple | Sequence) or isinstance(page_table, str):
        must = "int32 or int64 [batch, max_pages], or one a layer"
        raise TypeError(argument_error(op, "page_table", must, page_table))
    if len(page_table) != layers:
        raise ValueError(f"specdec_ops.{op}: page_table must be one, or {layers}, one a layer, got {len(page_table)}")
    known: dict[int, int] = {}
    tables, table_of = [], []
    for index, given in enumerate(page_table):
        if given is not None and id(given) not in known:
            table = check_int32(op, f"page_table[{index}]", "[batch, max_pages]", given, device, 2)
            if tables and table.shape[0] != tables[0].shape[0]:
                must = f"[{tables[0].shape[0]}, max_pages] like those before it"
                raise ValueError(argument_error(op, f"page_table[{index}]", must, given))
            known[id(given)] = len(tables)
            tables.append(table)
        table_of.append(-1 if given is None else known[id(given)])
    return tables, table_of, tables[0].shape[0] if tables else None


def check_int32(op: str, name: str, layout: str, value, device, dims: int) -> torch.Tensor:
    """A contiguous int32 tensor of so many dimensions; int64 is converted."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int32:
        value = as_int32(op, name, layout, value)
    if value.dim() != dims or (not 0 < value.numel() <= INT32_MAX and max(value.shape) > INT32_MAX):
        must = f"int32 or int64 {layout}" + (" of sizes below 2**31" if value.dim() == dims else "")
        raise ValueError(argument_error(op, name, must, value))
    if value.device != device:
        raise ValueError(device_error(op, name, device, value))
    return value if value.is_contiguous() else value.contiguous()
