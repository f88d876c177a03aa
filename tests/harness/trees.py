"""Trees for tests: random ones with seeds, and awkward ones."""

import numpy as np

from specdec_ops import Tree

EDGE_SIZES = (1, 2, 63, 64, 65, 127, 128, 129, 256, 1024)


def random_tree(nodes: int, seed: int, *, roots: float = 0.0, depth_bias: float = 0.5) -> Tree:
    """A random recursive tree. A node is a further root with probability `roots`; `depth_bias` near 1 hangs nodes on
    recent ones (deep), near 0 on old ones (wide)."""
    rng = np.random.default_rng(seed)
    parents = np.full(nodes, -1)
    for node in range(1, nodes):
        if rng.random() >= roots:
            exponent = np.log(0.5) / np.log(np.clip(depth_bias, 0.02, 0.98))
            parents[node] = min(node - 1, int(node * rng.random() ** exponent))
    return Tree(parents)


def level_ordered(tree: Tree) -> Tree:
    """The same tree with its nodes renumbered level by level."""
    order = np.argsort(tree.depths, kind="stable")
    rank = np.empty(len(tree), np.int64)
    rank[order] = np.arange(len(tree))
    parents = tree.parents[order]
    return Tree(np.where(parents >= 0, rank[parents], -1))


def star(nodes: int) -> Tree:
    """One root, all others its children."""
    return Tree(np.where(np.arange(nodes) == 0, -1, 0))


def isolated(nodes: int) -> Tree:
    """A forest of single nodes."""
    return Tree(np.full(nodes, -1))


def trees_of_size(nodes: int, seed: int = 0) -> dict[str, Tree]:
    """One tree of each kind with this many nodes."""
    return {
        "chain": Tree.chain(nodes),
        "star": star(nodes),
        "isolated": isolated(nodes),
        "forest": random_tree(nodes, seed, roots=0.1),
        "deep": random_tree(nodes, seed, depth_bias=0.9),
        "wide": random_tree(nodes, seed, depth_bias=0.1),
        "level-ordered": level_ordered(random_tree(nodes, seed)),
    }


def naive_ancestors(parents: np.ndarray) -> list[set[int]]:
    """For every node the nodes met on the way to its root, itself included."""
    found = []
    for node in range(len(parents)):
        seen = set()
        while node >= 0:
            seen.add(int(node))
            node = parents[node]
        found.append(seen)
    return found
