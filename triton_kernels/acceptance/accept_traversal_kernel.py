"""Traversal verification (2505.12398), from the leaves to the root; on a chain, block verification (2403.10444).

One program owns one request. It goes down into the first child that is left, with

    alpha(child) = min(1, alpha p(x) / q(x)),   alpha(node 0) = 1,

and where there is none accepts the whole path with probability alpha. Otherwise the node is deleted; at its parent,
with S = sum (alpha p - q)+, p becomes (alpha p - q)+ normalised, alpha becomes S / (S + 1 - alpha), and without
replacement q loses x. In terms of the weights w of accept_state.py, whose sum is N: c grows by
N / (alpha remaining), S is alpha N' / N. A child of weight 0 is deleted without a look at what is below it.

Each node on the path keeps its distributions, c, N and alpha in scratch, so coming back to a parent costs one pass over
its pair of rows (for the new N) and reads nothing twice from memory that L2 still holds. The excluded tokens of one
node at a time are in the bit set; they are the siblings that were deleted, so the set can be made anew from the tree.

A node belongs to the first parent that has tried it. That is the tree's own structure; in malformed links, which may
share nodes, it keeps every node to one visit, so the time is bounded by the nodes.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import BONUS, RESIDUAL, node_coin
from specdec_ops.triton_kernels.common.token_rows import DRAFT_INVALID, TARGET_INVALID

from .accept_state import (
    ALPHA,
    HEAD,
    MAX_FACTOR,
    NODE_WORDS,
    PARENT,
    PROPOSAL,
    REJECTED,
    REMAINING,
    REMOVED,
    ROW_READ,
    SUM,
    TARGET_ROW,
    TERM_BEFORE,
    TERM_FACTOR,
    TOKEN_IMPOSSIBLE,
    TREE_INVALID,
    UNCLAIMED,
    draft_proposal,
    draw,
    exclude,
    finish_outputs,
    first_child,
    get_float,
    get_int,
    include,
    is_end,
    is_excluded,
    is_next_end,
    next_sibling,
    put_float,
    put_int,
    read_proposal,
    read_row,
    residual_sums,
    residual_weight,
    take_from_draft,
    write_path,
)


@triton.jit
def _open_level(state, node, alpha):
    at = state + node * NODE_WORDS
    tl.debug_barrier()
    tl.store(at + ALPHA, alpha.to(tl.int32, bitcast=True))
    tl.store(at + SUM, (alpha * 0.0 + 1.0).to(tl.int32, bitcast=True))
    tl.store(at + REMAINING, (alpha * 0.0 + 1.0).to(tl.int32, bitcast=True))
    tl.store(at + ROW_READ, 0)
    tl.store(at + REJECTED, 0)
    tl.store(at + HEAD, -1)
    tl.store(at + PROPOSAL, 0)
    tl.debug_barrier()


@triton.jit
def _mark(request, node, TAKE: tl.constexpr):
    """Put the tokens that are excluded at the node into the bit set, or take them all out."""
    child, token, _ = first_child(request.tree, node)
    while child >= 0:
        if get_int(request.state, child, PARENT) == node:
            if get_int(request.state, child, REMOVED) == 1:
                if TAKE:
                    include(request.excluded, token)
                else:
                    exclude(request.excluded, token)
            child, token, _ = next_sibling(request.tree, child)
        else:  # not tried yet, or not the node's: the list has no removed ones after it
            child = tl.full([], -1, tl.int32)


@triton.jit
def _use_marks_of(request, node, marked):
    """Make the bit set that of the node; gives the node back."""
    if marked != node:
        if marked >= 0:
            _mark(request, marked, True)
        _mark(request, node, False)
    return node


@triton.jit
def _reject(request, node, child, token, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Update a node, whose marks are in use, after its child was deleted."""
    state, weighted = request.state, request.weighted
    alpha = get_float(state, node, ALPHA)
    total = get_float(state, node, SUM)
    remaining = get_float(state, node, REMAINING)
    head = get_int(state, node, HEAD)
    put_int(state, node, REJECTED, 1)
    alive = (alpha > 0.0) & (total > 0.0)
    if request.draft.logits is not None:
        if weighted:
            factor = tl.where(alive, tl.div_rn(total, tl.where(alive, alpha * remaining, 1.0)), 0.0)
            if CHILD_ROWS:
                put_int(state, child, TERM_BEFORE, head)
                head = child
                put_int(state, node, HEAD, head)
            else:
                factor += get_float(state, node, TERM_FACTOR)
            put_float(state, head, TERM_FACTOR, tl.minimum(factor, MAX_FACTOR))
    w, _ = residual_weight(request, node, head, True, token, True)
    if not is_excluded(request.excluded, token, True):
        exclude(request.excluded, token)
        put_int(state, child, REMOVED, 1)
    left = total - w
    if weighted | (left < 0.0009765625):
        left, free = residual_sums(request, node, head, BLOCK)
        if request.draft.logits is not None:
            if weighted & (not REPLACEMENT) & (not CHILD_ROWS):
                free = take_from_draft(request, node, free, BLOCK)
                put_float(state, node, REMAINING, free)
    put_float(state, node, SUM, left)
    # The loss of a child has the probability S + 1 - alpha, so what the difference loses is lost as rarely.
    kept = tl.where(alive, alpha.to(tl.float64) * left / tl.where(alive, total, 1.0), 0.0)
    if kept > 0.0:
        put_float(state, node, ALPHA, (kept / (kept + (1.0 - alpha.to(tl.float64)))).to(tl.float32))
    elif node != 0:
        put_float(state, node, ALPHA, alpha * 0.0)


@triton.jit
def _proposal_of(request, node, child, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr):
    """Whether there is a sound row that the child was drawn from, read at its first use, and the status bit if not."""
    if CHILD_ROWS:
        sound = read_proposal(request, child, FILTER, BLOCK)
    else:
        if get_int(request.state, node, PROPOSAL) == 0:
            fresh = read_proposal(request, node, FILTER, BLOCK)
            put_int(request.state, node, TERM_BEFORE, -1)
            put_int(request.state, node, HEAD, tl.where(fresh, node, -1))
            put_int(request.state, node, PROPOSAL, tl.where(fresh, 1, 2))
        sound = get_int(request.state, node, PROPOSAL) == 1
    return sound, tl.where(sound, 0, DRAFT_INVALID)


@triton.jit
def _weight_of(
    request, node, child, token, status, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Alpha of a child, or what to do without one: (alpha, verdict, status).

    verdict 0: alpha holds. 1: the child was not drawn from q, it is rejected without an update. 2: there is no q left
    to have drawn it or its later siblings from. 3: there is no q for this child.
    """
    state = request.state
    alpha = tl.full([], 0.0, tl.float32)
    verdict = tl.full([], 0, tl.int32)
    remaining = get_float(state, node, REMAINING)
    if request.draft.logits is not None:
        if request.weighted:
            sound, bits = _proposal_of(request, node, child, CHILD_ROWS, FILTER, BLOCK)
            status |= bits
            if CHILD_ROWS:
                verdict = tl.where(sound, 0, 3)
            else:
                verdict = tl.where(sound & (remaining > 0.0), 0, 2)
    if verdict == 0:
        w, _ = residual_weight(request, node, get_int(state, node, HEAD), True, token, True)
        q = tl.full([], 1.0, tl.float32)
        drawable = True
        if request.draft.logits is not None:
            if request.weighted:
                holder = child if CHILD_ROWS else node
                q, drawable = draft_proposal(request, holder, token)
                if (not REPLACEMENT) & (not CHILD_ROWS):
                    drawable = drawable & (is_excluded(request.excluded, token, True) == 0)
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


@triton.jit
def accept_traversal(
    request, bits, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr,
    DRAFT_FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One request. bits: its status so far. Its nodes in scratch are UNCLAIMED, and no token is excluded."""
    target, tree, state = request.target, request.tree, request.state
    node = tl.full([], 0, tl.int32)
    depth = tl.full([], 0, tl.int32)
    marked = tl.full([], -1, tl.int32)
    last = tl.full([], -1, tl.int32)  # the child of the node that was tried last
    stopped = tl.full([], 0, tl.int32)  # whether the node's later children are not tried
    at_end = tl.full([], 0, tl.int32)
    walking = tl.full([], 1, tl.int32)
    _open_level(state, node, tl.full([], 1.0, tl.float32))
    while walking != 0:
        child = tl.full([], -1, tl.int32)
        token = tl.full([], -1, tl.int32)
        wrong = tl.full([], 0, tl.int32)
        if (stopped == 0) & (depth < tree.max_depth) & (at_end == 0):
            if last < 0:
                child, token, wrong = first_child(tree, node)
            else:
                child, token, wrong = next_sibling(tree, last)
        child, bits = _claim(state, node, child, bits | wrong)
        deleted = tl.full([], -1, tl.int32)
        if child < 0:
            u = node_coin(request.seed, request.position, node, 0)
            if (node == 0) | (u < get_float(state, node, ALPHA).to(tl.float64)):
                walking = tl.full([], 0, tl.int32)
            else:
                deleted = node
                token = tl.load(tree.tokens + node * tree.token_stride)
                node = get_int(state, node, PARENT)
                depth -= 1
        elif (token < 0) | (token >= target.size):
            bits |= TOKEN_IMPOSSIBLE
            put_int(state, node, REJECTED, 1)
            last = child

        # A child is to be tried, or one was deleted, or the next token comes from here: all need the node's row.
        trying = (child >= 0) & (token >= 0) & (token < target.size)
        used = trying | (deleted >= 0) | ((walking == 0) & (at_end == 0))
        if used & (get_int(state, node, ROW_READ) == 0):
            _, sound, _ = read_row(state, node, TARGET_ROW, target, FILTER, True, False, BLOCK)
            bits |= tl.where(sound, 0, TARGET_INVALID)
            put_int(state, node, ROW_READ, 1)
        if used:
            marked = _use_marks_of(request, node, marked)
        if trying:
            last = child
            alpha, verdict, bits = _weight_of(
                request, node, child, token, bits, REPLACEMENT, CHILD_ROWS, DRAFT_FILTER, BLOCK
            )
            if verdict == 0:
                if alpha > 0.0:
                    _open_level(state, child, alpha)
                    node = child
                    depth += 1
                    last = tl.full([], -1, tl.int32)
                    at_end = is_end(token, request.eos).to(tl.int32)
                else:
                    deleted = child
            elif verdict == 1:
                put_int(state, node, REJECTED, 1)
            elif verdict == 2:
                stopped = tl.full([], 1, tl.int32)
        if deleted >= 0:
            _reject(request, node, deleted, token, REPLACEMENT, CHILD_ROWS, BLOCK)
            last = deleted
            stopped = tl.full([], 0, tl.int32)
            at_end = tl.full([], 0, tl.int32)

    following = tl.full([], -1, tl.int32)
    if at_end == 0:
        domain = tl.where(get_int(state, node, REJECTED) != 0, RESIDUAL, BONUS)
        head = get_int(state, node, HEAD)
        following, empty = draw(request, node, head, 0.0, 1.0, 0.0, request.position, domain, node, False, BLOCK)
        bits |= empty
    at_end |= is_next_end(following, request.eos)
    tl.store(request.outputs.next_tokens + request.index, following)
    write_path(request, node, depth, 1)
    finish_outputs(request, depth, depth + 1, following, bits, at_end)
