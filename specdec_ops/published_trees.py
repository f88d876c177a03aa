"""Draft trees that papers and their code publish, by name, as data.

>>> from specdec_ops import published_trees
>>> len(published_trees.get("mcsd-4x2x2x1"))
44
>>> len(published_trees.get("medusa-63", root=True))  # with the last committed token as node 0
64

Sizes are counted as the papers count them, without the last committed token.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from .tree import Tree


@dataclasses.dataclass(frozen=True)
class PublishedTree:
    """One entry: a tree as counts of children.

    A node's children are its most likely continuations, best first, so that counts alone say which continuation each
    node is.

    Attributes:
        name: what `get` takes.
        nodes: how many, without the last committed token.
        source: the paper or repository that it comes from.
        children: counts per node, level by level: first how many nodes have no drafted parent, then for each node of
            level 0 how many children it has, and so on; trailing zeros of a level are left out.
    """

    name: str
    nodes: int
    source: str
    children: tuple[tuple[int, ...], ...]


def _uniform(branching: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The counts of a tree in which all nodes of a level have equally many children."""
    levels, size = [], 1
    for width in branching:
        levels.append((width,) * size)
        size *= width
    return tuple(levels)


_MCSD = "Yang et al., Multi-Candidate Speculative Decoding, 2024 (arXiv 2401.06706; github.com/NJUNLP/MCSD)"
_IMPROVED = (
    "Lu et al., Improving Multi-Candidate Speculative Decoding, NeurIPS ENLSP 2024 (arXiv 2409.10644; "
    "github.com/JackZeng0208/DynaSD)"
)
_MEDUSA = (
    "Cai et al., Medusa, 2024 (arXiv 2401.10774): mc_sim_7b_63 in medusa/model/medusa_choices.py of "
    "github.com/FasterDecoding/Medusa; widths 10, 28, 23, 2"
)
_EAGLE = (
    "Li et al., EAGLE, 2024 (arXiv 2401.15077): the tree in eagle/model/choices.py of github.com/SafeAILab/EAGLE; "
    "widths 4, 8, 8, 3, 2"
)

_MEDUSA_CHILDREN = (
    (10,),
    (10, 7, 3, 2, 1, 1, 1, 1, 1, 1),
    (10, 3, 2, 1, 1, 1, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1),
    (2,),
)
_EAGLE_CHILDREN = ((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,))

_ENTRIES = (
    PublishedTree("mcsd-4x2x2", 28, f"{_MCSD}: the example of its README", _uniform((4, 2, 2))),
    PublishedTree("mcsd-4x2x2x1", 44, f"{_IMPROVED}: its MCSD baseline", _uniform((4, 2, 2, 1))),
    PublishedTree("mcsd-4x2x2x1x1", 60, f"{_MCSD}; quoted by {_IMPROVED}", _uniform((4, 2, 2, 1, 1))),
    PublishedTree("improved-mcsd-2x4x3x1x1", 82, f"{_IMPROVED}: its best static tree", _uniform((2, 4, 3, 1, 1))),
    PublishedTree("fork-3x2", 9, f"{_IMPROVED}: Figure 1, 3 branches of 2 drafted tokens", _uniform((3, 1, 1))),
    PublishedTree("fork-16x5", 96, f"{_IMPROVED}: dynamic drafting, W=16, D=5", _uniform((16, 1, 1, 1, 1, 1))),
    PublishedTree("medusa-63", 63, _MEDUSA, _MEDUSA_CHILDREN),
    PublishedTree("eagle-25", 25, _EAGLE, _EAGLE_CHILDREN),
)
PUBLISHED = {entry.name: entry for entry in _ENTRIES}


def names() -> tuple[str, ...]:
    """The names that `get` and `source` know."""
    return tuple(PUBLISHED)


@functools.cache
def get(name: str, *, root: bool = False) -> Tree:
    """The tree of that name, in level order.

    Args:
        name: one of `names()`.
        root: put the last committed token in front as node 0, the parent of the first level.

    Raises:
        ValueError: the name is unknown.
    """
    parents = [np.full(1, -1)] if root else []
    previous, first, start = np.full(1, 0 if root else -1), 0, int(root)
    for counts in _find(name).children:
        level = np.repeat(previous[: len(counts)], counts)
        parents.append(level)
        first, start = start, start + level.size
        previous = np.arange(first, start)
    return Tree(np.concatenate(parents))


def source(name: str) -> str:
    """Where the tree of that name comes from."""
    return _find(name).source


def _find(name: str) -> PublishedTree:
    if name not in PUBLISHED:
        raise ValueError(f"specdec_ops.published_trees: name must be one of {', '.join(PUBLISHED)}; got {name!r}")
    return PUBLISHED[name]
