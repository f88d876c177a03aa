"""What an acceptance kernel remembers of a request, and the weights of the next token that follow from it.

Every rejection rule has one form: after some rejections at a node, the next token has the weight

    w(x) = max(0, p(x) - sum over terms of c q(x)),   0 for the tokens that were rejected,

with p the target's probability there. If siblings were drawn from one row there is one term, whose c grows; if each has
a row of its own, each rejection adds a term. So nothing of the size of the vocabulary is written but one bit per token,
the excluded ones: they would be 0 by arithmetic, but not in float32.

The rest is small and lies in global scratch, NODE_WORDS integers per node: laws of the target's and of the draft's row,
the terms' c linked from the newest to the oldest, and what traversal keeps per level. One thread writes and all read,
so writes are between barriers.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import race_uniforms
from specdec_ops.triton_kernels.common.token_rows import NO_ID, best_of, keep_best, race_key, row_law, token_probability

# Words of a node in scratch. A law is (maximum, scale, inverse, cut, cut_id, hot), see rows.py.
NODE_WORDS = tl.constexpr(24)
TARGET_LAW = tl.constexpr(0)
DRAFT_LAW = tl.constexpr(6)
TERM_FACTOR = tl.constexpr(12)  # c
TERM_BEFORE = tl.constexpr(13)  # the node that holds the next older term, or -1
PARENT = tl.constexpr(14)  # the node that has claimed this one as a child; -1 for node 0, UNCLAIMED before
LAW_READ = tl.constexpr(15)  # whether the target's row was read
ALPHA = tl.constexpr(16)
SUM = tl.constexpr(17)  # of w
REMAINING = tl.constexpr(18)  # the draft's probability that is not on excluded tokens
REJECTED = tl.constexpr(19)
REMOVED = tl.constexpr(20)  # whether this node's token is excluded at its parent
HEAD = tl.constexpr(21)  # the node that holds the newest term, or -1
PROPOSAL = tl.constexpr(22)  # of the draft's row: 0 not read yet, 1 sound, 2 malformed
# The lossy rules keep these instead.
DEPTH = tl.constexpr(16)
LOGARITHM = tl.constexpr(17)
QUEUE = tl.constexpr(18)  # word of node i: the i-th node that was reached

UNCLAIMED = tl.constexpr(-2)

TOKEN_IMPOSSIBLE = tl.constexpr(4)
RESIDUAL_EMPTY = tl.constexpr(8)
TREE_INVALID = tl.constexpr(16)

LEAST_LEFT = tl.constexpr(2.0**-64)  # of a draft row; what is 2^-62 of that is still a normal number
MOST_FACTOR = tl.constexpr(2.0**120)  # of a path that is kept with a probability below 2^-50


@triton.jit
def get_int(state, node, FIELD: tl.constexpr):
    return tl.load(state + node * NODE_WORDS + FIELD)


@triton.jit
def get_float(state, node, FIELD: tl.constexpr):
    return tl.load(state + node * NODE_WORDS + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def put_int(state, node, FIELD: tl.constexpr, value):
    tl.debug_barrier()
    tl.store(state + node * NODE_WORDS + FIELD, value)
    tl.debug_barrier()


@triton.jit
def put_float(state, node, FIELD: tl.constexpr, value):
    tl.debug_barrier()
    tl.store(state + node * NODE_WORDS + FIELD, value.to(tl.int32, bitcast=True))
    tl.debug_barrier()


@triton.jit
def fill(at, count, value, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        tl.store(at + lane, tl.zeros([BLOCK], tl.int32) + value, mask=lane < count)
    tl.debug_barrier()


@triton.jit
def exclude(excluded, token):
    word = excluded + (token >> 5)
    tl.debug_barrier()
    bits = tl.load(word) | (tl.full([], 1, tl.int32) << (token & 31))
    tl.debug_barrier()
    tl.store(word, bits)
    tl.debug_barrier()


@triton.jit
def include(excluded, token):
    """Take the token back, and with it whatever is in its word: only used to take all back."""
    tl.debug_barrier()
    tl.store(excluded + (token >> 5), 0)
    tl.debug_barrier()


@triton.jit
def is_excluded(excluded, ids, inside):
    word = tl.load(excluded + (ids >> 5), mask=inside, other=0)
    return ((word >> (ids & 31)) & 1) != 0


@triton.jit
def is_end(token, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7):
    low = (token == eos0) | (token == eos1) | (token == eos2) | (token == eos3)
    return low | (token == eos4) | (token == eos5) | (token == eos6) | (token == eos7)


@triton.jit
def is_next_end(following, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7):
    """Whether the text ends with the next token, as 0 or 1. Unused ends are -1, as is a next token that is none."""
    end = is_end(following, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7)
    return ((following >= 0) & end).to(tl.int32)


@triton.jit
def follow(node, links, count, columns, SIBLING: tl.constexpr):
    """Where a link of the node leads, or -1, and the status bits.

    Links only ever lead to later nodes: one that does not, or leads out of the tensor, is none and is reported. One
    past the request's nodes is none, as trees are sliced. Without links the tree is a chain.
    """
    found = tl.full([], -1, tl.int32)
    status = tl.full([], 0, tl.int32)
    if links is not None:
        link = tl.load(links + node)
        wrong = (link < -1) | ((link > -1) & (link <= node)) | (link >= columns)
        status = tl.where(wrong, TREE_INVALID, 0)
        found = tl.where(wrong | (link >= count), -1, link)
    elif not SIBLING:
        found = tl.where(node + 1 < count, node + 1, -1)
    return found, status


@triton.jit
def step(node, links, tokens, token_stride, count, columns, SIBLING: tl.constexpr):
    """The first child of a node, or its next sibling, as (node or -1, token, status bits). A token of -1 is padding and
    ends the list.
    """
    found, status = follow(node, links, count, columns, SIBLING)
    token = tl.load(tokens + found * token_stride, mask=found >= 0, other=-1)
    return tl.where(token == -1, -1, found), token, status


@triton.jit
def write_law(
    state, node, LAW: tl.constexpr, row, size, temperature, top_k, top_p, FILTER: tl.constexpr, WEIGH: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a row and put its law into the node's words; (argmax or defined token, sound, entropy)."""
    maximum, scale, inverse, cut, cut_id, hot, argmax, sound, entropy = row_law(
        row, size, temperature, top_k, top_p, FILTER, WEIGH, ENTROPY, BLOCK
    )
    at = state + node * NODE_WORDS + LAW
    tl.debug_barrier()
    tl.store(at, maximum.to(tl.int32, bitcast=True))
    tl.store(at + 1, scale.to(tl.int32, bitcast=True))
    tl.store(at + 2, inverse.to(tl.int32, bitcast=True))
    tl.store(at + 3, cut.to(tl.int32, bitcast=True))
    tl.store(at + 4, cut_id)
    tl.store(at + 5, hot)
    tl.debug_barrier()
    return argmax, sound, entropy


@triton.jit
def probability(row, state, node, LAW: tl.constexpr, ids, inside):
    """Of one token or of a block of them, under the law that write_law has left; 0 outside of the row."""
    maximum = get_float(state, node, LAW)
    scale = get_float(state, node, LAW + 1)
    inverse = get_float(state, node, LAW + 2)
    cut = get_float(state, node, LAW + 3)
    cut_id = get_int(state, node, LAW + 4)
    hot = get_int(state, node, LAW + 5)
    # Only what is excluded can be above the maximum, once that is stated anew.
    z = tl.minimum(tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float32), maximum)
    return token_probability(z, ids, maximum, scale, inverse, cut, cut_id, hot)


@triton.jit
def draft_probability(draft, draft_stride, target_to_draft, state, node, ids, inside):
    """Of target ids under the draft's row of the node; 0 for tokens that the draft does not know."""
    if target_to_draft is not None:
        ids = tl.load(target_to_draft + ids, mask=inside, other=-1)
        inside = inside & (ids >= 0)
    return probability(draft + node.to(tl.int64) * draft_stride, state, node, DRAFT_LAW, ids, inside)


@triton.jit
def draft_proposal(draft, draft_stride, target_to_draft, state, node, token):
    """draft_probability of one token, and whether it is possible, even where a float is too small for it."""
    known = token >= 0
    if target_to_draft is not None:
        token = tl.load(target_to_draft + token)
        known = token >= 0
    row = draft + node.to(tl.int64) * draft_stride
    q = probability(row, state, node, DRAFT_LAW, token, known)
    z = tl.load(row + token, mask=known, other=float("-inf")).to(tl.float32)
    cut = get_float(state, node, DRAFT_LAW + 3)
    kept = (z > cut) | ((z == cut) & (token <= get_int(state, node, DRAFT_LAW + 4)))
    hot = get_int(state, node, DRAFT_LAW + 5)
    return q, known & tl.where(hot >= 0, token == hot, kept & (z > float("-inf")))


@triton.jit
def residual_weight(
    row, draft, draft_stride, target_to_draft, state, excluded, node, head, use_excluded, ids, inside,
):  # fmt: skip
    """(w, q of the last term where not excluded) of one token or of a block. head: the newest term, or -1."""
    w = probability(row, state, node, TARGET_LAW, ids, inside)
    left = w * 0.0
    if draft is not None:
        term = head
        while term >= 0:
            q = draft_probability(draft, draft_stride, target_to_draft, state, term, ids, inside)
            w -= get_float(state, term, TERM_FACTOR) * q
            left = q
            term = get_int(state, term, TERM_BEFORE)
        w = tl.maximum(w, 0.0)
    if excluded is not None:
        out = is_excluded(excluded, ids, inside) & use_excluded
        w = tl.where(out, 0.0, w)
        left = tl.where(out, 0.0, left)
    return w, left


@triton.jit
def residual_sums(
    row, size, draft, draft_stride, target_to_draft, state, excluded, node, head, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the vocabulary of both results of residual_weight."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    left = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        w, q = residual_weight(
            row, draft, draft_stride, target_to_draft, state, excluded, node, head, True, ids, ids < size
        )
        total += w
        left += q
    return tl.sum(total, 0), tl.sum(left, 0)


@triton.jit
def _left_of_draft(draft, draft_stride, size, target_to_draft, state, excluded, node, BLOCK: tl.constexpr):
    """The greatest logit and the sum of the probabilities of a draft row, over kept tokens that are not excluded."""
    lane = tl.arange(0, BLOCK)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    row = draft + node.to(tl.int64) * draft_stride
    cut = get_float(state, node, DRAFT_LAW + 3)
    cut_id = get_int(state, node, DRAFT_LAW + 4)
    for start in range(0, size, BLOCK):
        ids = start + lane
        left = (ids < size) & (is_excluded(excluded, ids, ids < size) == 0)
        if target_to_draft is not None:
            ids = tl.load(target_to_draft + ids, mask=left, other=-1)
            left = left & (ids >= 0)
        z = tl.load(row + ids, mask=left, other=float("-inf")).to(tl.float32)
        kept = left & ((z > cut) | ((z == cut) & (ids <= cut_id)))
        greatest = tl.maximum(greatest, tl.where(kept, z, float("-inf")))
        total += probability(row, state, node, DRAFT_LAW, ids, left)
    return tl.max(greatest, 0), tl.sum(total, 0)


@triton.jit
def take_from_draft(draft, draft_stride, size, target_to_draft, state, excluded, node, left, BLOCK: tl.constexpr):
    """What is left of a node's draft row, whose sum over the tokens not excluded is `left`: that, or 1.

    Children are drawn without a coin. So a row that has lost nearly all of its probability to the first of them is met
    in nearly all runs, and its later children are judged by the rest alone. Where that is too small a number the law is
    stated anew, relative to the greatest logit left, and c with it.
    """
    if (left < LEAST_LEFT) & (get_int(state, node, DRAFT_LAW + 5) < 0):
        maximum = get_float(state, node, DRAFT_LAW)
        scale = get_float(state, node, DRAFT_LAW + 1)
        inverse = get_float(state, node, DRAFT_LAW + 2)
        greatest, _ = _left_of_draft(draft, draft_stride, size, target_to_draft, state, excluded, node, BLOCK)
        left = tl.zeros([], tl.float32)
        if greatest > float("-inf"):
            left += 1.0
            put_float(state, node, DRAFT_LAW, greatest)
            put_float(state, node, DRAFT_LAW + 2, left)
            _, total = _left_of_draft(draft, draft_stride, size, target_to_draft, state, excluded, node, BLOCK)
            put_float(state, node, DRAFT_LAW + 2, 1.0 / total)
            ratio = tl.exp2((greatest - maximum) * scale) * inverse
            put_float(state, node, TERM_FACTOR, get_float(state, node, TERM_FACTOR) * (ratio * total))
    return left


@triton.jit
def residual_race(
    row, size, draft, draft_stride, target_to_draft, state, excluded, node, head, use_excluded, gain, rho, least, seed,
    position, domain, salt, last, last_id, by_weight, KSEQ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first token, after (last, last_id), of a race over the residual weights of a node; (key, token or NO_ID).

    Weights up to `least` do not take part. With KSEQ the weights are those of K-SEQ's residual, see accept_kernels.py.
    """
    lane = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.float32)
    best_id = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        inside = ids < size
        if KSEQ:
            w = probability(row, state, node, TARGET_LAW, ids, inside)
            if head >= 0:
                q = draft_probability(draft, draft_stride, target_to_draft, state, head, ids, inside)
                w = tl.maximum(w - gain * tl.minimum(q, w / rho), 0.0)
        else:
            w, _ = residual_weight(
                row, draft, draft_stride, target_to_draft, state, excluded, node, head, use_excluded, ids, inside
            )
        w = tl.where(w > least, w, 0.0)
        key = race_key(w, race_uniforms(seed, start, position, domain, salt, BLOCK), by_weight)
        waits = (key < last) | ((key == last) & (ids > last_id))
        best, best_id = keep_best(best, best_id, tl.where(waits, key, 0.0), ids)
    return best_of(best, best_id)


@triton.jit
def draw(
    row, size, draft, draft_stride, target_to_draft, state, excluded, node, head, gain, rho, least, seed, position,
    domain, salt, KSEQ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next token, from the residual weights; (token, status bits).

    If these are empty, which only rounding or a false q can bring about, from the target without the excluded tokens,
    and if that is empty too, from the target. Each of the three is raced by score, then by weight alone, which decides
    where no score is positive. Nearly always the first finds a token.
    """
    token = tl.full([], 2147483647, tl.int32)
    attempt = 0
    while (token == NO_ID) & (attempt < 6):
        whole = attempt >= 2
        _, token = residual_race(
            row, size, draft, draft_stride, target_to_draft, state, excluded, node, tl.where(whole, -1, head),
            attempt < 4, gain, rho, tl.where(whole, 0.0, least), seed, position, domain, salt, float("inf"), -1,
            attempt % 2 == 1, KSEQ, BLOCK,
        )  # fmt: skip
        attempt += 1
    return tl.where(token == NO_ID, 0, token), tl.where(attempt > 2, RESIDUAL_EMPTY, 0)
