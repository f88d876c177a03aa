"""A screened row's statistics, and intervals in which those of the whole head lie. Scalars in float64.

The bounds are derived in csrc/early_exit/screen_bounds.h, which has the same in C++. Of the entries that were not
rechecked (the tail), with approximations s = (a - reference) / T, weights w = exp(s) and bounds e of what s may be
wrong by, each bin of approximations leaves

    UPPER, LOWER              sums of exp(s + e) and exp(s - e)
    WEIGHT, SQUARES, PEAK     sum of w and of w^2, greatest w
    WORST, NOISE              greatest e, and greatest part of an e that is not the quantisation's
    UPPER_FALL, LOWER_FALL    bounds of the sum of exp(true s) * -(true s)
    FALL, TURNS, PEAK_FALL    sum of w * -s, sum of (w * (1 + s))^2, greatest w * -s
"""

import triton
import triton.language as tl

UPPER = tl.constexpr(0)
LOWER = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
SQUARES = tl.constexpr(3)
PEAK = tl.constexpr(4)
WORST = tl.constexpr(5)
NOISE = tl.constexpr(6)
UPPER_FALL = tl.constexpr(7)
LOWER_FALL = tl.constexpr(8)
FALL = tl.constexpr(9)
TURNS = tl.constexpr(10)
PEAK_FALL = tl.constexpr(11)
SUMS = tl.constexpr(12)
BINS = tl.constexpr(8)


@triton.jit
def joined_sum(sums, part, parts, step, field):
    """[BINS], over the parts of the vocabulary in their order."""
    bin = tl.arange(0, BINS)
    at = sums + step * field + part[:, None] * BINS + bin[None, :]
    return tl.sum(tl.load(at, mask=(part < parts)[:, None], other=0.0, cache_modifier=".cg").to(tl.float64), 0)


@triton.jit
def joined_peak(sums, part, parts, step, field):
    bin = tl.arange(0, BINS)
    at = sums + step * field + part[:, None] * BINS + bin[None, :]
    return tl.max(tl.load(at, mask=(part < parts)[:, None], other=0.0, cache_modifier=".cg").to(tl.float64), 0)


@triton.jit
def sum_from(by_bin, first):
    return tl.sum(tl.where(tl.arange(0, BINS) >= first, by_bin, 0.0), 0)


@triton.jit
def peak_from(by_bin, first):
    return tl.max(tl.where(tl.arange(0, BINS) >= first, by_bin, 0.0), 0)


@triton.jit
def one_minus_exp(x):
    """Of x <= 0, without the cancellation near 0."""
    series = -x * (1.0 + x * (0.5 + x * (0.16666666666666666 + x * 0.041666666666666664)))
    return tl.where(x > -1e-3, series, 1.0 - tl.exp(x))


@triton.jit
def stats(
    size, fall, upper, lower, weight, squares, peak, worst, noise, upper_fall, lower_fall, tail_fall, turns, peak_fall,
    first, second, reference, own_temperature, spread,
):  # fmt: skip
    """Value, least and greatest of max_prob, of margin and of entropy.

    size and fall: sums of exp((z - first) / T), and of the same times (first - z) / T, over the rechecked logits, of
    which first and second are the greatest. spread: what the errors of all logits together, as a vector, are no longer
    than, over T.
    """
    close = worst < 20.0
    e = tl.minimum(worst, 20.0)
    n = tl.minimum(noise, 20.0)
    apart = tl.maximum(e, 1e-3)  # exp(x) <= 1 + x + curve x^2 up to e
    curve = tl.where(e < 1e-3, 0.501, (tl.exp(apart) - 1.0 - apart) / (apart * apart) * 1.000001)
    off = tl.sqrt(squares) * spread
    high_close = (weight + off + curve * peak * spread * spread) * tl.exp(n)
    low = tl.where(close, tl.maximum(lower, (weight - off) * tl.exp(-n)), lower)
    high = tl.where(close, tl.minimum(upper, high_close), upper)
    bent = (peak_fall + (e + 2.0) * peak) * spread * spread + (tail_fall + (e + 2.0) * weight) * n * n
    off_fall = tl.sqrt(turns) * spread + n * (weight + tail_fall) + tl.exp(e) * bent
    low_fall = tl.where(worst < 300.0, lower_fall, 0.0)
    high_fall = tl.where(worst < 300.0, upper_fall, float("inf"))
    low_fall = tl.where(close, tl.maximum(low_fall, tail_fall - off_fall), low_fall)
    high_fall = tl.where(close, tl.minimum(high_fall, tail_fall + off_fall), high_fall)

    # The tail is measured from the reference, which lies `gap` below the first.
    gap = (first - reference) / own_temperature
    scale = tl.exp(-gap)
    seen = scale > 0.0
    low_all = low * scale + size
    high_all = high * scale + size
    low_fall_all = tl.where(seen, (low_fall + low * gap) * scale + fall, fall)
    high_fall_all = tl.where(seen, (high_fall + high * gap) * scale + fall, fall)
    lead = one_minus_exp((second - first) / own_temperature)
    all_sizes = size + weight * scale
    all_falls = tl.where(seen, fall + (tail_fall + gap * weight) * scale, fall)

    # 1e-4 of room for the float32 sums here and in exit_confidence.
    low_prob = 0.9999 / high_all
    high_prob = 1.0001 / low_all
    prob = tl.minimum(tl.minimum(tl.maximum(1.0 / all_sizes, low_prob), high_prob), 1.0)
    highest = tl.log(high_all) + high_fall_all / low_all
    room = (1.0 + highest) * 2e-4
    low_entropy = tl.maximum(tl.log(low_all) + low_fall_all / high_all - room, 0.0)
    high_entropy = highest + room
    entropy = tl.minimum(tl.maximum(tl.log(all_sizes) + all_falls / all_sizes, low_entropy), high_entropy)
    return (
        prob, low_prob, high_prob, prob * lead, low_prob * lead, high_prob * lead, entropy, low_entropy, high_entropy,
    )  # fmt: skip
