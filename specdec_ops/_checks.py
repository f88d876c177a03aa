"""The wording of argument errors: one sentence with the op, the argument, what it must be and what it was.

The ops test and raise; this module only builds text, so that a correct call pays for comparisons alone and so that
torch.compile can trace through the checks.
"""

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def describe(value) -> str:
    """`float32 [2, 3]` for a tensor, the value itself for a number or a string, else the name of its type.

    For an array of another framework also where the ops are that take it.
    """
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if hasattr(value, "__dlpack__"):
        return f"{type(value).__name__} (the ops of specdec_ops.dlpack take arrays)"
    return type(value).__name__


def describe_dtype(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def wrong(op: str, name: str, must: str, value) -> str:
    """The uniform sentence."""
    return f"specdec_ops.{op}: {name} must be {must}, got {describe(value)}"


def wrong_strides(op: str, name: str, must: str, value: torch.Tensor) -> str:
    """The same sentence for a tensor whose memory layout does not fit."""
    return f"{wrong(op, name, must, value)} with strides {list(value.stride())}"


def wrong_device(op: str, name: str, device: torch.device, value: torch.Tensor) -> str:
    """The same sentence for a tensor that lies elsewhere than the op's first argument."""
    return f"specdec_ops.{op}: {name} must be on {device}, got a tensor on {value.device}"


def wrong_grad(op: str) -> str:
    """What to say of an input that requires grad: a missing gradient must not go unnoticed."""
    return (
        f"specdec_ops.{op}: an input requires grad, but this op has no backward; "
        "call it under torch.inference_mode() or torch.no_grad()"
    )


def is_int(value) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """True for an int or a float, not for a bool or a tensor (reading one would wait for the device)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
