"""rms_norm in Triton: a program has one row, and reads it twice, the second time from a cache near by."""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.linear.products import narrowed, widened


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "out_stride", "eps"])
def rms_norm_kernel(
    x, weight, residual, out, x_stride, residual_stride, out_stride, dim, eps, BLOCK: tl.constexpr, WIDEN: tl.constexpr
):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        values = widened(tl.load(x + row * x_stride + d, mask=d < dim, other=0.0))
        squares += values * values
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / dim + eps)
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        y = widened(tl.load(x + row * x_stride + d, mask=d < dim, other=0.0)) * scale
        y = y * widened(tl.load(weight + d, mask=d < dim, other=0.0))
        if residual is not None:
            y += widened(tl.load(residual + row * residual_stride + d, mask=d < dim, other=0.0))
        tl.store(out + row * out_stride + d, narrowed(y, out.dtype.element_ty, WIDEN), mask=d < dim)


def rms_norm(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_rms_norm.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/linear/contract.py.
    """
    x, residual, out = arguments.x, arguments.residual, outputs.out
    rows, dim = x.shape
    with on(x.device):
        rms_norm_kernel[(rows,)](
            x, arguments.weight, residual, out, x.stride(0), 0 if residual is None else residual.stride(0),
            out.stride(0), dim, arguments.eps, BLOCK=min(4096, triton.next_power_of_2(dim)), WIDEN=not x.is_cuda,
            num_warps=4,
        )  # fmt: skip
