"""`Topology.from_mask`: masks as FlashInfer and TensorRT-LLM keep them, and masks that are no forest."""

import numpy as np
import pytest
import torch

from specdec_ops import Topology, Tree
from tests.harness.trees import random_tree

FIELDS = ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes", "status")
SIZES = (1, 2, 31, 32, 33, 63, 64, 65, 130)


def assert_same(topology: Topology, expected: Topology) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(topology, name), getattr(expected, name)), name


def word_rows(mask: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of words by Python's integers, lowest bit first."""
    words = -(-mask.shape[1] // bits)
    table = [[0] * words for _ in mask]
    for row, column in zip(*np.nonzero(mask), strict=True):
        table[row][column // bits] |= 1 << (int(column) % bits)
    signed = [[word - (1 << bits) if word >> (bits - 1) else word for word in row] for row in table]
    return torch.tensor(signed, dtype={32: torch.int32, 64: torch.int64}[bits])


@pytest.mark.parametrize("nodes", SIZES)
def test_one_tree_in_every_form(nodes):
    tree = random_tree(nodes, seed=nodes, roots=0.1, depth_bias=0.7)
    mask, expected = tree.mask(), tree.to()
    assert_same(Topology.from_mask(torch.from_numpy(mask)), expected)
    for bits in (32, 64):
        assert_same(Topology.from_mask(word_rows(mask, bits)), expected)
    context = nodes % 5
    flat = np.concatenate([np.ones((nodes, context), bool), mask], axis=1).reshape(-1)
    sizes = {"num_nodes": torch.tensor([nodes]), "context_lens": torch.tensor([context])}
    assert_same(Topology.from_mask(torch.from_numpy(flat), **sizes), expected)
    bits = torch.from_numpy(np.packbits(flat, bitorder="little"))
    assert_same(Topology.from_mask(bits, **sizes), expected)


def test_a_ragged_batch_with_rubbish_behind_each_tree():
    trees = [random_tree(nodes, seed=nodes) for nodes in (7, 40, 1, 33)]
    expected = Topology.from_trees(trees, packed=True)
    counts = torch.tensor([len(tree) for tree in trees], dtype=torch.int32)
    rng = np.random.default_rng(3)
    mask = rng.random((4, 40, 40)) < 0.5
    for row, tree in zip(mask, trees, strict=True):
        row[: len(tree), : len(tree)] = tree.mask()
        row[: len(tree), len(tree) :] = False  # a column of a node that does not exist: see below
    assert_same(Topology.from_mask(torch.from_numpy(mask), counts), Topology.from_trees(trees))
    made = Topology.from_mask(torch.from_numpy(mask), counts, packed=True)
    assert torch.equal(made.offsets, expected.offsets)
    for row, tree in zip(mask, trees, strict=True):
        row[: len(tree), len(tree) :] = True
    assert_same(Topology.from_mask(torch.from_numpy(mask), counts), Topology.from_trees(trees))
    words = torch.stack([word_rows(row, 32) for row in mask])
    assert_same(Topology.from_mask(words, counts), Topology.from_trees(trees))


@pytest.mark.parametrize("packed", (False, True), ids=("bool", "bits"))
def test_flashinfer_flat_masks_of_a_batch(packed):
    trees = [random_tree(nodes, seed=nodes) for nodes in (3, 9, 0, 5)]
    context = [5, 0, 7, 2]
    parts = [
        np.concatenate([np.ones((len(tree), length), bool), tree.mask()], axis=1).reshape(-1)
        for tree, length in zip(trees, context, strict=True)
    ]
    parts = [np.packbits(part, bitorder="little") for part in parts] if packed else parts
    mask = torch.from_numpy(np.concatenate(parts))
    made = Topology.from_mask(mask, torch.tensor([3, 9, 0, 5]), torch.tensor(context))
    assert_same(made, Topology.from_trees(trees))


def changed(tree: Tree, node: int, other: int, sees: bool) -> torch.Tensor:
    mask = tree.mask()
    mask[node, other] = sees
    return torch.from_numpy(mask)


@pytest.mark.parametrize(
    ("mask", "why"),
    (
        (changed(Tree([-1, 0, 0]), 1, 1, False), "node 1 of request 0 does not see itself"),
        (changed(Tree([-1, 0, 0]), 1, 2, True), "node 1 of request 0 sees node 2, which comes after it"),
        (changed(Tree([-1, 0, 0]), 2, 1, True), "node 2 of request 0 sees nodes 1 and 0|node 2 .* sees"),
        (changed(Tree([-1, 0, 1]), 2, 0, False), "node 2 of request 0 sees node 1 and not node 0, which node 1 sees"),
        (
            changed(Tree([-1, -1, 1]), 2, 0, True),
            "node 2 of request 0 sees nodes 1 and 0, and node 1 does not see node 0",
        ),
        (torch.ones(4, 4, dtype=torch.bool), "node 0 of request 0 sees node 1, which comes after it"),
    ),
)
def test_a_mask_that_is_no_forest_is_refused_and_the_node_named(mask, why):
    if "|" in why:  # node 2 under node 1 is a chain: the changed mask is one of a forest
        assert Topology.from_mask(mask).parents.tolist() == [[-1, 0, 1]]
        return
    with pytest.raises(ValueError, match=why):
        Topology.from_mask(mask)


def test_every_mask_of_four_nodes_is_a_forest_or_refused():
    """Against the definition: 24 forests of parents before children, and nothing else."""
    forests = set()
    for a in range(-1, 1):
        for b in range(-1, 2):
            for c in range(-1, 3):
                forests.add(Tree([-1, a, b, c]).mask().tobytes())
    accepted = 0
    for code in range(2**12):
        mask = np.eye(4, dtype=bool)
        mask[~mask] = [code >> bit & 1 for bit in range(12)]
        try:
            topology = Topology.from_mask(torch.from_numpy(mask))
        except ValueError:
            assert mask.tobytes() not in forests
        else:
            accepted += 1
            assert Tree(topology.parents[0].tolist()).mask().tobytes() == mask.tobytes()
    assert accepted == len(forests) == 24


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    (
        ((np.eye(3, dtype=bool),), TypeError, "mask must be"),
        ((torch.eye(3),), TypeError, "mask must be"),
        ((torch.ones(2, 3, 4, dtype=torch.bool),), ValueError, r"mask must be bool \[batch, 3, 3\]"),
        ((torch.zeros(40, 1, dtype=torch.int32),), ValueError, "at least 2 words"),
        ((torch.eye(3).bool(), torch.tensor([4])), ValueError, "num_nodes must be"),
        ((torch.eye(3).bool(), torch.tensor([3.0])), TypeError, "num_nodes must be"),
        ((torch.eye(3).bool(), None, torch.tensor([1])), ValueError, "context_lens must be None"),
        ((torch.ones(9, dtype=torch.bool),), TypeError, "num_nodes must be"),
        ((torch.ones(9, dtype=torch.bool), torch.tensor([3]), torch.tensor([1])), ValueError, r"flat bool \[12\]"),
        (
            (torch.ones(9, dtype=torch.bool), torch.tensor([3]), torch.tensor([1, 1])),
            ValueError,
            "context_lens must be",
        ),
        ((torch.zeros(1, dtype=torch.uint8), torch.tensor([1]), torch.tensor([1])), ValueError, "whole context"),
    ),
)
def test_bad_arguments_name_themselves(arguments, error, why):
    with pytest.raises(error, match=why):
        Topology.from_mask(*arguments)
