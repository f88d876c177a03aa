"""Checks that linear and rms_norm share."""

from __future__ import annotations

import torch

from specdec_ops._core.checks import (
    FLOAT_MAX,
    INT32_MAX,
    KERNEL_DTYPES,
    argument_error,
    describe_dtype,
    device_error,
    grad_error,
    is_number,
    strides_error,
)

DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_rows(op: str, name: str, value, layout: str) -> None:
    """Check for rows of a kernel's dtype, contiguous in their last dimension, of which there is at least one."""
    if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
        raise TypeError(argument_error(op, name, f"float32, bfloat16 or float16 {layout}", value))
    if value.dim() != 2 or value.shape[1] < 1 or max(value.shape) > INT32_MAX:
        must = f"{layout} with a dim of at least 1 and sizes below 2**31"
        raise ValueError(argument_error(op, name, must, value))
    if value.stride(1) != 1 and value.shape[1] > 1:
        raise ValueError(strides_error(op, name, "contiguous in its last dimension", value))


def check_like(op: str, name: str, value, shape: tuple, x: torch.Tensor) -> None:
    """Check for rows of this shape like x: its dtype and device, contiguous in the last dimension."""
    is_right_type = isinstance(value, torch.Tensor) and value.dtype == x.dtype
    if not is_right_type or value.shape != shape:
        kind = ValueError if is_right_type else TypeError
        raise kind(argument_error(op, name, f"{describe_dtype(x.dtype)} {list(shape)}", value))
    if value.device != x.device:
        raise ValueError(device_error(op, name, x.device, value))
    if value.stride(1) != 1 and value.shape[1] > 1:
        raise ValueError(strides_error(op, name, "contiguous in its last dimension", value))


def check_out(op: str, out, shape: tuple, x: torch.Tensor) -> None:
    """The same for what is written to, whose rows must not lie on each other."""
    check_like(op, "out", out, shape, x)
    if out.stride(0) < shape[1] and shape[0] > 1:
        raise ValueError(strides_error(op, "out", "of rows that do not overlap", out))


def check_vector(op: str, name: str, value, length: int, x: torch.Tensor) -> None:
    """Check for a contiguous [length] of x's dtype or float32 on x's device."""
    is_right_type = isinstance(value, torch.Tensor) and value.dtype in (x.dtype, torch.float32)
    if not is_right_type or value.shape != (length,):
        names = " or ".join(dict.fromkeys((describe_dtype(x.dtype), "float32")))
        kind = ValueError if is_right_type else TypeError
        raise kind(argument_error(op, name, f"{names} [{length}]", value))
    if value.device != x.device:
        raise ValueError(device_error(op, name, x.device, value))
    if not value.is_contiguous():
        raise ValueError(strides_error(op, name, "contiguous", value))


def check_eps(op: str, name: str, value) -> None:
    """Check for what may be added to a mean square."""
    if not is_number(value) or not 0 <= value <= FLOAT_MAX:
        raise ValueError(argument_error(op, name, "a finite number of at least 0", value))


def check_no_grad(op: str, *values: torch.Tensor | None) -> None:
    """Refuse inputs that require grad: a missing gradient must not go unnoticed."""
    if torch.is_grad_enabled():
        for value in values:
            if value is not None and value.requires_grad:
                raise RuntimeError(grad_error(op))
