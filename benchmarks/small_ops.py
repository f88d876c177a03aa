"""merge_states and build_topology: inputs, exact results, contestants."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import specdec_ops

from .attention.tree_attention import DTYPES, fill_random
from .harness import rounding
from .harness.cases import Case
from .harness.contestant import Contestant, Expected, allowed_error, largest_error

# --- merge_states


@dataclass
class States:
    """Two partial results: out [batch, nodes, heads, dim] and lse float32 [batch, nodes, heads] of each."""

    case: Case
    out_a: torch.Tensor
    lse_a: torch.Tensor
    out_b: torch.Tensor
    lse_b: torch.Tensor

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.out_a, self.lse_a, self.out_b, self.lse_b


def make_states(case: Case, device: str = "cpu") -> States:
    shape = (case.batch, case.nodes, case.model.heads, case.model.dim)
    outs = [fill_random(shape, DTYPES[case.dtype], seed).to(device) for seed in (1, 2)]
    lses = [fill_random(shape[:-1], torch.float32, seed).to(device) for seed in (3, 4)]
    return States(case, outs[0], lses[0], outs[1], lses[1])


def eager_merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    weight = torch.exp(lse_a - lse)[..., None].to(out_a.dtype)
    return torch.lerp(out_b, out_a, weight), lse


def expected_states(states: States) -> Expected:
    exact = list(
        specdec_ops.merge_states(
            states.out_a.double(), states.lse_a, states.out_b.double(), states.lse_b, backend="torch"
        )
    )
    errors = [largest_error(*both) for both in zip(eager_merge(*states.all), exact, strict=True)]
    bounds = rounding.merged_states(*states.all, states.out_a.dtype)
    return Expected(list, exact, [allowed_error(*each) for each in zip(exact, errors, bounds, strict=True)])


def merge_contestants(states: States, options) -> list[Contestant]:
    def ours(backend: str, name: str) -> Contestant:
        def call():
            return specdec_ops.merge_states(*states.all, backend=backend)

        return Contestant(name, "ours", call, lambda state: [state.out, state.lse], states.all)

    listed = [ours("auto", "specdec_ops")] + [ours(backend, f"specdec_ops {backend}") for backend in options.backends]
    eager = Contestant("eager", "pytorch", lambda: eager_merge(*states.all), list, states.all)
    return [*listed, eager]


# --- build_topology


@dataclass
class Parents:
    case: Case
    parents: torch.Tensor


def make_parents(case: Case, device: str = "cpu") -> Parents:
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


def expected_topology(parents: Parents) -> Expected:
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


def topology_contestants(parents: Parents, options) -> list[Contestant]:
    def ours(backend: str, name: str) -> Contestant:
        return Contestant(name, "ours", lambda: specdec_ops.build_topology(parents.parents, backend=backend))

    listed = [ours("auto", "specdec_ops")] + [ours(backend, f"specdec_ops {backend}") for backend in options.backends]
    return [*listed, Contestant("eager", "pytorch", lambda: eager_ancestors(parents.parents))]
