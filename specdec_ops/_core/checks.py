"""The wording of argument errors: one sentence with the op, the argument, what it must be and what it was.

The ops test and raise; this module only builds text, so that a correct call pays for comparisons alone and so that
torch.compile can trace through the checks. It also converts the integers that other libraries hand over.
"""

import functools
import math

import numpy as np
import torch

FLOAT_MAX = 3.4028234663852886e38
"""The greatest float32."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32_MAX = 2**31 - 1
MAX_EOS = 8
_SHORT = 60  # characters of a list that is worth repeating
_SHORTER_INTS = (torch.int32, torch.uint32)


def describe(value) -> str:
    """`float32 [2, 3]` for a tensor, the value itself for a number, a string or a short list, else its type."""
    if isinstance(value, torch.Tensor):
        return f"{describe_dtype(value.dtype)} {list(value.shape)}"
    if value is None or type(value) in (bool, int, float, str):
        return repr(value)
    name = type(value).__name__
    if isinstance(value, np.generic):
        return f"numpy.{name}({value}), of which int() or float() makes a number"
    if isinstance(value, np.ndarray):
        return f"ndarray {value.dtype} {list(value.shape)}"
    if type(value) in (list, tuple) and len(repr(value)) <= _SHORT:
        return f"{name} {value!r}"
    return name


@functools.cache
def describe_dtype(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def argument_error(op: str, name: str, must: str, value) -> str:
    """The uniform sentence, and what would help where something like a tensor stands for one."""
    sentence = f"specdec_ops.{op}: {name} must be {must}, got {describe(value)}"
    if isinstance(value, torch.nn.Module):
        return f"{sentence}, a module; its weight may be meant"
    if "32" in must and hasattr(value, "__dlpack__") and not isinstance(value, torch.Tensor | np.generic):
        return f"{sentence}; torch.from_dlpack makes a tensor of it, and specdec_ops.dlpack takes it"
    return sentence


def strides_error(op: str, name: str, must: str, value: torch.Tensor) -> str:
    """The same sentence for a tensor whose memory layout does not fit."""
    return f"{argument_error(op, name, must, value)} with strides {list(value.stride())}"


def device_error(op: str, name: str, device: torch.device, value: torch.Tensor) -> str:
    """The same sentence for a tensor that lies elsewhere than the op's first argument."""
    return f"specdec_ops.{op}: {name} must be on {device}, got a tensor on {value.device}"


def wrong_topology(op: str, must: str, value) -> str:
    """The same sentence for what is no topology, and how to come by one."""
    got = describe(value) if isinstance(value, torch.Tensor | str | None) else type(value).__name__
    how = "tree.to(device) makes one of a Tree, once for all calls, and build_topology of parents on the device"
    return f"specdec_ops.{op}: topology must be {must}, got {got}; {how}"


def wrong_batch(op: str, batch: int, got: int) -> str:
    """The same sentence for a topology of another batch."""
    must = "1" if batch == 1 else f"{batch} or 1"
    return f"specdec_ops.{op}: topology must have a batch of {must}, got {got}"


def grad_error(op: str) -> str:
    """What to say of an input that requires grad: a missing gradient must not go unnoticed."""
    return (
        f"specdec_ops.{op}: an input requires grad, but this op has no backward; "
        "call it under torch.inference_mode() or torch.no_grad()"
    )


def check_field(
    owner: str, name: str, value, dtype: torch.dtype, shape: tuple, like: torch.Tensor | None = None
) -> None:
    """Check a tensor that an object holds, once, when the object is made: ops rely on it.

    Args:
        owner: the class.
        name: the field.
        value: what it is given.
        dtype: what it must be of.
        shape: its sizes; a string stands for any size, and names it.
        like: a tensor of the device that it must be on; None: any.

    Raises:
        TypeError: it is no tensor of this dtype.
        ValueError: it has another shape, is not contiguous, or lies elsewhere.
        RuntimeError: it requires grad.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        raise TypeError(argument_error(owner, name, f"{describe_dtype(dtype)} [{', '.join(map(str, shape))}]", value))
    if value.dim() != len(shape) or any(
        [not isinstance(size, str) and size != own for size, own in zip(shape, value.shape, strict=True)]
    ):
        raise ValueError(argument_error(owner, name, f"{describe_dtype(dtype)} [{', '.join(map(str, shape))}]", value))
    if not value.is_contiguous():
        raise ValueError(strides_error(owner, name, "contiguous", value))
    if like is not None and value.device != like.device:
        raise ValueError(device_error(owner, name, like.device, value))
    if dtype.is_floating_point and value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(owner))


def is_int(value) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """True for an int or a float, not for a bool or a tensor (reading one would wait for the device)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_int32(op: str, name: str, layout: str, value) -> torch.Tensor:
    """What is not an int32 tensor as one: int64 is converted on its device.

    Numbers that int32 can't hold become the nearest that it can, which every op treats as it treats others that are out
    of range.
    """
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(argument_error(op, name, f"int32 or int64 {layout}", value))
    return value if value.dtype == torch.int32 else value.clamp(-INT32_MAX - 1, INT32_MAX).to(torch.int32)


def as_int64(op: str, name: str, layout: str, value: torch.Tensor) -> torch.Tensor:
    """The same for seeds: 64 bits, whatever their sign; shorter integers are converted."""
    if value.dtype == torch.uint64:
        return value.view(torch.int64)
    if value.dtype not in _SHORTER_INTS:
        raise TypeError(argument_error(op, name, f"int64, uint64, int32 or uint32 {layout}", value))
    return value.to(torch.int64)


def as_float32(op: str, name: str, value) -> float:
    """A number as kernels get it, infinite where float32 has none so great. NaN is refused."""
    if value != value:
        raise ValueError(argument_error(op, name, "a number, not NaN", value))
    if -FLOAT_MAX <= value <= FLOAT_MAX:
        return float(value)
    return math.inf if value > 0 else -math.inf


def check_eos(op: str, eos) -> tuple:
    """The ids that end a sequence, as a tuple."""
    if eos is None:
        return ()
    ids = (eos,) if is_int(eos) else eos
    if not isinstance(ids, tuple | list) or not all([is_int(token) for token in ids]):
        how = "; its tolist() has them" if isinstance(eos, torch.Tensor) else ""
        raise TypeError(argument_error(op, "eos", f"None, an int or up to {MAX_EOS} ints", eos) + how)
    if len(ids) > MAX_EOS or not all([0 <= token <= INT32_MAX for token in ids]):
        must = f"None, an int or up to {MAX_EOS} ints, each from 0 to 2**31 - 1"
        raise ValueError(f"specdec_ops.{op}: eos must be {must}, got {eos}")
    return tuple(ids)
