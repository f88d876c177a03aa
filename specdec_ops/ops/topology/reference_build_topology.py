"""The definition of build_topology in plain PyTorch. It runs on any device and never waits for it."""

import torch

from specdec_ops.status import TopologyStatus


def build_topology(arguments, outputs) -> None:
    """Write the sound parents and what follows from them. The tensors: specdec_ops/ops/topology/contract.py."""
    parents, num_nodes = arguments
    batch, nodes = parents.shape
    node = torch.arange(nodes, device=parents.device)
    count = num_nodes.clamp(0, nodes)
    exists = node < count[:, None]

    out_of_range = exists & ((parents < -1) | (parents >= count[:, None]))
    not_before = exists & ~out_of_range & (parents >= node)
    parent = torch.where(exists & ~out_of_range & ~not_before, parents, -1).long()

    # sees[b, i, j]: node i sees node j. A node sees what its parent sees, and itself.
    sees = torch.zeros(batch, nodes, nodes, dtype=torch.bool, device=parents.device)
    request = torch.arange(batch, device=parents.device)
    for i in range(nodes):
        has_parent = parent[:, i] >= 0
        sees[:, i] = sees[request, parent[:, i].clamp(min=0)] & has_parent[:, None]
        sees[:, i, i] = exists[:, i]

    # The lowest node for which a condition holds along the last dimension, or -1.
    def lowest(condition: torch.Tensor) -> torch.Tensor:
        found = torch.where(condition, node, nodes).amin(dim=-1) if nodes else condition.new_empty(batch, 0).long()
        return torch.where(found < nodes, found, -1)

    both_exist = exists[:, :, None] & exists[:, None, :]
    is_child = both_exist & (parent[:, None, :] == node[:, None])
    is_later_sibling = both_exist & (parent[:, None, :] == parent[:, :, None]) & (node > node[:, None])

    outputs.parents_out.copy_(parent)
    outputs.depths.copy_((sees.sum(dim=-1) - 1).clamp(min=0))
    outputs.ancestors.copy_(_pack(sees, outputs.ancestors.shape[-1]))
    outputs.first_child.copy_(lowest(is_child))
    outputs.next_sibling.copy_(lowest(is_later_sibling))
    outputs.num_nodes_out.copy_(count)
    outputs.status.copy_(
        TopologyStatus.PARENT_OUT_OF_RANGE * out_of_range.any(dim=-1)
        + TopologyStatus.PARENT_NOT_BEFORE * not_before.any(dim=-1)
        + TopologyStatus.NUM_NODES_OUT_OF_RANGE * (count != num_nodes)
    )


def _pack(bits: torch.Tensor, words: int) -> torch.Tensor:
    """From bool [..., nodes] to int64 [..., words]; bit 63 is the sign."""
    padded = torch.nn.functional.pad(bits, (0, words * 64 - bits.shape[-1]))
    weights = torch.ones(64, dtype=torch.int64, device=bits.device) << torch.arange(64, device=bits.device)
    return torch.where(padded.unflatten(-1, (words, 64)), weights, 0).sum(dim=-1)
