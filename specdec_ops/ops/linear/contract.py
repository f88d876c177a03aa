"""The contracts of linear and rms_norm: what their implementations take and write."""

from typing import NamedTuple

import torch

from specdec_ops._core.library import Operator


class LinearArguments(NamedTuple):
    """Rows, a weight, and what is done before and after their product.

    All is contiguous, but for the rows of x and residual. The weight has `outputs` rows, or, with an activation,
    `outputs` rows of the gate and then as many of what it is multiplied with.
    """

    x: torch.Tensor
    """[rows, dim]"""
    weight: torch.Tensor
    """[weight_rows, dim], floating or int8; or uint8 [weight_rows, bytes], the blocks of a GGUF file as they lie"""
    scales: torch.Tensor | None
    """float32 [weight_rows] of an int8 weight"""
    weight_type: str
    """"float32", "bfloat16", "float16", "int8", "q8_0", "q4_0" or "q4_1" """
    bias: torch.Tensor | None
    """[weight_rows], of x's dtype or float32"""
    norm_weight: torch.Tensor | None
    """[dim] of the RMSNorm of x, of x's dtype or float32; None: no norm"""
    norm_eps: float
    activation: str
    """"none", "swiglu" or "geglu\""""
    residual: torch.Tensor | None
    """[rows, outputs], added last"""


class LinearOutputs(NamedTuple):
    """The products. They may lie where residual lies."""

    out: torch.Tensor
    """[rows, outputs] of x's dtype, the last dimension contiguous"""


def _make_outputs(arguments: LinearArguments, empty) -> LinearOutputs:
    outputs = arguments.weight.shape[0]
    if arguments.activation != "none":
        outputs = outputs // 2
    return LinearOutputs(empty((arguments.x.shape[0], outputs), arguments.x.dtype, arguments.x.device))


linear = Operator(
    "linear",
    LinearArguments,
    LinearOutputs,
    _make_outputs,
    answers=lambda arguments, outputs: outputs.out.numel() == 0,
    may_be={"out": ("residual",)},
)


class RmsNormArguments(NamedTuple):
    """Rows and the weight of their norm."""

    x: torch.Tensor
    """[rows, dim], the last dimension contiguous"""
    weight: torch.Tensor
    """[dim], of x's dtype or float32, contiguous"""
    eps: float
    residual: torch.Tensor | None
    """like x, added to the normed rows"""


class RmsNormOutputs(NamedTuple):
    """The normed rows. They may lie where x or residual lies."""

    out: torch.Tensor
    """like x, the last dimension contiguous"""


def _make_normed(arguments: RmsNormArguments, empty) -> RmsNormOutputs:
    x = arguments.x
    return RmsNormOutputs(empty(x.shape, x.dtype, x.device))


rms_norm = Operator(
    "rms_norm",
    RmsNormArguments,
    RmsNormOutputs,
    _make_normed,
    answers=lambda arguments, outputs: outputs.out.numel() == 0,
    may_be={"out": ("x", "residual")},
)
