"""The screened head in Triton: an int8 copy says which entries matter, and those alone are read in full precision.

Four launches, whatever the rows turn out to need:

    rows         exit_kernels.py; here also the row's length and what bounds the difference of two of its products.
    approximate  the loop of exit_confidence over the int8 copy. Logits go to scratch (4 bytes per entry and row, from
                 then on in L2); of each program's entries the greatest lower bounds of logits are kept.
    scan         a program owns a row and a part of its approximations. Entries that may be among the best are
                 candidates; all others fall into BINS bins by how far below the reference they lie. Each bin leaves
                 SUMS sums (screen_stats.py), and each entry above the last bin its place in the bin's list. The last
                 program of a row to arrive answers it (screen_answer.py): it goes down bin by bin until candidates
                 and bins so far would settle the row, reads their rows of the head, and writes the statistics, or marks
                 the row as fallen.
    fallback     the loop of exit_confidence over the head for blocks with a fallen row, where there is one. The last
                 program of a block joins the states of its fallen rows, and the last of all decides.

Lists are filled in the order in which programs come, so that nobody waits for another; nothing depends on it: places in
a tile don't change a product, the best are found by value and entry, and sums over a list are of integers (2^-40). A
rechecked logit is made by the same steps in the same shape as that of exit_confidence, and is the same number.

The bounds are those of csrc/early_exit/screen_bounds.h. What a row is multiplied as, y, is the same in both
products, so |z - a| <= |y| error_norms[v] + rounding. A tensor core adds 8 or more products and the sum so far after
cutting each of them below 2^-23 of the greatest, so a chain of n errs by at most (9/8 n + 64) 2^-23 |y| |W|, scales and
bias included, and two of them by twice that; float32 chains by less.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.last_program import arrives_last
from specdec_ops.triton_kernels.common.token_rows import LOG2E, NO_ID, request_setting

from .exit_kernels import (
    COUNTERS,
    LISTS,
    LOWEST,
    decide,
    empty_list,
    finished,
    has_temperature,
    list_greatest,
    merge_row,
    read_head,
    row_temperature,
    tile_logits,
)
from .screen_answer import LIST_COUNTERS, answer
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
)

FELL_BACK = tl.constexpr(2)
ROUNDING = tl.constexpr(4.76837158203125e-07)  # 2^-21 of an approximation
# A row's counters: arrivals of its scan; arrivals of its block's fallback, at the block's first row; of all blocks, at
# the first row; and from LIST_COUNTERS on, entries of each list.
BLOCK_COUNTER = tl.constexpr(1)
ALL_COUNTER = tl.constexpr(2)
# Places in an approximation's state, whose lists are those of exit_kernels.
UNSOUND = tl.constexpr(0)
LONGEST = tl.constexpr(1)

VOLATILE = ["rows", "vocab", "programs", "parts", "limit", "top_k", "temperature", "threshold", "tolerance"]


@triton.jit
def approximate_kernel(
    screen, screen_scales, error_norms, norms, bias, y, bounds, approximate, state, y_stride, dim, rows, vocab,
    programs, ROWS: tl.constexpr, LIST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, programs)."""
    program = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = n < rows
    known = tl.minimum(n, rows - 1)
    by_error = tl.load(bounds + known * 4 + 1)[:, None]
    by_norm = tl.load(bounds + known * 4 + 2)[:, None]
    floor = tl.load(bounds + known * 4 + 3)[:, None]
    unsound = tl.zeros([ROWS], tl.int32)
    longest = tl.full([], 0.0, tl.float32)
    values, entries = empty_list(ROWS, LIST)
    for tile in range(program, tl.cdiv(vocab, BLOCK_V), programs):
        ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tile_logits(
            screen, tl.minimum(ids, vocab - 1), y, known, y_stride, dim, ROWS, BLOCK_V, BLOCK_K, EVEN, WIDEN
        )
        z = finished(z, ids, screen_scales, bias, vocab)
        at = approximate + n.to(tl.int64)[:, None] * vocab + ids[None, :]
        tl.store(at, z, mask=exists[:, None] & (ids < vocab)[None, :])
        unsound |= tl.max((z < float("inf")).to(tl.int32) ^ 1, 1)
        off = tl.load(error_norms + ids, mask=ids < vocab, other=0.0)
        length = tl.load(norms + ids, mask=ids < vocab, other=0.0)
        longest = tl.maximum(longest, tl.max(off + length, 0))
        noise = by_norm * length[None, :] + floor + tl.abs(tl.maximum(z, LOWEST)) * ROUNDING
        low = z - (by_error * off[None, :] + noise)
        values, entries = list_greatest(tl.where(low == low, low, float("-inf")), ids, values, entries)
    at = state + n.to(tl.int64) * programs + program
    step = tl.zeros([], tl.int64) + rows * programs
    tl.store(at + step * UNSOUND, unsound.to(tl.float32), mask=exists)
    tl.store(at + step * LONGEST, longest + tl.zeros([ROWS], tl.float32), mask=exists)
    slot = tl.arange(0, LIST).to(tl.int64)[None, :]
    tl.store(at[:, None] + (slot + LISTS) * step, values, mask=exists[:, None])


@triton.jit
def _lower_bounds(state, row, rows, programs, LISTED: tl.constexpr, LIST: tl.constexpr, PROGRAMS: tl.constexpr):
    """Of a row: whether all approximations are numbers, the longest entry, the greatest lower bound of a logit, and
    the LISTED-th greatest.
    """
    index = tl.arange(0, PROGRAMS * LIST)
    program = index % PROGRAMS
    step = tl.zeros([], tl.int64) + rows * programs
    at = state + row.to(tl.int64) * programs + program
    real = program < programs
    sound = tl.max(tl.load(at + step * UNSOUND, mask=real, other=0.0), 0) == 0.0
    longest = tl.max(tl.load(at + step * LONGEST, mask=real, other=0.0), 0)
    bounds = tl.load(at + ((index // PROGRAMS).to(tl.int64) + LISTS) * step, mask=real, other=float("-inf"))
    first = tl.max(bounds, 0)
    cut = first
    for _ in range(1, LISTED):
        gone = tl.min(tl.where(bounds == cut, index, NO_ID), 0)
        bounds = tl.where(index == gone, float("-inf"), bounds)
        cut = tl.max(bounds, 0)
    return sound, longest, first, cut


@triton.jit
def _classes(v, end, approximate, error_norms, norms, by_error, by_norm, floor, reference, cut, own_temperature):
    """Approximations, the noise in them, their whole error, and the class: 0 a candidate, 1 to BINS, beyond: masked.

    Bin 1 reaches from the reference, T units deep per step; the last has no end.
    """
    inside = v < end
    original = tl.load(approximate + v, mask=inside, other=float("-inf"))
    off = tl.load(error_norms + v, mask=inside, other=0.0)
    length = tl.load(norms + v, mask=inside, other=0.0)
    a = tl.maximum(original, LOWEST)
    noise = by_norm * length + floor + tl.abs(a) * ROUNDING
    error = by_error * off + noise
    kind = (a <= reference - own_temperature).to(tl.int32) + 1
    kind += (a <= reference - own_temperature * 2.0).to(tl.int32)
    kind += (a <= reference - own_temperature * 3.0).to(tl.int32)
    kind += (a <= reference - own_temperature * 4.5).to(tl.int32)
    kind += (a <= reference - own_temperature * 6.0).to(tl.int32)
    kind += (a <= reference - own_temperature * 8.0).to(tl.int32)
    kind += (a <= reference - own_temperature * 12.0).to(tl.int32)
    kind = tl.where(a + error < cut, kind, 0)
    return a, noise, error, tl.where(original > float("-inf"), kind, BINS + 1)


@triton.jit
def _add(sums, there, value):
    return sums + tl.where(there, value[None, :], 0.0)


@triton.jit
def _raise(peaks, there, value):
    return tl.maximum(peaks, tl.where(there, value[None, :], 0.0))


@triton.jit
def _scan_part(
    approximate, error_norms, norms, by_error, by_norm, floor, reference, cut, own_temperature, begin, end, sums, step,
    LANES: tl.constexpr,
):  # fmt: skip
    """Leave the sums of each bin over a part of a row, and give back how many entries each list gets."""
    lane = tl.arange(0, LANES)
    bin = tl.arange(0, BINS)
    upper = tl.zeros([BINS, LANES], tl.float32)
    lower = tl.zeros([BINS, LANES], tl.float32)
    weight = tl.zeros([BINS, LANES], tl.float32)
    squares = tl.zeros([BINS, LANES], tl.float32)
    peak = tl.zeros([BINS, LANES], tl.float32)
    worst = tl.zeros([BINS, LANES], tl.float32)
    worst_noise = tl.zeros([BINS, LANES], tl.float32)
    upper_fall = tl.zeros([BINS, LANES], tl.float32)
    lower_fall = tl.zeros([BINS, LANES], tl.float32)
    fall = tl.zeros([BINS, LANES], tl.float32)
    turns = tl.zeros([BINS, LANES], tl.float32)
    peak_fall = tl.zeros([BINS, LANES], tl.float32)
    counts = tl.zeros([BINS, LANES], tl.int32)
    for start in range(begin, end, LANES):
        a, noise, error, kind = _classes(
            start + lane,
            end,
            approximate,
            error_norms,
            norms,
            by_error,
            by_norm,
            floor,
            reference,
            cut,
            own_temperature,
        )
        counts += (kind[None, :] == bin[:, None]).to(tl.int32)
        there = kind[None, :] == bin[:, None] + 1
        high = tl.maximum((a - reference + error) / own_temperature, -1000.0)  # exp of -1000 is 0
        low = tl.maximum((a - reference - error) / own_temperature, -1000.0)
        middle = tl.maximum((a - reference) / own_temperature, -1000.0)
        # Only entries below the cut get here, whose upper end is not above the reference.
        w_high = tl.exp2(tl.minimum(high, 0.0) * LOG2E)
        w_low = tl.exp2(tl.minimum(low, 0.0) * LOG2E)
        w = tl.exp2(tl.minimum(middle, 0.0) * LOG2E)
        turn = w * (1.0 + middle)
        upper = _add(upper, there, w_high)
        lower = _add(lower, there, w_low)
        weight = _add(weight, there, w)
        squares = _add(squares, there, w * w)
        peak = _raise(peak, there, w)
        worst = _raise(worst, there, tl.where(w_high > 0.0, error / own_temperature, 0.0))
        worst_noise = _raise(worst_noise, there, tl.where(w_high > 0.0, noise / own_temperature, 0.0))
        upper_fall = _add(upper_fall, there, -w_high * low)
        lower_fall = _add(lower_fall, there, -w_low * high)
        fall = _add(fall, there, -w * middle)
        turns = _add(turns, there, turn * turn)
        peak_fall = _raise(peak_fall, there, -w * middle)
    at = sums + bin
    tl.store(at + step * UPPER, tl.sum(upper, 1))
    tl.store(at + step * LOWER, tl.sum(lower, 1))
    tl.store(at + step * WEIGHT, tl.sum(weight, 1))
    tl.store(at + step * SQUARES, tl.sum(squares, 1))
    tl.store(at + step * PEAK, tl.max(peak, 1))
    tl.store(at + step * WORST, tl.max(worst, 1))
    tl.store(at + step * NOISE, tl.max(worst_noise, 1))
    tl.store(at + step * UPPER_FALL, tl.sum(upper_fall, 1))
    tl.store(at + step * LOWER_FALL, tl.sum(lower_fall, 1))
    tl.store(at + step * FALL, tl.sum(fall, 1))
    tl.store(at + step * TURNS, tl.sum(turns, 1))
    tl.store(at + step * PEAK_FALL, tl.max(peak_fall, 1))
    return tl.sum(counts, 1)


@triton.jit
def _fill_lists(
    approximate, error_norms, norms, by_error, by_norm, floor, reference, cut, own_temperature, begin, end,
    counts, counters,
    found, limit, LANES: tl.constexpr,
):  # fmt: skip
    """Put candidates and entries of all bins but the last into the row's lists, as far as there is room."""
    lane = tl.arange(0, LANES)
    bin = tl.arange(0, BINS)
    # One lane for each thread: what an atomic gives to threads that share an element differs between Tritons.
    wanted = tl.sum(tl.where(lane[None, :] == bin[:, None], counts[:, None], 0), 0)
    given = tl.atomic_add(counters + LIST_COUNTERS + lane, wanted, mask=wanted > 0, sem="relaxed")
    place = tl.sum(tl.where((lane[None, :] == bin[:, None]) & (counts > 0)[:, None], given[None, :], 0), 1)
    for start in range(begin, end, LANES):
        v = start + lane
        _, _, _, kind = _classes(
            v, end, approximate, error_norms, norms, by_error, by_norm, floor, reference, cut, own_temperature
        )
        here = (kind[None, :] == bin[:, None]).to(tl.int32)
        if tl.min(kind, 0) < BINS:
            at = place[:, None] + tl.cumsum(here, 1) - here
            to = found + bin.to(tl.int64)[:, None] * limit + at
            tl.store(to, v[None, :] + tl.zeros_like(at), mask=(here > 0) & (at < limit))
            place += tl.sum(here, 1)


@triton.jit(do_not_specialize=VOLATILE)
def scan_kernel(
    head, bias, temperatures, token_map, thresholds, error_norms, norms, error_gain, y, bounds, approximate, state,
    sums, found, known, counters, token, max_prob, margin, entropy, logsumexp, top_tokens, top_logprobs, status,
    rechecked, y_stride, dim, rows, vocab, programs, parts, limit, top_k, temperature, threshold, tolerance,
    MEASURE: tl.constexpr, LISTED: tl.constexpr, LIST: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, parts)."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    at = row.to(tl.int64)
    counters += at * COUNTERS
    approximate += at * vocab
    found += at * BINS * limit
    known += at * limit
    length = tl.load(bounds + row * 4)
    by_error = tl.load(bounds + row * 4 + 1)
    by_norm = tl.load(bounds + row * 4 + 2)
    floor = tl.load(bounds + row * 4 + 3)
    own_temperature = row_temperature(temperature, temperatures, row)
    sound, longest, reference, cut = _lower_bounds(state, row, rows, programs, LISTED, LIST, PROGRAMS)
    # Beyond this product of lengths a sum might overflow. NaN and infinity are not below it either.
    sound = sound & (reference > float("-inf")) & (length * longest < 1e30)
    sound = sound & has_temperature(temperature, temperatures, row)
    step = tl.zeros([], tl.int64) + rows * parts * BINS
    row_sums = sums + at * parts * BINS
    if sound:
        begin = part * CHUNK
        end = tl.minimum(begin + CHUNK, vocab)
        counts = _scan_part(
            approximate, error_norms, norms, by_error, by_norm, floor, reference, cut, own_temperature, begin, end,
            row_sums + part * BINS, step, LANES,
        )  # fmt: skip
        _fill_lists(
            approximate, error_norms, norms, by_error, by_norm, floor, reference, cut, own_temperature, begin,
            end, counts,
            counters, found, limit, LANES,
        )  # fmt: skip
    if arrives_last(counters, parts):
        answered = tl.full([], 0, tl.int32)
        if sound:
            wide = own_temperature.to(tl.float64)
            spread = length.to(tl.float64) * tl.load(error_gain).to(tl.float64) / wide * 1.000001
            border = request_setting(threshold, thresholds, row)
            answered = answer(
                head, bias, token_map, y, approximate, row_sums, step, found, known, counters, token, max_prob, margin,
                entropy, logsumexp, top_tokens, top_logprobs, rechecked, y_stride, dim, row, rows, parts, limit, top_k,
                own_temperature, wide, spread, reference, border, tolerance, MEASURE, LISTED, PARTS, LANES,
                ROWS, BLOCK_V,
                BLOCK_K, EVEN, WIDEN,
            )  # fmt: skip
        tl.store(status + row, tl.where(answered > 0, 0, FELL_BACK))


@triton.jit(do_not_specialize=VOLATILE)
def fallback_kernel(
    head, bias, temperatures, token_map, y, state, counters, token, max_prob, margin, entropy, logsumexp, top_tokens,
    top_logprobs, status, rechecked, all_status, all_max_prob, all_margin, all_entropy, all_thresholds, exited,
    active_rows, inverse, num_active, y_stride, dim, rows, all_rows, vocab, programs, top_k, temperature, threshold,
    MEASURE: tl.constexpr, LEVEL: tl.constexpr, LISTED: tl.constexpr, LIST: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, programs). A measure: these are the last rows of the call, and all rows are decided."""
    block = tl.program_id(0)
    n = block * ROWS + tl.arange(0, ROWS)
    fell = tl.load(status + n, mask=n < rows, other=0) & FELL_BACK
    if tl.max(fell, 0) > 0:
        read_head(
            head, None, bias, temperature, temperatures, y, state, y_stride, dim, rows, vocab, programs, block,
            tl.program_id(1), ROWS, LIST, BLOCK_V, BLOCK_K, EVEN, WIDEN,
        )  # fmt: skip
    if arrives_last(counters + block * ROWS * COUNTERS + BLOCK_COUNTER, programs):
        for index in range(0, tl.minimum(rows - block * ROWS, ROWS)):
            row = block * ROWS + index
            if (tl.load(status + row) & FELL_BACK) != 0:
                merge_row(
                    state, row, rows, programs, temperature, temperatures, token_map, token, max_prob, margin, entropy,
                    logsumexp, top_tokens, top_logprobs, status, FELL_BACK, vocab, top_k, None, None, 0, LISTED, LIST,
                    PROGRAMS,
                )  # fmt: skip
                tl.store(rechecked + row, vocab)
        if MEASURE != "":  # noqa: SIM102 (known at compile time, the next one is not)
            if arrives_last(counters + ALL_COUNTER, tl.num_programs(0)):
                decide(
                    all_rows, all_status, all_max_prob, all_margin, all_entropy, threshold, all_thresholds, exited,
                    active_rows, inverse, num_active, MEASURE, LEVEL, BLOCK,
                )  # fmt: skip
