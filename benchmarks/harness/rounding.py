"""How far a right result may be from the exact one, op by op: a bound on the rounding errors of the computation.

PyTorch's own error is no measure by itself. A case may have a single figure, such as the log-sum-exp of one row, and in
one figure PyTorch may by chance be exact; twice nothing is nothing. So bounds are derived from what is computed.

A rounding changes a number by at most its unit roundoff u times its size: 2^-24 in float32, in which everybody adds,
and 2^-8 in bfloat16. Its sign is as good as random, and independent of other roundings': of uniform errors within
+-u the standard deviation is u / sqrt(3). Worst cases (Higham's gamma_n) would allow n u instead of sqrt(n) u, which
is a hundred times too much for a sum of 10,000 terms and would let wrong results pass; for random errors Higham and
Mary (A new approach to probabilistic rounding error analysis, 2019) prove the square root. Then:

- A sum of n products t_k, in whatever order and blocks: no partial sum is larger than about ||t|| + |sum t|, because
  the inputs here are random and their order says nothing about their signs. There are at most n roundings, so the
  error has a standard deviation of at most u sqrt(n / 3) (||t|| + |sum t|).
- Factors that are rounded to their dtype before: u / sqrt(3) ||t|| for each rounding.
- Errors go through a function by its derivative. Where the same error enters several times, its shares are added; where
  errors are independent, their squares are.

What is allowed is SIGMAS standard deviations, and on top the largest values of single roundings, of which the result's
own is one. With normal errors one right figure in 10^9 would be beyond it.
"""

from __future__ import annotations

import math

import torch

SIGMAS = 6.0
FLOAT = 2.0**-24  # the unit roundoff of sums
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: FLOAT}
EXPONENTIAL = 2.0**-20  # the relative error of an exponential; PyTorch's fast ones have 20 good bits
FACTOR_ROUNDINGS = 3  # of hidden rows, until they are multiplied: norm, weight, dtype


def spread(count: int, norm: torch.Tensor, total: torch.Tensor, factors: float = 0.0) -> torch.Tensor:
    """The standard deviation of a sum of `count` products, whose length as a vector is `norm`, and whose sum `total`.

    factors: u sqrt(r) where factors were rounded r times with unit roundoff u.
    """
    return ((FLOAT**2 * count * (norm + total.abs()) ** 2 + factors**2 * norm**2) / 3).sqrt()


def factor_rounding(dtype: torch.dtype) -> float:
    return ROUNDOFF[dtype] * math.sqrt(FACTOR_ROUNDINGS)


def lengths(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """||x_i * w_j|| of rows x [n, dim] and w [m, dim], as [n, m]."""
    return (x.float().square() @ weight.float().square().T).sqrt().double()


def product(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of x @ weight.T = total, where x is an RMSNorm: SIGMAS deviations, its scale, and the result's rounding.

    The norm's scale is the root of a mean of squares: half the relative error of a sum of positive terms.
    """
    dim = x.shape[-1]
    scale = FLOAT * (4 + SIGMAS * math.sqrt(dim / 3) / 2)
    error = SIGMAS * spread(dim, lengths(x, weight), total, factor_rounding(dtype))
    return error + (scale + ROUNDOFF[dtype]) * total.abs()


def exit_figures(logits: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of max_prob, logsumexp and the logit of the chosen token, each [rows], from the errors of logits [rows, vocab].

    d lse = sum p_v dz_v; d max_prob = max_prob (dz_top - d lse). The same hidden row is in all logits, so shares are
    added. A token is chosen wrongly if its logit and the greatest are nearer than their errors.
    """
    total = logits.logsumexp(1, keepdim=True)
    p = (logits - total).exp()
    top = logits.max(1, keepdim=True)
    sums = SIGMAS * FLOAT * math.sqrt(logits.shape[1] / 3) + EXPONENTIAL  # of the exponentials' sum, relative
    lse = (p * error).sum(1) + sums + 3 * FLOAT * total[:, 0].abs()
    others = (p * error).sum(1) - (p * error).gather(1, top.indices)[:, 0]
    largest, mine = p.gather(1, top.indices)[:, 0], error.gather(1, top.indices)[:, 0]
    arguments = 2 * FLOAT * (top.values[:, 0].abs() + total[:, 0].abs())
    max_prob = largest * ((1 - largest) * mine + others + sums + EXPONENTIAL + arguments)
    near = torch.where(logits >= top.values - 1, error, 0.0).amax(1)
    return max_prob, lse, 2 * near


def attention(q, k, v, visible, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Of the outputs [rows, dim] of rows q over slots k and v [slots, dim], of which `visible` [rows, slots] are seen.

    With relative errors e_j of the exponentials, independent of each other, the output is off by the sum of
    p_j e_j (v_j - out). They come from the scores (sums, factors that were scaled before, two roundings) and from the
    exponential itself. A weight that is rounded when its sum is known is off by p_j e_j v_j. The sum over slots has
    errors of its own, and so has the sum of the weights.
    """
    q, k, v, unit = q.float(), k.float(), v.float(), ROUNDOFF[dtype]
    products = q @ k.T
    scores = (products * scale).masked_fill(~visible, float("-inf"))
    p = torch.softmax(scores, 1)
    scores = scores.masked_fill(~visible, 0.0).abs()
    norm = (q.square() @ k.square().T).sqrt()
    variance = (scale * spread(q.shape[1], norm, products, unit * math.sqrt(2))).square()
    variance += 2 * (unit * scores).square() / 3 + (FLOAT * 3 * scores).square()
    weights = p.square() * (variance + EXPONENTIAL**2)
    out, squares = p @ v, p.square() @ v.square()
    of_scores = weights @ v.square() - 2 * out * (weights @ v) + out.square() * weights.sum(1, keepdim=True)
    of_weights = unit**2 / 3 * squares
    of_sums = spread(k.shape[0], squares.sqrt(), out)
    of_total = FLOAT * math.sqrt(k.shape[0] / 3) * out.abs()
    error = (of_scores.clamp(min=0) + of_weights + of_sums.square() + of_total.square()).sqrt()
    return (SIGMAS * error + (unit + 2 * FLOAT) * out.abs()).double()


def merged_states(out_a, lse_a, out_b, lse_b, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two merged partial results: largest values of each rounding, since these are few.

    The weight sigma(lse_a - lse_b) is off by its argument, two exponentials and its own rounding.
    """
    unit, apart = ROUNDOFF[dtype], (lse_a.double() - lse_b.double())
    weight = torch.sigmoid(apart)
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    argument = FLOAT * (lse_a.abs() + lse_b.abs() + 2 * lse.abs()) + 2 * EXPONENTIAL
    of_weight = (weight * (1 - weight) * argument + weight * (unit + EXPONENTIAL))[..., None]
    a, b = out_a.double(), out_b.double()
    difference = (a - b).abs()
    out = weight[..., None] * a + (1 - weight[..., None]) * b
    rounded = unit * (out.abs() + 2 * weight[..., None] * difference)
    return of_weight * difference + rounded + 2 * FLOAT * (a.abs() + b.abs()), argument + 2 * FLOAT * lse.abs() + FLOAT


def rotated(first, second, cosines, sines, error_first, error_second, dtype: torch.dtype) -> torch.Tensor:
    """Of first * cosines - second * sines, as of the other half with the signs and halves exchanged."""
    largest = (first * cosines).abs() + (second * sines).abs()
    return cosines.abs() * error_first + sines.abs() * error_second + (ROUNDOFF[dtype] + 4 * FLOAT) * largest


def decision_score(features, layers, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the score of layers (weight, bias) with ReLU between them and a sigmoid at the end: the score and the error.

    Errors of a layer's inputs are independent enough: each comes from sums and a rounding of its own.
    """
    unit, x, error = ROUNDOFF[dtype], features.double(), torch.zeros_like(features, dtype=torch.float64)
    for index, (weight, bias) in enumerate(layers):
        x = torch.relu(x) if index else x
        weight, bias = weight.double(), bias.double()
        total = x @ weight.T
        own = spread(x.shape[1], lengths(x, weight), total) + 2 * unit * (total.abs() + bias.abs()) / math.sqrt(3)
        error = (error.square() @ weight.square().T + own.square()).sqrt()
        x = total + bias
    score = torch.sigmoid(x[:, 0])
    return score, score * (1 - score) * SIGMAS * error[:, 0] + score * (2 * EXPONENTIAL + unit)
