"""`Topology`: the trees of a batch as device tensors, and `build_topology`, which derives them on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from ._core import alloc
from ._core.checks import INT32_MAX, argument_error, as_int32, check_field, device_error, is_int, strides_error
from ._tree_masks import parents_of_mask
from .ops.topology import contract
from .tree import MAX_NODES, Tree


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Topology:
    """The draft trees of a batch, as every op takes them. Made by `Tree.to`, `from_trees` and `build_topology`.

    A leading dimension of 1 serves any batch. **Nodes from `num_nodes[b]` on do not exist**: whoever reads the other
    tensors must ignore their rows, and must treat a child or sibling at or beyond `num_nodes[b]` as none. That is what
    makes slicing free: `topology[:n]` shares every tensor and has a smaller `num_nodes`.

    By convention node 0 of a tree with one root is the last committed token. Node i of request b keeps its K and V in
    slot `context_lens[b] + i`, and its position is `context_lens[b] + depths[b, i]`.

    A plain class of tensors: torch.compile traces through it, and nothing in it waits for the device. Dtypes, shapes,
    strides and devices are checked when one is made, also by `dataclasses.replace`; ops rely on it.

    Attributes:
        parents: int32 `[batch or 1, nodes]`: an earlier node, or -1 for a root.
        depths: int32 `[batch or 1, nodes]`: edges to the root.
        ancestors: int64 `[batch or 1, nodes, words]`: bit j % 64 of word j // 64 tells whether node j is an ancestor,
            or the node.
        first_child: int32 `[batch or 1, nodes]`: the lowest child, or -1.
        next_sibling: int32 `[batch or 1, nodes]`: the next higher node with the same parent, or -1. Roots are siblings.
        num_nodes: int32 `[batch or 1]`: how many leading nodes exist; also of each request where one tree serves all.
        status: int32 `[batch or 1]`: 0 for a sound tree, else `TopologyStatus` bits.
        offsets: int32 `[batch + 1]`, or None: the first row of every request in packed queries [tokens, heads, dim].
            Rows before the first request and behind the last one are padding.
    """

    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    first_child: torch.Tensor
    next_sibling: torch.Tensor
    num_nodes: torch.Tensor
    status: torch.Tensor
    offsets: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_field("Topology", "parents", self.parents, torch.int32, ("batch", "nodes"))
        batch, nodes = self.parents.shape
        words = max(1, (nodes + 63) // 64)
        for name in ("depths", "first_child", "next_sibling"):
            check_field("Topology", name, getattr(self, name), torch.int32, (batch, nodes), self.parents)
        check_field("Topology", "ancestors", self.ancestors, torch.int64, (batch, nodes, words), self.parents)
        for name in ("num_nodes", "status"):  # one tree may be cut to a size for each request
            sizes = ("batch",) if batch == 1 else (batch,)
            check_field("Topology", name, getattr(self, name), torch.int32, sizes, self.parents)
        if self.offsets is not None:
            check_field("Topology", "offsets", self.offsets, torch.int32, ("batch + 1",), self.parents)
            if self.offsets.shape[0] < 1 or (batch != 1 and self.offsets.shape[0] != batch + 1):
                raise ValueError(argument_error("Topology", "offsets", f"int32 [{batch + 1}]", self.offsets))

    @classmethod
    def from_trees(
        cls, trees: Iterable[Tree], device: torch.device | str | int = "cpu", *, packed: bool = False
    ) -> Topology:
        """A ragged batch of host trees, padded to the largest.

        Args:
            trees: one per request, at least one.
            device: a torch device.
            packed: also make `offsets`, for queries that hold the nodes of all requests without padding.
        """
        trees = list(trees) if isinstance(trees, Iterable) and not isinstance(trees, Tree) else trees
        if not isinstance(trees, list) or not trees or not all(isinstance(tree, Tree) for tree in trees):
            raise TypeError(
                argument_error("Topology.from_trees", "trees", "a sequence of at least one specdec_ops.Tree", trees)
            )
        sizes = np.array([len(tree) for tree in trees], np.int32)
        batch, nodes = len(trees), int(sizes.max())
        tables = {name: np.full((batch, nodes), -1, np.int32) for name in ("parents", "first_child", "next_sibling")}
        tables["depths"] = np.zeros((batch, nodes), np.int32)
        ancestors = np.zeros((batch, nodes, max(1, -(-nodes // 64))), np.uint64)
        for row, tree in enumerate(trees):
            for name, table in tables.items():
                table[row, : len(tree)] = getattr(tree, name)
            ancestors[row, : len(tree), : tree.num_words] = tree.ancestors
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return cls(
            **{name: torch.from_numpy(table).to(device) for name, table in tables.items()},
            ancestors=torch.from_numpy(ancestors.view(np.int64)).to(device),
            num_nodes=torch.from_numpy(sizes).to(device),
            status=torch.zeros(batch, dtype=torch.int32, device=device),
            offsets=torch.from_numpy(offsets).to(device) if packed else None,
        )

    @classmethod
    def from_mask(
        cls,
        mask: torch.Tensor,
        num_nodes: torch.Tensor | None = None,
        context_lens: torch.Tensor | None = None,
        *,
        packed: bool = False,
    ) -> Topology:
        """The trees of an attention mask that another library keeps. Reads the mask once and waits for the device.

        Forms of `mask`, whose rows are nodes and tell what a node sees:

        - bool `[batch, nodes, nodes]`, or `[nodes, nodes]` for one tree;
        - int32 or int64 `[batch, nodes, words]` or `[nodes, words]`: bit j of a row, lowest first, is node j.
          TensorRT-LLM's packed mask is this with int32;
        - flat bool `[sum(num_nodes * (context_lens + num_nodes))]`: FlashInfer's custom_mask, request after request,
          the columns of the context first;
        - flat uint8: FlashInfer's packed_custom_mask, the same as bits, lowest first; each request starts a byte.

        Entries of rows and columns from `num_nodes` on are ignored, and so are bits behind the last node.

        Args:
            mask: on any device.
            num_nodes: int32 or int64 [batch], on the same device; None: all nodes. A flat mask needs it.
            context_lens: int32 or int64 [batch], with a flat mask: the context columns of each request.
            packed: also make `offsets`, for queries that hold the nodes of all requests without padding.

        Returns:
            A Topology of [batch, nodes] on the mask's device. `Tree.mask` is the way back.

        Raises:
            TypeError: an argument has another dtype.
            ValueError: a shape or a count does not fit, or the mask is none of a forest whose parents come before
                their children: the first such node is named.
        """
        parents, counts = parents_of_mask(mask, num_nodes, context_lens)
        topology = build_topology(parents, counts)
        if not packed:
            return topology
        offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return dataclasses.replace(topology, offsets=offsets)

    @property
    def batch(self) -> int:
        """Trees held here; 1 serves any batch."""
        return self.parents.shape[0]

    @property
    def nodes(self) -> int:
        """Nodes there is room for: the columns of the tensors, at least every `num_nodes[b]`."""
        return self.parents.shape[1]

    @property
    def words(self) -> int:
        """64-bit words per ancestor set."""
        return self.ancestors.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.parents.device

    def position_ids(self, context_lens: torch.Tensor | int) -> torch.Tensor:
        """The position of every node, int32 [batch, nodes]: `context_lens + depths`, and -1 where no node is.

        A table of positions, such as `torch.nn.Embedding`, refuses -1: ask it for `position_ids(...).clamp(min=0)`.
        What it gives for nodes that do not exist is not looked at.

        Args:
            context_lens: int32 or int64 [batch], on this device; or one int for all requests.

        Raises:
            TypeError, ValueError: context_lens is an int and too large, or neither.
        """
        if isinstance(context_lens, torch.Tensor):
            first = as_int32("Topology.position_ids", "context_lens", "[batch] or an int", context_lens).unsqueeze(-1)
            first = first.clamp(max=INT32_MAX - self.nodes)  # and then a depth
        else:
            first = _int_up_to("Topology.position_ids", "context_lens", context_lens, INT32_MAX - self.nodes)
        return torch.where(self._exists(), self.depths + first, -1)

    def __getitem__(self, part: slice) -> Topology:
        """`topology[:n]`: at most the first n nodes of every request.

        Shares every tensor but `num_nodes` (and packed `offsets`, which follow it); `nodes` stays the room there is.
        n is an int, or an integer tensor [batch] or [1] on this device.
        """
        if not isinstance(part, slice) or not (isinstance(part.stop, torch.Tensor | None) or is_int(part.stop)):
            raise TypeError(argument_error("Topology", "the index", "a slice [:n] with an int or a tensor", part))
        if part.start not in (None, 0) or part.step not in (None, 1) or (is_int(part.stop) and part.stop < 0):
            raise ValueError(f"specdec_ops.Topology: a slice must be [:n] with n of 0 or more, got {part}")
        if part.stop is None:
            return self
        most = part.stop if isinstance(part.stop, torch.Tensor) else min(part.stop, INT32_MAX)
        return self._with_num_nodes(self.num_nodes.clamp(max=most).clamp(min=0).to(torch.int32))

    def truncate(self, depth: int | torch.Tensor) -> Topology:
        """The leading nodes before the first one deeper than `depth`: in level order, all nodes of depth <= `depth`.

        Shares tensors as slicing does. `depth` is an int, or an integer tensor [batch] or [1] on this device, as a
        decision to stop drafting gives it.
        """
        if isinstance(depth, torch.Tensor):
            limit = as_int32("Topology.truncate", "depth", "[batch] or an int", depth).unsqueeze(-1)
        elif is_int(depth):
            limit = max(-1, min(depth, INT32_MAX))
        else:
            raise TypeError(argument_error("Topology.truncate", "depth", "an int, or int32 or int64 [batch]", depth))
        kept = (self._exists() & (self.depths <= limit)).to(torch.int32)
        return self._with_num_nodes(kept.cumprod(dim=-1).sum(dim=-1).to(torch.int32))

    def to(self, device: torch.device | str | int) -> Topology:
        """The same on another device."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Topology(*(None if tensor is None else tensor.to(device) for tensor in fields))

    def __repr__(self) -> str:
        packed = ", packed" if self.offsets is not None else ""
        return f"<Topology of {self.batch} trees of up to {self.nodes} nodes on {self.device}{packed}>"

    def _exists(self) -> torch.Tensor:
        return torch.arange(self.nodes, dtype=torch.int32, device=self.device) < self.num_nodes.unsqueeze(-1)

    def _with_num_nodes(self, num_nodes: torch.Tensor) -> Topology:
        tensors = (self.parents, self.depths, self.ancestors, self.first_child, self.next_sibling)
        batch = num_nodes.shape[0]
        status = self.status
        if batch != self.batch:  # one tree for all, cut differently for each request
            tensors = (tensor.expand(batch, *tensor.shape[1:]).contiguous() for tensor in tensors)
            status = status.expand(batch).contiguous()
        offsets = self.offsets
        if offsets is not None:
            rows = num_nodes.expand(offsets.shape[0] - 1).cumsum(0, dtype=torch.int32)
            offsets = torch.nn.functional.pad(rows, (1, 0))
        return Topology(*tensors, num_nodes, status, offsets)


def _int_up_to(op: str, name: str, value, high: int) -> int:
    if not is_int(value):
        raise TypeError(argument_error(op, name, "an int, or int32 or int64 [batch]", value))
    if not 0 <= value <= high:
        raise ValueError(argument_error(op, name, f"from 0 to {high}", value))
    return value


def build_topology(
    parents: torch.Tensor, num_nodes: torch.Tensor | None = None, *, out: Topology | None = None, backend: str = "auto"
) -> Topology:
    """Derive depths, ancestor sets and links from parents that live on the device. For trees that change every step.

    Malformed parents do no harm: a node with a bad parent becomes a root, a bad `num_nodes` is clamped, and the
    request's `status` says so. Other requests are untouched. Nothing waits for the device.

    Args:
        parents: int32 or int64 [batch, nodes]: for every node an earlier node of the same request, or -1 for a root.
            Entries from `num_nodes` on are ignored.
        num_nodes: int32 or int64 [batch], on the same device; None: every request uses all nodes.
        out: a Topology of the same sizes to write into, not itself made of `parents`; its `offsets` are left alone.
        backend: "auto", "cuda", "triton", "cpu" or "torch".

    Returns:
        A Topology of [batch, nodes] (`out` where given). Nodes from `num_nodes` on have parent, child and sibling -1,
        depth 0 and an empty ancestor set.

    Raises:
        TypeError: parents or num_nodes are not integer tensors, or out is not a Topology.
        ValueError: a shape or device does not fit, or the backend's name is unknown.
        RuntimeError: the named backend is not available.
    """
    if not isinstance(parents, torch.Tensor) or parents.dtype != torch.int32:
        if isinstance(parents, Tree):
            must = "int32 or int64 [batch, nodes]"
            raise TypeError(
                f"{argument_error('build_topology', 'parents', must, parents)}; tree.to(device) makes its Topology"
            )
        parents = as_int32("build_topology", "parents", "[batch, nodes]", parents)
    if parents.dim() != 2:
        raise ValueError(argument_error("build_topology", "parents", "int32 or int64 [batch, nodes]", parents))
    batch, nodes = parents.shape
    if batch > INT32_MAX or nodes > MAX_NODES:
        raise ValueError(
            argument_error("build_topology", "parents", f"of at most 2**31 - 1 trees of {MAX_NODES} nodes", parents)
        )
    if num_nodes is None:
        num_nodes = alloc.empty((batch,), torch.int32, parents.device).fill_(nodes)
    else:
        num_nodes = _check_num_nodes(num_nodes, batch, parents.device)
    written = None if out is None else _written(out, parents)
    arguments = contract.BuildTopologyArguments(parents.contiguous(), num_nodes.contiguous())
    built = contract.build_topology(arguments, backend, written)
    return Topology(*built) if out is None else out


def _check_num_nodes(num_nodes, batch: int, device) -> torch.Tensor:
    if not isinstance(num_nodes, torch.Tensor) or num_nodes.dtype != torch.int32:
        num_nodes = as_int32("build_topology", "num_nodes", f"[{batch}]", num_nodes)
    if num_nodes.dim() == 0:
        num_nodes = num_nodes.expand(batch)
    if num_nodes.shape != (batch,):
        raise ValueError(argument_error("build_topology", "num_nodes", f"int32 or int64 [{batch}]", num_nodes))
    if num_nodes.device != device:
        raise ValueError(device_error("build_topology", "num_nodes", device, num_nodes))
    return num_nodes


def _written(out: Topology, parents: torch.Tensor) -> contract.BuildTopologyOutputs:
    """The tensors of `out` that build_topology writes."""
    if not isinstance(out, Topology):
        raise TypeError(argument_error("build_topology", "out", "a Topology", out))
    batch, nodes = parents.shape
    table, row = (batch, nodes), (batch,)
    sets = (batch, nodes, max(1, (nodes + 63) // 64))
    names = ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes", "status")
    tensors = contract.BuildTopologyOutputs(*(getattr(out, name) for name in names))
    for name, tensor, shape in zip(names, tensors, (table, table, sets, table, table, row, row), strict=True):
        dtype = torch.int64 if name == "ancestors" else torch.int32
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            must = f"contiguous {str(dtype).removeprefix('torch.')} {list(shape)}"
            raise ValueError(strides_error("build_topology", f"out.{name}", must, tensor))
        if tensor.device != parents.device:
            raise ValueError(device_error("build_topology", f"out.{name}", parents.device, tensor))
    return tensors
