"""build_topology: inputs, the exact result, and the contestants."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness.contestant import Contestant, Expected, on_backends

from .cases import TopologyCase


@dataclass
class Parents:
    case: TopologyCase
    parents: torch.Tensor


def make_inputs(case: TopologyCase, device: str = "cpu") -> Parents:
    parents = torch.tensor(case.tree.parents, dtype=torch.int32).repeat(case.batch, 1)
    return Parents(case, parents.to(device))


def eager_ancestors(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ancestor masks and depths by pointer doubling. No packing into words and no child links: less than ours makes."""
    nodes = parents.shape[1]
    reach = torch.eye(nodes, device=parents.device).repeat(parents.shape[0], 1, 1)
    reach.scatter_(2, parents.clamp(min=0).long()[..., None], 1.0)
    reach[parents < 0] = torch.eye(nodes, device=parents.device).repeat(parents.shape[0], 1, 1)[parents < 0]
    for _ in range(max(nodes - 1, 1).bit_length()):
        reach = torch.bmm(reach, reach).clamp_(max=1.0)
    return reach > 0, reach.sum(dim=2).int() - 1


def dense(topology: specdec_ops.Topology) -> list[torch.Tensor]:
    """The part that the eager form computes too: ancestors as a mask, and depths."""
    nodes = torch.arange(topology.parents.shape[1], device=topology.parents.device)
    return [(topology.ancestors[..., nodes // 64] >> (nodes % 64)) & 1, topology.depths]


def expected(parents: Parents) -> Expected:
    exact = specdec_ops.build_topology(parents.parents, backend="torch")

    def take(result) -> list[torch.Tensor]:
        if not isinstance(result, specdec_ops.Topology):
            return [*result, *everything[2:]]
        return dense(result) + every_field(result)

    everything = dense(exact) + every_field(exact)
    return Expected(take, everything, [0.0] * len(everything))


def every_field(topology: specdec_ops.Topology) -> list[torch.Tensor]:
    names = ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes", "status")
    return [getattr(topology, name) for name in names]


def contestants(parents: Parents, options) -> list[Contestant]:
    def ours(backend: str, name: str) -> Contestant:
        return Contestant(name, "ours", lambda: specdec_ops.build_topology(parents.parents, backend=backend))

    return [*on_backends(ours, options), Contestant("eager", "pytorch", lambda: eager_ancestors(parents.parents))]
