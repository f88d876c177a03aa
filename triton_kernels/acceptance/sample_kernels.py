"""Draws from rows of logits: one program per row, which is read two or three times and then stays in L2.

The first pass finds the maximum, the second (only where a log-probability is asked for) the sum; each draw is one more
pass, which gives every token a score (see noise.py) and takes the greatest. Draws without replacement are the `count`
greatest of the same scores, so a pass looks for the best token after the previous one, and nothing has to be remembered
of the tokens drawn. Where later tokens are so unlikely next to the first that float32 can't rank them, a pass goes over
those that are not drawn yet, relative to the greatest of them. At temperature 0 the same passes rank the logits.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import DRAFT, SAMPLE, NoiseStream
from specdec_ops.triton_kernels.common.token_rows import (
    DRAFT_INVALID,
    LEAST_SCORE,
    LN2,
    NO_ID,
    TARGET_INVALID,
    Sampling,
    TokenDistribution,
    draw_next,
    next_logit,
    request_sampling,
    request_seed,
    request_setting,
    row_distribution,
    weighted_draw,
)

_VOLATILE = [
    "count", "first_parent", "top_k", "seed_low", "seed_high", "position", "parents_batch_stride", "parents_row_stride",
    "rows",
]  # fmt: skip


@triton.jit(do_not_specialize=_VOLATILE)
def sample_kernel(
    logits, draft_to_target, parents, settings, noise, outputs, parents_batch_stride, parents_row_stride, rows, count,
    first_parent, top_k, seed_low, seed_high, position,
    REPLACEMENT: tl.constexpr, DRAFTING: tl.constexpr, FILTER: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, batch). The tuples (why the other numbers are in none: see accept.py) hold this.

    logits      [batch, rows, size], its strides by request and row, size
    settings    temperature, temperatures, top_ks, top_p, top_ps
    noise       seeds, positions
    outputs     tokens, logprobs [batch, rows, count] and logsumexp [batch, rows], contiguous; status [batch, rows] if
                PER_ROW, else [batch], zeroed
    """
    at = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    row, batch_stride, row_stride, size = logits
    seeds, positions = noise
    tokens, logprobs, logsumexp, status = outputs
    row = row + request * batch_stride + at.to(tl.int64) * row_stride
    out = (request * rows + at) * count
    seed = request_seed(seeds, seed_low, seed_high, request)
    position = request_setting(position, positions, request)
    sampling, bit = request_sampling(settings, top_k, request)
    domain = SAMPLE
    salt = 0
    if DRAFTING:
        domain = DRAFT
        salt = first_parent + at
        if parents is not None:
            salt = tl.load(parents + request * parents_batch_stride + at * parents_row_stride)

    SUM: tl.constexpr = (logprobs is not None) | (logsumexp is not None)
    of, _, sound, _ = row_distribution(row, size, sampling, FILTER, SUM, False, BLOCK)
    greedy = (sampling.temperature > 0.0) == 0
    if SUM:
        if greedy & sound:  # log-probabilities are those at temperature 1, without a filter; draws need one_hot_id only
            plain, _, _, _ = row_distribution(row, size, Sampling(1.0, 0, 1.0), False, True, False, BLOCK)
            of = TokenDistribution(plain.maximum, plain.scale, plain.inverse, plain.cut, plain.cut_id, of.one_hot_id)
        log_inverse = tl.log(of.inverse)
    bit |= tl.where(sound, 0, DRAFT_INVALID if DRAFTING else TARGET_INVALID)
    if PER_ROW:
        tl.store(status + request * rows + at, bit)
    elif bit != 0:
        tl.atomic_or(status + request, bit)
    possible = sound | (not DRAFTING)
    if logsumexp is not None:
        total = of.maximum * (of.scale * LN2) - log_inverse
        tl.store(logsumexp + request * rows + at, tl.where(possible, total, float("-inf")))

    last = tl.full([], float("inf"), tl.float32)
    last_id = tl.full([], -1, tl.int32)
    by_weight = tl.full([], 0, tl.int32)
    unreliable = tl.full([], 0, tl.int32)  # float32 can't rank the tokens that are left by their scores
    maximum = of.maximum  # what weights are relative to
    stream = NoiseStream(seed, position, domain, salt)
    for draw in range(count):
        token = tl.full([], 2147483647, tl.int32)
        score = last
        if possible:
            if greedy & sound & (not REPLACEMENT):
                score, token = next_logit(row, size, last, last_id, BLOCK)
            elif unreliable == 0:
                draw_salt = salt
                if REPLACEMENT:
                    draw_salt = salt + (draw << 16)
                    by_weight = tl.full([], 0, tl.int32)
                own = NoiseStream(seed, position, domain, draw_salt)
                score, token = weighted_draw(row, size, of, own, last, last_id, by_weight != 0, BLOCK)
                if (token == NO_ID) & ((draw == 0) | REPLACEMENT):
                    by_weight = tl.full([], 1, tl.int32)
                    score, token = weighted_draw(row, size, of, own, last, last_id, True, BLOCK)
                if not REPLACEMENT:
                    unreliable = ((draw > 0) & (of.one_hot_id < 0) & (score < LEAST_SCORE)).to(tl.int32)
            if unreliable != 0:
                token, maximum = draw_next(row, size, of, maximum, stream, tokens + out, draw, BLOCK)
        drawn = token != NO_ID
        possible = possible & drawn
        safe = tl.where(drawn, token, 0)
        tl.store(tokens + out + draw, tl.where(drawn, token, -1))
        if logprobs is not None:
            z = tl.load(row + safe).to(tl.float32)
            logprob = (z - of.maximum) * (of.scale * LN2) + log_inverse
            tl.store(logprobs + out + draw, tl.where(drawn, logprob, float("-inf")))
        if not REPLACEMENT:
            last = score
            last_id = token
    if draft_to_target is not None:  # only now: until here the ids of the row were wanted
        tl.debug_barrier()
        for draw in range(count):
            token = tl.load(tokens + out + draw)
            tl.debug_barrier()
            tl.store(tokens + out + draw, tl.load(draft_to_target + token, mask=token >= 0, other=-1))
