"""The answer of a screen to one row, by one program, when all parts of its approximations have been seen.

The program goes down from the candidates bin by bin (screen_kernels.py). At each depth it first takes the listed
entries' approximations for their logits: if not even those would settle the row, the next bin is added. If they would,
the listed rows of the head are read, and their logits decide. At the last depth they are read in any case. A row that
would need more than `limit` entries is given up.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.token_rows import LOG2E

from .exit_kernels import entry_of, order_of, tile_logits, token_of, value_of
from .screen_stats import (
    BINS,
    FALL,
    LOWER,
    LOWER_FALL,
    NOISE,
    PEAK,
    PEAK_FALL,
    SQUARES,
    TURNS,
    UPPER,
    UPPER_FALL,
    WEIGHT,
    WORST,
    joined_peak,
    joined_sum,
    peak_from,
    stats,
    sum_from,
)

LIST_COUNTERS = tl.constexpr(8)  # where a row's counters of list entries begin


@triton.jit
def _entries_at(i, found, counts, limit, total):
    """The i-th entries of the row's lists, one list after the other; 0 from `total` on."""
    bin = tl.arange(0, BINS)
    ends = tl.cumsum(counts, 0)
    past = i[:, None] >= ends[None, :]
    which = tl.minimum(tl.sum(past.to(tl.int32), 1), BINS - 1)
    before = tl.sum(tl.where(past & (bin < BINS - 1)[None, :], counts[None, :], 0), 1)
    at = found + which.to(tl.int64) * limit + (i - before)
    return tl.load(at, mask=i < total, other=0, cache_modifier=".cg")


@triton.jit
def _next_best(known, found, counts, limit, total, before, LANES: tl.constexpr):
    """The greatest known logit whose order is below `before`, as order_of."""
    lane = tl.arange(0, LANES)
    best = tl.full([LANES], -(2**63), tl.int64)
    for start in range(0, total, LANES):
        i = start + lane
        z = tl.load(known + i, mask=i < total, other=float("-inf"), cache_modifier=".cg")
        order = order_of(z, _entries_at(i, found, counts, limit, total))
        best = tl.maximum(best, tl.where((i < total) & (order < before), order, -(2**63)))
    return tl.max(best, 0)


@triton.jit
def _known_sums(known, total, first, own_temperature, LANES: tl.constexpr):
    """Sums of exp((z - first) / T) and of the same times (first - z) / T. Of integers: in any order the same."""
    lane = tl.arange(0, LANES)
    size = tl.zeros([LANES], tl.int64)
    fall = tl.zeros([LANES], tl.int64)
    for start in range(0, total, LANES):
        i = start + lane
        z = tl.load(known + i, mask=i < total, other=float("-inf"), cache_modifier=".cg")
        s = tl.minimum(tl.maximum((z - first) / own_temperature, -1000.0), 0.0)
        weight = tl.where(i < total, tl.exp2(s * LOG2E), 0.0)
        size += (weight * 1099511627776.0).to(tl.int64)
        fall += (weight * -s * 1099511627776.0).to(tl.int64)
    unit = 9.094947017729282e-13
    return tl.sum(size, 0).to(tl.float64) * unit, tl.sum(fall, 0).to(tl.float64) * unit


@triton.jit
def _recheck(
    head, bias, y, known, found, counts, limit, total, row, rows, y_stride, dim, ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write the row's logits of the listed entries: those of exit_confidence, which has the same rows side by side."""
    n = row // ROWS * ROWS + tl.arange(0, ROWS)
    for start in range(0, total, BLOCK_V):
        i = start + tl.arange(0, BLOCK_V)
        entries = _entries_at(i, found, counts, limit, total)
        z = tile_logits(head, entries, y, tl.minimum(n, rows - 1), y_stride, dim, ROWS, BLOCK_V, BLOCK_K, EVEN, WIDEN)
        mine = tl.sum(tl.where((n == row)[:, None], z, 0.0), 0)
        if bias is not None:
            mine += tl.load(bias + entries)
        tl.store(known + i, mine, mask=i < total)


@triton.jit
def _guess(approximate, known, found, counts, limit, total, LANES: tl.constexpr):
    for start in range(0, total, LANES):
        i = start + tl.arange(0, LANES)
        z = tl.load(approximate + _entries_at(i, found, counts, limit, total), mask=i < total, other=0.0)
        tl.store(known + i, z, mask=i < total)


@triton.jit
def _write(
    row, prob, lead, spread, own_temperature, known, found, counts, limit, total, best, token_map, token,
    max_prob, margin,
    entropy, logsumexp, top_tokens, top_logprobs, top_k, LISTED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    first = value_of(best).to(tl.float64)
    tl.store(token + row, token_of(entry_of(best), token_map))
    tl.store(max_prob + row, prob.to(tl.float32))
    tl.store(margin + row, lead.to(tl.float32))
    tl.store(entropy + row, spread.to(tl.float32))
    tl.store(logsumexp + row, (first / own_temperature - tl.log(prob)).to(tl.float32))
    if top_tokens is not None:
        for k in range(LISTED):
            exists = (best > -(2**63)) & (value_of(best) > float("-inf"))
            entry = tl.where(exists, entry_of(best), 0)
            logprob = ((value_of(best).to(tl.float64) - first) / own_temperature + tl.log(prob)).to(tl.float32)
            at = row * top_k + k
            tl.store(top_tokens + at, tl.where(exists, token_of(entry, token_map), -1), mask=k < top_k)
            tl.store(top_logprobs + at, tl.where(exists, logprob, float("-inf")), mask=k < top_k)
            best = _next_best(known, found, counts, limit, total, best, LANES)


@triton.jit
def _is_settled(
    prob, low_prob, high_prob, lead, low_lead, high_lead, low_entropy, high_entropy, tolerance, limit,
    MEASURE: tl.constexpr,
):  # fmt: skip
    """Whether max_prob and margin are known up to the tolerance, and on which side of the threshold the row is."""
    known = (tl.maximum(high_prob - prob, prob - low_prob) <= tolerance) & (
        tl.maximum(high_lead - lead, lead - low_lead) <= tolerance
    )
    if MEASURE == "max_prob":
        known = known & ((low_prob > limit) | (high_prob < limit))
    if MEASURE == "margin":
        known = known & ((low_lead > limit) | (high_lead < limit))
    if MEASURE == "entropy":
        known = known & ((low_entropy > limit) | (high_entropy < limit))
    return known


@triton.jit
def answer(
    head, bias, token_map, y, approximate, sums, step, found, known, counters, token, max_prob, margin, entropy,
    logsumexp, top_tokens, top_logprobs, rechecked, y_stride, dim, row, rows, parts, limit, top_k,
    own_temperature, wide,
    spread, reference, border, tolerance, MEASURE: tl.constexpr, LISTED: tl.constexpr, PARTS: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Write the statistics of a row that can be settled with at most `limit` entries of the head; 1 if so."""
    bin = tl.arange(0, BINS)
    counts = tl.load(counters + LIST_COUNTERS + bin, cache_modifier=".cg")
    part = tl.arange(0, PARTS)
    upper = joined_sum(sums, part, parts, step, UPPER)
    lower = joined_sum(sums, part, parts, step, LOWER)
    weight = joined_sum(sums, part, parts, step, WEIGHT)
    squares = joined_sum(sums, part, parts, step, SQUARES)
    peak = joined_peak(sums, part, parts, step, PEAK)
    worst = joined_peak(sums, part, parts, step, WORST)
    noise = joined_peak(sums, part, parts, step, NOISE)
    upper_fall = joined_sum(sums, part, parts, step, UPPER_FALL)
    lower_fall = joined_sum(sums, part, parts, step, LOWER_FALL)
    tail_fall = joined_sum(sums, part, parts, step, FALL)
    turns = joined_sum(sums, part, parts, step, TURNS)
    peak_fall = joined_peak(sums, part, parts, step, PEAK_FALL)

    depth = tl.full([], 0, tl.int32)  # bins that are rechecked besides the candidates
    paying = tl.full([], 0, tl.int32)  # 0: what would come out of it by the approximations
    answered = tl.full([], 0, tl.int32)
    reads = tl.full([], 0, tl.int32)
    while depth < BINS:
        total = tl.sum(tl.where(bin <= depth, counts, 0), 0)
        if (total == 0) | (total > limit):
            depth = tl.full([], BINS, tl.int32)
        else:
            paying = tl.where(depth == BINS - 1, 1, paying)
            if paying == 1:
                _recheck(
                    head, bias, y, known, found, counts, limit, total, row, rows, y_stride, dim, ROWS, BLOCK_V,
                    BLOCK_K, EVEN, WIDEN,
                )  # fmt: skip
                reads += total
            else:
                _guess(approximate, known, found, counts, limit, total, LANES)
            tl.debug_barrier()
            best = _next_best(known, found, counts, limit, total, 2**63 - 1, LANES)
            other = _next_best(known, found, counts, limit, total, best, LANES)
            first = value_of(best)
            first = tl.where(paying == 1, first, tl.maximum(first, reference))
            second = tl.where(total > 1, value_of(other), float("-inf"))
            size, fall = _known_sums(known, total, first, own_temperature, LANES)
            prob, low_prob, high_prob, lead, low_lead, high_lead, disorder, low_entropy, high_entropy = stats(
                size, fall, sum_from(upper, depth), sum_from(lower, depth), sum_from(weight, depth),
                sum_from(squares, depth), peak_from(peak, depth), peak_from(worst, depth), peak_from(noise, depth),
                sum_from(upper_fall, depth), sum_from(lower_fall, depth), sum_from(tail_fall, depth),
                sum_from(turns, depth), peak_from(peak_fall, depth), first.to(tl.float64), second.to(tl.float64),
                reference.to(tl.float64), wide, spread,
            )  # fmt: skip
            settled = _is_settled(
                prob, low_prob, high_prob, lead, low_lead, high_lead, low_entropy, high_entropy, tolerance, border,
                MEASURE,
            )  # fmt: skip
            if settled & (paying == 1):
                _write(
                    row, prob, lead, disorder, wide, known, found, counts, limit, total, best, token_map, token,
                    max_prob, margin, entropy, logsumexp, top_tokens, top_logprobs, top_k, LISTED, LANES,
                )  # fmt: skip
                tl.store(rechecked + row, reads)
                answered = tl.full([], 1, tl.int32)
            depth = tl.where(settled, tl.where(paying == 1, BINS, depth), depth + 1)
            paying = tl.where(settled, 1, 0)
            tl.debug_barrier()  # before the known logits are written again
    return answered
