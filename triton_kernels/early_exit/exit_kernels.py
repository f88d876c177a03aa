"""The head of early exit in Triton: logits of a tile, what a row remembers of them, and which rows exit.

Three launches, and no logit in memory:

    rows    one program per hidden row: y, the row's RMSNorm, in the type that is multiplied with the head, padded with
            zeros to whole steps of the dim. 2 to 4 bytes per element, from then on in L2. It also clears the counters.
    head    a program owns a block of hidden rows and every `programs`-th tile of the head's rows. A tile's logits are
            made by tensor cores (FMA for float32) from the head, which is read once per row block, and y, which comes
            from L2. They stay in registers, where the row's state takes them in; the states go to scratch at the end.
    merge   one program per hidden row joins its states, in the order of the programs, writes its statistics. The last
            one to arrive decides for all rows. Nobody waits for anybody, and nothing is added up by atomics.

Fewer launches would need the norm in every program of `head`, where it would go through registers between the copies
and the tensor cores, or one program that merges all rows one after the other.

A state is, of the part of the vocabulary that was seen: the greatest logit m, S = sum exp2((z - m) c) with c =
log2(e) / T, t = sum exp2((z - m) c) (z - m), whether a logit was NaN or +inf, and the LIST greatest logits with their
entries, in no order. An entry only gets into the list if it is above the least in it, which seldom happens after the
first tiles: the loop that looks for the next one then ends at once. Ties go to the lowest entry, because entries come
in ascending order and of the listed ones the highest is dropped first.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.last_program import arrives_last
from specdec_ops.triton_kernels.common.token_rows import (
    LOG2E,
    NO_ID,
    is_temperature,
    request_setting,
    softmax_temperature,
)
from specdec_ops.triton_kernels.linear.products import narrowed, product, widened

INVALID = tl.constexpr(1)
SETTING_INVALID = tl.constexpr(4)
LOWEST = tl.constexpr(-1e30)  # differences are cut off here: -inf would make NaN of 0 * -inf
# Integers of each row that count arrivals, from 0 at each call. Those of a block of rows are its first row's.
COUNTERS = tl.constexpr(16)
# Places of a state's numbers in scratch; the listed logits follow, then their entries.
MAXIMUM = tl.constexpr(0)
TOTAL = tl.constexpr(1)
MOMENT = tl.constexpr(2)
UNSOUND = tl.constexpr(3)
LISTS = tl.constexpr(4)

VOLATILE = ["rows", "vocab", "programs", "top_k"]


@triton.jit(do_not_specialize=["norm_eps", "share"])
def rows_kernel(
    hidden, norm_weight, y, bounds, counters, hidden_stride, y_stride, dim, norm_eps, share, BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (rows). y, the counters and, unless `bounds` is None, the row's length and what bounds its screen.

    `share` is the part of |y| |W| by which two differently rounded dot products may differ (screen_kernels.py).
    """
    row = tl.program_id(0).to(tl.int64)
    hidden += row * hidden_stride
    y += row * y_stride
    lane = tl.arange(0, BLOCK)
    tl.store(counters + row * COUNTERS + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
    scale = tl.full([], 1.0, tl.float32)
    if norm_weight is not None:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            d = start + lane
            x = widened(tl.load(hidden + d, mask=d < dim, other=0.0))
            squares += x * x
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / dim + norm_eps)
    exact = tl.zeros([BLOCK], tl.float64)
    for start in range(0, y_stride, BLOCK):
        d = start + lane
        x = widened(tl.load(hidden + d, mask=d < dim, other=0.0))
        if norm_weight is not None:
            weight = widened(tl.load(norm_weight + d, mask=d < dim, other=0.0))
            x = tl.where(d < dim, x * scale * weight, 0.0)
        multiplied = narrowed(x, y.dtype.element_ty, WIDEN)
        tl.store(y + d, multiplied, mask=d < y_stride)
        if bounds is not None:
            there = widened(multiplied).to(tl.float64)
            exact += there * there
    if bounds is not None:
        length = tl.sqrt(tl.sum(exact, 0)) * 1.000001
        # Numbers that a tensor core may take for zero: below 2^-126 each.
        vanishing = tl.sqrt(tl.full([], 0.0, tl.float64) + dim) * 2.350988701644575e-38
        at = bounds + row * 4
        tl.store(at, length.to(tl.float32))
        tl.store(at + 1, ((length * (1.0 + share) + vanishing) * 1.000001).to(tl.float32))
        tl.store(at + 2, ((length * share + vanishing) * 1.000001).to(tl.float32))
        tl.store(at + 3, ((vanishing * length + dim * 2.350988701644575e-38) * 1.000001).to(tl.float32))


@triton.jit
def tile_logits(
    head, entries, y, n, y_stride, dim, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products of the rows n of y with BLOCK_V entries of the head, all of which exist: float32 [ROWS, BLOCK_V]."""
    sums = tl.zeros([ROWS, BLOCK_V], tl.float32)
    head_at = head + entries.to(tl.int64) * dim
    y_at = y + n.to(tl.int64) * y_stride
    k = tl.arange(0, BLOCK_K)
    for start in range(0, dim, BLOCK_K):
        d = start + k
        if EVEN:
            weights = tl.load(head_at[:, None] + d[None, :])
        else:
            weights = tl.load(head_at[:, None] + d[None, :], mask=(d < dim)[None, :], other=0)
        rows = tl.load(y_at[:, None] + d[None, :])  # padded with zeros
        sums = product(rows, tl.trans(weights), sums, WIDEN)
    return sums


@triton.jit
def finished(z, entries, scales, bias, vocab):
    """Logits of a tile: with scale and bias, and -inf where the vocabulary ends."""
    exists = entries < vocab
    if scales is not None:
        z = z * tl.load(scales + entries, mask=exists, other=0.0)[None, :]
    if bias is not None:
        z = z + tl.load(bias + entries, mask=exists, other=0.0)[None, :]
    return tl.where(exists[None, :], z, float("-inf"))


@triton.jit
def empty_list(ROWS: tl.constexpr, LIST: tl.constexpr):
    """No logit, and entries beyond any, all different."""
    values = tl.full([ROWS, LIST], float("-inf"), tl.float32)
    entries = (tl.arange(0, LIST) ^ NO_ID)[None, :] + tl.zeros([ROWS, LIST], tl.int32)
    return values, entries


@triton.jit
def list_greatest(z, ids, values, entries):
    """Take a tile's logits [ROWS, BLOCK_V] in among the listed ones. No NaN; ids ascend from tile to tile."""
    least = tl.min(values, 1)
    top = tl.max(z, 1)
    left = z
    while tl.max((top > least).to(tl.int32), 0) > 0:
        first = tl.min(tl.where(left == top[:, None], ids[None, :], NO_ID), 1)
        dropped = tl.max(tl.where(values == least[:, None], entries, -1), 1)
        here = (values == least[:, None]) & (entries == dropped[:, None]) & (top > least)[:, None]
        values = tl.where(here, top[:, None], values)
        entries = tl.where(here, first[:, None], entries)
        left = tl.where(ids[None, :] == first[:, None], float("-inf"), left)
        top = tl.max(left, 1)
        least = tl.min(values, 1)
    return values, entries


@triton.jit
def row_factor(temperature, temperatures, n, rows):
    """log2(e) / T of each row."""
    given = tl.full(n.shape, 1.0, tl.float32) * temperature
    if temperatures is not None:
        given = tl.load(temperatures + n, mask=n < rows, other=1.0)
    return LOG2E / softmax_temperature(given)


@triton.jit
def row_temperature(temperature, temperatures, row):
    """What divides a row's logits, float32."""
    given = tl.full([], 0.0, tl.float32) + request_setting(temperature, temperatures, row)
    return softmax_temperature(given)


@triton.jit
def has_temperature(temperature, temperatures, row):
    return is_temperature(request_setting(temperature, temperatures, row))


@triton.jit
def read_head(
    head, scales, bias, temperature, temperatures, y, state, y_stride, dim, rows, vocab, programs, row_block, program,
    ROWS: tl.constexpr, LIST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """See every `programs`-th tile of the head, and leave the states of a block of rows."""
    n = row_block * ROWS + tl.arange(0, ROWS)
    known = tl.minimum(n, rows - 1)
    factor = row_factor(temperature, temperatures, n, rows)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    unsound = tl.zeros([ROWS], tl.int32)
    values, entries = empty_list(ROWS, LIST)
    for tile in range(program, tl.cdiv(vocab, BLOCK_V), programs):
        ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tile_logits(head, tl.minimum(ids, vocab - 1), y, known, y_stride, dim, ROWS, BLOCK_V, BLOCK_K, EVEN, WIDEN)
        z = finished(z, ids, scales, bias, vocab)
        unsound |= tl.max((z < float("inf")).to(tl.int32) ^ 1, 1)
        z = tl.where(z != z, float("-inf"), z)
        values, entries = list_greatest(z, ids, values, entries)
        new_maximum = tl.maximum(maximum, tl.max(z, 1))
        from_here = tl.where(new_maximum > float("-inf"), new_maximum, 0.0)
        fall = tl.maximum(maximum - from_here, LOWEST)
        decay = tl.exp2(fall * factor)
        below = tl.maximum(z - from_here[:, None], LOWEST)
        weight = tl.exp2(below * factor[:, None])
        moment = (moment + total * fall) * decay + tl.sum(weight * below, 1)
        total = total * decay + tl.sum(weight, 1)
        maximum = new_maximum
    exists = n < rows
    at = state + n.to(tl.int64) * programs + program
    step = tl.zeros([], tl.int64) + rows * programs
    tl.store(at + step * MAXIMUM, maximum, mask=exists)
    tl.store(at + step * TOTAL, total, mask=exists)
    tl.store(at + step * MOMENT, moment, mask=exists)
    tl.store(at + step * UNSOUND, unsound.to(tl.float32), mask=exists)
    slot = tl.arange(0, LIST).to(tl.int64)[None, :]
    tl.store(at[:, None] + (slot + LISTS) * step, values, mask=exists[:, None])
    tl.store(at[:, None] + (slot + LISTS + LIST) * step, entries.to(tl.float32, bitcast=True), mask=exists[:, None])


@triton.jit(do_not_specialize=[*VOLATILE, "temperature"])
def head_kernel(
    head, scales, bias, temperatures, y, state, y_stride, dim, rows, vocab, programs, temperature,
    ROWS: tl.constexpr, LIST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, programs); row blocks first, so that those of one tile meet in L2."""
    read_head(
        head, scales, bias, temperature, temperatures, y, state, y_stride, dim, rows, vocab, programs,
        tl.program_id(0), tl.program_id(1), ROWS, LIST, BLOCK_V, BLOCK_K, EVEN, WIDEN,
    )  # fmt: skip


@triton.jit
def order_of(value, entry):
    """An integer that is greater for greater logits, and for lower entries among equals."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (entry ^ NO_ID).to(tl.int64)


@triton.jit
def value_of(order):
    bits = (order >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def entry_of(order):
    return (order & 0x7FFFFFFF).to(tl.int32) ^ NO_ID


@triton.jit
def token_of(entry, token_map):
    if token_map is not None:
        return tl.load(token_map + entry)
    else:
        return entry


@triton.jit
def joined_sums(state, row, rows, programs, factor, carried_sums, begin, PROGRAMS: tl.constexpr):
    """Of a row's states, and of what it carries from before `begin`: m, S and t in float64, and 1 for NaN or +inf."""
    program = tl.arange(0, PROGRAMS)
    there = program < programs
    at = state + row.to(tl.int64) * programs + program
    step = tl.zeros([], tl.int64) + rows * programs
    maxima = tl.load(at + step * MAXIMUM, mask=there, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    if carried_sums is not None:
        carried = carried_sums + row.to(tl.int64) * LISTS
        before = tl.load(carried + MAXIMUM, mask=begin > 0, other=float("-inf")).to(tl.float32)
        maximum = tl.maximum(maximum, before)
    from_here = tl.where(maximum > float("-inf"), maximum, 0.0)
    fall = tl.maximum(maxima - from_here, LOWEST)
    decay = tl.exp2(fall * factor).to(tl.float64)
    totals = tl.load(at + step * TOTAL, mask=there, other=0.0).to(tl.float64)
    moments = tl.load(at + step * MOMENT, mask=there, other=0.0).to(tl.float64)
    total = tl.sum(totals * decay, 0)
    moment = tl.sum((moments + totals * fall) * decay, 0)
    unsound = tl.max(tl.load(at + step * UNSOUND, mask=there, other=0.0), 0)
    if carried_sums is not None:
        fall_before = tl.maximum(before - from_here, LOWEST)
        decay_before = tl.exp2(fall_before * factor).to(tl.float64)
        total_before = tl.load(carried + TOTAL, mask=begin > 0, other=0.0)
        moment_before = tl.load(carried + MOMENT, mask=begin > 0, other=0.0)
        total += total_before * decay_before
        moment += (moment_before + total_before * fall_before) * decay_before
        unsound = tl.maximum(unsound, tl.load(carried + UNSOUND, mask=begin > 0, other=0.0).to(tl.float32))
    return maximum, total, moment, unsound


@triton.jit
def carry(row, carried_sums, carried_best, maximum, total, moment, unsound, best, LIST: tl.constexpr):
    """Leave what a row has seen to the next part: the joined state, its list as integers of order_of."""
    tl.debug_barrier()  # all threads have read what is overwritten
    at = carried_sums + row.to(tl.int64) * LISTS
    tl.store(at + MAXIMUM, maximum.to(tl.float64))
    tl.store(at + TOTAL, total)
    tl.store(at + MOMENT, moment)
    tl.store(at + UNSOUND, unsound.to(tl.float64))
    tl.store(carried_best + row.to(tl.int64) * LIST + tl.arange(0, LIST), best)


@triton.jit
def write_listed(
    state, row, rows, programs, valid, maximum, log_size, inverse_temperature, token_map, token, top_tokens,
    top_logprobs,
    top_k, carried_best, begin, LISTED: tl.constexpr, LIST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write the greatest logits of a row's states, see merge_row. Gives back the second one, the last of the top_k, and
    all of them as carried_best has them.
    """
    index = tl.arange(0, PROGRAMS * LIST)
    slot = index // PROGRAMS
    from_program = index % PROGRAMS
    step = tl.zeros([], tl.int64) + rows * programs
    listed_at = state + row.to(tl.int64) * programs + from_program + (slot.to(tl.int64) + LISTS) * step
    real = from_program < programs
    listed = tl.load(listed_at, mask=real, other=float("-inf"))
    entries = tl.load(listed_at + step * LIST, mask=real, other=0.0).to(tl.int32, bitcast=True)
    rank = tl.arange(0, LIST)
    joined = order_of(tl.full([LIST], float("-inf"), tl.float32), rank ^ NO_ID)
    if carried_best is not None:
        entries = tl.where(listed > float("-inf"), entries + begin, entries)
        earlier = rank < tl.where(begin > 0, LIST, 0)
        before = tl.load(carried_best + row.to(tl.int64) * LIST + rank, mask=earlier, other=0)
        before = tl.where(earlier, before, joined)
    orders = order_of(listed, tl.where(real, entries, NO_ID))
    second = tl.full([], float("-inf"), tl.float32)
    last = tl.full([], float("-inf"), tl.float32)
    for k in range(LISTED):
        best = tl.max(orders, 0)
        if carried_best is not None:
            best = tl.maximum(best, tl.max(before, 0))
            before = tl.where(before == best, -(2**63), before)
            joined = tl.where(rank == k, best, joined)
        orders = tl.where(orders == best, -(2**63), orders)
        value = value_of(best)
        exists = value > float("-inf")
        entry = tl.where(exists, entry_of(best), 0)
        if k == 0:
            tl.store(token + row, token_of(entry, token_map))
        if k == 1:
            second = value
        if carried_best is not None:
            last = tl.where((k == 0) | (k < top_k), value, last)
        if top_tokens is not None:
            logprob = ((value - maximum) * inverse_temperature - log_size).to(tl.float32)
            listed_token = token_of(entry, token_map)
            tl.store(top_tokens + row * top_k + k, tl.where(valid & exists, listed_token, -1), mask=k < top_k)
            shown = tl.where(valid & exists, logprob, float("-inf"))
            tl.store(top_logprobs + row * top_k + k, shown, mask=k < top_k)
    return second, last, joined


@triton.jit
def merge_row(
    state, row, rows, programs, temperature, temperatures, token_map, token, max_prob, margin, entropy, logsumexp,
    top_tokens, top_logprobs, status, flags, vocab, top_k, carried_sums, carried_best, begin, LISTED: tl.constexpr,
    LIST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Join a row's states and write its statistics, with `flags` added to its status.

    carried_sums float64 [rows, LISTS] and carried_best int64 [rows, LIST]: what rows have seen before entry `begin`,
    where the states' entries begin; it is joined, too, and replaced. None: the states are all there is. Gives back
    what was joined: m, S, t, 1 for NaN or +inf, the second logit and the last of the top_k.
    """
    own_temperature = row_temperature(temperature, temperatures, row)
    factor = LOG2E / own_temperature
    inverse_temperature = 1.0 / tl.full([], 1.0, tl.float64) / own_temperature
    maximum, total, moment, unsound = joined_sums(state, row, rows, programs, factor, carried_sums, begin, PROGRAMS)
    sound = (unsound == 0.0) & (maximum > float("-inf"))
    bits = tl.where(has_temperature(temperature, temperatures, row), 0, SETTING_INVALID) | tl.where(sound, 0, INVALID)
    valid = bits == 0
    size = tl.where(valid, total, 1.0)
    log_size = tl.log(size)
    second, last, joined = write_listed(
        state, row, rows, programs, valid, maximum, log_size, inverse_temperature, token_map, token,
        top_tokens, top_logprobs,
        top_k, carried_best, begin, LISTED, LIST, PROGRAMS,
    )  # fmt: skip
    lead = 1.0 - tl.exp2(tl.maximum(second - maximum, LOWEST) * factor)
    spread = tl.maximum(log_size - moment * inverse_temperature / size, 0.0)
    tl.store(max_prob + row, tl.where(valid, 1.0 / size, 0.0).to(tl.float32))
    tl.store(margin + row, tl.where(valid, lead / size, 0.0).to(tl.float32))
    tl.store(entropy + row, tl.where(valid, spread, 0.0).to(tl.float32))
    tl.store(logsumexp + row, tl.where(valid, maximum * inverse_temperature + log_size, float("-inf")).to(tl.float32))
    tl.store(status + row, bits | flags)
    if carried_best is not None:
        carry(row, carried_sums, carried_best, maximum, total, moment, unsound, joined, LIST)
    return maximum, total, moment, unsound, second, last


@triton.jit
def _passed(n, rows, status, figure, threshold, thresholds, MEASURE: tl.constexpr):
    """Which rows pass by themselves; read past the first-level cache, since other programs have written it."""
    exists = n < rows
    value = tl.load(figure + n, mask=exists, other=0.0, cache_modifier=".cg")
    flags = tl.load(status + n, mask=exists, other=1, cache_modifier=".cg")
    limit = tl.full(n.shape, 0.0, tl.float32) + threshold
    if thresholds is not None:
        limit = tl.load(thresholds + n, mask=exists, other=0.0)
    passed = value <= limit if MEASURE == "entropy" else value >= limit
    return exists & passed & ((flags & (INVALID | SETTING_INVALID)) == 0)


@triton.jit
def decide(
    rows, status, max_prob, margin, entropy, threshold, thresholds, exited, active_rows, inverse, num_active,
    MEASURE: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which rows exit, and the others in their order. By one program, when the statistics of all rows are written."""
    figure = max_prob
    if MEASURE == "margin":
        figure = margin
    if MEASURE == "entropy":
        figure = entropy
    lane = tl.arange(0, BLOCK)
    together = tl.full([], 0, tl.int32)
    if LEVEL != "row":
        count = tl.full([], 0, tl.int32)
        for start in range(0, rows, BLOCK):
            passed = _passed(start + lane, rows, status, figure, threshold, thresholds, MEASURE)
            count += tl.sum(passed.to(tl.int32), 0)
        together = (count > 0 if LEVEL == "any" else count == rows).to(tl.int32)
    active = tl.full([], 0, tl.int32)
    for start in range(0, rows, BLOCK):
        n = start + lane
        exists = n < rows
        if LEVEL == "row":
            goes = _passed(n, rows, status, figure, threshold, thresholds, MEASURE).to(tl.int32)
        else:
            goes = together + tl.zeros([BLOCK], tl.int32)
        stays = exists.to(tl.int32) * (1 - goes)
        place = active + tl.cumsum(stays, 0) - stays
        tl.store(exited + n, goes.to(tl.int8), mask=exists)
        tl.store(inverse + n, tl.where(stays > 0, place, -1), mask=exists)
        tl.store(active_rows + place, n, mask=stays > 0)
        active += tl.sum(stays, 0)
    for start in range(0, rows, BLOCK):
        n = start + lane
        tl.store(active_rows + n, tl.full([BLOCK], -1, tl.int32), mask=(n >= active) & (n < rows))
    tl.store(num_active, active)


@triton.jit(do_not_specialize=[*VOLATILE, "temperature", "threshold"])
def merge_kernel(
    state, counters, temperatures, token_map, thresholds, token, max_prob, margin, entropy, logsumexp, top_tokens,
    top_logprobs, status, exited, active_rows, inverse, num_active, rows, vocab, programs, top_k, temperature,
    threshold, MEASURE: tl.constexpr, LEVEL: tl.constexpr, LISTED: tl.constexpr, LIST: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows)."""
    merge_row(
        state, tl.program_id(0), rows, programs, temperature, temperatures, token_map, token, max_prob, margin,
        entropy, logsumexp, top_tokens, top_logprobs, status, 0, vocab, top_k, None, None, 0, LISTED, LIST, PROGRAMS,
    )  # fmt: skip
    if MEASURE != "":  # noqa: SIM102 (known at compile time, the next one is not)
        if arrives_last(counters, rows):
            decide(
                rows, status, max_prob, margin, entropy, threshold, thresholds, exited, active_rows, inverse,
                num_active, MEASURE, LEVEL, BLOCK,
            )  # fmt: skip
