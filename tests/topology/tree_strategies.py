"""Trees that hypothesis draws. Apart from trees.py, so that most tests run without hypothesis."""

from hypothesis import strategies as st

from specdec_ops import Tree
from tests.harness.trees import EDGE_SIZES, random_tree


@st.composite
def trees(draw, min_nodes: int = 1, max_nodes: int = 1024) -> Tree:
    """Any tree; small ones shrink to lists of parents, large ones to a seed."""
    if draw(st.booleans()):
        nodes = draw(st.integers(min_nodes, min(max_nodes, 12)))
        return Tree([draw(st.integers(-1, node - 1)) for node in range(nodes)])
    edges = [nodes for nodes in EDGE_SIZES if min_nodes <= nodes <= max_nodes]
    nodes = draw(st.integers(min_nodes, max_nodes) | st.sampled_from(edges or [max_nodes]))
    return random_tree(
        nodes,
        draw(st.integers(0, 2**32 - 1)),
        roots=draw(st.sampled_from([0.0, 0.05, 0.5])),
        depth_bias=draw(st.sampled_from([0.1, 0.5, 0.9, 0.98])),
    )
