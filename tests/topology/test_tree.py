"""The host-side Tree: what it derives, how it is sliced, drawn and refused, and the tables of published trees."""

import copy
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_ops import Tree, published_trees
from tests.harness.trees import EDGE_SIZES, level_ordered, naive_ancestors, random_tree, trees_of_size
from tests.topology.tree_strategies import trees

some = settings(max_examples=60, deadline=None, derandomize=True)
DERIVED = ("parents", "depths", "ancestors", "first_child", "next_sibling", "roots", "leaves")


def assert_same(tree: Tree, other: Tree) -> None:
    assert tree == other
    assert hash(tree) == hash(other)
    for name in DERIVED:
        got, expected = getattr(tree, name), getattr(other, name)
        assert got.dtype == expected.dtype, name
        np.testing.assert_array_equal(got, expected, err_msg=name)


def check_against_walk(tree: Tree) -> None:
    ancestors = naive_ancestors(tree.parents)
    expected = np.zeros((len(tree), len(tree)), bool)
    for node, seen in enumerate(ancestors):
        expected[node, list(seen)] = True
    np.testing.assert_array_equal(tree.mask(), expected)
    np.testing.assert_array_equal(tree.depths, [len(seen) - 1 for seen in ancestors])
    assert tree.ancestors.shape == (len(tree), max(1, (len(tree) + 63) // 64))
    assert sum(int(word).bit_count() for word in tree.ancestors.flat) == expected.sum()
    assert tree.depth == max(len(seen) for seen in ancestors) - 1


@some
@given(trees())
def test_ancestors_and_depths_against_a_walk(tree):
    check_against_walk(tree)


@pytest.mark.parametrize("nodes", EDGE_SIZES)
def test_every_kind_of_tree_against_a_walk(nodes):
    for tree in trees_of_size(nodes).values():
        check_against_walk(tree)


@some
@given(trees(max_nodes=300))
def test_links_visit_the_children_in_order(tree):
    for node in range(-1, len(tree)):
        children = np.flatnonzero(tree.parents == node).tolist()
        first = tree.first_child[node] if node >= 0 else 0
        listed = []
        while first >= 0:
            listed.append(int(first))
            first = tree.next_sibling[first]
        assert listed == children


@some
@given(trees(), st.data())
def test_a_slice_equals_a_rebuild(tree, data):
    size = data.draw(st.integers(0, len(tree)))
    for name in data.draw(st.lists(st.sampled_from(DERIVED))):
        getattr(tree, name)  # whatever is cached by now must be sliced rightly
    part = tree[:size]
    assert_same(part, Tree(tree.parents[:size]))
    assert size == 0 or np.shares_memory(part.parents, tree.parents)


@some
@given(trees(max_nodes=300), st.data())
def test_truncation_keeps_whole_levels(tree, data):
    tree = level_ordered(tree)
    depth = data.draw(st.integers(-1, tree.depth + 1))
    assert_same(tree.truncate(depth), Tree(tree.parents[tree.depths <= depth]))
    assert tree.truncate(depth).depth == min(depth, tree.depth)


@some
@given(trees(max_nodes=300))
def test_levels(tree):
    if not tree.is_level_ordered:
        with pytest.raises(ValueError, match=r"Tree\.levels: the tree must be level-ordered, but node \d+ \(depth"):
            _ = tree.levels
        tree = level_ordered(tree)
    assert tree.levels[0] == 0
    assert tree.levels[-1] == len(tree)
    for depth, (start, end) in enumerate(itertools.pairwise(tree.levels)):
        assert start < end
        assert (tree.depths[start:end] == depth).all()


@some
@given(trees(max_nodes=200), st.integers(0, 100_000))
def test_paths_and_positions(tree, context_len):
    paths = tree.paths()
    assert [path[-1] for path in paths] == tree.leaves.tolist()
    assert {node for path in paths for node in path} == set(range(len(tree)))
    for path, padded in zip(paths, tree.paths(padded=True), strict=True):
        assert tree.parents[path[0]] == -1
        assert all(tree.parents[child] == parent for parent, child in itertools.pairwise(path))
        assert padded.tolist() == list(path) + [-1] * (tree.depth + 1 - len(path))
    positions = tree.position_ids(context_len)
    assert positions.dtype == np.int32
    # The definition of improved MCSD: the number of visible slots, less one.
    np.testing.assert_array_equal(positions, context_len + tree.mask().sum(1) - 1)


def test_constructors():
    assert Tree.from_parents([-1, 0]) == Tree([-1, 0]) == Tree(np.array([-1, 0], np.int64))
    assert Tree.chain(4) == Tree([-1, 0, 1, 2])
    assert Tree.fork(2, 2) == Tree([-1, -1, 0, 1, 2, 3])
    assert Tree.fork(2, 1, root=True) == Tree([-1, 0, 0, 1, 2])
    assert Tree.from_branching((2, 2)) == Tree([-1, -1, 0, 0, 1, 1])
    assert Tree.from_branching((2, 2), root=True) == Tree([-1, 0, 0, 1, 1, 2, 2])
    assert Tree.from_branching(()) == Tree([])
    assert Tree.from_branching((), root=True) == Tree([-1])
    assert Tree.from_paths([[1], [0, 0], [0], [1, 3], [1, 0], [0, 0, 0]]) == Tree([-1, -1, 0, 1, 1, 2])
    assert Tree.from_paths([(0,), (1,)], root=True) == Tree([-1, 0, 0])


@pytest.mark.parametrize(("width", "depth"), [(1, 0), (1, 5), (3, 3), (16, 5), (7, 40)])
def test_fork_has_the_closed_form_of_its_paper(width, depth):
    tree = Tree.fork(width, depth)
    assert len(tree) == width * (depth + 1)
    assert tree.depth == depth
    row, column = np.indices((len(tree), len(tree)))
    np.testing.assert_array_equal(tree.mask(), (column <= row) & ((row - column) % width == 0))
    np.testing.assert_array_equal(tree.position_ids(7), 7 + np.arange(len(tree)) // width)
    for shorter in range(depth):
        assert tree.truncate(shorter) == Tree.fork(width, shorter)


def test_branching_has_the_parents_of_its_paper():
    branching = (4, 2, 2, 1)
    tree = Tree.from_branching(branching)
    for level in range(1, len(branching)):
        start, end = tree.levels[level : level + 2]
        expected = tree.levels[level - 1] + np.arange(end - start) // branching[level]
        np.testing.assert_array_equal(tree.parents[start:end], expected)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("mcsd-4x2x2", (4, 8, 16)),
        ("mcsd-4x2x2x1", (4, 8, 16, 16)),
        ("mcsd-4x2x2x1x1", (4, 8, 16, 16, 16)),
        ("improved-mcsd-2x4x3x1x1", (2, 8, 24, 24, 24)),
        ("fork-3x2", (3, 3, 3)),
        ("fork-16x5", (16,) * 6),
        ("medusa-63", (10, 28, 23, 2)),
        ("eagle-25", (4, 8, 8, 3, 2)),
    ],
)
def test_published_trees_have_the_published_sizes(name, widths):
    tree = published_trees.get(name)
    assert len(tree) == sum(widths) == published_trees.PUBLISHED[name].nodes
    assert tuple(np.diff(tree.levels)) == widths
    rooted = published_trees.get(name, root=True)
    assert len(rooted) == len(tree) + 1
    assert tuple(np.diff(rooted.levels)) == (1, *widths)
    np.testing.assert_array_equal(rooted.mask()[1:, 1:], tree.mask())
    assert rooted.mask()[:, 0].all()
    assert len(published_trees.source(name)) > 20


def test_published_trees_agree_with_the_constructors():
    assert published_trees.get("mcsd-4x2x2x1", root=True) == Tree.from_branching((4, 2, 2, 1), root=True)
    assert published_trees.get("fork-16x5") == Tree.fork(16, 5)
    # Child ranks summed over each place of the authors' lists of paths: what a wrong entry would change.
    for name, sums in (("medusa-63", [107, 102, 50, 1]), ("eagle-25", [16, 11, 5, 3, 1])):
        tree = published_trees.get(name)
        ranks = [child_ranks(tree, node) for node in range(len(tree))]
        assert [sum(rank[place] for rank in ranks if len(rank) > place) for place in range(tree.depth + 1)] == sums
        assert Tree.from_paths(ranks[::-1]) == tree
    assert set(published_trees.names()) == set(published_trees.PUBLISHED)
    with pytest.raises(ValueError, match=r"published_trees: name must be one of mcsd-4x2x2, .*; got 'oak'"):
        published_trees.get("oak")


def child_ranks(tree: Tree, node: int) -> tuple[int, ...]:
    """The path of a node as Medusa writes it."""
    return tuple(int((tree.parents[:step] == tree.parents[step]).sum()) for step in tree.path(node))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([0], r"the parent of node 0 must be -1 \(node 0 is always a root\); got 0"),
        ([-1, 0, 2], r"the parent of node 2 must be -1 or a node before it, 0 to 1; got 2"),
        ([-1, 2, 0], r"the parent of node 1 must be -1 or a node before it, 0 to 0; got 2"),
        ([-1, 0, -2], r"the parent of node 2 must be .*; got -2"),
        ([-1, 2**40], r"the parent of node 1 must be .*; got 1099511627776"),
        ([[-1, 0]], r"parents must be one-dimensional \[nodes\], got \[1, 2\]"),
    ],
)
def test_malformed_parents(parents, message):
    with pytest.raises(ValueError, match=rf"specdec_ops\.Tree: {message}"):
        Tree(parents)


@pytest.mark.parametrize("parents", [[-1.0, 0.0], ["a"], [True, False], None])
def test_parents_must_be_integers(parents):
    with pytest.raises(TypeError, match=r"specdec_ops\.Tree: parents must be integers, got"):
        Tree(parents)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tree.chain(-1), r"Tree\.chain: nodes must be at least 0, got -1"),
        (lambda: Tree.fork(0, 3), r"Tree\.fork: width must be at least 1, got 0"),
        (lambda: Tree.fork(2, -1), r"Tree\.fork: depth must be at least 0, got -1"),
        (lambda: Tree.from_branching((4, 0)), r"Tree\.from_branching: branching must be at least 1, got 0"),
        (lambda: Tree.from_paths([(0,), (0, 1, 0)]), r"the prefix \(0, 1\) of \(0, 1, 0\) must be listed too"),
        (lambda: Tree.from_paths([(0,), (0,)]), r"the path \(0,\) must be listed once"),
        (lambda: Tree.from_paths([()]), r"a path must be ranks of 0 or more, got \(\)"),
        (lambda: Tree.from_paths([(-1,)]), r"a path must be ranks of 0 or more, got \(-1,\)"),
        (lambda: Tree.chain(4)[1:], r"a slice must start at node 0 with step 1"),
        (lambda: Tree.chain(4)[::2], r"a slice must start at node 0 with step 1"),
        (
            lambda: Tree([-1, 0, 1, 0]).truncate(1),
            r"Tree\.truncate: .* node 3 \(depth 1\) comes after node 2 \(depth 2\)",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_indices():
    with pytest.raises(TypeError, match=r"the index must be a slice like \[:n\], got int"):
        _ = Tree.chain(4)[0]
    with pytest.raises(IndexError, match=r"node must be in 0\.\.3, got 4"):
        Tree.chain(4).path(4)


def test_trees_do_not_change():
    given_parents = np.array([-1, 0, 0])
    tree = Tree(given_parents)
    given_parents[2] = 1
    assert tree.parents.tolist() == [-1, 0, 0]
    for name in DERIVED:
        with pytest.raises(ValueError, match="read-only"):
            getattr(tree, name)[0] = 0
    with pytest.raises(AttributeError, match="immutable"):
        tree.parents = np.array([-1])
    with pytest.raises(AttributeError, match="immutable"):
        del tree.parents
    assert tree != Tree([-1, 0, 1])
    assert tree != [-1, 0, 0]
    assert len({tree, Tree([-1, 0, 0]), Tree([-1])}) == 2
    for same in (copy.copy(tree), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert_same(same, tree)
        assert not same.parents.flags.writeable


def test_the_empty_tree():
    tree = Tree([])
    assert len(tree) == 0
    assert tree.depth == -1
    assert tree.num_words == 1
    assert tree.ancestors.shape == (0, 1)
    assert tree.paths() == []
    assert tree.paths(padded=True).shape == (0, 0)
    assert tree.levels.tolist() == [0]
    assert str(tree) == "(empty tree)"
    assert tree == Tree.chain(0) == Tree.chain(5)[:0] == Tree.chain(5).truncate(-1)


def test_drawing():
    assert str(Tree([-1, 0, 0, 1, 1, 2])) == "0 ┬ 1 ┬ 3\n  │   └ 4\n  └ 2 ─ 5"
    assert str(Tree([-1, 0, -1, -1, 3])) == "┬ 0 ─ 1\n├ 2\n└ 3 ─ 4"
    assert str(Tree.fork(2, 4, root=True)).splitlines()[1] == "   └─ 2 ── 4 ── 6 ── 8 ─ 10"
    assert repr(Tree([-1, 0])) == "Tree([-1, 0])"
    assert repr(random_tree(100, 0)).startswith("<Tree of 100 nodes, depth ")


@some
@given(trees())
def test_drawings_are_bounded_and_complete(tree):
    lines = str(tree).splitlines()
    assert len(lines) <= 49
    assert max(map(len, lines)) <= 112
    if "…" not in str(tree):
        words = [word for line in lines for word in line.split() if word.isdigit()]
        assert sorted(map(int, words)) == list(range(len(tree)))
        assert len(lines) == len(tree.leaves)


def test_the_tree_needs_no_torch():
    code = (
        "import sys, types; sys.modules['torch'] = None; package = types.ModuleType('specdec_ops'); "
        "package.__path__ = [sys.argv[1]]; sys.modules['specdec_ops'] = package; "
        "from specdec_ops.tree import Tree; print(len(Tree.fork(3, 2)))"
    )
    folder = sys.modules["specdec_ops"].__file__.rpartition("__init__")[0]
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert run.stdout == "9\n", run.stderr


def test_sequences_share_their_beginnings():
    tree, tokens = Tree.from_sequences([(7, 8, 9), (7, 8, 5, 6), (3,), (7, 8), (3, 8)], root_token=1)
    assert tokens.tolist() == [1, 7, 3, 8, 8, 9, 5, 6]
    assert tree.parents.tolist() == [-1, 0, 0, 1, 2, 3, 3, 6]
    forest, tokens = Tree.from_sequences([(7, 8), (3,)])
    assert (forest.parents.tolist(), tokens.tolist()) == ([-1, -1, 0], [7, 3, 8])
    assert [len(Tree.from_sequences(nothing)[0]) for nothing in ([], [()])] == [0, 0]


@some
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12), st.booleans())
def test_sequences_are_the_paths_of_their_tree(sequences, root):
    tree, tokens = Tree.from_sequences(sequences, root_token=9 if root else None)
    prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    spelled = [tuple(tokens[list(tree.path(node))].tolist())[int(root) :] for node in range(len(tree))]
    assert len(spelled) == len(set(spelled)) == len(tree)
    assert set(spelled) - {()} == prefixes
    assert tree.is_level_ordered
    ranked = [
        path
        for length in range(1, 7)
        for path in dict.fromkeys(tuple(s[:length]) for s in sequences if len(s) >= length)
    ]
    assert [path for path in spelled if path] == ranked


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    (
        (5, TypeError, "sequences must be"),
        ([5], TypeError, "sequences must be"),
        (["ab"], TypeError, "sequences must be"),
        ([(1.5,)], TypeError, "1.5"),
        ([(True,)], TypeError, "True"),
        ([(-1,)], ValueError, "got -1"),
        ([(2**31,)], ValueError, "2147483648"),
    ),
)
def test_sequences_of_something_else_are_refused(arguments, error, why):
    with pytest.raises(error, match=why):
        Tree.from_sequences(arguments)
