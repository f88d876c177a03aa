"""The merge of two partial attentions over disjoint slots."""

import torch

from specdec_ops._core.checks import INT32_MAX, argument_error

from . import contract
from .tree_attention import QUERY_DTYPES, AttentionState, check_like, check_no_grad


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    out: AttentionState | None = None,
    backend: str = "auto",
) -> AttentionState:
    """Combine the attention over two disjoint sets of slots into the attention over both.

    For a context spread over devices, a shared prefix computed once, or a cross-attention beside a self-attention.
    Attention sinks must have joined one of the two parts only. For inference: there is no backward.

    Args:
        out_a: float32, bfloat16 or float16 `[..., heads, dim]`, contiguous: the first part's output.
        lse_a: float32 `[..., heads]`, contiguous: the natural log of its softmax denominator. -inf marks a part that
            saw nothing; its `out` is then not used.
        out_b: the second part's output, like out_a.
        lse_b: the second part's log denominator, like lse_a.
        out: an AttentionState to write to. It may be one of the inputs, but must not overlap them otherwise.
        backend: as in tree_attention.

    Returns:
        AttentionState(out like out_a, lse like lse_a). Where both parts saw nothing: 0 and -inf.

    Raises:
        TypeError, ValueError, RuntimeError: as in tree_attention.

    The rule is that of online softmax (Milakov and Gimelshein, 2018).
    """
    op = "merge_states"
    if not isinstance(out_a, torch.Tensor) or out_a.dtype not in QUERY_DTYPES:
        raise TypeError(argument_error(op, "out_a", "float32, bfloat16 or float16 [..., heads, dim]", out_a))
    if out_a.dim() < 2:
        raise ValueError(argument_error(op, "out_a", "float32, bfloat16 or float16 [..., heads, dim]", out_a))
    shape = out_a.shape
    if shape[-1] > INT32_MAX:
        raise ValueError(argument_error(op, "out_a", "of a dim below 2**31", out_a))
    check_like(op, "out_a", out_a, out_a, shape)
    check_like(op, "out_b", out_b, out_a, shape)
    check_like(op, "lse_a", lse_a, out_a, shape[:-1], torch.float32)
    check_like(op, "lse_b", lse_b, out_a, shape[:-1], torch.float32)
    check_no_grad(op, out_a, lse_a, out_b, lse_b)
    arguments = contract.MergeStatesArguments(out_a, lse_a, out_b, lse_b)
    if out is None:
        return AttentionState(*contract.merge_states(arguments, backend))
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(argument_error(op, "out", "an AttentionState(out, lse)", out))
    check_like(op, "out.out", out[0], out_a, shape)
    check_like(op, "out.lse", out[1], out_a, shape[:-1], torch.float32)
    contract.merge_states(arguments, backend, contract.MergeStatesOutputs(*out))
    return out
