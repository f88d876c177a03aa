"""Levels of draft trees, in Triton: the program of a request does all of it, in one launch.

A level is a tile [rows, branching] of candidates. Each finds its rank by comparing with all of them, CHUNK at a time,
which are read and judged again rather than handed round: what makes a candidate is input, or was written by the launch
before. Its rank is the column of the frontier, and the node, that it becomes, so everything about it is stored from
where it is. That is quadratic in a level's candidates, of which there are 64 to 100: some 8,000 comparisons.
"""

import torch
import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on

LOGPROB_INVALID = tl.constexpr(1)
TOKEN_OUT_OF_RANGE = tl.constexpr(2)
MAX_EOS = 8
_TILE = 4096  # comparisons at once
_LEVEL = ["level", "first_parent", "first_candidate", "first_node"]  # other numbers in every launch of a round
_EOS = [f"eos_{i}" for i in range(MAX_EOS)]


@triton.jit
def _candidates(index, inside, tables, place, branching, draft_vocab, FIRST: tl.constexpr):
    """Token, score, parent and status bits of a level's candidates; -1 and -inf where there is none."""
    top_logprobs, top_tokens, active, draft_to_target, candidates, scores = tables
    first_parent, first_candidate = place
    if FIRST:
        parent = index * 0 - 1
        above = tl.zeros(index.shape, tl.float32)
        grows = inside
    else:
        parent = tl.load(candidates + first_parent + index // branching, mask=inside, other=-1)
        grows = inside & (parent >= 0) & (parent < first_candidate)
        above = tl.load(scores + parent, mask=grows, other=0.0)
    if active is not None:
        grows = grows & (tl.load(active + index * 0, mask=inside, other=0) != 0)
    token = tl.load(top_tokens + index, mask=grows, other=-1)
    logprob = tl.load(top_logprobs + index, mask=grows, other=0.0)
    impossible = token < -1
    if draft_to_target is not None:
        impossible = impossible | (token >= draft_vocab)
    possible = (token != -1) & (impossible == 0)
    valid = logprob < float("inf")  # not NaN either
    score = above + tl.where(logprob < 0.0, logprob, 0.0)
    exists = possible & valid & (score > -float("inf"))
    if draft_to_target is not None:
        token = tl.load(draft_to_target + token, mask=exists, other=-1)
    bits = tl.where(impossible, TOKEN_OUT_OF_RANGE, 0) | tl.where(possible & (valid == 0), LOGPROB_INVALID, 0)
    return (
        tl.where(exists, token, -1),
        tl.where(exists, score, -float("inf")),
        tl.where(exists, parent, -1),
        bits,
    )


@triton.jit
def _may_grow(token, score, eos):
    """The score, or -inf for what ends a text."""
    for i in tl.static_range(8):
        score = tl.where((token == eos[i]) & (token >= 0), -float("inf"), score)
    return score


@triton.jit
def _blank_pool(tables, size, nodes, words, BLOCK: tl.constexpr):
    """A pool whose draft has its root, and nothing else."""
    tokens, scores, parents, expanded, candidates, node_parents, depths, ancestors, first_child, next_sibling = tables
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        nothing = tl.full([BLOCK], -1, tl.int32)
        tl.store(tokens + place, nothing, mask=place < size)
        tl.store(parents + place, nothing, mask=place < size)
        tl.store(expanded + place, nothing, mask=place < size)
        tl.store(scores + place, tl.full([BLOCK], -float("inf"), tl.float32), mask=place < size)
    for start in range(0, nodes, BLOCK):
        node = start + tl.arange(0, BLOCK)
        nothing = tl.full([BLOCK], -1, tl.int32)
        tl.store(candidates + node, nothing, mask=node < nodes)
        tl.store(node_parents + node, nothing, mask=node < nodes)
        tl.store(first_child + node, nothing, mask=node < nodes)
        tl.store(next_sibling + node, nothing, mask=node < nodes)
        tl.store(depths + node, tl.zeros([BLOCK], tl.int32), mask=node < nodes)
    for start in range(0, nodes * words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(ancestors + word, (word == 0).to(tl.int64), mask=word < nodes * words)


@triton.jit(do_not_specialize=_LEVEL + _EOS)
def grow_tree_kernel(
    top_logprobs, top_tokens, active, draft_to_target,
    frontier_tokens, parent_rows, frontier_scores,
    tokens, scores, parents, expanded, candidates,
    node_parents, depths, ancestors, first_child, next_sibling, num_nodes, status,
    level, first_parent, first_candidate, first_node,
    eos_0, eos_1, eos_2, eos_3, eos_4, eos_5, eos_6, eos_7,
    rows, branching, width, size, nodes, words, draft_vocab,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr, BRANCHING: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (batch,)."""
    request = tl.program_id(0).to(tl.int64)
    count = rows * branching
    top_logprobs += request * count
    top_tokens += request * count
    frontier_tokens += request * width
    parent_rows += request * width
    frontier_scores += request * width
    tokens += request * size
    scores += request * size
    parents += request * size
    expanded += request * size
    candidates += request * nodes
    node_parents += request * nodes
    depths += request * nodes
    ancestors += request * nodes * words
    first_child += request * nodes
    next_sibling += request * nodes
    if active is not None:
        active += request
    if FIRST:
        _blank_pool(
            (tokens, scores, parents, expanded, candidates, node_parents, depths, ancestors, first_child, next_sibling),
            size, nodes, words, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()  # others' blanks come before what is written, and read, from here on

    row = tl.arange(0, ROWS)
    column = tl.arange(0, BRANCHING)
    inside = (row < rows)[:, None] & (column < branching)[None, :]
    index = row[:, None] * branching + column[None, :]
    tables = (top_logprobs, top_tokens, active, draft_to_target, candidates, scores)
    eos = (eos_0, eos_1, eos_2, eos_3, eos_4, eos_5, eos_6, eos_7)
    at = (first_parent, first_candidate)
    token, score, parent, bits = _candidates(index, inside, tables, at, branching, draft_vocab, FIRST)
    own = _may_grow(token, score, eos)
    rank = tl.zeros([ROWS, BRANCHING], tl.int32)
    for start in range(0, count, CHUNK):
        other = start + tl.arange(0, CHUNK)
        others, other_score, _, _ = _candidates(
            other, other < count, tables, at, branching, draft_vocab, FIRST
        )  # fmt: skip
        theirs = _may_grow(others, other_score, eos)[None, None, :]
        earlier = other[None, None, :] < index[:, :, None]
        better = (theirs > own[:, :, None]) | ((theirs == own[:, :, None]) & earlier)
        rank += tl.sum(better.to(tl.int32), axis=2)
    may_grow = own > -float("inf")
    chosen = may_grow & (rank < width)
    found = tl.minimum(tl.sum(tl.sum(may_grow.to(tl.int32), axis=1), axis=0), width)
    tl.debug_barrier()  # all have read the scores of parents

    place = first_candidate + index
    node = first_node + rank
    tl.store(tokens + place, token, mask=inside)
    tl.store(scores + place, score, mask=inside)
    tl.store(parents + place, parent, mask=inside)
    tl.store(expanded + place, tl.where(chosen, node, -1), mask=inside)
    tl.store(frontier_tokens + rank, token, mask=chosen)
    tl.store(parent_rows + rank, index // branching, mask=chosen)
    tl.store(frontier_scores + rank, score, mask=chosen)
    tl.store(candidates + node, place, mask=chosen)
    tl.store(node_parents + node, first_parent + index // branching, mask=chosen)
    tl.store(depths + node, tl.zeros([ROWS, BRANCHING], tl.int32) + level + 1, mask=chosen)
    tl.store(first_child + node, tl.full([ROWS, BRANCHING], -1, tl.int32), mask=chosen)

    # A node's next sibling is the next rank among those of its row.
    child = tl.min(tl.where(chosen, rank, 2147483647), axis=1)
    tl.store(first_child + first_parent + row, tl.where(child < width, first_node + child, -1), mask=row < rows)
    sibling = tl.full([ROWS, BRANCHING], 2147483647, tl.int32)
    for other_column in range(0, branching):
        is_other = chosen & (column == other_column)[None, :]
        other_rank = tl.max(tl.where(is_other, rank, -1), axis=1)[:, None]
        sibling = tl.where((other_rank > rank) & (other_rank < sibling), other_rank, sibling)
    tl.store(next_sibling + node, tl.where(sibling < width, first_node + sibling, -1), mask=chosen)

    for word in range(0, words):
        above = tl.load(ancestors + (first_parent + row).to(tl.int64) * words + word, mask=row < rows, other=0)
        bit = tl.full([ROWS, BRANCHING], 1, tl.int64) << (node & 63).to(tl.int64)
        seen = above[:, None] | tl.where((node >> 6) == word, bit, 0)
        tl.store(ancestors + node.to(tl.int64) * words + word, seen, mask=chosen)

    # Columns without a node.
    blank = tl.arange(0, WIDTH)
    missing = (blank >= found) & (blank < width)
    nothing = tl.full([WIDTH], -1, tl.int32)
    tl.store(frontier_tokens + blank, nothing, mask=missing)
    tl.store(parent_rows + blank, nothing, mask=missing)
    tl.store(frontier_scores + blank, tl.full([WIDTH], -float("inf"), tl.float32), mask=missing)
    tl.store(candidates + first_node + blank, nothing, mask=missing)
    tl.store(node_parents + first_node + blank, nothing, mask=missing)
    tl.store(depths + first_node + blank, tl.zeros([WIDTH], tl.int32), mask=missing)
    tl.store(first_child + first_node + blank, nothing, mask=missing)
    tl.store(next_sibling + first_node + blank, nothing, mask=missing)
    for word in range(0, words):
        none = tl.zeros([WIDTH], tl.int64)
        tl.store(ancestors + (first_node + blank).to(tl.int64) * words + word, none, mask=missing)

    bits = tl.max(tl.max(bits & LOGPROB_INVALID, axis=1), axis=0) | tl.max(
        tl.max(bits & TOKEN_OUT_OF_RANGE, axis=1), axis=0
    )  # fmt: skip
    if FIRST:
        tl.store(status + request, bits)
        tl.store(num_nodes + request, tl.where(found > 0, first_node + found, 1))
    else:
        before = tl.load(status + request)
        tl.store(status + request, before | bits)
        if found > 0:
            tl.store(num_nodes + request, first_node + found)


def tile_of(rows: int, branching: int) -> dict[str, int]:
    """A level's tile of candidates, and with how many others each is compared at once."""
    tile = triton.next_power_of_2(rows), triton.next_power_of_2(branching)
    chunk = min(triton.next_power_of_2(rows * branching), _TILE // (tile[0] * tile[1]))
    return {"ROWS": tile[0], "BRANCHING": tile[1], "CHUNK": max(1, chunk)}


def warps_of(rows: int, branching: int) -> int:
    """Few candidates of a level for each thread."""
    return max(4, min(triton.next_power_of_2(rows) * triton.next_power_of_2(branching) // 512, 32))


def grow_tree(arguments, outputs) -> None:
    """Launch on the tensors' device. What the tensors are is told in specdec_ops/ops/topology/contract.py."""
    a = arguments
    batch, rows, branching = a.top_logprobs.shape
    nodes, words = outputs.ancestors.shape[1:]
    width, size = outputs.frontier_tokens.shape[1], outputs.tokens.shape[1]
    device = a.top_logprobs.device
    with on(device):
        grow_tree_kernel[(batch,)](
            a.top_logprobs, a.top_tokens, None if a.active is None else a.active.view(torch.int8), a.draft_to_target,
            *outputs, a.level, a.first_parent, a.first_candidate, a.first_node,
            *a.eos, *[-1] * (MAX_EOS - len(a.eos)), rows, branching, width, size, nodes, words,
            0 if a.draft_to_target is None else a.draft_to_target.shape[0],
            FIRST=a.level == 0, WIDTH=triton.next_power_of_2(max(width, 1)), BLOCK=256,
            **tile_of(rows, branching), num_warps=warps_of(rows, branching),
        )  # fmt: skip
