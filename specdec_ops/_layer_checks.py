"""The checks of `LayerCache`'s arguments, apart from the order of calls, which `_layer_state` knows."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch

from ._core.checks import argument_error, describe_dtype, device_error, grad_error

OP = "LayerCache"
_OPTIONS = frozenset(("scale", "window", "softcap", "sinks", "alibi_slopes", "num_splits", "path_invariant"))


def check_rows(name: str, rows, count: int | None, like: torch.Tensor) -> None:
    """Hidden rows `[count, dim]` of the dtype and on the device of `like`, which ends with dim. None: any count."""
    if not isinstance(rows, torch.Tensor) or rows.dtype != like.dtype:
        raise TypeError(argument_error(OP, name, _rows(count, like), rows))
    if rows.dim() != 2 or rows.shape[1] != like.shape[-1] or (count is not None and rows.shape[0] != count):
        raise ValueError(argument_error(OP, name, _rows(count, like), rows))
    _check_place(name, rows, like)


def _rows(count: int | None, like: torch.Tensor) -> str:
    return f"{describe_dtype(like.dtype)} [{'rows' if count is None else count}, {like.shape[-1]}]"


def check_heads(rows: int, q, k, v, cache: torch.Tensor) -> None:
    """q, k and v of `rows` rows, for one layer's cache [batch, slots, kv_heads, head_dim]."""
    _, _, kv_heads, head_dim = cache.shape
    for name, value, heads in (("k", k, kv_heads), ("v", v, kv_heads), ("q", q, None)):
        if not isinstance(value, torch.Tensor) or value.dtype != cache.dtype:
            raise TypeError(argument_error(OP, name, _vectors(rows, heads, cache), value))
        shape = value.shape
        if len(shape) != 3 or shape[0] != rows or shape[2] != head_dim:
            raise ValueError(argument_error(OP, name, _vectors(rows, heads, cache), value))
        if shape[1] != heads if heads else shape[1] < 1 or shape[1] % kv_heads:
            raise ValueError(argument_error(OP, name, _vectors(rows, heads, cache), value))
        _check_place(name, value, cache)


def _vectors(rows: int, heads: int | None, cache: torch.Tensor) -> str:
    of_queries = "" if heads else f" with a multiple of {cache.shape[2]} heads"
    return f"{describe_dtype(cache.dtype)} [{rows}, {heads or 'heads'}, {cache.shape[3]}]{of_queries}"


def _check_place(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.device != like.device:
        raise ValueError(device_error(OP, name, like.device, value))
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(OP))


def check_options(options: dict) -> None:
    """Only what changes the attention, not what it is of."""
    if options and not _OPTIONS.issuperset(options):
        name = next(name for name in options if name not in _OPTIONS)
        raise TypeError(f"specdec_ops.{OP}: options must be of {', '.join(sorted(_OPTIONS))}, got {name}")


def counts_of(counts: Sequence[int] | None, rows: int, batch: int) -> tuple[int, ...]:
    """Rows per request, which make `rows` together. None: the same number for each."""
    if counts is None:
        if rows % batch:
            raise ValueError(argument_error(OP, "rows", f"a multiple of the batch of {batch}, without counts", rows))
        return (rows // batch,) * batch
    must = f"{batch} ints that sum to {rows}"
    counts = tuple(index_of("counts", must, count) for count in items_of("counts", must, counts))
    if len(counts) != batch or any(count < 0 for count in counts) or sum(counts) != rows:
        raise ValueError(f"specdec_ops.{OP}: counts must be {must}, got {counts}")
    return counts


def items_of(name: str, must: str, values) -> list:
    """The items of a sequence or of a tensor, which is read."""
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    try:
        return list(values)
    except TypeError:
        raise TypeError(argument_error(OP, name, must, values)) from None


def index_of(name: str, must: str, value) -> int:
    """An int, also one of NumPy's."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(argument_error(OP, name, must, value))
    return operator.index(value)


def ascending(values: Sequence[int], least: int) -> bool:
    """Whether every value is above the one before it, from `least` on."""
    return all(low < high for low, high in itertools.pairwise((least - 1, *values)))
