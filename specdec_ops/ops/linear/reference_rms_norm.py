"""The definition of rms_norm."""

import torch

from .reference_linear import normed


def rms_norm(arguments, outputs) -> None:
    """Write the normed rows and what is added to them, rounded once.

    The arguments and outputs: specdec_ops/ops/linear/contract.py.
    """
    compute = torch.promote_types(arguments.x.dtype, torch.float32)
    y = normed(arguments.x.to(compute), arguments.weight, arguments.eps)
    if arguments.residual is not None:
        y = y + arguments.residual.to(compute)
    outputs.out.copy_(y)
