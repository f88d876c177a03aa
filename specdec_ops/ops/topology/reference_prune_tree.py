"""The definition of prune_tree in plain PyTorch. It runs on any device and never waits for it."""

import torch

from specdec_ops.ops.topology.contract import BuildTopologyOutputs
from specdec_ops.ops.topology.reference_build_topology import build_topology

_NONE = float("-inf")


def prune_tree(arguments, outputs) -> None:
    """Write the best candidates in the order of the pool, behind the root, and the topology of them."""
    a, o = arguments, outputs
    batch, candidates = a.scores.shape
    device = a.scores.device
    order = a.scores.where(a.scores > _NONE, _NONE).sort(dim=1, descending=True, stable=True)
    most = min(a.nodes - 1, candidates)
    kept = torch.where(order.values[:, :most] > _NONE, order.indices[:, :most], candidates).sort(dim=1).values
    kept = torch.nn.functional.pad(kept, (1, a.nodes - 1 - most), value=candidates)  # and a place for the root
    exists = kept < candidates
    exists[:, 0] = True
    num_nodes = exists.sum(dim=1).int()

    def of_kept(table: torch.Tensor, root) -> torch.Tensor:
        values = torch.nn.functional.pad(table, (0, 1), value=-1).gather(1, kept)
        values[:, 0] = root
        return values

    o.tree_tokens.copy_(of_kept(a.tokens, a.root_tokens))
    o.draft_nodes.copy_(of_kept(a.expanded, 0))
    o.pool_ids.copy_(torch.where(kept < candidates, kept, -1))

    # The node that each candidate has become, or -1. A child of the root has no parent in the pool.
    node_of = torch.full((batch, candidates + 1), -1, device=device)
    node_of.scatter_(1, kept, torch.arange(a.nodes, device=device).expand(batch, -1))
    node_of[:, candidates] = -1
    above = of_kept(a.parents, -1)
    in_pool = (above >= 0) & (above < candidates)
    parents = torch.where(above == -1, 0, node_of.gather(1, torch.where(in_pool, above, candidates).long()))
    parents = torch.where(parents < 0, a.nodes, parents)  # out of range, as build_topology says of it
    parents[:, 0] = -1
    topology = (o.node_parents, o.depths, o.ancestors, o.first_child, o.next_sibling, o.num_nodes, o.status)
    build_topology((parents.int(), num_nodes), BuildTopologyOutputs(*topology))
