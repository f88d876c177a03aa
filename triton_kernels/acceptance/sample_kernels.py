"""Draws from rows of logits: one program per row, which is read two or three times and then stays in L2.

The first pass finds the maximum, the second (only where a log-probability is asked for) the sum; each draw is one more
pass, a race of all tokens. Draws without replacement are the first `count` of one race, so a pass looks for the best
token after the previous winner, and nothing has to be remembered of the tokens drawn. Where later tokens are so
unlikely next to the first that float32 can't rank them, a pass goes over those that are not drawn yet, relative to the
greatest of them. At temperature 0 the same passes rank the logits themselves.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.philox import DRAFT, SAMPLE
from specdec_ops.triton_kernels.common.token_rows import (
    DRAFT_INVALID,
    LEAST_SCORE,
    LN2,
    NO_ID,
    TARGET_INVALID,
    next_logit,
    race_rest,
    race_row,
    request_law,
    request_setting,
    row_law,
)

_VOLATILE = [
    "count", "first_parent", "top_k", "seed_low", "seed_high", "position", "parents_batch_stride", "parents_row_stride",
    "rows",
]  # fmt: skip


@triton.jit(do_not_specialize=_VOLATILE)
def sample_kernel(
    logits, draft_to_target, parents, temperatures, top_ks, top_ps, seeds, positions, tokens, logprobs, logsumexp,
    status, batch_stride, row_stride, parents_batch_stride, parents_row_stride, rows, size, count, first_parent,
    temperature, top_k, top_p, seed_low, seed_high, position,
    REPLACEMENT: tl.constexpr, DRAFTING: tl.constexpr, FILTER: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, batch). logits [batch, rows, size]; tokens, logprobs [batch, rows, count] and logsumexp
    [batch, rows] contiguous; status [batch, rows] if PER_ROW, else [batch], zeroed.
    """
    at = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    row = logits + request * batch_stride + at.to(tl.int64) * row_stride
    out = (request * rows + at) * count
    if seeds is not None:
        seed = tl.load(seeds + request)
    else:
        seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    place = request_setting(position, positions, request)
    heat, k, p, bit = request_law(temperature, temperatures, top_k, top_ks, top_p, top_ps, request)
    domain = SAMPLE
    salt = 0
    if DRAFTING:
        domain = DRAFT
        salt = first_parent + at
        if parents is not None:
            salt = tl.load(parents + request * parents_batch_stride + at * parents_row_stride)

    SUM: tl.constexpr = (logprobs is not None) | (logsumexp is not None)
    maximum, scale, inverse, cut, cut_id, hot, _, sound, _ = row_law(row, size, heat, k, p, FILTER, SUM, False, BLOCK)
    greedy = (heat > 0.0) == 0
    if SUM:
        if greedy & sound:  # what the row says of its tokens then: temperature 1, no filter
            maximum, scale, inverse, cut, cut_id, _, _, _, _ = row_law(
                row, size, 1.0, 0, 1.0, False, True, False, BLOCK
            )
        log_inverse = tl.log(inverse)
    bit |= tl.where(sound, 0, DRAFT_INVALID if DRAFTING else TARGET_INVALID)
    if PER_ROW:
        tl.store(status + request * rows + at, bit)
    elif bit != 0:
        tl.atomic_or(status + request, bit)
    possible = sound | (not DRAFTING)
    if logsumexp is not None:
        total = maximum * (scale * LN2) - log_inverse
        tl.store(logsumexp + request * rows + at, tl.where(possible, total, float("-inf")))

    last = tl.full([], float("inf"), tl.float32)
    last_id = tl.full([], -1, tl.int32)
    by_weight = tl.full([], 0, tl.int32)
    unsure = tl.full([], 0, tl.int32)
    top = maximum  # what weights are relative to
    for draw in range(count):
        winner = tl.full([], 2147483647, tl.int32)
        key = last
        if possible:
            if greedy & sound & (not REPLACEMENT):
                key, winner = next_logit(row, size, last, last_id, BLOCK)
            elif unsure == 0:
                draw_salt = salt
                if REPLACEMENT:
                    draw_salt = salt + (draw << 16)
                    by_weight = tl.full([], 0, tl.int32)
                key, winner = race_row(row, size, seed, place, domain, draw_salt, maximum, scale, cut, cut_id, hot,
                                       last, last_id, by_weight != 0, BLOCK)  # fmt: skip
                if (winner == NO_ID) & ((draw == 0) | REPLACEMENT):
                    by_weight = tl.full([], 1, tl.int32)
                    key, winner = race_row(row, size, seed, place, domain, draw_salt, maximum, scale, cut, cut_id, hot,
                                           last, last_id, True, BLOCK)  # fmt: skip
                if not REPLACEMENT:
                    unsure = ((draw > 0) & (hot < 0) & (key < LEAST_SCORE)).to(tl.int32)
            if unsure != 0:
                winner, top = race_rest(row, size, seed, place, domain, salt, top, scale, cut, cut_id, tokens + out,
                                        draw, BLOCK)  # fmt: skip
        drawn = winner != NO_ID
        possible = possible & drawn
        safe = tl.where(drawn, winner, 0)
        tl.store(tokens + out + draw, tl.where(drawn, winner, -1))
        if logprobs is not None:
            z = tl.load(row + safe).to(tl.float32)
            logprob = (z - maximum) * (scale * LN2) + log_inverse
            tl.store(logprobs + out + draw, tl.where(drawn, logprob, float("-inf")))
        if not REPLACEMENT:
            last = key
            last_id = winner
    if draft_to_target is not None:  # only now: until here the ids of the row were wanted
        tl.debug_barrier()
        for draw in range(count):
            winner = tl.load(tokens + out + draw)
            tl.debug_barrier()
            tl.store(tokens + out + draw, tl.load(draft_to_target + winner, mask=winner >= 0, other=-1))
