"""The two rules that look at every reached node and keep the deepest: typical acceptance and longest path.

One program owns one request. Nodes that pass are appended to a queue in scratch, and the queue is served in order: each
of its nodes reads its row (longest path: its pair of rows) if it has children, and tests them all. So the rows read are
those of accepted nodes, and one more for the next token.

    typical  Medusa's rule (2401.10774): p(x) > min(epsilon, delta exp(-entropy)). No noise but in the next token, which
             is drawn from the tokens that pass the same test.
    longest  improved MCSD's rule for a forest whose roots are given (2409.10644): u q(x) < p(x) with p and q as they
             were. `width` next tokens are the first of one race: over (p - q)+ at an inner node, over p at a leaf or a
             root.

Both are lossy: among several accepted nodes they choose by what comes later.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import BONUS, RESIDUAL, node_coin
from specdec_ops.triton_kernels.common.token_rows import (
    DRAFT_INVALID,
    LEAST_SCORE,
    NO_ID,
    TARGET_INVALID,
    next_logit,
    race_rest,
    request_law,
    request_setting,
)

from .accept_kernels import VOLATILE, finish_outputs, node_count, read_proposal, request_seed, write_path
from .accept_state import (
    DEPTH,
    LOGARITHM,
    NODE_WORDS,
    PARENT,
    QUEUE,
    RESIDUAL_EMPTY,
    TARGET_LAW,
    TERM_BEFORE,
    TERM_FACTOR,
    TOKEN_IMPOSSIBLE,
    TREE_INVALID,
    UNCLAIMED,
    draft_proposal,
    draw,
    fill,
    get_float,
    get_int,
    is_end,
    is_next_end,
    probability,
    put_float,
    put_int,
    residual_race,
    step,
    write_law,
)

TYPICAL = tl.constexpr(6)
LONGEST = tl.constexpr(7)


@triton.jit
def _reach(state, node, parent, depth, logarithm, reached):
    """Append a node to the queue."""
    at = state + node * NODE_WORDS
    tl.debug_barrier()
    tl.store(at + PARENT, parent)
    tl.store(at + DEPTH, depth)
    tl.store(at + LOGARITHM, logarithm.to(tl.int32, bitcast=True))
    tl.store(state + reached * NODE_WORDS + QUEUE, node)
    tl.debug_barrier()
    return reached + 1


@triton.jit
def _passes_longest(
    row, draft, draft_stride, target_to_draft, state, node, child, token, weighed, sound, seed, position,
):  # fmt: skip
    """Whether the child passes its own test, and status bits. weighed: whether there is a q; sound: it can be used."""
    q = tl.full([], 1.0, tl.float32)
    drawable = True
    if draft is not None:
        if weighed:
            q, drawable = draft_proposal(draft, draft_stride, target_to_draft, state, node, token)
    p = probability(row, state, node, TARGET_LAW, token, True)
    u = node_coin(seed, position, child, 0)
    passed = sound & drawable & (u * q.to(tl.float64) < p.to(tl.float64))
    return passed, tl.where(sound & (drawable == 0), TOKEN_IMPOSSIBLE, 0)


@triton.jit
def _counts(
    tokens, token_stride, next_sibling, count, columns, size, state, node, child, token, PADDED: tl.constexpr,
):  # fmt: skip
    """Whether a list of children makes the node read its rows: one that is the node's and, unless PADDED, in range."""
    found = tl.full([], 0, tl.int32)
    while (child >= 0) & (found == 0):
        owner = get_int(state, child, PARENT)
        free = (owner == UNCLAIMED) | (owner == node)
        found = (free & (PADDED | ((token >= 0) & (token < size)))).to(tl.int32)
        if free:
            child, token, _ = step(child, next_sibling, tokens, token_stride, count, columns, True)
        else:
            child = tl.full([], -1, tl.int32)
    return found != 0


@triton.jit
def _draw_many(
    row, size, draft, draft_stride, target_to_draft, state, node, head, ranked, seed, position, domain, next_tokens,
    width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write `width` tokens, the first of one race (or, ranked, the greatest logits); -1 where there are fewer.

    From p alone every possible token can come. A difference p - q has no such scale: what float32 makes 0 is not drawn.
    """
    maximum = get_float(state, node, TARGET_LAW)
    scale = get_float(state, node, TARGET_LAW + 1)
    cut = get_float(state, node, TARGET_LAW + 3)
    cut_id = get_int(state, node, TARGET_LAW + 4)
    hot = get_int(state, node, TARGET_LAW + 5)
    unsure = tl.full([], 0, tl.int32)
    last = tl.full([], float("inf"), tl.float32)
    last_id = tl.full([], -1, tl.int32)
    attempt = tl.full([], 0, tl.int32)
    left = True
    for index in range(width):
        key = last
        token = tl.full([], 2147483647, tl.int32)
        if ranked:
            key, token = next_logit(row, size, last, last_id, BLOCK)
        elif unsure == 0:
            searching = tl.full([], 1, tl.int32)
            while searching != 0:
                key, token = residual_race(
                    row, size, draft, draft_stride, target_to_draft, state, None, node, tl.where(attempt < 2, head, -1),
                    False, 0.0, 1.0, 0.0, seed, position, domain, node, last, last_id, attempt % 2 == 1, False, BLOCK,
                )  # fmt: skip
                # The first token decides what is raced for: the residual by score or weight, or the row if it is empty.
                searching = ((token == NO_ID) & (index == 0) & (attempt < 3)).to(tl.int32)
                attempt += searching
            alone = ((head < 0) | (attempt >= 2)) & (hot < 0)
            unsure = (alone & (index > 0) & ((key < LEAST_SCORE) | (attempt % 2 == 1))).to(tl.int32)
        if unsure != 0:
            token, maximum = race_rest(row, size, seed, position, domain, node, maximum, scale, cut, cut_id,
                                       next_tokens, index, BLOCK)  # fmt: skip
        left = left & (token != NO_ID)
        tl.store(next_tokens + index, tl.where(left, token, -1))
        last = key
        last_id = token
    return tl.where(attempt >= 2, RESIDUAL_EMPTY, 0)


@triton.jit(do_not_specialize=VOLATILE)
def accept_lossy_kernel(
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
    next_tokens += request * width
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
    state = scratch + request * scratch_stride
    fill(state, columns * NODE_WORDS, UNCLAIMED, BLOCK)

    zero = tl.full([], 0.0, tl.float32)
    end = tl.full([], 0, tl.int32)
    end_depth = tl.full([], 0, tl.int32)
    end_logarithm = zero
    reached = _reach(state, end, -1, 0, zero, tl.full([], 0, tl.int32))
    if RULE == LONGEST:
        token = tl.load(draft_tokens)
        bits |= tl.where((token < -1) | (token >= size), TOKEN_IMPOSSIBLE, 0)
        root, token, wrong = step(end, next_sibling, draft_tokens, token_stride, count, columns, True)
        bits |= wrong
        while root >= 0:
            if (token < 0) | (token >= size):
                bits |= TOKEN_IMPOSSIBLE
            else:
                reached = _reach(state, root, -1, 0, zero, reached)
            root, token, wrong = step(root, next_sibling, draft_tokens, token_stride, count, columns, True)
            bits |= wrong
    # One round more than there are nodes in the queue: the last is for the next token, from the row of the deepest.
    served = tl.full([], 0, tl.int32)
    row = target
    least = zero
    head = tl.full([], -1, tl.int32)
    known = False
    ended = False
    while served <= reached:
        last = served == reached
        node = end
        if not last:
            node = get_int(state, served, QUEUE)
        depth = get_int(state, node, DEPTH)
        row = target + node.to(tl.int64) * target_node_stride
        ended = _ends(draft_tokens, token_stride, node, RULE, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7)
        over = ended | (depth >= max_depth)
        child, token, wrong = step(node, first_child, draft_tokens, token_stride, tl.where(over, 0, count), columns,
                                   False)  # fmt: skip
        bits |= tl.where(over, 0, wrong)
        known = True
        sound = True
        if (last & (ended == 0)) | _counts(draft_tokens, token_stride, next_sibling, count, columns, size, state, node,
                                           child, token, RULE == TYPICAL):  # fmt: skip
            _, known, entropy = write_law(state, node, TARGET_LAW, row, size, heat, k, p, FILTER, True, RULE == TYPICAL,
                                          BLOCK)  # fmt: skip
            bits |= tl.where(known, 0, TARGET_INVALID)
            least = tl.minimum(threshold_a, threshold_b * tl.exp(-entropy))
            if draft is not None:
                if weighed & (child >= 0) & ((last == 0) | (get_int(state, node, PARENT) >= 0)):
                    sound = read_proposal(draft, draft_node_stride, draft_size, state, node, draft_heat, draft_k,
                                          draft_p, DRAFT_FILTER, BLOCK)  # fmt: skip
                    bits |= tl.where(sound, 0, DRAFT_INVALID)
                    put_int(state, node, TERM_BEFORE, -1)
                    put_float(state, node, TERM_FACTOR, zero + 1.0)
                    head = tl.where(last & sound, node, -1)
        while (child >= 0) & (served < reached):
            owner = get_int(state, child, PARENT)
            if (owner != UNCLAIMED) & (owner != node):
                bits |= TREE_INVALID
                child = tl.full([], -1, tl.int32)
            else:
                put_int(state, child, PARENT, node)
                if (token < 0) | (token >= size):
                    bits |= TOKEN_IMPOSSIBLE
                else:
                    logarithm = zero
                    if RULE == TYPICAL:
                        mass = probability(row, state, node, TARGET_LAW, token, True)
                        passed = mass > least
                        logarithm = get_float(state, node, LOGARITHM) + tl.log(tl.where(passed, mass, 1.0))
                    else:
                        passed, wrong = _passes_longest(row, draft, draft_node_stride, target_to_draft, state, node,
                                                        child, token, weighed, sound, seed, place)  # fmt: skip
                        bits |= wrong
                    if passed:
                        reached = _reach(state, child, node, depth + 1, logarithm, reached)
                        more = (logarithm > end_logarithm) | ((logarithm == end_logarithm) & (child < end))
                        if (depth + 1 > end_depth) | ((depth + 1 == end_depth) & more):
                            end = child
                            end_depth = depth + 1
                            end_logarithm = logarithm
                child, token, wrong = step(child, next_sibling, draft_tokens, token_stride, count, columns, True)
                bits |= wrong
        served += 1

    if RULE == TYPICAL:
        following = tl.full([], -1, tl.int32)
        if not ended:
            following, empty = draw(row, size, None, 0, None, state, None, end, -1, 0.0, 1.0, least, seed, place, BONUS,
                                    end, False, BLOCK)  # fmt: skip
            bits |= empty
        final = ended.to(tl.int32) | is_next_end(following, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7)
        tl.store(next_tokens, following)
        write_path(draft_tokens, token_stride, state, tokens, nodes, request, max_depth, end, end_depth, 1)
        finish_outputs(tokens, nodes, num_accepted, status, finished, request, max_depth, end_depth, end_depth + 1,
                       following, bits, final)  # fmt: skip
    else:
        if ended:
            fill(next_tokens, width, -1, 64)
        else:
            bits |= _draw_many(row, size, draft, draft_node_stride, target_to_draft, state, end, head,
                               known & ((heat > 0.0) == 0), seed, place, tl.where(head >= 0, RESIDUAL, BONUS),
                               next_tokens, width, BLOCK)  # fmt: skip
        write_path(draft_tokens, token_stride, state, tokens, nodes, request, max_depth, end, end_depth, 0)
        finish_outputs(tokens, nodes, num_accepted, status, finished, request, max_depth, end_depth + 1, end_depth + 1,
                       -1, bits, ended)  # fmt: skip


@triton.jit
def _ends(tokens, token_stride, node, RULE: tl.constexpr, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7):
    """Whether the node's token ends the sequence. Node 0 is a draft in a forest only."""
    drafted = node >= 0 if RULE == LONGEST else node > 0
    token = tl.load(tokens + node * token_stride, mask=drafted, other=-1)
    return drafted & is_end(token, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7)
