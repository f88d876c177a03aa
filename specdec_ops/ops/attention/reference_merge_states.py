"""The definition of merge_states."""

import torch


def merge_states(arguments, outputs) -> None:
    """Write the attention over the union of two disjoint sets of slots, given the attention over each.

    A partial result weighs as much as its softmax denominator. One that saw nothing (lse -inf) weighs nothing, whatever
    its `out` holds. A log denominator of NaN or +inf makes the row NaN.
    """
    out_a, lse_a, out_b, lse_b = arguments
    compute = torch.promote_types(out_a.dtype, torch.float32)
    logs = torch.stack([lse_a, lse_b]).to(compute)
    weights = torch.softmax(logs, dim=0).masked_fill(logs == float("-inf"), 0.0)
    merged = torch.zeros(out_a.shape, dtype=compute, device=out_a.device)
    for part, weight in ((out_a, weights[0]), (out_b, weights[1])):
        merged += torch.where(weight[..., None] == 0, 0.0, weight[..., None] * part.to(compute))
    outputs.out.copy_(merged)
    outputs.lse.copy_(torch.logsumexp(logs, dim=0).masked_fill(logs.isposinf().any(dim=0), float("nan")))
