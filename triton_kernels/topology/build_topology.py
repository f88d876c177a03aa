"""Ancestor sets, depths and links of every request's tree, in Triton.

One program owns a block of nodes of one request; one row of its tile is one node, one column one 64-bit ancestor word.
A row walks from its node up to the root through the *input* parents, which nobody writes, so no program waits for
another and nothing it wrote itself is read back: within a program, writes to memory are not ordered before reads by
other threads. Unsound parents are replaced by -1 wherever they are read. A sound parent is an earlier node, so a walk
ends after at most as many steps as there are nodes, whatever the input holds.

Children and siblings come from comparing the block with every block of candidates, 64 x 64 at a time. That is quadratic
in nodes, but trees are small: up to 64 nodes it is one tile, and at 1,024 nodes 16 tiles per program. Parents are 4
bytes per node and stay in cache; 16 + 8 * words bytes per node are written once. The time is the depth of the tree
times the latency of a cached load.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on

OUT_OF_RANGE = tl.constexpr(1)
NOT_BEFORE = tl.constexpr(2)
BAD_COUNT = tl.constexpr(4)
BLOCK_NODES = 64
_MAX_WORDS_PER_TILE = 16


@triton.jit
def _sound_parents(parents, node, count):
    """Parents of these nodes with unsound ones replaced by -1, and which were out of range or not before the node."""
    exists = node < count
    parent = tl.load(parents + node, mask=exists, other=-1)
    out_of_range = (parent < -1) | (parent >= count)
    not_before = (parent >= node) & (out_of_range == 0) & exists
    return tl.where(out_of_range | not_before, -1, parent), out_of_range, not_before


@triton.jit
def write_tables(
    parents, node, count, nodes, words, depths, ancestors, first_child, next_sibling, BLOCK: tl.constexpr,
    WORDS: tl.constexpr
):  # fmt: skip
    """Depths, ancestors and links of a block of nodes of one request, whose tables these are. Returns status bits."""
    inside = node < nodes
    exists = node < count
    parent, _, _ = _sound_parents(parents, node, count)

    # Links: the lowest candidate whose parent is the node, and the lowest later one with the same parent. Candidates
    # beyond count read as roots; they come after every real one, so the stores below tell them apart.
    child = tl.full([BLOCK], 2147483647, tl.int32)
    sibling = tl.full([BLOCK], 2147483647, tl.int32)
    unsound = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        other = start + tl.arange(0, BLOCK)
        other_parent, out_of_range, not_before = _sound_parents(parents, other, count)
        unsound |= tl.where(out_of_range, OUT_OF_RANGE, 0) | tl.where(not_before, NOT_BEFORE, 0)
        same = (other_parent[None, :] == parent[:, None]) & (other[None, :] > node[:, None])
        sibling = tl.minimum(sibling, tl.min(tl.where(same, other[None, :], 2147483647), axis=1))
        is_child = other_parent[None, :] == node[:, None]
        child = tl.minimum(child, tl.min(tl.where(is_child, other[None, :], 2147483647), axis=1))
    tl.store(first_child + node, tl.where(exists & (child < count), child, -1), mask=inside)
    tl.store(next_sibling + node, tl.where(exists & (sibling < count), sibling, -1), mask=inside)

    # Depth and the first WORDS ancestor words from one walk; more than 16 words (1,024 nodes) walk again.
    for first_word in range(0, words, WORDS):
        word = first_word + tl.arange(0, WORDS)
        seen = tl.zeros([BLOCK, WORDS], tl.int64)
        depth = tl.full([BLOCK], -1, tl.int32)
        current = tl.where(exists, node, -1)
        alive = tl.max(current, axis=0)
        while alive >= 0:
            bit = tl.full([BLOCK], 1, tl.int64) << (current & 63).to(tl.int64)
            here = (current[:, None] >= 0) & ((current >> 6)[:, None] == word[None, :])
            seen |= tl.where(here, bit[:, None], 0)
            depth += (current >= 0).to(tl.int32)
            above = tl.load(parents + current, mask=current >= 0, other=-1)
            current = tl.where((above < current) & (above >= 0), above, -1)
            alive = tl.max(current, axis=0)
        if first_word == 0:
            tl.store(depths + node, tl.maximum(depth, 0), mask=inside)
        at = node[:, None].to(tl.int64) * words + word[None, :]
        tl.store(ancestors + at, seen, mask=inside[:, None] & (word < words)[None, :])
    return tl.max(unsound & OUT_OF_RANGE, axis=0) | tl.max(unsound & NOT_BEFORE, axis=0)


@triton.jit
def build_topology_kernel(
    parents,
    num_nodes,
    parents_out,
    depths,
    ancestors,
    first_child,
    next_sibling,
    num_nodes_out,
    status,
    nodes,
    words,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = request * nodes
    given = tl.load(num_nodes + request)
    count = tl.minimum(tl.maximum(given, 0), nodes)

    node = block * BLOCK + tl.arange(0, BLOCK)
    parent, _, _ = _sound_parents(parents + row, node, count)
    tl.store(parents_out + row + node, parent, mask=node < nodes)
    bits = write_tables(
        parents + row, node, count, nodes, words, depths + row, ancestors + row * words, first_child + row,
        next_sibling + row, BLOCK, WORDS
    )  # fmt: skip
    if block == 0:
        bits = tl.where(given != count, bits | BAD_COUNT, bits)
        tl.store(status + request, bits)
        tl.store(num_nodes_out + request, count)


def words_per_tile(words: int) -> int:
    """Ancestor words of a node that one walk makes."""
    return min(triton.next_power_of_2(words), _MAX_WORDS_PER_TILE)


def build_topology(arguments, outputs) -> None:
    """Launch on the tensors' device. What the tensors are is told in specdec_ops/ops/topology/contract.py."""
    batch, nodes, words = outputs.ancestors.shape
    device = arguments.parents.device
    grid = (batch, max(1, triton.cdiv(nodes, BLOCK_NODES)))
    with on(device):
        build_topology_kernel[grid](
            **arguments._asdict(),
            **outputs._asdict(),
            nodes=nodes,
            words=words,
            BLOCK=BLOCK_NODES,
            WORDS=words_per_tile(words),
            num_warps=8,  # a 64 x 64 tile of candidates in fewer than 128 registers
        )
