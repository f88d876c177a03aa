"""Queries, caches and masks of tree_attention."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness.inputs import DTYPES, fill_random

from .cases import AttentionCase


@dataclass
class Inputs:
    """q [batch, nodes, heads, dim], caches [batch, slots, kv_heads, dim], True in a mask means visible.

    tree_mask [nodes, nodes] is the tree's own part, mask [batch or 1, 1, nodes, slots] all of it.
    """

    case: AttentionCase
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    topology: specdec_ops.Topology
    context_lens: torch.Tensor
    tree_mask: torch.Tensor
    mask: torch.Tensor

    @property
    def head_major(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [batch, kv_heads, slots, dim] of the caches, as PyTorch wants them."""
        return self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)

    @functools.cached_property
    def stored_by_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the caches that lie head by head, [batch, kv_heads, slots, dim], as suits PyTorch best."""
        k, v = self.head_major
        return k.contiguous(), v.contiguous()


def make_inputs(case: AttentionCase, device: str = "cpu", seed: int = 1) -> Inputs:
    """Random inputs in which the tree matters.

    Among thousands of context slots a few tree slots would weigh nothing, and a wrong mask would pass the check. In
    every second KV head the tree's keys therefore point the way the queries do, such that each node weighs an eighth of
    the context; the other heads are plain random and show errors in the context.
    """
    model, dtype = case.model, DTYPES[case.dtype]
    q = fill_random((case.batch, case.nodes, model.heads, model.dim), dtype, seed, device)
    k_cache, v_cache = (
        fill_random((case.batch, case.slots, model.kv_heads, model.dim), dtype, seed + 1 + i, device) for i in range(2)
    )
    push = math.sqrt(math.log(max(case.context / 8, 2.0)) * math.sqrt(model.dim))
    q.view(case.batch, case.nodes, model.kv_heads, model.group, model.dim)[:, :, ::2, :, 0] += push
    for request, context in enumerate(case.contexts):
        k_cache[request, context : context + case.nodes, ::2, 0] += push

    tree = specdec_ops.Tree.from_parents(case.tree.parents)
    tree_mask = torch.as_tensor(tree.mask()).bool()
    mask = torch.zeros(case.batch if case.ragged else 1, 1, case.nodes, case.slots, dtype=torch.bool)
    for request, context in enumerate(case.contexts[: mask.shape[0]]):
        mask[request, :, :, :context] = True
        mask[request, :, :, context : context + case.nodes] = tree_mask
    lengths = torch.tensor(case.contexts, dtype=torch.int32)
    topology, lengths = tree.to(device), lengths.to(device)
    return Inputs(case, q, k_cache, v_cache, topology, lengths, tree_mask.to(device), mask.to(device))
