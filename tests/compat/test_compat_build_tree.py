"""The drop-in form of sgl-kernel's build_tree_kernel_efficient: its published case, rewritten, and where it differs."""

import pytest
import torch

from specdec_ops import Tree
from specdec_ops.compat.sgl_kernel import FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING, build_tree_kernel_efficient
from tests.compat.compat_cases import eagle_trees


def build(parent_list, selected, lengths, topk, depth, mode=FULL_MASK):
    """Call build_tree_kernel_efficient on outputs full of rubbish; context columns of the mask hold True."""
    batch, nodes = len(selected), len(selected[0]) + 1
    size = {
        FULL_MASK: sum(lengths) * nodes + batch * nodes * nodes,
        QLEN_ONLY: batch * nodes * nodes,
        QLEN_ONLY_BITPACKING: batch * nodes * (1 if nodes <= 8 else 2 if nodes <= 16 else 4),
    }.get(mode, 0)
    mask = torch.full((size,), 255, dtype=torch.uint8) if mode == QLEN_ONLY_BITPACKING else torch.full((size,), True)
    links = [torch.full((batch, nodes), 99) for _ in range(3)]
    positions = torch.full((batch * nodes,), 99)
    given = (torch.tensor(parent_list), torch.tensor(selected), torch.tensor(lengths))
    build_tree_kernel_efficient(*given, mask, positions, *links, topk, depth, nodes, mode)
    return mask, positions.tolist(), *(link.tolist() for link in links)


PUBLISHED_PARENTS = [[-1, 0, 1, 2, 3, 4, 8, 9, 10, 20, 24, 21, 28], [-1, 0, 1, 2, 3, 4, 5, 6, 7, 24, 28, 20, 21]]
PUBLISHED_SELECTED = [[0, 1, 4, 8, 20, 24, 36], [0, 4, 5, 6, 7, 24, 36]]


def test_published_tree():
    mask, positions, index, next_token, next_sibling = build(PUBLISHED_PARENTS, PUBLISHED_SELECTED, [5, 10], 4, 4)
    assert positions == [5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, 12, 12, 12, 13, 14]
    assert index == [list(range(8)), list(range(8, 16))]
    assert next_token == [[1, 3, 4, 5, 6, 7, -1, -1], [1, 2, -1, 6, -1, -1, 7, -1]]
    assert next_sibling == [[-1, 2, -1, -1, -1, -1, -1, -1], [-1, -1, 3, 4, 5, -1, -1, -1]]
    trees = Tree([-1, 0, 0, 1, 2, 3, 4, 5]), Tree([-1, 0, 1, 1, 1, 1, 3, 6])
    rows = (mask[: 8 * 13].view(8, 13), mask[8 * 13 :].view(8, 18))
    for length, tree, row in zip((5, 10), trees, rows, strict=True):
        assert row[:, :length].all(), "the context's part is the caller's"
        assert torch.equal(row[:, length:], torch.from_numpy(tree.mask()))


@pytest.mark.parametrize("topk, depth, selected", [(1, 3, 2), (2, 3, 7), (4, 4, 15), (8, 3, 31), (10, 6, 69)])
@pytest.mark.parametrize("mode", [FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING])
def test_built_trees(topk, depth, selected, mode):
    if mode == QLEN_ONLY_BITPACKING and selected > 31:
        with pytest.raises(ValueError, match="draft_token_num must be at most 32 for a mask of bits, got 70"):
            build([[0] * (topk * (depth - 1) + 1)], [list(range(selected))], [1], topk, depth, mode)
        return
    lengths = [3, 0, 11]
    parent_lists, selections, trees = eagle_trees(3, topk, depth, selected, seed=topk)
    mask, positions, index, next_token, next_sibling = build(parent_lists, selections, lengths, topk, depth, mode)
    nodes = selected + 1
    assert positions == [
        position for tree, length in zip(trees, lengths, strict=True) for position in tree.position_ids(length)
    ]
    assert index == torch.arange(3 * nodes).view(3, nodes).tolist()
    assert next_token == [tree.first_child.tolist() for tree in trees]
    assert next_sibling == [tree.next_sibling.tolist() for tree in trees]
    for tree, length in zip(trees, lengths, strict=True):
        width = nodes + length if mode == FULL_MASK else nodes
        if mode == QLEN_ONLY_BITPACKING:
            width = 1 if nodes <= 8 else 2 if nodes <= 16 else 4
        rows, mask = mask[: nodes * width].view(nodes, width), mask[nodes * width :]
        seen = torch.from_numpy(tree.mask())
        if mode == QLEN_ONLY_BITPACKING:
            bits = (rows[:, :, None] >> torch.arange(8) & 1).bool().view(nodes, -1)
            assert torch.equal(bits[:, :nodes], seen) and not bits[:, nodes:].any()
        else:
            assert torch.equal(rows[:, width - nodes :], seen) and rows[:, : width - nodes].all()
    assert mask.numel() == 0


@pytest.mark.parametrize("mode", [FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING])
@pytest.mark.parametrize("topk, nodes", [(2, 3), (2, 1), (1, 2), (8, 9), (20, 21), (40, 32)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_trees_of_one_level(mode, topk, nodes, dtype):
    """SGLang has no parents to list then: parent_list is [batch, 0]. Masks of 16 and 32 bits are its own dtypes."""
    lengths = [5, 0, 3]
    parent_list, selected = torch.empty(3, 0, dtype=dtype), torch.arange(nodes - 1, dtype=dtype).repeat(3, 1)
    size = {FULL_MASK: 8 * nodes + 3 * nodes * nodes, QLEN_ONLY: 3 * nodes * nodes, QLEN_ONLY_BITPACKING: 3 * nodes}
    mask = torch.ones(size[mode], dtype=torch.bool)
    if mode == QLEN_ONLY_BITPACKING:
        mask = torch.zeros(
            size[mode], dtype=torch.uint8 if nodes <= 8 else torch.uint16 if nodes <= 16 else torch.uint32
        )
    links = [torch.full((3, nodes), 99, dtype=dtype) for _ in range(3)]
    positions = torch.full((3 * nodes,), 99, dtype=dtype)
    given = (parent_list, selected, torch.tensor(lengths, dtype=dtype))
    build_tree_kernel_efficient(*given, mask, positions, *links, topk, 1, nodes, mode)
    assert positions.view(3, nodes).tolist() == [[length] + [length + 1] * (nodes - 1) for length in lengths]
    siblings = [*range(2, nodes), -1] if nodes > 1 else []
    assert links[0].tolist() == torch.arange(3 * nodes).view(3, nodes).tolist()
    assert links[1].tolist() == [[1 if nodes > 1 else -1] + [-1] * (nodes - 1)] * 3
    assert links[2].tolist() == [[-1, *siblings]] * 3
    seen = torch.eye(nodes, dtype=torch.bool)
    seen[:, 0] = True
    if mode == QLEN_ONLY_BITPACKING:
        powers = 2 ** torch.arange(nodes)
        assert mask.long().tolist() == (seen * powers).sum(1).tolist() * 3
        return
    for length in lengths:
        width = nodes + length * (mode == FULL_MASK)
        rows, mask = mask[: nodes * width].view(nodes, width), mask[nodes * width :]
        assert torch.equal(rows[:, width - nodes :], seen) and rows[:, : width - nodes].all()


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("batch", [0, 2])
def test_chains_and_no_requests(depth, batch):
    """With topk 1 a tree is a chain, whose parents SGLang lists as -1, 0, 1 and so on."""
    nodes = depth + 1
    parent_list = torch.arange(-1, depth - 1 if depth > 1 else -1).repeat(batch, 1)
    links, positions = [torch.full((batch, nodes), 99) for _ in range(3)], torch.full((batch * nodes,), 99)
    mask = torch.ones(batch * nodes * nodes, dtype=torch.bool)
    given = (parent_list, torch.arange(depth).repeat(batch, 1), torch.full((batch,), 7))
    build_tree_kernel_efficient(*given, mask, positions, *links, 1, depth, nodes, QLEN_ONLY)
    assert positions.tolist() == list(range(7, 7 + nodes)) * batch
    assert links[1].tolist() == [[*range(1, nodes), -1]] * batch and links[2].tolist() == [[-1] * nodes] * batch
    assert torch.equal(mask.view(batch, nodes, nodes), torch.ones(batch, nodes, nodes, dtype=torch.bool).tril())


@pytest.mark.parametrize("selected", [[0, 1, 99], [0, -1, 1], [0, 5, 6], [-9, -1, 40], [4, 0, 1]])
def test_selections_that_make_no_tree_are_orphans(selected):
    """Candidates beyond parent_list, below 0, or before their parent: none of them gets a wrong parent."""
    _, positions, _, next_token, next_sibling = build([[-1, 0, 1]], [selected], [5], 2, 2, QLEN_ONLY)
    reached, node = [], next_token[0][0]
    while node != -1:
        assert selected[node - 1] in (0, 1), "children of node 0"
        reached.append(node)
        node = next_sibling[0][node]
    children = sorted(n + 1 for n, candidate in enumerate(selected) if candidate in (0, 1))
    assert sorted(reached) == children
    assert positions == [5] + [6 if n in reached else 5 for n in range(1, 4)]


def test_a_node_without_a_selected_parent_is_an_orphan():
    selected = [[0, 1, 4, 12, 20]]  # candidate 12's parent is candidate 2, which was not selected
    mask, positions, _, next_token, next_sibling = build(PUBLISHED_PARENTS[:1], selected, [5], 4, 4, QLEN_ONLY)
    assert next_token == [[1, 3, -1, 5, -1, -1]] and next_sibling == [[-1, 2, -1, -1, -1, -1]]
    assert mask.view(6, 6)[4].tolist() == [False] * 4 + [True, False]
    assert positions == [5, 6, 6, 7, 5, 8]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="tree_mask_mode must be 0, 1 or 2, got 3"):
        build([[-1, 0, 1, 2, 3]], [[0, 1]], [0], 4, 2, 3)
    with pytest.raises(ValueError, match=r"parent_list must be \[1, 5\], got int64 \[1, 4\]"):
        build([[-1, 0, 1, 2]], [[0, 1]], [0], 4, 2)
    for topk, depth, name in ((0, 2, "topk"), (4, 0, "depth")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            build([[-1, 0, 1, 2, 3]], [[0, 1]], [0], topk, depth)
    with pytest.raises(ValueError, match="verified_seq_len must be at least 0, got -1"):
        build([[-1, 0, 1, 2, 3]], [[0, 1]], [-1], 4, 2)
    links, given = [torch.zeros(1, 3, dtype=torch.int64)] * 3, (torch.tensor([[-1, 0]]), torch.tensor([[0, 1]]))
    for mode, size in ((FULL_MASK, 3 * 7), (QLEN_ONLY, 9), (QLEN_ONLY_BITPACKING, 3)):
        short = torch.zeros(size - 1, dtype=torch.uint8)
        with pytest.raises(ValueError, match=rf"tree_mask must be of at least {size} bytes, got uint8 \[{size - 1}\]"):
            build_tree_kernel_efficient(*given, torch.tensor([4]), short, torch.zeros(3), *links, 1, 2, 3, mode)
