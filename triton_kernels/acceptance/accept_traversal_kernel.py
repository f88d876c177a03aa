"""Traversal verification (2505.12398), from the leaves to the root; on a chain, block verification (2403.10444).

One program owns one request. It goes down into the first child that is left, with

    alpha(child) = min(1, alpha p(x) / q(x)),   alpha(node 0) = 1,

and where there is none accepts the whole path with probability alpha. Otherwise the node is deleted; at its parent,
with S = sum (alpha p - q)+, p becomes (alpha p - q)+ normalised, alpha becomes S / (S + 1 - alpha), and without
replacement q loses x. In terms of the weights w of accept_state.py, whose sum is N: c grows by
N / (alpha remaining), S is alpha N' / N. A child of weight 0 is deleted without a look at what is below it.

Each node on the path keeps its laws, c, N and alpha in scratch, so coming back to a parent costs one pass over its pair
of rows (for the new N) and reads nothing twice from memory that L2 still holds. The excluded tokens of one node at a
time are in the bit set; they are the siblings that were deleted, so the set can be made anew from the tree.

A node belongs to the first parent that has tried it. That is the tree's own structure; in malformed links, which may
share nodes, it keeps every node to one visit, so the time is bounded by the nodes.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import BONUS, RESIDUAL, node_coin
from specdec_ops.triton_kernels.common.token_rows import DRAFT_INVALID, TARGET_INVALID, request_law, request_setting

from .accept_kernels import VOLATILE, finish_outputs, node_count, read_proposal, request_seed, write_path
from .accept_state import (
    ALPHA,
    HEAD,
    LAW_READ,
    MOST_FACTOR,
    NODE_WORDS,
    PARENT,
    PROPOSAL,
    REJECTED,
    REMAINING,
    REMOVED,
    SUM,
    TARGET_LAW,
    TERM_BEFORE,
    TERM_FACTOR,
    TOKEN_IMPOSSIBLE,
    TREE_INVALID,
    UNCLAIMED,
    draft_proposal,
    draw,
    exclude,
    fill,
    get_float,
    get_int,
    include,
    is_end,
    is_excluded,
    is_next_end,
    put_float,
    put_int,
    residual_sums,
    residual_weight,
    step,
    take_from_draft,
    write_law,
)


@triton.jit
def _open_level(state, node, alpha):
    at = state + node * NODE_WORDS
    tl.debug_barrier()
    tl.store(at + ALPHA, alpha.to(tl.int32, bitcast=True))
    tl.store(at + SUM, (alpha * 0.0 + 1.0).to(tl.int32, bitcast=True))
    tl.store(at + REMAINING, (alpha * 0.0 + 1.0).to(tl.int32, bitcast=True))
    tl.store(at + LAW_READ, 0)
    tl.store(at + REJECTED, 0)
    tl.store(at + HEAD, -1)
    tl.store(at + PROPOSAL, 0)
    tl.debug_barrier()


@triton.jit
def _mark(state, excluded, tokens, token_stride, first_child, next_sibling, count, columns, node, TAKE: tl.constexpr):
    """Put the tokens that are excluded at the node into the bit set, or take them all out."""
    child, token, _ = step(node, first_child, tokens, token_stride, count, columns, False)
    while child >= 0:
        if get_int(state, child, PARENT) == node:
            if get_int(state, child, REMOVED) == 1:
                if TAKE:
                    include(excluded, token)
                else:
                    exclude(excluded, token)
            child, token, _ = step(child, next_sibling, tokens, token_stride, count, columns, True)
        else:  # not tried yet, or not the node's: the list has no removed ones after it
            child = tl.full([], -1, tl.int32)


@triton.jit
def _use_marks_of(node, marked, state, excluded, tokens, token_stride, first_child, next_sibling, count, columns):
    """Make the bit set that of the node; gives the node back."""
    if marked != node:
        if marked >= 0:
            _mark(state, excluded, tokens, token_stride, first_child, next_sibling, count, columns, marked, True)
        _mark(state, excluded, tokens, token_stride, first_child, next_sibling, count, columns, node, False)
    return node


@triton.jit
def _reject(
    row, size, draft, draft_stride, target_to_draft, state, excluded, node, child, token, weighed,
    REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a node, whose marks are in use, after its child was deleted."""
    alpha = get_float(state, node, ALPHA)
    total = get_float(state, node, SUM)
    remaining = get_float(state, node, REMAINING)
    head = get_int(state, node, HEAD)
    put_int(state, node, REJECTED, 1)
    alive = (alpha > 0.0) & (total > 0.0)
    if draft is not None:
        if weighed:
            factor = tl.where(alive, total / tl.where(alive, alpha * remaining, 1.0), 0.0)
            if CHILD_ROWS:
                put_int(state, child, TERM_BEFORE, head)
                head = child
                put_int(state, node, HEAD, head)
            else:
                factor += get_float(state, node, TERM_FACTOR)
            put_float(state, head, TERM_FACTOR, tl.minimum(factor, MOST_FACTOR))
    w, _ = residual_weight(row, draft, draft_stride, target_to_draft, state, excluded, node, head, True, token, True)
    if not is_excluded(excluded, token, True):
        exclude(excluded, token)
        put_int(state, child, REMOVED, 1)
    left = total - w
    if weighed | (left < 0.0009765625):
        left, free = residual_sums(row, size, draft, draft_stride, target_to_draft, state, excluded, node, head, BLOCK)
        if draft is not None:
            if weighed & (not REPLACEMENT) & (not CHILD_ROWS):
                free = take_from_draft(draft, draft_stride, size, target_to_draft, state, excluded, node, free, BLOCK)
                put_float(state, node, REMAINING, free)
    put_float(state, node, SUM, left)
    # The loss of a child has the probability S + 1 - alpha, so what the difference loses is lost as rarely.
    kept = tl.where(alive, alpha.to(tl.float64) * left / tl.where(alive, total, 1.0), 0.0)
    if kept > 0.0:
        put_float(state, node, ALPHA, (kept / (kept + (1.0 - alpha.to(tl.float64)))).to(tl.float32))
    elif node != 0:
        put_float(state, node, ALPHA, alpha * 0.0)


@triton.jit
def _proposal_of(
    draft, draft_stride, draft_size, state, node, child, temperature, top_k, top_p, CHILD_ROWS: tl.constexpr,
    FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether there is a sound row that the child was drawn from, read at its first use, and the status bit if not."""
    if CHILD_ROWS:
        sound = read_proposal(draft, draft_stride, draft_size, state, child, temperature, top_k, top_p, FILTER, BLOCK)
    else:
        if get_int(state, node, PROPOSAL) == 0:
            fresh = read_proposal(
                draft, draft_stride, draft_size, state, node, temperature, top_k, top_p, FILTER, BLOCK
            )
            put_int(state, node, TERM_BEFORE, -1)
            put_int(state, node, HEAD, tl.where(fresh, node, -1))
            put_int(state, node, PROPOSAL, tl.where(fresh, 1, 2))
        sound = get_int(state, node, PROPOSAL) == 1
    return sound, tl.where(sound, 0, DRAFT_INVALID)


@triton.jit
def _weight_of(
    row, size, draft, draft_stride, draft_size, target_to_draft, state, excluded, node, child, token, weighed,
    temperature, top_k, top_p, status, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Alpha of a child, or what to do without one: (alpha, verdict, status).

    verdict 0: alpha holds. 1: the child was not drawn from q, it is rejected without an update. 2: there is no q left
    to have drawn it or its later siblings from. 3: there is no q for this child.
    """
    alpha = tl.full([], 0.0, tl.float32)
    verdict = tl.full([], 0, tl.int32)
    remaining = get_float(state, node, REMAINING)
    if draft is not None:
        if weighed:
            sound, bits = _proposal_of(draft, draft_stride, draft_size, state, node, child, temperature, top_k, top_p,
                                       CHILD_ROWS, FILTER, BLOCK)  # fmt: skip
            status |= bits
            if CHILD_ROWS:
                verdict = tl.where(sound, 0, 3)
            else:
                verdict = tl.where(sound & (remaining > 0.0), 0, 2)
    if verdict == 0:
        head = get_int(state, node, HEAD)
        w, _ = residual_weight(
            row, draft, draft_stride, target_to_draft, state, excluded, node, head, True, token, True
        )
        q = tl.full([], 1.0, tl.float32)
        drawable = True
        if draft is not None:
            if weighed:
                holder = child if CHILD_ROWS else node
                q, drawable = draft_proposal(draft, draft_stride, target_to_draft, state, holder, token)
                if (not REPLACEMENT) & (not CHILD_ROWS):
                    drawable = drawable & (is_excluded(excluded, token, True) == 0)
        total = get_float(state, node, SUM)
        if not drawable:
            verdict = tl.full([], 1, tl.int32)
            status |= TOKEN_IMPOSSIBLE
        elif (w > 0.0) & (total > 0.0):
            most = q.to(tl.float64) * total
            weight = get_float(state, node, ALPHA).to(tl.float64) * w * remaining
            alpha = tl.where(weight < most, weight / tl.where(most > 0.0, most, 1.0), 1.0).to(tl.float32)
    return alpha, verdict, status


@triton.jit
def _claim(state, node, child, status):
    """Make the child the node's, unless another parent has it: that ends the list, and is reported."""
    if child >= 0:
        owner = get_int(state, child, PARENT)
        if (owner == UNCLAIMED) | (owner == node):
            put_int(state, child, PARENT, node)
            put_int(state, child, REMOVED, 0)
        else:
            status |= TREE_INVALID
            child = tl.full([], -1, tl.int32)
    return child, status


@triton.jit(do_not_specialize=VOLATILE)
def accept_traversal_kernel(
    target, draft_tokens, draft, target_to_draft, first_child, next_sibling, num_nodes, temperatures, top_ks, top_ps,
    draft_temperatures, draft_top_ks, draft_top_ps, seeds, positions, tokens, nodes, num_accepted, next_tokens, status,
    finished, scratch, target_batch_stride, target_node_stride, token_batch_stride, token_stride, draft_batch_stride,
    draft_node_stride, first_batch_stride, next_batch_stride, num_nodes_stride, scratch_stride, columns, size,
    draft_size, max_depth, width, temperature, top_k, top_p, draft_temperature, draft_top_k, draft_top_p, seed_low,
    seed_high, position, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7, threshold_a, threshold_b,
    RULE: tl.constexpr, IDS: tl.constexpr, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr,
    DRAFT_FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (batch,). Arguments as in accept_walk_kernel."""
    request = tl.program_id(0).to(tl.int64)
    target += request * target_batch_stride
    draft_tokens += request * token_batch_stride
    if first_child is not None:
        first_child += request * first_batch_stride
        next_sibling += request * next_batch_stride
    else:
        draft_tokens -= token_stride  # a chain has no column for node 0
    if draft is not None:
        draft += request * draft_batch_stride
    count, bits = node_count(num_nodes, num_nodes_stride, request, columns)
    seed = request_seed(seeds, seed_low, seed_high, request)
    place = request_setting(position, positions, request)
    heat, k, p, wrong_law = request_law(temperature, temperatures, top_k, top_ks, top_p, top_ps, request)
    draft_heat, draft_k, draft_p, wrong_draft_law = request_law(
        draft_temperature, draft_temperatures, draft_top_k, draft_top_ks, draft_top_p, draft_top_ps, request
    )
    weighed = (heat > 0.0) & (draft is not None)
    bits |= wrong_law | tl.where(weighed, wrong_draft_law, 0)
    excluded = scratch + request * scratch_stride
    words = (size + 31) // 32
    fill(excluded, words, 0, BLOCK)
    state = excluded + words
    fill(state, columns * NODE_WORDS, UNCLAIMED, BLOCK)

    node = tl.full([], 0, tl.int32)
    depth = tl.full([], 0, tl.int32)
    marked = tl.full([], -1, tl.int32)
    last = tl.full([], -1, tl.int32)  # the child of the node that was tried last
    stopped = tl.full([], 0, tl.int32)  # whether the node's later children are not tried
    at_end = tl.full([], 0, tl.int32)
    walking = tl.full([], 1, tl.int32)
    row = target
    _open_level(state, node, tl.full([], 1.0, tl.float32))
    while walking != 0:
        row = target + node.to(tl.int64) * target_node_stride
        child = tl.full([], -1, tl.int32)
        token = tl.full([], -1, tl.int32)
        wrong = tl.full([], 0, tl.int32)
        if (stopped == 0) & (depth < max_depth) & (at_end == 0):
            if last < 0:
                child, token, wrong = step(node, first_child, draft_tokens, token_stride, count, columns, False)
            else:
                child, token, wrong = step(last, next_sibling, draft_tokens, token_stride, count, columns, True)
        child, bits = _claim(state, node, child, bits | wrong)
        deleted = tl.full([], -1, tl.int32)
        if child < 0:
            u = node_coin(seed, place, node, 0)
            if (node == 0) | (u < get_float(state, node, ALPHA).to(tl.float64)):
                walking = tl.full([], 0, tl.int32)
            else:
                deleted = node
                token = tl.load(draft_tokens + node * token_stride)
                node = get_int(state, node, PARENT)
                row = target + node.to(tl.int64) * target_node_stride
                depth -= 1
        elif (token < 0) | (token >= size):
            bits |= TOKEN_IMPOSSIBLE
            put_int(state, node, REJECTED, 1)
            last = child

        # A child is to be tried, or one was deleted, or the next token comes from here: all need the node's row.
        trying = (child >= 0) & (token >= 0) & (token < size)
        used = trying | (deleted >= 0) | ((walking == 0) & (at_end == 0))
        if used & (get_int(state, node, LAW_READ) == 0):
            _, sound, _ = write_law(state, node, TARGET_LAW, row, size, heat, k, p, FILTER, True, False, BLOCK)
            bits |= tl.where(sound, 0, TARGET_INVALID)
            put_int(state, node, LAW_READ, 1)
        if used:
            marked = _use_marks_of(node, marked, state, excluded, draft_tokens, token_stride, first_child, next_sibling,
                                   count, columns)  # fmt: skip
        if trying:
            last = child
            alpha, verdict, bits = _weight_of(
                row, size, draft, draft_node_stride, draft_size, target_to_draft, state, excluded, node, child, token,
                weighed, draft_heat, draft_k, draft_p, bits, REPLACEMENT, CHILD_ROWS, DRAFT_FILTER, BLOCK,
            )  # fmt: skip
            if verdict == 0:
                if alpha > 0.0:
                    _open_level(state, child, alpha)
                    node = child
                    depth += 1
                    last = tl.full([], -1, tl.int32)
                    at_end = is_end(token, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7).to(tl.int32)
                else:
                    deleted = child
            elif verdict == 1:
                put_int(state, node, REJECTED, 1)
            elif verdict == 2:
                stopped = tl.full([], 1, tl.int32)
        if deleted >= 0:
            _reject(row, size, draft, draft_node_stride, target_to_draft, state, excluded, node, deleted, token,
                    weighed, REPLACEMENT, CHILD_ROWS, BLOCK)  # fmt: skip
            last = deleted
            stopped = tl.full([], 0, tl.int32)
            at_end = tl.full([], 0, tl.int32)

    following = tl.full([], -1, tl.int32)
    if at_end == 0:
        domain = tl.where(get_int(state, node, REJECTED) != 0, RESIDUAL, BONUS)
        following, empty = draw(row, size, draft, draft_node_stride, target_to_draft, state, excluded, node,
                                get_int(state, node, HEAD), 0.0, 1.0, 0.0, seed, place, domain, node, False,
                                BLOCK)  # fmt: skip
        bits |= empty
    at_end |= is_next_end(following, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7)
    tl.store(next_tokens + request, following)
    write_path(draft_tokens, token_stride, state, tokens, nodes, request, max_depth, node, depth, 1)
    finish_outputs(tokens, nodes, num_accepted, status, finished, request, max_depth, depth, depth + 1, following, bits,
                   at_end)  # fmt: skip
