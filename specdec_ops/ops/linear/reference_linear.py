"""The definition of linear."""

import torch

from .reference_blocks import dequantized_blocks


def linear(arguments, outputs) -> None:
    """Write the products of each row, rounded once.

    The arguments and outputs: specdec_ops/ops/linear/contract.py.
    """
    compute = torch.promote_types(arguments.x.dtype, torch.float32)
    y = arguments.x.to(compute)
    if arguments.norm_weight is not None:
        y = normed(y, arguments.norm_weight, arguments.norm_eps)
    products = y @ plain_weight(arguments, compute).T
    if arguments.bias is not None:
        products = products + arguments.bias.to(compute)
    products = activated(products, arguments.activation)
    if arguments.residual is not None:
        products = products + arguments.residual.to(compute)
    outputs.out.copy_(products)


def normed(y, norm_weight, norm_eps):
    """The RMSNorm of rows y [rows, dim], in their dtype."""
    return y * torch.rsqrt(y.square().mean(dim=1, keepdim=True) + norm_eps) * norm_weight.to(y.dtype)


def plain_weight(arguments, dtype):
    """The weight [weight_rows, dim] in a dtype, whatever form it has."""
    weight, weight_type = arguments.weight, arguments.weight_type
    if weight_type == "int8":
        return (weight.to(torch.promote_types(dtype, torch.float32)) * arguments.scales[:, None]).to(dtype)
    if weight_type.startswith("q"):
        return dequantized_blocks(weight, weight_type).to(dtype)
    return weight.to(dtype)


def activated(products, activation: str):
    """The gate's function of the first half of each row times the second half."""
    if activation == "none":
        return products
    gate, up = products.chunk(2, dim=1)
    if activation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
