"""`Tree`: the shape of one request's draft, on the host.

A tree is a list of parents in which every parent comes before its children. That order is what makes slicing free:
any leading part of it is closed under ancestors, so it is a tree again, and everything derived from it is a leading
part too. Only NumPy is needed here; `Tree.to` makes the device tensors that the ops read.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .topology import Topology

_Scalar = TypeVar("_Scalar", bound=np.generic)

MAX_NODES = 2**20
"""Of a tree, whose ancestor sets would take 128 GiB."""
MAX_DRAWN_LINES = 48
MAX_DRAWN_COLUMNS = 110
_MAX_BATCH = 2**20


class Tree:
    """The parents of the nodes of a draft tree, and what follows from them. Immutable; equal by parents; hashable.

    Several roots are allowed (a forest). By convention node 0 of a tree with one root is the last committed token, so
    that the target's logits at node 0 score the first drafted level. The constructors named after published trees
    count as their papers do, without that node; `root=True` puts it in front.

    Args:
        parents: for every node its parent, an earlier node, or -1 for a root. Integers, one-dimensional.

    Raises:
        TypeError: parents are not integers.
        ValueError: parents are not one-dimensional, or a node's parent is neither -1 nor an earlier node.

    Attributes:
        parents: int32 `[nodes]`, read-only.
    """

    def __init__(self, parents: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        self.__dict__["parents"] = _check_parents(parents)

    parents: NDArray[np.int32]

    # ---- constructors

    @classmethod
    def from_parents(cls, parents: Sequence[int] | NDArray[np.integer[Any]]) -> Tree:
        """The same as `Tree(parents)`."""
        return cls(parents)

    @classmethod
    def from_branching(cls, branching: Sequence[int], *, root: bool = False) -> Tree:
        """Every node of level i has `branching[i + 1]` children; `branching[0]` nodes have no drafted parent.

        This is the k-configuration of multi-candidate speculative decoding (MCSD, Yang et al. 2024): (4, 2, 2, 1) has
        levels of 4, 8, 16 and 16 nodes, 44 in all. Nodes are in level order.

        Args:
            branching: children per node, level by level; each at least 1.
            root: put the last committed token in front as node 0, the parent of the first level (45 nodes above).
        """
        if not isinstance(branching, Iterable):
            raise TypeError(f"specdec_ops.Tree.from_branching: branching must be a sequence of ints, got {branching!r}")
        branching = [_positive("from_branching", "branching", width) for width in branching]
        _positive("from_branching", "nodes", sum(itertools.accumulate(branching, int.__mul__)), 0, MAX_NODES)
        levels = []
        size, start, previous = 1, 0, np.full(1, -1, np.int64)
        for width in branching:
            levels.append(np.repeat(previous, width))
            size *= width
            previous = np.arange(start, start + size)
            start += size
        return cls._with_root(np.concatenate(levels) if levels else previous[:0], root)

    @classmethod
    def from_paths(cls, choices: Iterable[Sequence[int]], *, root: bool = False) -> Tree:
        """One node per path of child ranks, as Medusa lists its trees: [(0,), (1,), (0, 0), ...].

        The path (2, 0) is the best continuation of the third-best first token. Whatever the order of the list, nodes
        come out in level order, and within a level by rank: `sorted(choices, key=lambda c: (len(c), tuple(c)))`. Ranks
        order siblings and may skip numbers.

        Args:
            choices: paths; each must be listed once, and its own prefix must be listed too. The empty path is the
                root: leave it out and use `root`.
            root: put the last committed token in front as node 0.

        Raises:
            ValueError: a path is empty, negative or repeated, or its prefix is missing.
        """
        choices = list(choices) if isinstance(choices, Iterable) else [choices]
        if not all(isinstance(choice, Iterable) for choice in choices):
            raise TypeError(f"specdec_ops.Tree.from_paths: choices must be sequences of ranks, got {choices!r}")
        paths = (tuple(int(rank) for rank in choice) for choice in choices)
        ordered = sorted(paths, key=lambda path: (len(path), path))
        index: dict[tuple[int, ...], int] = {(): -1}
        parents = []
        for node, path in enumerate(ordered):
            if not path or min(path) < 0:
                raise ValueError(f"specdec_ops.Tree.from_paths: a path must be ranks of 0 or more, got {path}")
            if path in index:
                raise ValueError(f"specdec_ops.Tree.from_paths: the path {path} must be listed once, got it twice")
            if path[:-1] not in index:
                raise ValueError(f"specdec_ops.Tree.from_paths: the prefix {path[:-1]} of {path} must be listed too")
            parents.append(index[path[:-1]])
            index[path] = node
        return cls._with_root(np.array(parents, np.int64), root)

    @classmethod
    def from_sequences(
        cls, sequences: Iterable[Sequence[int]], *, root_token: int | None = None
    ) -> tuple[Tree, NDArray[np.int32]]:
        """Candidate continuations merged into one tree, with shared beginnings once (a trie), and its tokens.

        Nodes come out in level order; within a level in the order of the sequences, so that children of a node are
        ranked as the sequences are. A sequence that starts another one, or is listed twice, adds nothing.

        Args:
            sequences: token ids, each from 0 to 2**31 - 1; of any lengths, also none.
            root_token: the last committed token, put in front as node 0. None: the first tokens are roots.

        Returns:
            The tree, and int32 [nodes]: the token of each node.

        Raises:
            TypeError: a sequence holds something else than ints.
            ValueError: a token is negative or too large, or the tree has more than 2**20 nodes.
        """
        checked = [_tokens(sequence) for sequence in _iterable(sequences)]
        parents: list[int] = [] if root_token is None else [-1]
        tokens: list[int] = [] if root_token is None else _tokens([root_token], "root_token")
        at = [-1 if root_token is None else 0] * len(checked)  # the node that each sequence has come to
        for level in range(max(map(len, checked), default=0)):
            children: dict[tuple[int, int], int] = {}
            for index, sequence in enumerate(checked):
                if level >= len(sequence):
                    continue
                edge = (at[index], sequence[level])
                if edge not in children:
                    children[edge] = len(tokens)
                    parents.append(edge[0])
                    tokens.append(edge[1])
                at[index] = children[edge]
            _positive("from_sequences", "nodes", len(tokens), 0, MAX_NODES)
        return cls._trusted(np.array(parents, np.int64)), np.array(tokens, np.int32)

    @classmethod
    def chain(cls, nodes: int) -> Tree:
        """A single path of `nodes` nodes: node n follows node n - 1."""
        return cls._trusted(np.arange(-1, _positive("chain", "nodes", nodes, 0, MAX_NODES) - 1))

    @classmethod
    def fork(cls, width: int, depth: int, *, root: bool = False) -> Tree:
        """`width` roots, each continued by a chain of `depth` further nodes: `width * (depth + 1)` nodes.

        The dynamic form of improved multi-candidate speculative decoding (Lu et al. 2024): the target samples `width`
        first tokens, and drafting may stop after any level. Node n is on level n // width and branch n % width; its
        parent is n - width. `truncate(d)` of it is `fork(width, d)`.

        Args:
            width: branches, at least 1.
            depth: drafted levels below the first, at least 0; the tree's `depth`.
            root: put the last committed token in front as node 0, which makes the tree one deeper.
        """
        width = _positive("fork", "width", width)
        nodes = _positive("fork", "nodes", width * (_positive("fork", "depth", depth, least=0) + 1), 1, MAX_NODES)
        return cls._with_root(np.maximum(np.arange(nodes) - width, -1), root)

    @classmethod
    def _with_root(cls, parents: NDArray[np.integer[Any]], root: bool) -> Tree:
        return cls._trusted(np.concatenate([[-1], parents + 1]) if root else parents)

    @classmethod
    def _trusted(cls, parents: NDArray[np.integer[Any]], **derived: NDArray[Any]) -> Tree:
        """A tree from parents known to be sound, with derived arrays that are known already."""
        tree = cls.__new__(cls)
        tree.__dict__["parents"] = _frozen(parents.astype(np.int32, copy=False))
        tree.__dict__.update({name: _frozen(array) for name, array in derived.items()})
        return tree

    # ---- size

    def __len__(self) -> int:
        return self.parents.size

    @property
    def num_words(self) -> int:
        """64-bit words per ancestor set: `max(1, ceil(nodes / 64))`."""
        return max(1, -(-len(self) // 64))

    @functools.cached_property
    def depth(self) -> int:
        """The largest depth; roots have depth 0. An empty tree has depth -1."""
        return int(self.depths.max(initial=-1))

    # ---- derived arrays; all read-only

    @functools.cached_property
    def depths(self) -> NDArray[np.int32]:
        """int32 [nodes]: edges between a node and its root."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return _frozen(np.array(depths, np.int32))

    @functools.cached_property
    def ancestors(self) -> NDArray[np.uint64]:
        """uint64 [nodes, words]: bit j % 64 of word j // 64 says whether node j is an ancestor of the node, or it."""
        ancestors = np.zeros((len(self), self.num_words), np.uint64)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                ancestors[node] = ancestors[parent]
            ancestors[node, node // 64] |= np.uint64(1 << (node % 64))
        return _frozen(ancestors)

    @functools.cached_property
    def _links(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        first_child, next_sibling = [-1] * len(self), [-1] * len(self)
        first_root = -1
        parents = self.parents.tolist()
        for node in range(len(self) - 1, -1, -1):  # backwards, so that every list of siblings grows at its front
            parent = parents[node]
            if parent >= 0:
                next_sibling[node], first_child[parent] = first_child[parent], node
            else:
                next_sibling[node], first_root = first_root, node
        return _frozen(np.array(first_child, np.int32)), _frozen(np.array(next_sibling, np.int32))

    @property
    def first_child(self) -> NDArray[np.int32]:
        """int32 [nodes]: the lowest child, or -1."""
        return self._links[0]

    @property
    def next_sibling(self) -> NDArray[np.int32]:
        """int32 [nodes]: the next higher node with the same parent, or -1. Roots are siblings of each other."""
        return self._links[1]

    @functools.cached_property
    def roots(self) -> NDArray[np.int32]:
        """int32: the nodes without a parent."""
        return _frozen(np.flatnonzero(self.parents < 0).astype(np.int32))

    @functools.cached_property
    def leaves(self) -> NDArray[np.int32]:
        """int32: the nodes without children."""
        return _frozen(np.flatnonzero(self.first_child < 0).astype(np.int32))

    @functools.cached_property
    def is_level_ordered(self) -> bool:
        """Whether no node comes before a shallower one. `levels` and `truncate` need that."""
        return bool((np.diff(self.depths) >= 0).all())

    @functools.cached_property
    def levels(self) -> NDArray[np.int32]:
        """int32 [depth + 2]: the nodes of depth d are `levels[d]` to `levels[d + 1] - 1`.

        Raises:
            ValueError: the tree is not level-ordered.
        """
        self._need_level_order("levels")
        return _frozen(np.searchsorted(self.depths, np.arange(self.depth + 2)).astype(np.int32))

    # ---- views for people, tests and models

    @overload
    def paths(self, *, padded: Literal[False] = False) -> list[tuple[int, ...]]: ...

    @overload
    def paths(self, *, padded: Literal[True]) -> NDArray[np.int32]: ...

    def paths(self, *, padded: bool = False) -> list[tuple[int, ...]] | NDArray[np.int32]:
        """The nodes from a root to each leaf, in the order of `leaves`.

        Args:
            padded: return int32 [leaves, depth + 1] filled up with -1 instead of a list.
        """
        if not padded:
            return [self.path(leaf) for leaf in self.leaves.tolist()]
        table = np.full((self.leaves.size, self.depth + 1), -1, np.int32)
        for row, leaf in zip(table, self.leaves.tolist(), strict=True):
            path = self.path(leaf)
            row[: len(path)] = path
        return table

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to `node`, both included."""
        if not 0 <= node < len(self):
            raise IndexError(f"specdec_ops.Tree.path: node must be in 0..{len(self) - 1}, got {node}")
        path = []
        while node >= 0:
            path.append(int(node))
            node = self.parents[node]
        return tuple(reversed(path))

    def mask(self) -> NDArray[np.bool_]:
        """Which node (column) a node (row) sees, bool [nodes, nodes]. For tests and people; no kernel reads it."""
        nodes = np.arange(len(self))
        return (self.ancestors[:, nodes // 64] >> (nodes % 64).astype(np.uint64) & np.uint64(1)).astype(bool)

    def position_ids(self, context_len: int) -> NDArray[np.int32]:
        """int32 [nodes]: the position of each node after `context_len` committed tokens, `context_len + depths`."""
        context_len = _positive("position_ids", "context_len", context_len, 0, 2**31 - 1 - len(self))
        return (self.depths + np.int32(context_len)).astype(np.int32)

    # ---- leading parts

    def __getitem__(self, part: slice) -> Tree:
        """`tree[:n]`: the first n nodes. The arrays are views; what was derived already is not derived again."""
        if not isinstance(part, slice):
            raise TypeError(f"specdec_ops.Tree: the index must be a slice like [:n], got {type(part).__name__}")
        start, stop, step = part.indices(len(self))
        if start != 0 or step != 1:
            raise ValueError(f"specdec_ops.Tree: a slice must start at node 0 with step 1, got {part}")
        if stop == len(self):
            return self
        known = self.__dict__
        derived = {}
        if "depths" in known:
            derived["depths"] = self.depths[:stop]
        if "ancestors" in known:
            derived["ancestors"] = self.ancestors[:stop, : max(1, -(-stop // 64))]
        tree = Tree._trusted(self.parents[:stop], **derived)
        if "_links" in known:
            tree.__dict__["_links"] = tuple(_frozen(np.where(x[:stop] < stop, x[:stop], -1)) for x in self._links)
        return tree

    def truncate(self, depth: int) -> Tree:
        """The nodes of depth at most `depth`, as a leading part.

        Raises:
            ValueError: the tree is not level-ordered, so that those nodes are not a leading part.
        """
        self._need_level_order("truncate")
        depth = min(_positive("truncate", "depth", depth, least=-1), MAX_NODES)
        return self[: int(np.searchsorted(self.depths, depth, side="right"))]

    def _need_level_order(self, what: str) -> None:
        if not self.is_level_ordered:
            node = int(np.flatnonzero(np.diff(self.depths) < 0)[0]) + 1
            raise ValueError(
                f"specdec_ops.Tree.{what}: the tree must be level-ordered, but node {node} (depth {self.depths[node]}) "
                f"comes after node {node - 1} (depth {self.depths[node - 1]})"
            )

    # ---- to the device

    def to(self, device: Any = "cpu", batch: int = 1) -> Topology:
        """The device tensors of this tree, which every op takes.

        Args:
            device: a torch device.
            batch: requests; 1 serves any batch, since ops broadcast it.
        """
        from .topology import Topology  # torch is imported only when device tensors are asked for

        return Topology.from_trees([self] * _positive("to", "batch", batch, 1, _MAX_BATCH), device)

    # ---- identity

    def __eq__(self, other: object) -> bool:
        return np.array_equal(self.parents, other.parents) if isinstance(other, Tree) else NotImplemented

    @functools.cached_property
    def _hash(self) -> int:
        return hash((Tree, self.parents.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"specdec_ops.Tree is immutable: {name} can't be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"specdec_ops.Tree is immutable: {name} can't be deleted")

    def __reduce__(self) -> tuple:
        return Tree, (self.parents.copy(),)

    def __repr__(self) -> str:
        if len(self) <= 16:
            return f"Tree({self.parents.tolist()})"
        return f"<Tree of {len(self)} nodes, depth {self.depth}, {len(self.leaves)} leaves>"

    def __str__(self) -> str:
        return draw(self)


def draw(tree: Tree, *, max_lines: int = MAX_DRAWN_LINES, max_columns: int = MAX_DRAWN_COLUMNS) -> str:
    """The tree as text, one line per leaf, cut with an ellipsis beyond the given lines and columns.

    >>> print(Tree([-1, 0, 0, 1, 1, 2]))
    0 ┬ 1 ┬ 3
      │   └ 4
      └ 2 ─ 5
    """
    if not len(tree):
        return "(empty tree)"
    label = len(str(len(tree) - 1))
    first = 0 if len(tree.roots) > 1 else 1  # a forest hangs from a bar of its own
    cells = max(1, (max_columns - 2) // (label + 3))
    lines: list[str] = []
    previous: list[int] = []
    for path in _depth_first(tree, cells):
        if len(lines) == max_lines:
            lines.append(f"… ({len(tree)} nodes, {len(tree.leaves)} leaves)")
            break
        shared = 0
        while shared < len(previous) and previous[shared] == path[shared]:
            shared += 1
        line = []
        for level, node in enumerate(path):
            name = str(node)
            fill = " " * (label - len(name))
            if level >= first:
                new = level >= shared
                joint = _joint(new, bool(previous) and level == shared, tree.next_sibling[node] >= 0)
                fill = fill.replace(" ", "─") if new else fill
                line.append(f" {joint}{fill} {name if new else ' ' * len(name)}")
            else:
                line.append(fill + (name if level >= shared else " " * len(name)))
        lines.append("".join(line)[1 if first == 0 else 0 :] + (" …" if tree.first_child[path[-1]] >= 0 else ""))
        previous = path
    return "\n".join(lines)


def _joint(new: bool, branch: bool, more: bool) -> str:
    """What stands before a node: `new` on this line, below a node of another line (`branch`), siblings to come."""
    if not new:
        return "│" if more else " "
    if branch:
        return "├" if more else "└"
    return "┬" if more else "─"


def _depth_first(tree: Tree, max_levels: int) -> Iterator[list[int]]:
    """Root-to-leaf paths in depth-first order, no longer than `max_levels`."""
    first_child, next_sibling = tree.first_child.tolist(), tree.next_sibling.tolist()
    path = [0]
    while path:
        while len(path) < max_levels and first_child[path[-1]] >= 0:
            path.append(first_child[path[-1]])
        yield list(path)
        while path:
            sibling = next_sibling[path.pop()]
            if sibling >= 0:
                path.append(sibling)
                break


def _frozen(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    array.flags.writeable = False
    return array


def _positive(function: str, name: str, value: int, least: int = 1, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"specdec_ops.Tree.{function}: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"specdec_ops.Tree.{function}: {name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"specdec_ops.Tree.{function}: {name} must be at most {most}, got {value}")
    return int(value)


def _iterable(sequences: Iterable[Sequence[int]]) -> Iterable[Sequence[int]]:
    if not isinstance(sequences, Iterable):
        raise TypeError(f"specdec_ops.Tree.from_sequences: sequences must be sequences of token ids, got {sequences!r}")
    return sequences


def _tokens(sequence: Sequence[int], name: str = "sequences") -> list[int]:
    """Token ids as ints."""
    must = "a token id" if name == "root_token" else "sequences of token ids"
    if isinstance(sequence, str | bytes) or not isinstance(sequence, Iterable):
        raise TypeError(f"specdec_ops.Tree.from_sequences: {name} must be {must}, got {sequence!r}")
    tokens = []
    for token in sequence:
        token = token.item() if hasattr(token, "item") and getattr(token, "ndim", 1) == 0 else token
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"specdec_ops.Tree.from_sequences: {name} must be {must}, got {token!r} for a token")
        if not 0 <= token < 2**31:
            raise ValueError(f"specdec_ops.Tree.from_sequences: {name} must be from 0 to 2**31 - 1, got {token}")
        tokens.append(token)
    return tokens


def _check_parents(parents: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    array = np.asarray(parents)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"specdec_ops.Tree: parents must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"specdec_ops.Tree: parents must be one-dimensional [nodes], got {list(array.shape)}")
    if array.size > MAX_NODES:
        raise ValueError(f"specdec_ops.Tree: parents must be of at most {MAX_NODES} nodes, got {array.size}")
    nodes = np.arange(array.size)
    bad = np.flatnonzero((array < -1) | (array >= nodes))
    if bad.size:
        node = int(bad[0])
        allowed = "-1 (node 0 is always a root)" if node == 0 else f"-1 or a node before it, 0 to {node - 1}"
        raise ValueError(f"specdec_ops.Tree: the parent of node {node} must be {allowed}; got {array[node]}")
    return _frozen(array.astype(np.int32))  # a copy: the caller may change theirs
