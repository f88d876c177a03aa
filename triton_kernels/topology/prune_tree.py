"""The best candidates of grown trees, and their topology, in Triton: one launch, a program for each request.

It looks for the key of the last candidate that stays: 32 halvings of the range of float32, each a count over the
pool, 512 candidates at a time, which stay in the first cache. One more pass gives those that stay their nodes in the
order of the pool. Behind a barrier, which orders what the program has written before it reads it, parents are found
among them 64 x 64 at a time, and behind another the tables are made as build_topology makes them.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.topology.build_topology import (
    BLOCK_NODES,
    NOT_BEFORE,
    OUT_OF_RANGE,
    words_per_tile,
    write_tables,
)

_MAX_BLOCK = 512  # candidates of a pool at once: with more the assembler for SM 90 spills


@triton.jit
def _keys(scores, index, size):
    """Integers that compare as the scores do, and the least for what is no candidate."""
    score = tl.load(scores + index, mask=index < size, other=-float("inf"))
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # the two zeros are equal
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score > -float("inf"), key, -2147483648)


@triton.jit
def _count_from(scores, size, key, BLOCK: tl.constexpr):
    """How many keys are at least this one."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        keys = _keys(scores, start + tl.arange(0, BLOCK), size)
        count += (keys >= key).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def prune_tree_kernel(
    scores, tokens, parents, expanded, root_tokens,
    tree_tokens, pool_ids, draft_nodes,
    node_parents, depths, ancestors, first_child, next_sibling, num_nodes, status,
    size, nodes, words,
    BLOCK: tl.constexpr, BLOCK_NODES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Grid: (batch,)."""
    request = tl.program_id(0).to(tl.int64)
    scores += request * size
    tokens += request * size
    parents += request * size
    expanded += request * size
    tree_tokens += request * nodes
    pool_ids += request * nodes
    draft_nodes += request * nodes
    node_parents += request * nodes
    depths += request * nodes
    ancestors += request * nodes * words
    first_child += request * nodes
    next_sibling += request * nodes

    # The greatest key that at least `wanted` candidates reach: all above it stay, and the first of its equals.
    wanted = nodes - 1
    low = tl.full([], -2147483648, tl.int32)
    high = tl.full([], 2147483647, tl.int32)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, which never overflows
        enough = _count_from(scores, size, middle, BLOCK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        above += (_keys(scores, start + tl.arange(0, BLOCK), size) > low).to(tl.int32)
    equals = wanted - tl.sum(above, axis=0)
    above_so_far = tl.full([], 0, tl.int32)
    equal_so_far = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        key = _keys(scores, index, size)
        is_above = (key > low).to(tl.int32)
        is_equal = ((key == low) & (key > -2147483648)).to(tl.int32)
        before = equal_so_far + tl.cumsum(is_equal, axis=0) - is_equal
        stays = (is_above != 0) | ((is_equal != 0) & (before < equals))
        place = 1 + above_so_far + tl.cumsum(is_above, axis=0) - is_above + tl.minimum(before, equals)
        token = tl.load(tokens + index, mask=stays, other=-1)
        draft_node = tl.load(expanded + index, mask=stays, other=-1)
        tl.store(pool_ids + place, index, mask=stays)
        tl.store(tree_tokens + place, token, mask=stays)
        tl.store(draft_nodes + place, draft_node, mask=stays)
        above_so_far += tl.sum(is_above, axis=0)
        equal_so_far += tl.sum(is_equal, axis=0)
    count = 1 + above_so_far + tl.minimum(equal_so_far, equals)
    for start in range(0, nodes, BLOCK_NODES):
        node = start + tl.arange(0, BLOCK_NODES)
        rest = (node < nodes) & ((node >= count) | (node == 0))
        nothing = tl.full([BLOCK_NODES], -1, tl.int32)
        root = tl.load(root_tokens + request + nothing + 1, mask=node == 0, other=-1)
        tl.store(pool_ids + node, nothing, mask=rest)
        tl.store(tree_tokens + node, root, mask=rest)
        tl.store(draft_nodes + node, tl.where(node == 0, 0, -1), mask=rest)
    tl.debug_barrier()

    unsound = tl.zeros([BLOCK_NODES], tl.int32)
    for start in range(0, nodes, BLOCK_NODES):
        node = start + tl.arange(0, BLOCK_NODES)
        exists = (node > 0) & (node < count)
        candidate = tl.load(pool_ids + node, mask=exists, other=0)
        parent_candidate = tl.load(parents + candidate, mask=exists, other=-1)
        parent = tl.where(exists & (parent_candidate == -1), 0, -1)
        for other_start in range(0, count, BLOCK_NODES):
            other = other_start + tl.arange(0, BLOCK_NODES)
            kept = tl.load(pool_ids + other, mask=(other > 0) & (other < count), other=-1)
            same = (kept[None, :] == parent_candidate[:, None]) & (kept >= 0)[None, :]
            parent = tl.maximum(parent, tl.max(tl.where(same, other[None, :], -1), axis=1))
        unsound |= tl.where(exists & (parent < 0), OUT_OF_RANGE, 0)
        unsound |= tl.where(exists & (parent >= node), NOT_BEFORE, 0)
        tl.store(node_parents + node, tl.where(exists & (parent < node), parent, -1), mask=node < nodes)
    tl.debug_barrier()

    for start in range(0, nodes, BLOCK_NODES):
        node = start + tl.arange(0, BLOCK_NODES)
        write_tables(
            node_parents, node, count, nodes, words, depths, ancestors, first_child, next_sibling, BLOCK_NODES, WORDS
        )
    bits = tl.max(unsound & OUT_OF_RANGE, axis=0) | tl.max(unsound & NOT_BEFORE, axis=0)
    tl.store(status + request, bits)
    tl.store(num_nodes + request, count)


def prune_tree(arguments, outputs) -> None:
    """Launch on the tensors' device. What the tensors are is told in specdec_ops/ops/topology/contract.py."""
    batch, size = arguments.scores.shape
    words = outputs.ancestors.shape[2]
    with on(arguments.scores.device):
        prune_tree_kernel[(batch,)](
            arguments.scores, arguments.tokens, arguments.parents, arguments.expanded, arguments.root_tokens,
            *outputs, size, arguments.nodes, words,
            BLOCK=min(triton.next_power_of_2(size), _MAX_BLOCK), BLOCK_NODES=BLOCK_NODES,
            WORDS=words_per_tile(words), num_warps=8,
        )  # fmt: skip
