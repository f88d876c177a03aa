"""xFormers' tree_attention: split-K attention over the context, dense attention among the nodes, and a merge.

One tree for the whole batch; query heads of a KV head are a dimension of their own, over which K and V are expanded
without a copy. Its Triton kernels need no compiled part of xFormers.
"""

from __future__ import annotations

import importlib

import torch

from benchmarks.harness.contestant import Contestant, unavailable

from .inputs import Inputs


def grouped(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[batch, nodes, heads, dim] as [batch, nodes, kv_heads, group, dim]."""
    return tensor.unflatten(2, (kv_heads, -1))


def expanded(cache: torch.Tensor, group: int) -> torch.Tensor:
    """[batch, slots, kv_heads, dim] as [batch, slots, kv_heads, group, dim], without a copy."""
    return cache.unsqueeze(3).expand(-1, -1, -1, group, -1)


def tree_bias(tree_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else -inf. Rows lie a multiple of 8 elements apart, which kernels ask for."""
    nodes = tree_mask.shape[0]
    bias = torch.zeros(nodes, -(-nodes // 8) * 8, dtype=dtype, device=tree_mask.device)[:, :nodes]
    return bias.masked_fill_(~tree_mask, float("-inf"))


def contestants(inputs: Inputs) -> list[Contestant]:
    name = "xformers tree_attention"
    try:
        function = importlib.import_module("xformers.ops.tree_attention").tree_attention
        masks = importlib.import_module("xformers.ops.fmha.attn_bias")
        kernel = importlib.import_module("xformers.ops.fmha.triton_splitk").FwOp
    except Exception as error:  # not installed, or not for this PyTorch
        return [unavailable(name, "library", f"can't be imported: {type(error).__name__}: {error}"[:120])]
    case = inputs.case
    k, v = inputs.k_cache, inputs.v_cache
    new_k, new_v = (
        torch.stack([cache[r, context : context + case.nodes] for r, context in enumerate(case.contexts)])
        for cache in (k, v)
    )
    prefix = masks.BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[case.nodes] * case.batch, kv_padding=case.slots, kv_seqlen=list(case.contexts), device=inputs.q.device
    )
    q = grouped(inputs.q, case.model.kv_heads)
    bias = tree_bias(inputs.tree_mask, inputs.q.dtype)
    tensors = [expanded(tensor, case.model.group) for tensor in (new_k, new_v, k, v)]

    def call():
        return function(q, *tensors, bias, prefix, prefix_op=kernel, suffix_op=kernel)

    return [Contestant(name, "library", call, lambda out: out.flatten(2, 3), (k, v))]
