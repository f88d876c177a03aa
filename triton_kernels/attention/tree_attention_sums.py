"""Scores of tree attention, and sums of values that are made once more. The kernels: tree_attention_kernels.py."""

from typing import NamedTuple

import triton
import triton.language as tl


class Keys(NamedTuple):
    """K or V of one KV head."""

    start: tl.tensor
    page_stride: tl.tensor  # by request, where there are no pages
    slot_stride: tl.tensor


class Cache(NamedTuple):
    """K and V of one request and KV head, and where its slots lie."""

    k: Keys
    v: Keys
    request: tl.tensor
    page_row: tl.tensor  # the request's pages, or None
    page_size: tl.tensor
    pages: tl.tensor  # pages with an id of pages or more do not exist


class Rows(NamedTuple):
    """The query rows of a block, and what decides which slots they see."""

    real: tl.tensor  # whether the row is one of the request's
    position: tl.tensor
    context: tl.tensor  # slots before the nodes
    ancestors: tl.tensor  # each row's words; None: no tree
    words: tl.tensor  # of a row
    depths: tl.tensor  # of the request's nodes; None: nobody asks
    slope: tl.tensor  # of ALiBi, or None


class Scoring(NamedTuple):
    """How products q . k become scores in units of log2, and how many slots back a row sees."""

    logit_scale: tl.tensor  # log2(e) * scale, or scale / softcap when there is a soft cap of log2(e) * softcap
    softcap: tl.tensor
    window: tl.tensor


@triton.jit
def _tanh(x):
    # Through exp2 of a number <= 0, which cannot overflow; near zero, where 1 - exp2 would cancel, the Taylor series.
    magnitude = tl.abs(x)
    e = tl.exp2(magnitude * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = 0.021869488536155203 + x2 * -0.008863235529902197
    series = -0.05396825396825397 + x2 * series
    series = 0.13333333333333333 + x2 * series
    series = -0.3333333333333333 + x2 * series
    return tl.where(magnitude < 0.35, x + x * x2 * series, tl.where(x < 0, -far, far))


@triton.jit
def scores(s, distance, slope, scoring, SOFTCAP: tl.constexpr):
    """Products q . k to scores: scaled, capped, biased. Of a tile or of one slot."""
    s = s * scoring.logit_scale
    if SOFTCAP:
        s = _tanh(s) * scoring.softcap
    if slope is not None:
        s -= slope * distance.to(tl.float32)
    return s


@triton.jit
def _piece(at, d, exists, DIM: tl.constexpr):
    """Columns `d` of one row of K or V, as float32."""
    return tl.load(at + d, mask=d < tl.where(exists, DIM, 0), other=0.0).to(tl.float32)


@triton.jit
def _dots(q_at, k_at, real, exists, DIM: tl.constexpr):
    """Every row of q times one key, 64 columns at a time. q is volatile, lest it stay in registers for all slots."""
    s = tl.zeros([q_at.shape[0]], tl.float32)
    for first in tl.range(0, DIM, 64, num_stages=1):
        d = first + tl.arange(0, 64)
        at = q_at[:, None] + d[None, :]
        q = tl.load(at, mask=real[:, None] & (d < DIM)[None, :], other=0.0, volatile=True).to(tl.float32)
        s += tl.sum(q * _piece(k_at, d, exists, DIM)[None, :], 1)
    return s


@triton.jit
def sum_again(
    q_at, maximum, cache, rows, scoring, begin, end, lowest, DIM: tl.constexpr, DIM0: tl.constexpr, DIM1: tl.constexpr,
    PAGING: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The sums of values and of weights over slots [begin, end), slot by slot: none reaches a row that doesn't see it.

    `maximum` is known already. Slow, and held apart from the loop over tiles, whose registers it would take.
    """
    k, v, request, page_row, page_size, pages = cache
    real, position, context, ancestors, _, depths, slope = rows
    d0 = tl.arange(0, DIM0)
    acc0 = tl.zeros([q_at.shape[0], DIM0], tl.float32)
    acc1 = 0.0
    if DIM1 > 0:
        d1 = DIM0 + tl.arange(0, DIM1)
        acc1 = tl.zeros([q_at.shape[0], DIM1], tl.float32)
    total = tl.zeros([q_at.shape[0]], tl.float32)
    safe = tl.where(maximum == float("-inf"), 0.0, maximum)
    for index in tl.range(tl.maximum(begin, lowest), end, num_stages=1):
        slot = tl.zeros([], tl.int32) + index  # the interpreter's index is a Python int
        exists = slot >= 0
        page = request
        offset = slot
        if PAGING > 0:
            page = tl.load(page_row + slot // page_size)
            offset = slot % page_size
            exists = (page >= 0) & (page < pages)
        k_at = k.start + page.to(tl.int64) * k.page_stride + offset.to(tl.int64) * k.slot_stride
        v_at = v.start + page.to(tl.int64) * v.page_stride + offset.to(tl.int64) * v.slot_stride
        s = _dots(q_at, k_at, real, exists, DIM)
        node = slot - context + tl.zeros_like(position)
        sees = real
        if ancestors is not None:
            words = tl.load(ancestors + (node >> 6), mask=real & (node >= 0), other=-1)
            sees = sees & (((words >> (node & 63).to(tl.int64)) & 1) != 0)
        distance = position - slot
        if depths is not None:
            distance -= tl.where(node >= 0, tl.load(depths + node, mask=node >= 0, other=0) - node, 0)
        if WINDOW:
            sees = sees & (distance >= 0) & (distance < scoring.window)
        weight = tl.exp2(scores(s, distance, slope, scoring, SOFTCAP) - safe)
        total += tl.where(sees, weight, 0.0)
        acc0 += tl.where(sees[:, None], weight[:, None] * _piece(v_at, d0, exists, DIM)[None, :], 0.0)
        if DIM1 > 0:
            acc1 += tl.where(sees[:, None], weight[:, None] * _piece(v_at, d1, exists, DIM)[None, :], 0.0)
    return acc0, acc1, total
