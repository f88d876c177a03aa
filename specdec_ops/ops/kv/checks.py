"""Checks that the ops of this family share. Each gets the op's name, for the sentence that says what is wrong."""

from __future__ import annotations

import torch

from specdec_ops._core.checks import INT32_MAX, argument_error, as_int32, describe_dtype, device_error, grad_error
from specdec_ops.rope import Rope


def check_tensor(op: str, name: str, value, layout: str, dims: int, dtypes: tuple, like: torch.Tensor) -> None:
    """Check for a tensor of one of these dtypes and so many dimensions on the device of `like`."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        raise TypeError(argument_error(op, name, _described(dtypes, layout), value))
    if value.dim() != dims:
        raise ValueError(argument_error(op, name, _described(dtypes, layout), value))
    if value.device != like.device:
        raise ValueError(device_error(op, name, like.device, value))


def _described(dtypes: tuple, layout: str) -> str:
    """`float32 or bfloat16 [rows]`. float64, which the definitions alone take, is named where there is no other."""
    *names, last = dict.fromkeys(describe_dtype(dtype) for dtype in dtypes if dtype != torch.float64) or ("float64",)
    return f"{', '.join(names)} or {last} {layout}" if names else f"{last} {layout}"


def check_ids(op: str, name: str, ids, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """An int32 or int64 tensor of this shape as int32, contiguous."""
    layout = str(list(shape))
    ids = ids if is_int32(ids) else as_int32(op, name, layout, ids)
    if ids.shape != shape:
        raise ValueError(argument_error(op, name, f"int32 or int64 {layout}", ids))
    if ids.device != like.device:
        raise ValueError(device_error(op, name, like.device, ids))
    return ids.contiguous()


def check_page_table(op: str, page_table, like: torch.Tensor) -> torch.Tensor | None:
    """An int32 or int64 table of pages as int32, contiguous."""
    if page_table is None:
        return None
    page_table = page_table if is_int32(page_table) else as_int32(op, "page_table", "[batch, max_pages]", page_table)
    check_tensor(op, "page_table", page_table, "[batch, max_pages]", 2, (torch.int32,), like)
    if max(page_table.shape) > INT32_MAX:
        raise ValueError(argument_error(op, "page_table", "of sizes below 2**31", page_table))
    return page_table.contiguous()


def is_int32(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int32


def rope_tables(op: str, rope, head_dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines of a Rope or of two tables, [positions, pairs]: float32, or float64 with float64 rows."""
    compute = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(rope, Rope):  # whose tables are float32, and of one shape
        cosines, sines = rope.cosines, rope.sines
        if 2 * cosines.shape[1] > head_dim:
            raise ValueError(argument_error(op, "rope", f"of at most {head_dim // 2} pairs", rope))
        if cosines.device != like.device:
            raise ValueError(device_error(op, "rope", like.device, cosines))
        return (cosines, sines) if compute == torch.float32 else (cosines.double(), sines.double())
    cosines, sines = rope
    for name, table in (("rope[0]", cosines), ("rope[1]", sines)):
        check_tensor(op, name, table, "[positions, pairs]", 2, (compute,), like)
        if table.shape != cosines.shape or table.shape[0] < 1 or 2 * table.shape[1] > head_dim:
            must = f"two tables [positions, pairs] of one shape, of at most {head_dim // 2} pairs"
            raise ValueError(argument_error(op, name, must, table))
        if table.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(grad_error(op))
    return cosines, sines


def is_rope(value) -> bool:
    """Whether it is a Rope, or a pair that may be tables."""
    return isinstance(value, Rope) or (isinstance(value, tuple) and len(value) == 2)
