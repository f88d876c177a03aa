"""Early exit with bounds in Triton: the head is read a part at a time, until no entry that is left matters.

One launch for the rows, and two for each part, whatever the rows turn out to need:

    rows    exit_kernels.py; here also the row's length, from which no unread logit can escape.
    part    the loop of exit_confidence over one part of the head, for blocks of rows of which one is open. Its closed
            rows are multiplied along, since the block reads the same bytes without them, but nobody looks at what they
            leave. Each program also finds the greatest bias of its share of what is behind the part: 4 bytes per entry,
            next to the thousands that an entry of the head has.
    settle  one program per hidden row. If the row is open, its states are joined with what it carries from the parts
            before, its statistics are written, and the rule of csrc/early_exit/bound_verdict.h says whether it may
            close. A row whose decision is its own closes itself; else the last program to arrive closes all rows or
            none. After the last part the last program decides for all rows, from the statistics with which they closed.

When every row is closed, the programs of the launches that are left return at once. Nobody waits for anybody, and what
a row carries is touched by its own program alone.

Rounding: a sum is at most (9/8 n + 64) 2^-23 |y| |W| off, see screen_kernels.py. Verdicts are in float64, where what
cancels in 1 - exp(x) near 0 costs 1e-16; the header's room is 1e-6 there, and 1e-4 of everything else.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.last_program import arrives_last
from specdec_ops.triton_kernels.common.token_rows import request_setting

from .exit_kernels import COUNTERS, LISTS, VOLATILE, decide, has_temperature, merge_row, read_head, row_temperature

# A row's counters: arrivals, at the first row; whether it is closed; its verdict.
CLOSED = tl.constexpr(1)
VERDICT = tl.constexpr(2)
# Bits of a verdict: the row cannot pass, must pass, and no other entry can be among those that it returns.
NO = tl.constexpr(1)
YES = tl.constexpr(2)
KNOWN = tl.constexpr(4)

ROOM = tl.constexpr(1e-4)
LEAD_ROOM = tl.constexpr(1e-6)
MAX_ABOVE = tl.constexpr(600.0)
MAX_PRODUCT = tl.constexpr(1e30)  # of lengths, above which a float32 sum might overflow
BIAS_BLOCK = tl.constexpr(512)


@triton.jit
def _greatest_bias(bias, begin, vocab, program, programs):
    """Of a program's share of the entries from `begin` on; infinite if there is a NaN."""
    lane = tl.arange(0, BIAS_BLOCK)
    most = tl.full([BIAS_BLOCK], float("-inf"), tl.float32)
    for start in range(begin + program * BIAS_BLOCK, vocab, programs * BIAS_BLOCK):
        entries = start + lane
        value = tl.load(bias + entries, mask=entries < vocab, other=float("-inf"))
        most = tl.maximum(most, tl.where(value == value, value, float("inf")))
    return tl.max(most, 0)


@triton.jit(do_not_specialize=[*VOLATILE[:3], "begin", "end", "temperature"])
def part_kernel(
    head, scales, bias, temperatures, y, state, counters, y_stride, dim, rows, vocab, begin, end, programs,
    temperature, ROWS: tl.constexpr, LIST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, programs). Entries in the states count from `begin`; the bias is their last number."""
    block = tl.program_id(0)
    program = tl.program_id(1)
    n = block * ROWS + tl.arange(0, ROWS)
    closed = tl.load(counters + n.to(tl.int64) * COUNTERS + CLOSED, mask=n < rows, other=1)
    if tl.min(closed, 0) == 0:
        part_scales = scales
        if scales is not None:
            part_scales += begin
        part_bias = bias
        if bias is not None:
            part_bias += begin
        read_head(
            head + begin.to(tl.int64) * dim, part_scales, part_bias, temperature, temperatures, y, state, y_stride, dim,
            rows, end - begin, programs, block, program, ROWS, LIST, BLOCK_V, BLOCK_K, EVEN, WIDEN,
        )  # fmt: skip
        if bias is not None:
            behind = _greatest_bias(bias, end, vocab, program, programs)
            at = state + n.to(tl.int64) * programs + program
            step = tl.zeros([], tl.int64) + rows * programs
            tl.store(at + step * (LISTS + 2 * LIST), behind + tl.zeros([ROWS], tl.float32), mask=n < rows)


@triton.jit
def _ceiling(bounds, norm, most_bias):
    """What no unread logit is above, in float64; infinite where a sum on the way to it might overflow, or of NaN."""
    length = tl.load(bounds).to(tl.float64)
    by_length = tl.load(bounds + 1).to(tl.float64)
    floor = tl.load(bounds + 3).to(tl.float64)
    product = by_length * norm.to(tl.float64) + floor
    # Before its scale a sum with an int8 head may be as large as the length allows.
    bounded = (product < MAX_PRODUCT) & (length < MAX_PRODUCT)
    highest = product + most_bias.to(tl.float64)
    outward = tl.where(tl.abs(highest) < float("inf"), tl.abs(highest) * 9.5367431640625e-07, 0.0)
    return tl.where(bounded, highest + outward, float("inf"))


@triton.jit
def _mixed_entropy(a, entropy):
    """h(a) + (1 - a) entropy."""
    between = (a > 0.0) & (a < 1.0)
    inside = tl.where(between, a, 0.5)
    choice = -inside * tl.log(inside) - (1.0 - inside) * tl.log(1.0 - inside)
    return tl.where(between, choice, 0.0) + (1.0 - a) * entropy


@triton.jit
def verdict(
    maximum, total, moment, unsound, second, least, ceiling, left, own_temperature, limit, MEASURE: tl.constexpr,
):  # fmt: skip
    """exit_verdict of csrc/early_exit/bound_verdict.h, as bits.

    Of a row: greatest logit, S, t, 1 for NaN or +inf, the second logit and the last of those that are returned; what
    none of the `left` others is above; temperature and threshold. `ceiling` and what follows it, S and t are float64.
    """
    some = maximum > float("-inf")
    first = maximum.to(tl.float64)
    size = tl.where(some, total, 1.0)
    up = (ceiling - first) / own_temperature
    bounded = some & (up <= MAX_ABOVE)  # NaN is not
    up = tl.where(bounded, up, 0.0)
    peak = tl.exp(up)
    above = up > 0.0
    rest = left * peak
    whole = size + rest
    if MEASURE == "entropy":
        entropy = tl.log(size) - moment / own_temperature / size
        most = rest / whole
        mixed = _mixed_entropy(most, entropy)
        spread = tl.exp(entropy) + left
        low = tl.minimum(entropy, mixed)
        high = tl.where(left / spread <= most, tl.log(spread), mixed + most * tl.log(left))
        room = (1.0 + high) * (2.0 * ROOM)
        no = low - room > limit
        yes = high + room <= limit
    else:
        first_part = 1.0 / size
        least_part = 1.0 / whole
        lead = tl.zeros([], tl.float64)
        room = tl.zeros([], tl.float64)
        if MEASURE == "margin":
            gap = (second.to(tl.float64) - first) / own_temperature
            first_part *= 1.0 - tl.exp(gap)
            least_part *= 1.0 - tl.exp(tl.minimum(tl.maximum(gap, up), 0.0))
            lead += 1.0
            room += LEAD_ROOM
        high = tl.maximum(first_part, tl.where(above, (peak - lead) / (size + peak), 0.0)) + room
        low = tl.where(above, 0.0, least_part) - room
        no = high * (1.0 + ROOM) < limit
        yes = low * (1.0 - ROOM) >= limit
    known = ceiling <= least.to(tl.float64)
    bits = no.to(tl.int32) * NO + yes.to(tl.int32) * YES + known.to(tl.int32) * KNOWN
    return tl.where(unsound > 0.0, NO + KNOWN, tl.where(bounded, bits, 0))


@triton.jit
def _close_together(counters, rows, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """Close all rows if their common decision is certain. By one program, when all verdicts are written."""
    lane = tl.arange(0, BLOCK)
    no = tl.full([], 0, tl.int32)
    yes = tl.full([], 0, tl.int32)
    known = tl.full([], 0, tl.int32)
    for start in range(0, rows, BLOCK):
        n = start + lane
        at = counters + n.to(tl.int64) * COUNTERS + VERDICT
        bits = tl.load(at, mask=n < rows, other=0, cache_modifier=".cg")  # other programs have written it
        no += tl.sum(((bits & NO) != 0).to(tl.int32), 0)
        yes += tl.sum(((bits & YES) != 0).to(tl.int32), 0)
        known += tl.sum(((bits & KNOWN) != 0).to(tl.int32), 0)
    if LEVEL == "any":
        certain = (no == rows) | ((yes > 0) & (known == rows))
    else:
        certain = (no > 0) | ((yes == rows) & (known == rows))
    if certain:
        for start in range(0, rows, BLOCK):
            n = start + lane
            at = counters + n.to(tl.int64) * COUNTERS + CLOSED
            tl.store(at, tl.full([BLOCK], 1, tl.int32), mask=n < rows)


@triton.jit(do_not_specialize=[*VOLATILE, "part", "begin", "end", "temperature", "threshold"])
def settle_kernel(
    state, carried_sums, carried_best, bounds, norms_after, bias, counters, temperatures, token_map, thresholds,
    token, max_prob, margin, entropy, logsumexp, top_tokens, top_logprobs, status, exited, active_rows, inverse,
    num_active, seen, rows, vocab, part, begin, end, programs, top_k, temperature, threshold, MEASURE: tl.constexpr,
    LEVEL: tl.constexpr, LISTED: tl.constexpr, LIST: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows)."""
    row = tl.program_id(0)
    mine = counters + row.to(tl.int64) * COUNTERS
    is_open = tl.load(mine + CLOSED) == 0
    if is_open:
        maximum, total, moment, unsound, second, least = merge_row(
            state, row, rows, programs, temperature, temperatures, token_map, token, max_prob, margin, entropy,
            logsumexp, top_tokens, top_logprobs, status, 0, vocab, top_k, carried_sums, carried_best, begin, LISTED,
            LIST, PROGRAMS,
        )  # fmt: skip
        tl.store(seen + row, end)
        if end < vocab:
            most_bias = tl.full([], 0.0, tl.float32)
            if bias is not None:
                program = tl.arange(0, PROGRAMS)
                step = tl.zeros([], tl.int64) + rows * programs
                at = state + row.to(tl.int64) * programs + program + step * (LISTS + 2 * LIST)
                most_bias = tl.max(tl.load(at, mask=program < programs, other=float("-inf")), 0)
            ceiling = _ceiling(bounds + row.to(tl.int64) * 4, tl.load(norms_after + part), most_bias)
            zero = tl.zeros([], tl.float64)
            own_temperature = zero + row_temperature(temperature, temperatures, row)
            unsound = tl.where(has_temperature(temperature, temperatures, row), unsound, 1.0)
            limit = zero + request_setting(threshold, thresholds, row)
            bits = verdict(
                maximum,
                total,
                moment,
                unsound,
                second,
                least,
                ceiling,
                zero + (vocab - end),
                own_temperature,
                limit,
                MEASURE,
            )
            if LEVEL == "row":
                settled = ((bits & NO) != 0) | ((bits & (YES + KNOWN)) == YES + KNOWN)
                tl.store(mine + CLOSED, settled.to(tl.int32))
            else:
                tl.store(mine + VERDICT, bits)
                if arrives_last(counters, rows):
                    tl.store(counters, 0)
                    _close_together(counters, rows, LEVEL, BLOCK)
    if end == vocab:  # noqa: SIM102 (an `and` would call both)
        if arrives_last(counters, rows):
            decide(
                rows, status, max_prob, margin, entropy, threshold, thresholds, exited, active_rows, inverse,
                num_active, MEASURE, LEVEL, BLOCK,
            )  # fmt: skip
