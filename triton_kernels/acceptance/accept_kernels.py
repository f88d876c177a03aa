"""Acceptance rules that walk from the root: greedy, match, recursive, target_only and kseq.

One program owns one request and does all of it in one launch: at a node it reads the target's row (rows.py), tries the
drafted children in ascending order, and goes on to the first that is accepted, or draws the next token from what is
left of the row it stands at. So it reads the rows on the accepted path and no others, and no probabilities are written.
Bytes: (accepted + 1) rows of the target, and for rules that need q as many of the draft, from memory once and from L2
for the second pass and the race; one more pass over the pair of rows for each rejected sibling.

One program per request keeps the machine busy at large batches and leaves most of it idle at small ones, where a row
takes as long as one multiprocessor needs to read it. Splitting rows over programs would take a launch per node of the
path, or programs that wait for each other; the CUDA backend does that, this one stays at one launch.

Decisions compare u * left < right in float64, with u the middle of one of 2^23 intervals: strictly, so that what is
impossible is never accepted, and exactly, so that p == q always is.

    recursive  u q(x) / remaining < w(x) / sum(w). A rejection adds sum(w) / remaining to c and excludes x. This is
               SpecInfer's, MCSD's and Sequoia's rule, and on a chain Leviathan's and Chen's. Without q (proposals that
               are functions of the prefix, and temperature 0) q(x) is 1 and sum(w) just loses w(x).
    target_only: SGLang's; one coin per node against the mass of the distinct children tried so far.
    kseq       SpecTr's K-SEQ: u rho q(x) < p(x), residual p - gain * min(q, p / rho).
    match      the child that is the token plain sampling draws there; greedy: that is the argmax.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import BONUS, RESIDUAL, SAMPLE, node_coin
from specdec_ops.triton_kernels.common.token_rows import DRAFT_INVALID, TARGET_INVALID, request_law, request_setting

from .accept_state import (
    DRAFT_LAW,
    NODE_WORDS,
    PARENT,
    TARGET_LAW,
    TERM_BEFORE,
    TERM_FACTOR,
    TOKEN_IMPOSSIBLE,
    TREE_INVALID,
    draft_probability,
    draft_proposal,
    draw,
    exclude,
    fill,
    get_int,
    include,
    is_end,
    is_excluded,
    is_next_end,
    probability,
    put_float,
    put_int,
    residual_sums,
    residual_weight,
    step,
    take_from_draft,
    write_law,
)

GREEDY = tl.constexpr(0)
MATCH = tl.constexpr(1)
RECURSIVE = tl.constexpr(2)
TARGET_ONLY = tl.constexpr(3)
KSEQ = tl.constexpr(4)

# Arguments that change from call to call: no recompilation for a value that happens to be 1 or a multiple of 16. The
# sizes and strides of rows are not among them: loads of 16 bytes need to know that rows are aligned.
VOLATILE = [
    "token_batch_stride", "token_stride", "first_batch_stride", "next_batch_stride", "num_nodes_stride",
    "scratch_stride", "columns", "max_depth", "width", "top_k", "draft_top_k", "seed_low", "seed_high", "position",
    "eos0", "eos1", "eos2", "eos3", "eos4", "eos5", "eos6", "eos7",
]  # fmt: skip


@triton.jit
def request_seed(seeds, seed_low, seed_high, request):
    if seeds is not None:
        return tl.load(seeds + request)
    else:
        return (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def node_count(num_nodes, num_nodes_stride, request, columns):
    """Nodes of the request, at least 1 and at most those there are columns for, and the status bit if that is news."""
    given = tl.load(num_nodes + request * num_nodes_stride)
    count = tl.minimum(tl.maximum(given, 1), columns)
    return count, tl.where(count == given, 0, TREE_INVALID)


@triton.jit
def finish_outputs(
    tokens, nodes, num_accepted, status, finished, request, max_depth, accepted, nodes_on_path, following, bits, ended,
):  # fmt: skip
    """Write what follows the accepted tokens: the next token, unless it is -1, then -1. ended: whether the text is."""
    for start in range(0, max_depth + 1, 64):
        at = start + tl.arange(0, 64)
        row = request * (max_depth + 1) + at
        tl.store(tokens + row, tl.where(at == accepted, following, -1), mask=(at >= accepted) & (at <= max_depth))
        tl.store(nodes + row, -1, mask=(at >= nodes_on_path) & (at <= max_depth))
    tl.store(num_accepted + request, accepted)
    tl.store(status + request, bits)
    tl.store(finished + request, ended.to(tl.int8))


@triton.jit
def write_path(draft_tokens, token_stride, state, tokens, nodes, request, max_depth, node, depth, FIRST: tl.constexpr):
    """Write the path that ends at a node of this depth, along the claims, and its tokens from depth FIRST on."""
    out = request * (max_depth + 1)
    while depth >= 0:
        tl.store(nodes + out + depth, node)
        if depth >= FIRST:
            tl.store(tokens + out + depth - FIRST, tl.load(draft_tokens + node * token_stride))
        node = get_int(state, node, PARENT)
        depth -= 1


@triton.jit
def read_proposal(
    draft, draft_stride, draft_size, state, node, temperature, top_k, top_p, FILTER: tl.constexpr, BLOCK: tl.constexpr
):
    """Read a row of the draft and make it the newest term, with factor 0; whether it is sound."""
    _, sound, _ = write_law(state, node, DRAFT_LAW, draft + node.to(tl.int64) * draft_stride, draft_size, temperature,
                            top_k, top_p, FILTER, True, False, BLOCK)  # fmt: skip
    put_float(state, node, TERM_FACTOR, temperature * 0.0)
    return sound


@triton.jit
def _follow(
    node, wanted, size, tokens, token_stride, first_child, next_sibling, count, columns, deep, status,
    IDS: tl.constexpr,
):  # fmt: skip
    """The lowest child that is the wanted token, and the status."""
    child, token, bits = step(node, first_child, tokens, token_stride, tl.where(deep, 0, count), columns, False)
    status |= tl.where(deep, 0, bits)
    accepted = tl.full([], -1, tl.int32)
    while (child >= 0) & (accepted < 0):
        possible = token >= 0
        if not IDS:
            possible = possible & (token < size)
        if not possible:
            status |= TOKEN_IMPOSSIBLE
        if possible & (token == wanted):
            accepted = child
        else:
            child, token, bits = step(child, next_sibling, tokens, token_stride, count, columns, True)
            status |= bits
    return accepted, status


@triton.jit
def _by_coin(
    row, size, state, excluded, tokens, token_stride, first_child, next_sibling, count, columns, node, deep, seed,
    position, single, accumulated, status,
):  # fmt: skip
    """One coin for all children of the node. (accepted child or -1, whether any was rejected, status)."""
    u = node_coin(seed, position, node, 1)
    mass = tl.full([], 0.0, tl.float32)
    rejected = tl.full([], 0, tl.int32)
    accepted = tl.full([], -1, tl.int32)
    child, token, bits = step(node, first_child, tokens, token_stride, tl.where(deep, 0, count), columns, False)
    status |= tl.where(deep, 0, bits)
    while (child >= 0) & (accepted < 0):
        possible = (token >= 0) & (token < size)
        if not possible:
            status |= TOKEN_IMPOSSIBLE
            rejected = tl.full([], 1, tl.int32)
        elif not is_excluded(excluded, token, possible):
            p = probability(row, state, node, TARGET_LAW, token, possible)
            mass += p
            if ((p > 0.0) & (p >= single)) | (u * accumulated < mass.to(tl.float64)):
                accepted = child
            else:
                rejected = tl.full([], 1, tl.int32)
                exclude(excluded, token)
        if accepted < 0:
            child, token, bits = step(child, next_sibling, tokens, token_stride, count, columns, True)
            status |= bits
    return accepted, rejected, status


@triton.jit
def _recursive(
    row, size, draft, draft_stride, draft_size, target_to_draft, state, excluded, tokens, token_stride, first_child,
    next_sibling, count, columns, node, deep, weighed, temperature, top_k, top_p, seed, position, status,
    REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Test each child against what the rejections before it have left of the row.

    weighed: whether proposals have a q. Returns (accepted child or -1, whether any was rejected, newest term, status).
    """
    rejected = tl.full([], 0, tl.int32)
    accepted = tl.full([], -1, tl.int32)
    head = tl.full([], -1, tl.int32)
    total = tl.full([], 1.0, tl.float32)
    remaining = tl.full([], 1.0, tl.float32)
    asked = tl.full([], 0, tl.int32)  # whether the node's one row was read
    child, token, bits = step(node, first_child, tokens, token_stride, tl.where(deep, 0, count), columns, False)
    status |= tl.where(deep, 0, bits)
    while (child >= 0) & (accepted < 0):
        go_on = True
        possible = (token >= 0) & (token < size)
        if not possible:
            status |= TOKEN_IMPOSSIBLE
            rejected = tl.full([], 1, tl.int32)
        else:
            usable = True
            before = head
            if draft is not None:
                if weighed & ((asked == 0) | CHILD_ROWS):
                    holder = child if CHILD_ROWS else node
                    usable = read_proposal(draft, draft_stride, draft_size, state, holder, temperature, top_k, top_p,
                                           FILTER, BLOCK)  # fmt: skip
                    asked = tl.full([], 1, tl.int32)
                    if usable:
                        put_int(state, holder, TERM_BEFORE, head)
                        head = holder
                    else:
                        status |= DRAFT_INVALID
                if weighed & (remaining <= 0.0):
                    usable = False
            if usable:
                rejected = tl.full([], 1, tl.int32)
                w, _ = residual_weight(row, draft, draft_stride, target_to_draft, state, excluded, node, head, True,
                                       token, possible)  # fmt: skip
                again = is_excluded(excluded, token, possible)
                q = tl.full([], 1.0, tl.float32)
                drawable = True
                if draft is not None:
                    if weighed:
                        q, drawable = draft_proposal(draft, draft_stride, target_to_draft, state, head, token)
                        if again & (not REPLACEMENT) & (not CHILD_ROWS):
                            drawable = False
                u = node_coin(seed, position, child, 0)
                if not drawable:
                    status |= TOKEN_IMPOSSIBLE
                elif u * (q.to(tl.float64) * total) < w.to(tl.float64) * remaining:
                    accepted = child
                else:
                    if not again:
                        exclude(excluded, token)
                    if weighed:
                        if draft is not None:
                            factor = total / remaining
                            if not CHILD_ROWS:
                                factor += tl.load(state + node * NODE_WORDS + TERM_FACTOR).to(tl.float32, bitcast=True)
                            put_float(state, head, TERM_FACTOR, factor)
                    else:
                        total -= w
                    # Without q a subtraction will do as long as it cancels little. A node is left with `total` in just
                    # as large a part of all runs, so what that loses is lost in as small a part.
                    if weighed | (total < 0.0009765625):
                        total, left = residual_sums(row, size, draft, draft_stride, target_to_draft, state, excluded,
                                                    node, head, BLOCK)  # fmt: skip
                        if draft is not None:
                            if weighed & (not REPLACEMENT) & (not CHILD_ROWS):
                                remaining = take_from_draft(draft, draft_stride, size, target_to_draft, state, excluded,
                                                            node, left, BLOCK)  # fmt: skip
                    go_on = total > 0.0
            elif not CHILD_ROWS:
                go_on = False
            else:
                head = before
        if accepted < 0:
            if go_on:
                child, token, bits = step(child, next_sibling, tokens, token_stride, count, columns, True)
                status |= bits
            else:
                child = tl.full([], -1, tl.int32)
    return accepted, rejected, head, status


@triton.jit
def _overlap(
    row, size, draft, draft_stride, target_to_draft, state, node, rho, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of min(q, p / rho)."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        p = probability(row, state, node, TARGET_LAW, ids, ids < size)
        q = draft_probability(draft, draft_stride, target_to_draft, state, node, ids, ids < size)
        total += tl.minimum(q, p / rho)
    return tl.minimum(tl.sum(total, 0), 1.0)


@triton.jit
def _gain(beta, siblings):
    """(1 - (1 - beta)^siblings) / beta as the sum that it is: no difference, however small beta is."""
    miss = 1.0 - beta.to(tl.float64)
    power = miss * 0.0 + 1.0
    total = miss * 0.0
    for _ in range(siblings):
        total += power
        power *= miss
    return total


@triton.jit
def _kseq(
    row, size, draft, draft_stride, draft_size, target_to_draft, state, tokens, token_stride, first_child,
    next_sibling, count, columns, node, deep, temperature, top_k, top_p, seed, position, status,
    FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(accepted child or -1, whether any was rejected, newest term, gain, rho, status)."""
    first, first_token, bits = step(node, first_child, tokens, token_stride, tl.where(deep, 0, count), columns, False)
    status |= tl.where(deep, 0, bits)
    siblings = 0
    child = first
    while child >= 0:
        siblings += 1
        child, _, bits = step(child, next_sibling, tokens, token_stride, count, columns, True)
        status |= bits

    rejected = tl.full([], 0, tl.int32)
    accepted = tl.full([], -1, tl.int32)
    head = tl.full([], -1, tl.int32)
    gain = tl.full([], 0.0, tl.float32)
    rho = tl.full([], 1.0, tl.float32)
    child = first
    token = first_token
    while (child >= 0) & (accepted < 0):
        possible = (token >= 0) & (token < size)
        usable = True
        if not possible:
            status |= TOKEN_IMPOSSIBLE
            rejected = tl.full([], 1, tl.int32)
        else:
            if head < 0:
                usable = read_proposal(draft, draft_stride, draft_size, state, node, temperature, top_k, top_p, FILTER,
                                       BLOCK)  # fmt: skip
                if usable:
                    head = node
                    low = rho
                    rho = siblings.to(tl.float32)
                    while rho - low > low * 0.000244140625:
                        middle = (low + rho) * 0.5
                        beta = _overlap(row, size, draft, draft_stride, target_to_draft, state, node, middle, BLOCK)
                        small = _gain(beta, siblings) * beta > middle.to(tl.float64) * beta
                        low = tl.where(small, middle, low)
                        rho = tl.where(small, rho, middle)
                    beta = _overlap(row, size, draft, draft_stride, target_to_draft, state, node, rho, BLOCK)
                    gain = _gain(beta, siblings).to(tl.float32)
                else:
                    status |= DRAFT_INVALID
            if usable:
                rejected = tl.full([], 1, tl.int32)
                q, drawable = draft_proposal(draft, draft_stride, target_to_draft, state, node, token)
                p = probability(row, state, node, TARGET_LAW, token, possible)
                u = node_coin(seed, position, child, 0)
                if not drawable:
                    status |= TOKEN_IMPOSSIBLE
                elif u * (rho.to(tl.float64) * q) < p.to(tl.float64):
                    accepted = child
        if accepted < 0:
            if usable:
                child, token, bits = step(child, next_sibling, tokens, token_stride, count, columns, True)
                status |= bits
            else:
                child = tl.full([], -1, tl.int32)
    return accepted, rejected, head, gain, rho, status


@triton.jit
def _include_children(excluded, size, tokens, token_stride, first_child, next_sibling, count, columns, node):
    child, token, _ = step(node, first_child, tokens, token_stride, count, columns, False)
    while child >= 0:
        if (token >= 0) & (token < size):
            include(excluded, token)
        child, token, _ = step(child, next_sibling, tokens, token_stride, count, columns, True)


@triton.jit(do_not_specialize=VOLATILE)
def accept_walk_kernel(
    target, draft_tokens, draft, target_to_draft, first_child, next_sibling, num_nodes, temperatures, top_ks, top_ps,
    draft_temperatures, draft_top_ks, draft_top_ps, seeds, positions, tokens, nodes, num_accepted, next_tokens, status,
    finished, scratch, target_batch_stride, target_node_stride, token_batch_stride, token_stride, draft_batch_stride,
    draft_node_stride, first_batch_stride, next_batch_stride, num_nodes_stride, scratch_stride, columns, size,
    draft_size, max_depth, width, temperature, top_k, top_p, draft_temperature, draft_top_k, draft_top_p, seed_low,
    seed_high, position, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7, threshold_a, threshold_b,
    RULE: tl.constexpr, IDS: tl.constexpr, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr,
    DRAFT_FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (batch,). Arguments as accept.accept has them; a request's scratch is a bit per token, then its nodes."""
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
    bits |= wrong_law
    if draft is not None:
        bits |= tl.where(heat > 0.0, wrong_draft_law, 0)
    if RULE == GREEDY:
        heat = 0.0
    excluded = None
    state = scratch
    if not IDS:
        state = scratch + request * scratch_stride
    if (RULE == RECURSIVE) | (RULE == TARGET_ONLY):
        excluded = state
        words = (size + 31) // 32
        fill(excluded, words, 0, BLOCK)
        state += words

    node = tl.full([], 0, tl.int32)
    depth = tl.full([], 0, tl.int32)
    ended = tl.full([], 0, tl.int32)
    walking = tl.full([], 1, tl.int32)
    rejected = tl.full([], 0, tl.int32)
    head = tl.full([], -1, tl.int32)
    gain = tl.full([], 0.0, tl.float32)
    rho = tl.full([], 1.0, tl.float32)
    following = tl.full([], 0, tl.int32)
    row = target
    out = request * (max_depth + 1)
    tl.store(nodes + out, 0)
    while walking != 0:
        deep = depth >= max_depth
        if IDS:
            following = tl.load(target + node * target_node_stride)
        else:
            row = target + node.to(tl.int64) * target_node_stride
            following, sound, _ = write_law(state, node, TARGET_LAW, row, size, heat, k, p,
                                            FILTER and RULE != GREEDY, RULE != GREEDY and RULE != MATCH, False,
                                            BLOCK)  # fmt: skip
            bits |= tl.where(sound, 0, TARGET_INVALID)
        if RULE == MATCH:
            following, empty = draw(row, size, None, 0, None, state, None, node, -1, gain, rho, 0.0, seed,
                                    place + depth + 1, SAMPLE, 0, False, BLOCK)  # fmt: skip
            bits |= empty
        if (RULE == GREEDY) | (RULE == MATCH):
            child, bits = _follow(node, following, size, draft_tokens, token_stride, first_child, next_sibling, count,
                                  columns, deep, bits, IDS)  # fmt: skip
        elif RULE == TARGET_ONLY:
            child, rejected, bits = _by_coin(row, size, state, excluded, draft_tokens, token_stride, first_child,
                                             next_sibling, count, columns, node, deep, seed, place, threshold_a,
                                             threshold_b, bits)  # fmt: skip
        elif RULE == KSEQ:
            if heat > 0.0:
                child, rejected, head, gain, rho, bits = _kseq(
                    row, size, draft, draft_node_stride, draft_size, target_to_draft, state, draft_tokens, token_stride,
                    first_child, next_sibling, count, columns, node, deep, draft_heat, draft_k, draft_p, seed, place,
                    bits, DRAFT_FILTER, BLOCK)  # fmt: skip
            else:
                child, bits = _follow(node, following, size, draft_tokens, token_stride, first_child, next_sibling,
                                      count, columns, deep, bits, False)  # fmt: skip
        else:
            child, rejected, head, bits = _recursive(
                row, size, draft, draft_node_stride, draft_size, target_to_draft, state, excluded, draft_tokens,
                token_stride, first_child, next_sibling, count, columns, node, deep, (heat > 0.0) & (draft is not None),
                draft_heat, draft_k, draft_p, seed, place, bits, REPLACEMENT, CHILD_ROWS, DRAFT_FILTER, BLOCK,
            )  # fmt: skip
        if child < 0:
            walking = tl.full([], 0, tl.int32)
        else:
            if (RULE == RECURSIVE) | (RULE == TARGET_ONLY):
                if rejected != 0:
                    _include_children(excluded, size, draft_tokens, token_stride, first_child, next_sibling, count,
                                      columns, node)  # fmt: skip
            token = tl.load(draft_tokens + child * token_stride)
            tl.store(tokens + out + depth, token)
            depth += 1
            tl.store(nodes + out + depth, child)
            node = child
            if is_end(token, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7):
                ended = tl.full([], 1, tl.int32)
                walking = tl.full([], 0, tl.int32)

    if (RULE != GREEDY) & (RULE != MATCH):
        if ended == 0:
            domain = tl.where(rejected != 0, RESIDUAL, BONUS)
            following, empty = draw(row, size, draft, draft_node_stride, target_to_draft, state, excluded, node, head,
                                    gain, rho, 0.0, seed, place, domain, node, RULE == KSEQ, BLOCK)  # fmt: skip
            bits |= empty
    following = tl.where(ended == 0, following, -1)
    ended |= is_next_end(following, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7)
    tl.store(next_tokens + request, following)
    finish_outputs(tokens, nodes, num_accepted, status, finished, request, max_depth, depth, depth + 1, following, bits,
                   ended)  # fmt: skip
