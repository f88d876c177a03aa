"""`CandidatePool`: what a draft has considered in a round, and the tree of what it has run, as device tensors."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core.checks import INT32_MAX, argument_error, is_int
from specdec_ops.topology import Topology

MAX_LEVELS = 64
MAX_WIDTH = 256
MAX_BRANCHING = 64


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False, init=False)
class CandidatePool:
    """What a draft has considered in one round, and the tree of what it has run. `grow_tree` writes it level by level.

    Candidates lie level by level, within a level row by row, within a row as `grow_tree` gets them. Level 0 has one
    row, the root's; every other level has `width` rows, one for each node that the level before it expands. A place
    that holds no candidate has token -1 and score -inf.

    The draft's own tree has the root as node 0 and then `width` nodes for each level but the last, in fixed places: row
    r of level l is node `query_start(l) + r`, its K and V lie in slot `context_lens[b] + node` of the draft's cache,
    and its position is `context_lens[b] + l`. So sizes never depend on what the draft says, and one CUDA graph serves
    all rounds. A place without a node is blank in `topology`: no parent, depth 0, an empty ancestor set. Its row of
    attention sees the context alone, and nobody sees it.

    Made by `CandidatePool.empty`, once for all rounds: `grow_tree(level=0)` begins a new one.

    Attributes:
        tokens: int32 `[batch, candidates]`: target ids, or -1.
        scores: float32 like tokens: sums of logprobs from the root, at most 0; -inf beside -1.
        parents: int32 like tokens: the candidate that each one follows, -1 for the root.
        expanded: int32 like tokens: the draft's node that a candidate has become, -1 where the draft has not run it.
        candidates: int32 `[batch, nodes]`: the reverse: the candidate that is each node of the draft, -1 for the root.
        topology: the draft's tree, for `tree_attention` and whatever else runs it. Its tensors are written in place.
        status: int32 `[batch]`: 0, or `GrowStatus` bits.
        levels: how many levels there are: passes of the draft, the root's included.
        width: the most nodes that a level expands.
        branching: candidates per row.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    parents: torch.Tensor
    expanded: torch.Tensor
    candidates: torch.Tensor
    topology: Topology
    status: torch.Tensor
    levels: int
    width: int
    branching: int

    def __init__(self) -> None:
        raise TypeError("specdec_ops.CandidatePool: a pool must be made by CandidatePool.empty(batch, ...)")

    @classmethod
    def empty(
        cls, batch: int, *, levels: int, width: int, branching: int, device: torch.device | str | int = "cpu"
    ) -> CandidatePool:
        """A pool without candidates, for `branching * (1 + (levels - 1) * width)` of them per request.

        Args:
            batch: requests.
            levels: passes of the draft, the root's included, 1 to 64. A tree has at most so many levels below the root.
            width: the most nodes that a level expands, 1 to 256. (EAGLE calls it top_k, as it does branching.)
            branching: candidates per row, 1 to 64.
            device: a torch device.

        Raises:
            TypeError: a size is not an int.
            ValueError: it is out of range.
        """
        op = "CandidatePool.empty"
        check_int(op, "batch", batch, 0, INT32_MAX)
        check_int(op, "levels", levels, 1, MAX_LEVELS)
        check_int(op, "width", width, 1, MAX_WIDTH)
        check_int(op, "branching", branching, 1, MAX_BRANCHING)
        size, nodes = branching * (1 + (levels - 1) * width), 1 + (levels - 1) * width

        def filled(value, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full((batch, *shape), value, dtype=dtype, device=device)

        ancestors = filled(0, nodes, (nodes + 63) // 64, dtype=torch.int64)
        ancestors[:, 0, 0] = 1
        topology = Topology(
            parents=filled(-1, nodes),
            depths=filled(0, nodes),
            ancestors=ancestors,
            first_child=filled(-1, nodes),
            next_sibling=filled(-1, nodes),
            num_nodes=filled(1),
            status=filled(0),
        )
        pool = object.__new__(cls)
        pool._set(
            tokens=filled(-1, size),
            scores=filled(float("-inf"), size, dtype=torch.float32),
            parents=filled(-1, size),
            expanded=filled(-1, size),
            candidates=filled(-1, nodes),
            topology=topology,
            status=filled(0),
            levels=levels,
            width=width,
            branching=branching,
        )
        return pool

    @property
    def batch(self) -> int:
        """Requests."""
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        """Candidates per request that there is room for."""
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tokens.device

    def query_start(self, level: int) -> int:
        """The draft's node that row 0 of a level is: 0, then `1 + (level - 1) * width`."""
        return 0 if level == 0 else 1 + (level - 1) * self.width

    def to(self, device: torch.device | str | int) -> CandidatePool:
        """The same on another device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor | Topology)}
        other = object.__new__(CandidatePool)
        other._set(**{**values, **tensors})
        return other

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        sizes = f"{self.levels} levels, width {self.width}, branching {self.branching}"
        return f"<CandidatePool of {self.batch} requests, {sizes}, on {self.device}>"


def check_int(op: str, name: str, value, low: int, high: int) -> None:
    """Check an int of a range."""
    must = f"an int from {low} to {high}"
    if not is_int(value):
        raise TypeError(argument_error(op, name, must, value))
    if not low <= value <= high:
        raise ValueError(argument_error(op, name, must, value))
