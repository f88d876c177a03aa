"""What an acceptance kernel remembers of a request, and the weights of the next token that follow from it.

Every rejection rule has one form: after some rejections at a node, the next token has the weight

    w(x) = max(0, p(x) - sum over terms of c q(x)),   0 for the tokens that were rejected,

with p the target's probability there. If siblings were drawn from one row there is one term, whose c grows; if each has
a row of its own, each rejection adds a term. So nothing of the size of the vocabulary is written but one bit per token,
the excluded ones: they would be 0 by arithmetic, but not in float32.

The rest is small and lies in global scratch, NODE_WORDS integers per node: the distributions of the target's and of
the draft's row, the terms' c linked from the newest to the oldest, and what traversal keeps per level. One thread
writes and all read, so writes are between barriers.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import NoiseStream, token_uniforms
from specdec_ops.triton_kernels.common.token_rows import (
    NO_ID,
    Sampling,
    TokenDistribution,
    best_of,
    draw_score,
    is_kept,
    keep_best,
    row_distribution,
    token_probability,
)

# Words of a node in scratch. A distribution takes six, see TokenDistribution.
NODE_WORDS = tl.constexpr(24)
TARGET_ROW = tl.constexpr(0)
DRAFT_ROW = tl.constexpr(6)
TERM_FACTOR = tl.constexpr(12)  # c
TERM_BEFORE = tl.constexpr(13)  # the node that holds the next older term, or -1
PARENT = tl.constexpr(14)  # the node that has claimed this one as a child; -1 for node 0, UNCLAIMED before
ROW_READ = tl.constexpr(15)  # whether the target's row was read
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

# The rules, by the numbers that they have in csrc/acceptance/params.h.
GREEDY = tl.constexpr(0)
MATCH = tl.constexpr(1)
RECURSIVE = tl.constexpr(2)
TRAVERSAL = tl.constexpr(3)
TARGET_ONLY = tl.constexpr(4)
KSEQ = tl.constexpr(5)
TYPICAL = tl.constexpr(6)
LONGEST = tl.constexpr(7)

TOKEN_IMPOSSIBLE = tl.constexpr(4)
RESIDUAL_EMPTY = tl.constexpr(8)
TREE_INVALID = tl.constexpr(16)

LEAST_LEFT = tl.constexpr(2.0**-64)  # of a draft row; what is 2^-62 of that is still a normal number
MAX_FACTOR = tl.constexpr(2.0**120)  # of a path that is kept with a probability below 2^-50


class Model(NamedTuple):
    """The logits of the request's nodes by the target or by the draft, and how the request samples from them."""

    logits: tl.tensor  # [nodes, size]. Of the target: ids [nodes] will do for greedy. Of a draft: None, if it gave none
    node_stride: tl.tensor
    size: tl.tensor
    sampling: Sampling
    ids_of_target: tl.tensor  # of a draft: its id of each token of the target, or -1; None: they are the same


class Tree(NamedTuple):
    """The request's drafted tokens and their links; `first_child` None is a chain."""

    tokens: tl.tensor
    token_stride: tl.tensor
    first_child: tl.tensor
    next_sibling: tl.tensor
    count: tl.tensor  # nodes of the request
    columns: tl.tensor  # nodes that there is room for
    max_depth: tl.tensor


class Outputs(NamedTuple):
    """As accept.accept has them, for all requests."""

    tokens: tl.tensor
    nodes: tl.tensor
    num_accepted: tl.tensor
    next_tokens: tl.tensor
    status: tl.tensor
    finished: tl.tensor
    width: tl.tensor  # next tokens of a request


class Request(NamedTuple):
    """What the rules know of a request."""

    index: tl.tensor
    target: Model
    draft: Model
    weighted: tl.tensor  # whether proposals have a q: the draft gave logits, and the temperature is not 0
    tree: Tree
    seed: tl.tensor
    position: tl.tensor
    eos: tl.tensor  # a tuple of eight tokens, -1 where there are fewer
    state: tl.tensor  # scratch: NODE_WORDS integers per node
    excluded: tl.tensor  # scratch: a bit per token, or None: this rule excludes none
    thresholds: tl.tensor  # a pair of numbers, of the rules that have any
    outputs: Outputs


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
def is_end(token, eos):
    low = (token == eos[0]) | (token == eos[1]) | (token == eos[2]) | (token == eos[3])
    return low | (token == eos[4]) | (token == eos[5]) | (token == eos[6]) | (token == eos[7])


@triton.jit
def is_next_end(following, eos):
    """Whether the text ends with the next token, as 0 or 1. Unused ends are -1, as is a next token that is none."""
    return ((following >= 0) & is_end(following, eos)).to(tl.int32)


@triton.jit
def follow(tree, node, count, SIBLING: tl.constexpr):
    """Where a link of the node leads, or -1, and the status bits.

    Links only ever lead to later nodes: one that does not, or leads out of the tensor, is none and is reported. One
    past the request's nodes is none, as trees are sliced. Without links the tree is a chain.
    """
    found = tl.full([], -1, tl.int32)
    status = tl.full([], 0, tl.int32)
    if tree.first_child is not None:
        link = tl.load((tree.next_sibling if SIBLING else tree.first_child) + node)
        wrong = (link < -1) | ((link > -1) & (link <= node)) | (link >= tree.columns)
        status = tl.where(wrong, TREE_INVALID, 0)
        found = tl.where(wrong | (link >= count), -1, link)
    elif not SIBLING:
        found = tl.where(node + 1 < count, node + 1, -1)
    return found, status


@triton.jit
def step(tree, node, count, SIBLING: tl.constexpr):
    """The first child of a node, or its next sibling, as (node or -1, token, status bits), among the first `count`
    nodes. A token of -1 is padding and ends the list.
    """
    found, status = follow(tree, node, count, SIBLING)
    token = tl.load(tree.tokens + found * tree.token_stride, mask=found >= 0, other=-1)
    return tl.where(token == -1, -1, found), token, status


@triton.jit
def first_child(tree, node):
    return step(tree, node, tree.count, False)


@triton.jit
def first_child_above(tree, node, deep):
    """first_child, but none of a node that is as deep as paths may be."""
    child, token, bits = step(tree, node, tl.where(deep, 0, tree.count), False)
    return child, token, tl.where(deep, 0, bits)


@triton.jit
def next_sibling(tree, node):
    return step(tree, node, tree.count, True)


@triton.jit
def row_of(model, node):
    return model.logits + node.to(tl.int64) * model.node_stride


@triton.jit
def read_row(
    state, node, ROW: tl.constexpr, model, FILTER: tl.constexpr, SUM: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a node's row and keep its distribution in the node's words; (argmax or defined token, sound, entropy)."""
    of, argmax, sound, entropy = row_distribution(
        row_of(model, node), model.size, model.sampling, FILTER, SUM, ENTROPY, BLOCK
    )
    at = state + node * NODE_WORDS + ROW
    tl.debug_barrier()
    tl.store(at, of.maximum.to(tl.int32, bitcast=True))
    tl.store(at + 1, of.scale.to(tl.int32, bitcast=True))
    tl.store(at + 2, of.inverse.to(tl.int32, bitcast=True))
    tl.store(at + 3, of.cut.to(tl.int32, bitcast=True))
    tl.store(at + 4, of.cut_id)
    tl.store(at + 5, of.one_hot_id)
    tl.debug_barrier()
    return argmax, sound, entropy


@triton.jit
def kept_distribution(state, node, ROW: tl.constexpr):
    """The distribution that read_row has kept."""
    return TokenDistribution(
        get_float(state, node, ROW),
        get_float(state, node, ROW + 1),
        get_float(state, node, ROW + 2),
        get_float(state, node, ROW + 3),
        get_int(state, node, ROW + 4),
        get_int(state, node, ROW + 5),
    )


@triton.jit
def probability(model, state, node, ROW: tl.constexpr, ids, inside):
    """Of one token or of a block of them, in the node's row, which has been read; 0 outside of the row."""
    of = kept_distribution(state, node, ROW)
    z = tl.load(row_of(model, node) + ids, mask=inside, other=float("-inf")).to(tl.float32)
    # Only what is excluded can be above the maximum, once that is stated anew.
    return token_probability(tl.minimum(z, of.maximum), ids, of)


@triton.jit
def target_probability(request, node, ids, inside):
    return probability(request.target, request.state, node, TARGET_ROW, ids, inside)


@triton.jit
def draft_probability(request, node, ids, inside):
    """Of target ids in the draft's row of the node; 0 for tokens that the draft does not know."""
    if request.draft.ids_of_target is not None:
        ids = tl.load(request.draft.ids_of_target + ids, mask=inside, other=-1)
        inside = inside & (ids >= 0)
    return probability(request.draft, request.state, node, DRAFT_ROW, ids, inside)


@triton.jit
def draft_proposal(request, node, token):
    """draft_probability of one token, and whether it is possible, even where a float is too small for it."""
    known = token >= 0
    if request.draft.ids_of_target is not None:
        token = tl.load(request.draft.ids_of_target + token)
        known = token >= 0
    q = probability(request.draft, request.state, node, DRAFT_ROW, token, known)
    z = tl.load(row_of(request.draft, node) + token, mask=known, other=float("-inf")).to(tl.float32)
    of = kept_distribution(request.state, node, DRAFT_ROW)
    kept = is_kept(z, token, of.cut, of.cut_id)
    return q, known & tl.where(of.one_hot_id >= 0, token == of.one_hot_id, kept & (z > float("-inf")))


@triton.jit
def read_proposal(request, node, FILTER: tl.constexpr, BLOCK: tl.constexpr):
    """Read a row of the draft and make it the newest term, with factor 0; whether it is sound."""
    _, sound, _ = read_row(request.state, node, DRAFT_ROW, request.draft, FILTER, True, False, BLOCK)
    put_float(request.state, node, TERM_FACTOR, request.draft.sampling.temperature * 0.0)
    return sound


@triton.jit
def residual_weight(request, node, head, use_excluded, ids, inside):
    """(w, q of the last term where not excluded) of one token or of a block. head: the newest term, or -1."""
    w = target_probability(request, node, ids, inside)
    left = w * 0.0
    if request.draft.logits is not None:
        term = head
        while term >= 0:
            q = draft_probability(request, term, ids, inside)
            w -= get_float(request.state, term, TERM_FACTOR) * q
            left = q
            term = get_int(request.state, term, TERM_BEFORE)
        w = tl.maximum(w, 0.0)
    if request.excluded is not None:
        out = is_excluded(request.excluded, ids, inside) & use_excluded
        w = tl.where(out, 0.0, w)
        left = tl.where(out, 0.0, left)
    return w, left


@triton.jit
def residual_sums(request, node, head, BLOCK: tl.constexpr):
    """Sums over the vocabulary of both results of residual_weight."""
    lane = tl.arange(0, BLOCK)
    size = request.target.size
    total = tl.zeros([BLOCK], tl.float32)
    left = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        w, q = residual_weight(request, node, head, True, ids, ids < size)
        total += w
        left += q
    return tl.sum(total, 0), tl.sum(left, 0)


@triton.jit
def _left_of_draft(request, node, BLOCK: tl.constexpr):
    """The greatest logit and the sum of the probabilities of a draft row, over kept tokens that are not excluded."""
    lane = tl.arange(0, BLOCK)
    size = request.target.size
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    of = kept_distribution(request.state, node, DRAFT_ROW)
    for start in range(0, size, BLOCK):
        ids = start + lane
        left = (ids < size) & (is_excluded(request.excluded, ids, ids < size) == 0)
        if request.draft.ids_of_target is not None:
            ids = tl.load(request.draft.ids_of_target + ids, mask=left, other=-1)
            left = left & (ids >= 0)
        z = tl.load(row_of(request.draft, node) + ids, mask=left, other=float("-inf")).to(tl.float32)
        kept = left & is_kept(z, ids, of.cut, of.cut_id)
        greatest = tl.maximum(greatest, tl.where(kept, z, float("-inf")))
        total += probability(request.draft, request.state, node, DRAFT_ROW, ids, left)
    return tl.max(greatest, 0), tl.sum(total, 0)


@triton.jit
def take_from_draft(request, node, left, BLOCK: tl.constexpr):
    """What is left of a node's draft row, whose sum over the tokens not excluded is `left`: that, or 1.

    Children are drawn without a coin. So a row that has lost nearly all of its probability to the first of them is met
    in nearly all runs, and its later children are judged by the rest alone. Where that is too small a number the
    distribution is stated anew, relative to the greatest logit left, and c with it.
    """
    state = request.state
    if (left < LEAST_LEFT) & (get_int(state, node, DRAFT_ROW + 5) < 0):
        maximum = get_float(state, node, DRAFT_ROW)
        scale = get_float(state, node, DRAFT_ROW + 1)
        inverse = get_float(state, node, DRAFT_ROW + 2)
        greatest, _ = _left_of_draft(request, node, BLOCK)
        left = tl.zeros([], tl.float32)
        if greatest > float("-inf"):
            left += 1.0
            put_float(state, node, DRAFT_ROW, greatest)
            put_float(state, node, DRAFT_ROW + 2, left)
            _, total = _left_of_draft(request, node, BLOCK)
            put_float(state, node, DRAFT_ROW + 2, tl.div_rn(tl.full([], 1.0, tl.float32), total))
            ratio = tl.exp2((greatest - maximum) * scale) * inverse
            put_float(state, node, TERM_FACTOR, get_float(state, node, TERM_FACTOR) * (ratio * total))
    return left


@triton.jit
def residual_draw(
    request, node, head, use_excluded, gain, rho, least, stream, last, last_id, by_weight, KSEQ: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first token, after (last, last_id), of a draw from the residual weights of a node; (score, token or NO_ID).

    Weights up to `least` do not take part. With KSEQ the weights are those of K-SEQ's residual, see accept_kernels.py.
    """
    lane = tl.arange(0, BLOCK)
    size = request.target.size
    best = tl.zeros([BLOCK], tl.float32)
    best_id = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        inside = ids < size
        if KSEQ:
            w = target_probability(request, node, ids, inside)
            if head >= 0:
                q = draft_probability(request, head, ids, inside)
                w = tl.maximum(w - gain * tl.minimum(q, tl.div_rn(w, rho)), 0.0)
        else:
            w, _ = residual_weight(request, node, head, use_excluded, ids, inside)
        w = tl.where(w > least, w, 0.0)
        score = draw_score(w, token_uniforms(stream, start, BLOCK), by_weight)
        waits = (score < last) | ((score == last) & (ids > last_id))
        best, best_id = keep_best(best, best_id, tl.where(waits, score, 0.0), ids)
    return best_of(best, best_id)


@triton.jit
def draw(request, node, head, gain, rho, least, position, domain, salt, KSEQ: tl.constexpr, BLOCK: tl.constexpr):
    """The next token, from the residual weights; (token, status bits).

    If these are empty, which only rounding or a false q can bring about, from the target without the excluded tokens,
    and if that is empty too, from the target. Each of the three is drawn from by score, then by weight alone, which
    decides where no score is positive. Nearly always the first finds a token.
    """
    stream = NoiseStream(request.seed, position, domain, salt)
    token = tl.full([], 2147483647, tl.int32)
    attempt = 0
    while (token == NO_ID) & (attempt < 6):
        whole = attempt >= 2
        _, token = residual_draw(
            request, node, tl.where(whole, -1, head), attempt < 4, gain, rho, tl.where(whole, 0.0, least), stream,
            float("inf"), -1, attempt % 2 == 1, KSEQ, BLOCK,
        )  # fmt: skip
        attempt += 1
    return tl.where(token == NO_ID, 0, token), tl.where(attempt > 2, RESIDUAL_EMPTY, 0)


@triton.jit
def finish_outputs(request, accepted, nodes_on_path, following, bits, ended):
    """Write what follows the accepted tokens: the next token, unless it is -1, then -1. ended: whether the text is."""
    outputs = request.outputs
    max_depth = request.tree.max_depth
    for start in range(0, max_depth + 1, 64):
        at = start + tl.arange(0, 64)
        row = request.index * (max_depth + 1) + at
        tl.store(
            outputs.tokens + row, tl.where(at == accepted, following, -1), mask=(at >= accepted) & (at <= max_depth)
        )
        tl.store(outputs.nodes + row, -1, mask=(at >= nodes_on_path) & (at <= max_depth))
    tl.store(outputs.num_accepted + request.index, accepted)
    tl.store(outputs.status + request.index, bits)
    tl.store(outputs.finished + request.index, ended.to(tl.int8))


@triton.jit
def write_path(request, node, depth, FIRST: tl.constexpr):
    """Write the path that ends at a node of this depth, along the claims, and its tokens from depth FIRST on."""
    tree, outputs = request.tree, request.outputs
    out = request.index * (tree.max_depth + 1)
    while depth >= 0:
        tl.store(outputs.nodes + out + depth, node)
        if depth >= FIRST:
            tl.store(outputs.tokens + out + depth - FIRST, tl.load(tree.tokens + node * tree.token_stride))
        node = get_int(request.state, node, PARENT)
        depth -= 1
