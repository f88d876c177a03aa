"""The contract of build_topology: what its implementations take and write."""

from typing import NamedTuple

import torch

from specdec_ops._core.library import Operator


class BuildTopologyArguments(NamedTuple):
    """Parents that live on the device. All are contiguous, as the outputs are."""

    parents: torch.Tensor
    """int32 [batch, nodes]"""
    num_nodes: torch.Tensor
    """int32 [batch]"""


class BuildTopologyOutputs(NamedTuple):
    """The tensors of a Topology, without offsets. Nodes from num_nodes_out on are blank."""

    parents_out: torch.Tensor
    """int32 [batch, nodes]: the sound ones, or -1"""
    depths: torch.Tensor
    """int32 [batch, nodes]"""
    ancestors: torch.Tensor
    """int64 [batch, nodes, words]: bit j % 64 of word j // 64 for every ancestor j and the node itself"""
    first_child: torch.Tensor
    """int32 [batch, nodes], or -1"""
    next_sibling: torch.Tensor
    """int32 [batch, nodes], or -1"""
    num_nodes_out: torch.Tensor
    """int32 [batch], clamped to the columns of parents"""
    status: torch.Tensor
    """int32 [batch]: TopologyStatus bits"""


def _make_outputs(arguments: BuildTopologyArguments, empty) -> BuildTopologyOutputs:
    batch, nodes = arguments.parents.shape
    device = arguments.parents.device
    words = max(1, (nodes + 63) // 64)
    return BuildTopologyOutputs(
        parents_out=empty((batch, nodes), torch.int32, device),
        depths=empty((batch, nodes), torch.int32, device),
        ancestors=empty((batch, nodes, words), torch.int64, device),
        first_child=empty((batch, nodes), torch.int32, device),
        next_sibling=empty((batch, nodes), torch.int32, device),
        num_nodes_out=empty((batch,), torch.int32, device),
        status=empty((batch,), torch.int32, device),
    )


def _answers(arguments: BuildTopologyArguments, outputs: BuildTopologyOutputs) -> bool:
    return arguments.parents.shape[0] == 0


build_topology = Operator(
    "build_topology", BuildTopologyArguments, BuildTopologyOutputs, _make_outputs, answers=_answers
)
