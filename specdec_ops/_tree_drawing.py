"""A `Tree` as text: what `print(tree)` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tree import Tree

MAX_DRAWN_LINES = 48
MAX_DRAWN_COLUMNS = 110


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
