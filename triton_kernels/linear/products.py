"""Products of few rows with a matrix of weights, which heads, kv_propagate and decision models share."""

import triton
import triton.language as tl


@triton.jit
def widened(x):
    """As float32. Of bfloat16 by its bits, since Triton's interpreter has no numbers of that type."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrowed(x, to: tl.constexpr, WIDEN: tl.constexpr):
    """Float32 rounded to the nearest number of another type; by its bits where the interpreter would cut them off."""
    if WIDEN and to == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x == x, nearest, bits | 0x400000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(to)


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr):
    """Add a b to the sums, where an int8 b is widened to a's type."""
    if WIDEN:  # the interpreter would multiply the bit patterns of bfloat16
        a = widened(a)
        b = widened(b)
    elif a.dtype != b.dtype:
        b = b.to(a.dtype)
    return tl.dot(a, b, sums, input_precision="ieee")
