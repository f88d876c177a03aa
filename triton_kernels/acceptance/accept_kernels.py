"""Acceptance rules that walk from the root: greedy, match, recursive, target_only and kseq.

One program owns one request and does all of it in one launch: at a node it reads the target's row (rows.py), tries the
drafted children in ascending order, and goes on to the first that is accepted, or draws the next token from what is
left of the row it stands at. So it reads the rows on the accepted path and no others, and no probabilities are written.
Bytes: (accepted + 1) rows of the target, and for rules that need q as many of the draft, from memory once and from L2
for the second pass and the draw; one more pass over the pair of rows for each rejected sibling.

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
from specdec_ops.triton_kernels.common.token_rows import DRAFT_INVALID, TARGET_INVALID

from .accept_state import (
    GREEDY,
    KSEQ,
    MATCH,
    NODE_WORDS,
    RECURSIVE,
    TARGET_ONLY,
    TARGET_ROW,
    TERM_BEFORE,
    TERM_FACTOR,
    TOKEN_IMPOSSIBLE,
    draft_probability,
    draft_proposal,
    draw,
    exclude,
    finish_outputs,
    first_child,
    first_child_above,
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
    target_probability,
)


@triton.jit
def _follow(request, node, wanted, deep, status, IDS: tl.constexpr):
    """The lowest child that is the wanted token, and the status."""
    child, token, bits = first_child_above(request.tree, node, deep)
    status |= bits
    accepted = tl.full([], -1, tl.int32)
    while (child >= 0) & (accepted < 0):
        possible = token >= 0
        if not IDS:
            possible = possible & (token < request.target.size)
        if not possible:
            status |= TOKEN_IMPOSSIBLE
        if possible & (token == wanted):
            accepted = child
        else:
            child, token, bits = next_sibling(request.tree, child)
            status |= bits
    return accepted, status


@triton.jit
def _by_coin(request, node, deep, status):
    """One coin for all children of the node. (accepted child or -1, whether any was rejected, status)."""
    single, accumulated = request.thresholds
    u = node_coin(request.seed, request.position, node, 1)
    mass = tl.full([], 0.0, tl.float32)
    rejected = tl.full([], 0, tl.int32)
    accepted = tl.full([], -1, tl.int32)
    child, token, bits = first_child_above(request.tree, node, deep)
    status |= bits
    while (child >= 0) & (accepted < 0):
        possible = (token >= 0) & (token < request.target.size)
        if not possible:
            status |= TOKEN_IMPOSSIBLE
            rejected = tl.full([], 1, tl.int32)
        elif not is_excluded(request.excluded, token, possible):
            p = target_probability(request, node, token, possible)
            mass += p
            if ((p > 0.0) & (p >= single)) | (u * accumulated < mass.to(tl.float64)):
                accepted = child
            else:
                rejected = tl.full([], 1, tl.int32)
                exclude(request.excluded, token)
        if accepted < 0:
            child, token, bits = next_sibling(request.tree, child)
            status |= bits
    return accepted, rejected, status


@triton.jit
def _recursive(
    request, node, deep, status, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Test each child against what the rejections before it have left of the row.

    Returns (accepted child or -1, whether any was rejected, newest term, status).
    """
    state, weighted = request.state, request.weighted
    rejected = tl.full([], 0, tl.int32)
    accepted = tl.full([], -1, tl.int32)
    head = tl.full([], -1, tl.int32)
    total = tl.full([], 1.0, tl.float32)
    remaining = tl.full([], 1.0, tl.float32)
    asked = tl.full([], 0, tl.int32)  # whether the node's one row was read
    child, token, bits = first_child_above(request.tree, node, deep)
    status |= bits
    while (child >= 0) & (accepted < 0):
        go_on = True
        possible = (token >= 0) & (token < request.target.size)
        if not possible:
            status |= TOKEN_IMPOSSIBLE
            rejected = tl.full([], 1, tl.int32)
        else:
            usable = True
            before = head
            if request.draft.logits is not None:
                if weighted & ((asked == 0) | CHILD_ROWS):
                    holder = child if CHILD_ROWS else node
                    usable = read_proposal(request, holder, FILTER, BLOCK)
                    asked = tl.full([], 1, tl.int32)
                    if usable:
                        put_int(state, holder, TERM_BEFORE, head)
                        head = holder
                    else:
                        status |= DRAFT_INVALID
                if weighted & (remaining <= 0.0):
                    usable = False
            if usable:
                rejected = tl.full([], 1, tl.int32)
                w, _ = residual_weight(request, node, head, True, token, possible)
                again = is_excluded(request.excluded, token, possible)
                q = tl.full([], 1.0, tl.float32)
                drawable = True
                if request.draft.logits is not None:
                    if weighted:
                        q, drawable = draft_proposal(request, head, token)
                        if again & (not REPLACEMENT) & (not CHILD_ROWS):
                            drawable = False
                u = node_coin(request.seed, request.position, child, 0)
                if not drawable:
                    status |= TOKEN_IMPOSSIBLE
                elif u * (q.to(tl.float64) * total) < w.to(tl.float64) * remaining:
                    accepted = child
                else:
                    if not again:
                        exclude(request.excluded, token)
                    if weighted:
                        if request.draft.logits is not None:
                            factor = tl.div_rn(total, remaining)
                            if not CHILD_ROWS:
                                factor += tl.load(state + node * NODE_WORDS + TERM_FACTOR).to(tl.float32, bitcast=True)
                            put_float(state, head, TERM_FACTOR, factor)
                    else:
                        total -= w
                    # Without q a subtraction will do as long as it cancels little. A node is left with `total` in just
                    # as large a part of all runs, so what that loses is lost in as small a part.
                    if weighted | (total < 0.0009765625):
                        total, left = residual_sums(request, node, head, BLOCK)
                        if request.draft.logits is not None:
                            if weighted & (not REPLACEMENT) & (not CHILD_ROWS):
                                remaining = take_from_draft(request, node, left, BLOCK)
                    go_on = total > 0.0
            elif not CHILD_ROWS:
                go_on = False
            else:
                head = before
        if accepted < 0:
            if go_on:
                child, token, bits = next_sibling(request.tree, child)
                status |= bits
            else:
                child = tl.full([], -1, tl.int32)
    return accepted, rejected, head, status


@triton.jit
def _overlap(request, node, rho, BLOCK: tl.constexpr):
    """Sum of min(q, p / rho)."""
    lane = tl.arange(0, BLOCK)
    size = request.target.size
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        p = target_probability(request, node, ids, ids < size)
        q = draft_probability(request, node, ids, ids < size)
        total += tl.minimum(q, tl.div_rn(p, rho))
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
def _kseq(request, node, deep, status, FILTER: tl.constexpr, BLOCK: tl.constexpr):
    """(accepted child or -1, whether any was rejected, newest term, gain, rho, status)."""
    first, first_token, bits = first_child_above(request.tree, node, deep)
    status |= bits
    siblings = 0
    child = first
    while child >= 0:
        siblings += 1
        child, _, bits = next_sibling(request.tree, child)
        status |= bits

    rejected = tl.full([], 0, tl.int32)
    accepted = tl.full([], -1, tl.int32)
    head = tl.full([], -1, tl.int32)
    gain = tl.full([], 0.0, tl.float32)
    rho = tl.full([], 1.0, tl.float32)
    child = first
    token = first_token
    while (child >= 0) & (accepted < 0):
        possible = (token >= 0) & (token < request.target.size)
        usable = True
        if not possible:
            status |= TOKEN_IMPOSSIBLE
            rejected = tl.full([], 1, tl.int32)
        else:
            if head < 0:
                usable = read_proposal(request, node, FILTER, BLOCK)
                if usable:
                    head = node
                    low = rho
                    rho = siblings.to(tl.float32)
                    while rho - low > low * 0.000244140625:
                        middle = (low + rho) * 0.5
                        beta = _overlap(request, node, middle, BLOCK)
                        small = _gain(beta, siblings) * beta > middle.to(tl.float64) * beta
                        low = tl.where(small, middle, low)
                        rho = tl.where(small, rho, middle)
                    beta = _overlap(request, node, rho, BLOCK)
                    gain = _gain(beta, siblings).to(tl.float32)
                else:
                    status |= DRAFT_INVALID
            if usable:
                rejected = tl.full([], 1, tl.int32)
                q, drawable = draft_proposal(request, node, token)
                p = target_probability(request, node, token, possible)
                u = node_coin(request.seed, request.position, child, 0)
                if not drawable:
                    status |= TOKEN_IMPOSSIBLE
                elif u * (rho.to(tl.float64) * q) < p.to(tl.float64):
                    accepted = child
        if accepted < 0:
            if usable:
                child, token, bits = next_sibling(request.tree, child)
                status |= bits
            else:
                child = tl.full([], -1, tl.int32)
    return accepted, rejected, head, gain, rho, status


@triton.jit
def _include_children(request, node):
    child, token, _ = first_child(request.tree, node)
    while child >= 0:
        if (token >= 0) & (token < request.target.size):
            include(request.excluded, token)
        child, token, _ = next_sibling(request.tree, child)


@triton.jit
def accept_walk(
    request, bits, RULE: tl.constexpr, IDS: tl.constexpr, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr,
    FILTER: tl.constexpr, DRAFT_FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One request, by one of the rules above. bits: its status so far."""
    target, tree, outputs = request.target, request.tree, request.outputs
    node = tl.full([], 0, tl.int32)
    depth = tl.full([], 0, tl.int32)
    ended = tl.full([], 0, tl.int32)
    walking = tl.full([], 1, tl.int32)
    rejected = tl.full([], 0, tl.int32)
    head = tl.full([], -1, tl.int32)
    gain = tl.full([], 0.0, tl.float32)
    rho = tl.full([], 1.0, tl.float32)
    following = tl.full([], 0, tl.int32)
    out = request.index * (tree.max_depth + 1)
    tl.store(outputs.nodes + out, 0)
    while walking != 0:
        deep = depth >= tree.max_depth
        if IDS:
            following = tl.load(target.logits + node * target.node_stride)
        else:
            following, sound, _ = read_row(
                request.state, node, TARGET_ROW, target, FILTER and RULE != GREEDY, RULE != GREEDY and RULE != MATCH,
                False, BLOCK,
            )  # fmt: skip
            bits |= tl.where(sound, 0, TARGET_INVALID)
        if RULE == MATCH:
            position = request.position + depth + 1
            following, empty = draw(request, node, -1, gain, rho, 0.0, position, SAMPLE, 0, False, BLOCK)
            bits |= empty
        if (RULE == GREEDY) | (RULE == MATCH):
            child, bits = _follow(request, node, following, deep, bits, IDS)
        elif RULE == TARGET_ONLY:
            child, rejected, bits = _by_coin(request, node, deep, bits)
        elif RULE == KSEQ:
            if target.sampling.temperature > 0.0:
                child, rejected, head, gain, rho, bits = _kseq(request, node, deep, bits, DRAFT_FILTER, BLOCK)
            else:
                child, bits = _follow(request, node, following, deep, bits, False)
        else:
            child, rejected, head, bits = _recursive(
                request, node, deep, bits, REPLACEMENT, CHILD_ROWS, DRAFT_FILTER, BLOCK
            )
        if child < 0:
            walking = tl.full([], 0, tl.int32)
        else:
            if (RULE == RECURSIVE) | (RULE == TARGET_ONLY):
                if rejected != 0:
                    _include_children(request, node)
            token = tl.load(tree.tokens + child * tree.token_stride)
            tl.store(outputs.tokens + out + depth, token)
            depth += 1
            tl.store(outputs.nodes + out + depth, child)
            node = child
            if is_end(token, request.eos):
                ended = tl.full([], 1, tl.int32)
                walking = tl.full([], 0, tl.int32)

    if (RULE != GREEDY) & (RULE != MATCH):
        if ended == 0:
            domain = tl.where(rejected != 0, RESIDUAL, BONUS)
            following, empty = draw(
                request, node, head, gain, rho, 0.0, request.position, domain, node, RULE == KSEQ, BLOCK
            )
            bits |= empty
    following = tl.where(ended == 0, following, -1)
    ended |= is_next_end(following, request.eos)
    tl.store(outputs.next_tokens + request.index, following)
    finish_outputs(request, depth, depth + 1, following, bits, ended)
