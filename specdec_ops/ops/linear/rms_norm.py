"""rms_norm: the norm of rows where no product follows it that could take it along."""

from __future__ import annotations

import torch

from . import checks, contract

_OP = "rms_norm"


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Divide each row by the root of its mean square, multiply it with the weight, and add a residual.

    `linear`, `exit_confidence` and `kv_propagate` take the norm before them along. This one is for norms that stand
    elsewhere, as those after attention and after the MLP of Gemma 2 and 3, which are followed by the residual. (Gemma's
    weights are kept less 1: pass `1 + weight`.)

    Args:
        x: float32, bfloat16 or float16 `[rows, dim]`, any stride from row to row, the last dimension contiguous.
        weight: `[dim]`, in x's dtype or float32.
        eps: added to the mean square.
        residual: like x, added to the normed rows.
        out: like x, to write to, any stride from row to row. It may be x or residual.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("rms_norm")`. A named backend
            never falls back. float64 runs with torch.

    Returns:
        A tensor like x, `out` where given: computed in float32, rounded once. A row's result depends on that row alone.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    The norm: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    checks.check_rows(_OP, "x", x, "[rows, dim]")
    checks.check_vector(_OP, "weight", weight, x.shape[1], x)
    checks.check_eps(_OP, "eps", eps)
    if residual is not None:
        checks.check_like(_OP, "residual", residual, x.shape, x)
    checks.check_no_grad(_OP, x, weight, residual)
    arguments = contract.RmsNormArguments(x, weight, float(eps), residual)
    if out is None:
        return contract.rms_norm(arguments, backend).out
    checks.check_out(_OP, out, x.shape, x)
    contract.rms_norm(arguments, backend, contract.RmsNormOutputs(out))
    return out
