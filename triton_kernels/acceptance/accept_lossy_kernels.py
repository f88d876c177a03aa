"""The two rules that test every reached node and keep the deepest: typical acceptance and longest path.

One program owns one request. Nodes that pass are appended to a queue in scratch, and the queue is served in order: each
of its nodes reads its row (longest path: its pair of rows) if it has children, and tests them all. So the rows read are
those of accepted nodes, and one more for the next token.

    typical  Medusa's rule (2401.10774): p(x) > min(epsilon, delta exp(-entropy)). No noise but in the next token, which
             is drawn from the tokens that pass the same test.
    longest  improved MCSD's rule for a forest whose roots are given (2409.10644): u q(x) < p(x) with p and q as they
             were. The next tokens are drawn without replacement: from (p - q)+ at an inner node, from p at a leaf or
             a root.

Both are lossy: among several accepted nodes they choose by what comes later.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import BONUS, RESIDUAL, NoiseStream, node_coin
from specdec_ops.triton_kernels.common.token_rows import (
    DRAFT_INVALID,
    LEAST_SCORE,
    NO_ID,
    TARGET_INVALID,
    draw_next,
    next_logit,
)

from .accept_state import (
    DEPTH,
    LOGARITHM,
    LONGEST,
    NODE_WORDS,
    PARENT,
    QUEUE,
    RESIDUAL_EMPTY,
    TARGET_ROW,
    TERM_BEFORE,
    TERM_FACTOR,
    TOKEN_IMPOSSIBLE,
    TREE_INVALID,
    TYPICAL,
    UNCLAIMED,
    draft_proposal,
    draw,
    fill,
    finish_outputs,
    first_child_above,
    get_float,
    get_int,
    is_end,
    is_next_end,
    kept_distribution,
    next_sibling,
    put_float,
    put_int,
    read_proposal,
    read_row,
    residual_draw,
    row_of,
    target_probability,
    write_path,
)


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
def _passes_longest(request, node, child, token, sound):
    """Whether the child passes its own test, and status bits. sound: whether its q can be used."""
    q = tl.full([], 1.0, tl.float32)
    drawable = True
    if request.draft.logits is not None:
        if request.weighted:
            q, drawable = draft_proposal(request, node, token)
    p = target_probability(request, node, token, True)
    u = node_coin(request.seed, request.position, child, 0)
    passed = sound & drawable & (u * q.to(tl.float64) < p.to(tl.float64))
    return passed, tl.where(sound & (drawable == 0), TOKEN_IMPOSSIBLE, 0)


@triton.jit
def _counts(request, node, child, token, PADDED: tl.constexpr):
    """Whether a list of children makes the node read its rows: one that is the node's and, unless PADDED, in range."""
    found = tl.full([], 0, tl.int32)
    while (child >= 0) & (found == 0):
        owner = get_int(request.state, child, PARENT)
        free = (owner == UNCLAIMED) | (owner == node)
        found = (free & (PADDED | ((token >= 0) & (token < request.target.size)))).to(tl.int32)
        if free:
            child, token, _ = next_sibling(request.tree, child)
        else:
            child = tl.full([], -1, tl.int32)
    return found != 0


@triton.jit
def _draw_many(request, node, head, ranked, domain, next_tokens, BLOCK: tl.constexpr):
    """Write the next tokens, drawn without replacement (or, ranked, the greatest logits); -1 where there are fewer.

    From p alone every possible token can come. A difference p - q has no such scale: what float32 makes 0 is not drawn.
    """
    row = row_of(request.target, node)
    size = request.target.size
    stream = NoiseStream(request.seed, request.position, domain, node)
    of = kept_distribution(request.state, node, TARGET_ROW)
    maximum = of.maximum
    unreliable = tl.full([], 0, tl.int32)  # float32 can't rank the tokens that are left by their scores
    last = tl.full([], float("inf"), tl.float32)
    last_id = tl.full([], -1, tl.int32)
    attempt = tl.full([], 0, tl.int32)
    left = True
    for index in range(request.outputs.width):
        score = last
        token = tl.full([], 2147483647, tl.int32)
        if ranked:
            score, token = next_logit(row, size, last, last_id, BLOCK)
        elif unreliable == 0:
            searching = tl.full([], 1, tl.int32)
            while searching != 0:
                score, token = residual_draw(
                    request, node, tl.where(attempt < 2, head, -1), False, 0.0, 1.0, 0.0, stream, last, last_id,
                    attempt % 2 == 1, False, BLOCK,
                )  # fmt: skip
                # The first token decides for all: the residual by score or by weight, or the row if that is empty.
                searching = ((token == NO_ID) & (index == 0) & (attempt < 3)).to(tl.int32)
                attempt += searching
            alone = ((head < 0) | (attempt >= 2)) & (of.one_hot_id < 0)
            unreliable = (alone & (index > 0) & ((score < LEAST_SCORE) | (attempt % 2 == 1))).to(tl.int32)
        if unreliable != 0:
            token, maximum = draw_next(row, size, of, maximum, stream, next_tokens, index, BLOCK)
        left = left & (token != NO_ID)
        tl.store(next_tokens + index, tl.where(left, token, -1))
        last = score
        last_id = token
    return tl.where(attempt >= 2, RESIDUAL_EMPTY, 0)


@triton.jit
def _ends(request, node, RULE: tl.constexpr):
    """Whether the node's token ends the sequence. Node 0 is a draft in a forest only."""
    drafted = node >= 0 if RULE == LONGEST else node > 0
    token = tl.load(request.tree.tokens + node * request.tree.token_stride, mask=drafted, other=-1)
    return drafted & is_end(token, request.eos)


@triton.jit
def accept_lossy(
    request, bits, RULE: tl.constexpr, FILTER: tl.constexpr, DRAFT_FILTER: tl.constexpr, BLOCK: tl.constexpr
):
    """One request, by one of the rules above. bits: its status so far. Its nodes in scratch are UNCLAIMED."""
    target, tree, state = request.target, request.tree, request.state
    zero = tl.full([], 0.0, tl.float32)
    end = tl.full([], 0, tl.int32)
    end_depth = tl.full([], 0, tl.int32)
    end_logarithm = zero
    reached = _reach(state, end, -1, 0, zero, tl.full([], 0, tl.int32))
    if RULE == LONGEST:
        token = tl.load(tree.tokens)
        bits |= tl.where((token < -1) | (token >= target.size), TOKEN_IMPOSSIBLE, 0)
        root, token, wrong = next_sibling(tree, end)
        bits |= wrong
        while root >= 0:
            if (token < 0) | (token >= target.size):
                bits |= TOKEN_IMPOSSIBLE
            else:
                reached = _reach(state, root, -1, 0, zero, reached)
            root, token, wrong = next_sibling(tree, root)
            bits |= wrong
    # One round more than there are nodes in the queue: the last is for the next token, from the row of the deepest.
    served = tl.full([], 0, tl.int32)
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
        ended = _ends(request, node, RULE)
        over = ended | (depth >= tree.max_depth)
        child, token, wrong = first_child_above(tree, node, over)
        bits |= wrong
        known = True
        sound = True
        if (last & (ended == 0)) | _counts(request, node, child, token, RULE == TYPICAL):
            _, known, entropy = read_row(state, node, TARGET_ROW, target, FILTER, True, RULE == TYPICAL, BLOCK)
            bits |= tl.where(known, 0, TARGET_INVALID)
            least = tl.minimum(request.thresholds[0], request.thresholds[1] * tl.exp(-entropy))
            if request.draft.logits is not None:
                if request.weighted & (child >= 0) & ((last == 0) | (get_int(state, node, PARENT) >= 0)):
                    sound = read_proposal(request, node, DRAFT_FILTER, BLOCK)
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
                if (token < 0) | (token >= target.size):
                    bits |= TOKEN_IMPOSSIBLE
                else:
                    logarithm = zero
                    if RULE == TYPICAL:
                        mass = target_probability(request, node, token, True)
                        passed = mass > least
                        logarithm = get_float(state, node, LOGARITHM) + tl.log(tl.where(passed, mass, 1.0))
                    else:
                        passed, wrong = _passes_longest(request, node, child, token, sound)
                        bits |= wrong
                    if passed:
                        reached = _reach(state, child, node, depth + 1, logarithm, reached)
                        more = (logarithm > end_logarithm) | ((logarithm == end_logarithm) & (child < end))
                        if (depth + 1 > end_depth) | ((depth + 1 == end_depth) & more):
                            end = child
                            end_depth = depth + 1
                            end_logarithm = logarithm
                child, token, wrong = next_sibling(tree, child)
                bits |= wrong
        served += 1

    next_tokens = request.outputs.next_tokens + request.index * request.outputs.width
    if RULE == TYPICAL:
        following = tl.full([], -1, tl.int32)
        if not ended:
            following, empty = draw(request, end, -1, 0.0, 1.0, least, request.position, BONUS, end, False, BLOCK)
            bits |= empty
        final = ended.to(tl.int32) | is_next_end(following, request.eos)
        tl.store(next_tokens, following)
        write_path(request, end, end_depth, 1)
        finish_outputs(request, end_depth, end_depth + 1, following, bits, final)
    else:
        if ended:
            fill(next_tokens, request.outputs.width, -1, 64)
        else:
            ranked = known & ((target.sampling.temperature > 0.0) == 0)
            domain = tl.where(head >= 0, RESIDUAL, BONUS)
            bits |= _draw_many(request, end, head, ranked, domain, next_tokens, BLOCK)
        write_path(request, end, end_depth, 0)
        finish_outputs(request, end_depth + 1, end_depth + 1, -1, bits, ended)
