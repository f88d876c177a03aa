"""linear: a weight times few rows, at one read of the weight."""

from __future__ import annotations

import torch

from specdec_ops._core import dispatch
from specdec_ops._core.checks import INT32_MAX, argument_error, describe_dtype, device_error, strides_error

from . import checks, contract
from .gguf_weight import GgufWeight
from .quantized_weight import QuantizedWeight
from .reference_linear import activated, normed, plain_weight

MAX_FEW_ROWS = 64
"""With more rows than these, backend="auto" may take PyTorch's product: `_is_handed_over` says when."""
_ACTIVATIONS = ("none", "swiglu", "geglu")
_OP = "linear"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight | GgufWeight,
    *,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply few rows with a weight, at one read of the weight: each row's dot products with the weight's rows.

    Few rows, up to 64, wait for the weight to come from memory, so 8 rows take about as long as one. Sums are float32,
    rounded once at the end. A quantised weight is multiplied in integers on CPUs with AVX-512 VNNI: rows are rounded to
    16 bits for it, in pieces of at most 640 elements, by no more than the piece's greatest magnitude over 65,278.

    **A row's result never depends on how many rows go with it**, to the last bit, nor on what they are, nor on the
    number of threads: so greedy text with drafts is greedy text without. That holds for the backends cpu, triton and
    cuda, each for itself, with any number of rows. backend="auto" takes them for up to 64 rows, and on CPUs for more,
    those of a prompt, too, unless x and a plain weight both have 16 bits. Those, and on a GPU all of more than 64 rows,
    go to PyTorch's product, which promises no such thing and rounds the product to x's dtype before the bias and what
    follows; a quantised weight is made a plain one for it in each call. Measured on a CPU (AMD Zen 5, two cores, layers
    of SmolLM2-135M and Llama-3.2-1B) with 65 to 512 rows: float32 is 1.1 to 2.2 times as fast as PyTorch's product,
    quantised weights 2.7 to 14 times; bfloat16 0.7 to 1.4 times, mostly below 1.

    Args:
        x: float32, bfloat16 or float16 `[rows, dim]`, with a contiguous last dimension.
        weight: `[outputs, dim]`, contiguous: a tensor of x's dtype, or of bfloat16 or float16 for float32 rows; or a
            `QuantizedWeight` (from `quantize_linear`); or a `GgufWeight`. The latter two go with any x. With an
            activation it is `[2 * outputs, dim]`: the rows of the gate, then those of the up projection.
        bias: a number for each row of the weight, in x's dtype or float32.
        norm_weight: `[dim]`, in x's dtype or float32: before the product a row is divided by the root of its mean
            square and multiplied with it, an RMSNorm. None: x is taken as it is.
        norm_eps: added to the mean square.
        activation: "swiglu" or "geglu": SiLU of the gate, or GELU in its form with tanh, times the up projection.
        residual: `[rows, outputs]` in x's dtype, added last.
        out: `[rows, outputs]` in x's dtype to write to, any stride from row to row. It may be residual, and must not
            overlap x.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("linear")`. A named backend never
            falls back, and takes any number of rows. float64 runs with torch.

    Returns:
        `[rows, outputs]` in x's dtype, `out` where given.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.
    """
    checks.check_rows(_OP, "x", x, "[rows, dim]")
    plain, scales, weight_type = _parts(weight, x)
    rows, weight_rows = x.shape[0], plain.shape[0]
    if activation is None:
        activation, outputs = "none", weight_rows
    else:
        outputs = _check_activation(activation, plain)
    if bias is not None:
        checks.check_vector(_OP, "bias", bias, weight_rows, x)
    if norm_weight is not None:
        checks.check_vector(_OP, "norm_weight", norm_weight, x.shape[1], x)
    checks.check_eps(_OP, "norm_eps", norm_eps)
    if residual is not None:
        checks.check_like(_OP, "residual", residual, (rows, outputs), x)
    if out is not None:
        checks.check_out(_OP, out, (rows, outputs), x)
        if out is x:
            raise ValueError(f"specdec_ops.{_OP}: out must be another tensor than x, got x")
    checks.check_no_grad(_OP, x, plain, bias, norm_weight, residual)
    arguments = contract.LinearArguments(
        x, plain, scales, weight_type, bias, norm_weight, float(norm_eps), activation, residual
    )
    if _is_handed_over(x, plain) and dispatch.is_free(backend):
        return _product_of_many_rows(arguments, out)
    if out is None:
        return contract.linear(arguments, backend).out
    contract.linear(arguments, backend, contract.LinearOutputs(out))
    return out


def _parts(weight, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """The weight's elements or blocks, its scales, and the name of its type."""
    dim = x.shape[1]
    if isinstance(weight, GgufWeight | QuantizedWeight):  # whose parts have been checked against each other
        if weight.dim != dim:
            raise ValueError(
                f"specdec_ops.{_OP}: weight must be [outputs, {dim}], got [{weight.outputs}, {weight.dim}]"
            )
        if isinstance(weight, GgufWeight):
            parts, what = (weight.blocks, None, weight.weight_type), "weight.blocks"
        else:
            parts, what = (weight.values, weight.scales, "int8"), "weight.values"
    else:
        allowed = (x.dtype, torch.bfloat16, torch.float16) if x.dtype == torch.float32 else (x.dtype,)
        if not isinstance(weight, torch.Tensor) or weight.dtype not in allowed:
            must = f"{_names(allowed)} [outputs, {dim}], a specdec_ops.QuantizedWeight or a specdec_ops.GgufWeight"
            raise TypeError(argument_error(_OP, "weight", must, weight))
        if weight.dim() != 2 or weight.shape[1] != dim:
            how = "; weight.T.contiguous() fits" if weight.dim() == 2 and weight.shape[0] == dim else ""
            raise ValueError(argument_error(_OP, "weight", f"{_names(allowed)} [outputs, {dim}]", weight) + how)
        parts, what = (weight, None, describe_dtype(weight.dtype)), "weight"
    stored = parts[0]
    if max(stored.shape) > INT32_MAX:
        raise ValueError(argument_error(_OP, what, "of sizes below 2**31", stored))
    if not stored.is_contiguous():
        raise ValueError(strides_error(_OP, what, "contiguous", stored))
    if stored.device != x.device:
        raise ValueError(device_error(_OP, what, x.device, stored))
    return parts


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(describe_dtype, dtypes))


def _check_activation(activation, weight: torch.Tensor) -> int:
    """The number of outputs."""
    if not isinstance(activation, str):
        raise TypeError(argument_error(_OP, "activation", "'swiglu', 'geglu' or None", activation))
    if activation not in _ACTIVATIONS[1:]:
        raise ValueError(argument_error(_OP, "activation", "'swiglu', 'geglu' or None", activation))
    if weight.shape[0] % 2:
        must = f"of an even number of rows with activation={activation!r}"
        raise ValueError(argument_error(_OP, "weight", must, weight))
    return weight.shape[0] // 2


def _is_handed_over(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's product of so many rows is the faster one: on a CPU that of 16 bits alone, as measured."""
    if x.shape[0] <= MAX_FEW_ROWS:
        return False
    return x.device.type != "cpu" or (x.dtype == weight.dtype and x.dtype != torch.float32)


def _product_of_many_rows(arguments: contract.LinearArguments, out: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's product in x's dtype, with everything around it in float32."""
    x = arguments.x
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x
    if arguments.norm_weight is not None:
        y = normed(x.to(compute), arguments.norm_weight, arguments.norm_eps).to(x.dtype)
    products = torch.nn.functional.linear(y, plain_weight(arguments, x.dtype))
    if arguments.bias is not None or arguments.activation != "none" or arguments.residual is not None:
        products = products.to(compute)
        if arguments.bias is not None:
            products = products + arguments.bias.to(compute)
        products = activated(products, arguments.activation)
        if arguments.residual is not None:
            products = products + arguments.residual.to(compute)
        products = products.to(x.dtype)
    return products if out is None else out.copy_(products)
