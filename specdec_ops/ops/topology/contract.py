"""The contracts of build_topology, grow_tree and prune_tree: what their implementations take and write."""

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


class GrowTreeArguments(NamedTuple):
    """The most likely tokens behind the rows of one level, and where that level is in the pool. All is contiguous."""

    top_logprobs: torch.Tensor
    """float32 [batch, rows, branching]"""
    top_tokens: torch.Tensor
    """int32 like top_logprobs"""
    active: torch.Tensor | None
    """bool [batch]; None: every request is"""
    draft_to_target: torch.Tensor | None
    """int32 [draft_vocab]; None: tokens are target ids"""
    eos: list[int]
    """target ids that are not expanded, at most 8"""
    level: int
    """0 blanks what else the pool holds"""
    first_parent: int
    """the draft's node that row 0 is"""
    first_candidate: int
    """the place in the pool of row 0's first token"""
    first_node: int
    """the draft's node that column 0 of the frontier becomes"""


class GrowTreeOutputs(NamedTuple):
    """The next frontier, which is written in full, and the tensors of a CandidatePool, which are read too."""

    frontier_tokens: torch.Tensor
    """int32 [batch, width], width may be 0"""
    parent_rows: torch.Tensor
    """int32 [batch, width]"""
    frontier_scores: torch.Tensor
    """float32 [batch, width]"""
    tokens: torch.Tensor
    """int32 [batch, candidates]"""
    scores: torch.Tensor
    """float32 [batch, candidates]"""
    parents: torch.Tensor
    """int32 [batch, candidates]: a candidate, or -1"""
    expanded: torch.Tensor
    """int32 [batch, candidates]: a node of the draft, or -1"""
    candidates: torch.Tensor
    """int32 [batch, nodes]: the candidate of each node of the draft, or -1"""
    node_parents: torch.Tensor
    """int32 [batch, nodes]; this and what follows are the tensors of the draft's Topology"""
    depths: torch.Tensor
    """int32 [batch, nodes]"""
    ancestors: torch.Tensor
    """int64 [batch, nodes, words]"""
    first_child: torch.Tensor
    """int32 [batch, nodes]"""
    next_sibling: torch.Tensor
    """int32 [batch, nodes]"""
    num_nodes: torch.Tensor
    """int32 [batch]"""
    status: torch.Tensor
    """int32 [batch]: GrowStatus bits"""


grow_tree = Operator(
    "grow_tree",
    GrowTreeArguments,
    GrowTreeOutputs,
    None,
    answers=lambda arguments, outputs: arguments.top_logprobs.shape[0] == 0,
    own_outputs=True,  # those of a CandidatePool, which made them
)


class PruneTreeArguments(NamedTuple):
    """The candidates of a pool, as grow_tree leaves them, and the roots of their trees."""

    scores: torch.Tensor
    """float32 [batch, candidates]"""
    tokens: torch.Tensor
    """int32 [batch, candidates]"""
    parents: torch.Tensor
    """int32 [batch, candidates]"""
    expanded: torch.Tensor
    """int32 [batch, candidates]"""
    root_tokens: torch.Tensor
    """int32 [batch]"""
    nodes: int
    """of the trees that are made, from 1"""


class PruneTreeOutputs(NamedTuple):
    """The nodes that stay, and the tensors of their Topology, without offsets. Nodes from num_nodes on are blank."""

    tree_tokens: torch.Tensor
    """int32 [batch, nodes]"""
    pool_ids: torch.Tensor
    """int32 [batch, nodes]"""
    draft_nodes: torch.Tensor
    """int32 [batch, nodes]"""
    node_parents: torch.Tensor
    """int32 [batch, nodes]"""
    depths: torch.Tensor
    """int32 [batch, nodes]"""
    ancestors: torch.Tensor
    """int64 [batch, nodes, words]"""
    first_child: torch.Tensor
    """int32 [batch, nodes]"""
    next_sibling: torch.Tensor
    """int32 [batch, nodes]"""
    num_nodes: torch.Tensor
    """int32 [batch]"""
    status: torch.Tensor
    """int32 [batch]: TopologyStatus bits"""


def _make_pruned(arguments: PruneTreeArguments, empty) -> PruneTreeOutputs:
    batch, nodes, device = arguments.scores.shape[0], arguments.nodes, arguments.scores.device
    table, row = (batch, nodes), (batch,)
    return PruneTreeOutputs(
        tree_tokens=empty(table, torch.int32, device),
        pool_ids=empty(table, torch.int32, device),
        draft_nodes=empty(table, torch.int32, device),
        node_parents=empty(table, torch.int32, device),
        depths=empty(table, torch.int32, device),
        ancestors=empty((batch, nodes, (nodes + 63) // 64), torch.int64, device),
        first_child=empty(table, torch.int32, device),
        next_sibling=empty(table, torch.int32, device),
        num_nodes=empty(row, torch.int32, device),
        status=empty(row, torch.int32, device),
    )


prune_tree = Operator(
    "prune_tree",
    PruneTreeArguments,
    PruneTreeOutputs,
    _make_pruned,
    answers=lambda arguments, outputs: arguments.scores.shape[0] == 0,
    own_outputs=True,
)
