"""linear in Triton: a norm, the product of few rows with a weight, bias, activation and residual, in one launch.

A program owns up to 16 rows and BLOCK_N outputs: BLOCK_N rows of the weight, or with an activation the rows of the gate
and those that it is multiplied with, whose products meet in registers. It goes through the dim once; weights are read
once for each 16 rows, from the second-level cache for all but the first of them. More rows are further programs, never
another shape of block: so the order of a row's sums, and its bits, don't depend on how many rows go with it.

The RMSNorm comes first: each program adds up the squares of its rows and rounds the normed rows to their type, as
engines do. Int8 weights are widened to the rows' type, exactly, and scaled when all is summed. Of GGUF's blocks, 32
elements of a row are a step: their integers are widened exactly, and each step's sums are scaled.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.linear.products import narrowed, product, widened

_ROWS = 16
_BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
_VOLATILE = ["x_stride", "rows", "outputs", "residual_stride", "out_stride", "norm_eps"]


@triton.jit
def _row_scales(x_at, exists, dim, norm_eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / root of the mean square of each row."""
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, dim, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        x = widened(tl.load(x_at[:, None] + d[None, :], mask=exists[:, None] & (d < dim)[None, :], other=0.0))
        squares += x * x
    return 1.0 / tl.sqrt(tl.sum(squares, 1) / dim + norm_eps)


@triton.jit
def _rows(x_at, exists, d, dim, norm_weight, scale, kind: tl.constexpr, WIDEN: tl.constexpr):
    """Elements d of the rows, normed where there is a norm."""
    x = tl.load(x_at[:, None] + d[None, :], mask=exists[:, None] & (d < dim)[None, :], other=0.0)
    if norm_weight is not None:
        norm = widened(tl.load(norm_weight + d, mask=d < dim, other=0.0))
        x = narrowed(widened(x) * scale[:, None] * norm[None, :], kind, WIDEN)
    return x


@triton.jit
def _half(address):
    """The float16 that begins at an address, from its bytes: nothing says that they are aligned."""
    bits = tl.load(address).to(tl.int16) | (tl.load(address + 1).to(tl.int16) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _block_sums(x, block_at, sums, kind: tl.constexpr, BYTES: tl.constexpr, WIDEN: tl.constexpr):
    """Add the products of 32 elements of the rows with blocks of the weight."""
    i = tl.arange(0, 32)
    scale = _half(block_at)
    if BYTES == 34:
        elements = tl.load(block_at[None, :] + 2 + i[:, None]).to(tl.int8, bitcast=True).to(tl.int32)
    else:
        packed = tl.load(block_at[None, :] + (BYTES - 16) + (i % 16)[:, None]).to(tl.int32)
        elements = (packed >> ((i // 16) * 4)[:, None]) & 15
        if BYTES == 18:
            elements = elements - 8
    weights = narrowed(elements.to(tl.float32), kind, WIDEN)
    part = product(x, weights, tl.zeros(sums.shape, tl.float32), WIDEN)
    sums += part * scale[None, :]
    if BYTES == 20:
        sums += tl.sum(widened(x), 1)[:, None] * _half(block_at + 2)[None, :]
    return sums


@triton.jit
def _finished(sums, n, scales, bias):
    """The sums of weight rows n [1, N], scaled and with their bias."""
    if scales is not None:
        sums = sums * tl.load(scales + n)[None, :]
    if bias is not None:
        sums += widened(tl.load(bias + n))[None, :]
    return sums


@triton.jit(do_not_specialize=_VOLATILE)
def linear_kernel(
    x, weight, scales, bias, norm_weight, residual, out, x_stride, residual_stride, out_stride, dim, rows, outputs,
    norm_eps, ACTIVATION: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of outputs, blocks of rows). BYTES: of a GGUF block, 0 for other weights."""
    kind: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    x_at = x + row.to(tl.int64) * x_stride
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(output, outputs - 1).to(tl.int64)
    row_bytes = dim
    if BYTES:
        row_bytes = dim // 32 * BYTES
    first_at = weight + n * row_bytes
    second_at = weight + (n + outputs) * row_bytes

    scale = tl.full([ROWS], 1.0, tl.float32)
    if norm_weight is not None:
        scale = _row_scales(x_at, exists, dim, norm_eps, ROWS, BLOCK_K)
    first = tl.zeros([ROWS, BLOCK_N], tl.float32)
    second = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        y = _rows(x_at, exists, d, dim, norm_weight, scale, kind, WIDEN)
        if BYTES:
            first = _block_sums(y, first_at + start // 32 * BYTES, first, kind, BYTES, WIDEN)
            if ACTIVATION:
                second = _block_sums(y, second_at + start // 32 * BYTES, second, kind, BYTES, WIDEN)
        else:
            weights = tl.load(first_at[None, :] + d[:, None], mask=(d < dim)[:, None], other=0)
            first = product(y, weights, first, WIDEN)
            if ACTIVATION:
                weights = tl.load(second_at[None, :] + d[:, None], mask=(d < dim)[:, None], other=0)
                second = product(y, weights, second, WIDEN)

    result = _finished(first, n, scales, bias)
    if ACTIVATION:
        up = _finished(second, n + outputs, scales, bias)
        exponent = result
        if ACTIVATION == 2:
            exponent = 1.5957691216 * (result + 0.044715 * result * result * result)  # (1 + tanh z) / 2 of 2 z
        result = result / (1.0 + tl.exp(-exponent)) * up
    stored = exists[:, None] & (output < outputs)[None, :]
    if residual is not None:
        at = residual + row.to(tl.int64)[:, None] * residual_stride + output[None, :]
        result += widened(tl.load(at, mask=stored, other=0.0))
    at = out + row.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(at, narrowed(result, kind, WIDEN), mask=stored)


def block_shape(arguments) -> tuple[int, int, int]:
    """Outputs of a program, elements of the dim of a step, and stages: 16 to 32 KiB of weights under way."""
    halves = 1 if arguments.activation == "none" else 2
    if arguments.weight_type in _BLOCK_BYTES:
        return 64 // halves, 32, 4
    size = arguments.weight.element_size()
    least = min(128, max(16, triton.next_power_of_2(arguments.x.shape[1])))
    return 32 // halves, min(least, 512 // size), 3


def linear(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row and output; reference_linear.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/linear/contract.py.
    """
    x, residual, out = arguments.x, arguments.residual, outputs.out
    (rows, dim), count = x.shape, out.shape[1]
    block, step, stages = block_shape(arguments)
    grid = triton.cdiv(count, block), triton.cdiv(rows, _ROWS)
    with on(x.device):
        linear_kernel[grid](
            x, arguments.weight, arguments.scales, arguments.bias, arguments.norm_weight, residual, out, x.stride(0),
            0 if residual is None else residual.stride(0), out.stride(0), dim, rows, count, arguments.norm_eps,
            ACTIVATION=("none", "swiglu", "geglu").index(arguments.activation),
            BYTES=_BLOCK_BYTES.get(arguments.weight_type, 0), ROWS=_ROWS, BLOCK_N=block, BLOCK_K=step,
            WIDEN=not x.is_cuda, num_warps=4, num_stages=stages,
        )  # fmt: skip
