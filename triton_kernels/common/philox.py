"""The noise of sampling and acceptance: Philox, coins and exponentials, the same integers on every backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) is a function of a key, the request's
seed, and of a counter of four words. Every use has its own domain in the third word, so that no two draws share a word:

    domain    c0          c1                    c2  c3
    SAMPLE    token // 4  position of the token  0  0
    DRAFT     token // 4  position of node 0     1  parent node + (draw << 16)
    ACCEPT    node // 4   position of node 0     2  0, or 1 for the coin of the node's level
    RESIDUAL  token // 4  position of node 0     3  node at which the walk ended
    BONUS     token // 4  position of node 0     4  node at which the walk ended

A token (or node) takes lane token % 4, so a block of BLOCK tokens costs BLOCK / 4 calls. Nothing is stored, nothing
depends on the batch, and a replayed CUDA graph draws anew as soon as the position has grown.

A weighted draw takes the token with the greatest score, weight / E, where each token has an exponential variable E of
its own: it is drawn with a probability proportional to its weight (an "exponential race": the first of many clocks to
ring, each at the rate of its weight). That needs no prefix sum over the vocabulary and no normalisation, and the result
does not depend on the order of any sum. The greatest scores come from small E, so E = -log1p(-v), whose small values
are resolved down to 2^-33, and not -log(v), whose are not.
"""

from typing import NamedTuple

import triton
import triton.language as tl

SAMPLE = tl.constexpr(0)
DRAFT = tl.constexpr(1)
ACCEPT = tl.constexpr(2)
RESIDUAL = tl.constexpr(3)
BONUS = tl.constexpr(4)


class NoiseStream(NamedTuple):
    """What the uniforms of one draw depend on besides the token: Philox' key and the last words of its counter."""

    seed: tl.tensor
    position: tl.tensor
    domain: tl.tensor
    salt: tl.tensor


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four uint32 of the shape of c0. seed int64; the words of the counter are int32 and are read as uint32."""
    none = c0 * 0
    return tl.philox(seed, c0, none + c1, none + c2, none + c3)


@triton.jit
def node_coin(seed, position, node, level):
    """A uniform in (0, 1): the middle of one of 2^23 intervals, which float32 holds exactly."""
    a, b, c, d = philox(seed, node // 4, position, ACCEPT, level)
    lane = node % 4
    word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def token_uniforms(stream, start, BLOCK: tl.constexpr):
    """V in (0, 1] for the tokens start .. start + BLOCK - 1; start is a multiple of 4."""
    a, b, c, d = philox(stream.seed, start // 4 + tl.arange(0, BLOCK // 4), stream.position, stream.domain, stream.salt)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def exponential(v):
    """-log1p(-v) for v in [0, 1], to some ulp. Triton has no log1p.

    The logarithm of y = 1 - v is exact enough, but y is rounded; the quotient puts back what the rounding took (the
    rounded y is off by as much in log(y) as in 1 - y). Where y rounds to 1, the answer is v. It decides draws, so the
    quotient is rounded as on other backends: `/` of float32 is approximate on GPUs.
    """
    y = 1.0 - v
    taken = 1.0 - y
    return tl.where(taken > 0.0, -tl.log(y) * tl.div_rn(v, tl.where(taken > 0.0, taken, 1.0)), v)
