"""Decision models in Triton: a launch per hidden layer, the last of which also scores the rows and decides to stop.

A program owns a block of rows and a tile of a layer's outputs; its weights stream by once, its sums stay in registers.
Activations between layers are float32 in scratch, rows * outputs * 4 bytes, which stay in L2. The last layer has one
output, too little for a launch: the last program to arrive at the end of the layer before multiplies it for all rows.
So 11-44-1 is one program in one launch, and 2048-1024-512-1 two launches of 64 and 32 programs: a single program would
take its 5 MB through one multiprocessor.

Weights of 16 bits are exact in TF32 (float16 and bfloat16 alike), which takes 10 bits of each activation, more than
bfloat16 and without the overflow of float16. Float32 weights are multiplied in float32.
"""

import torch
import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.last_program import arrives_last
from specdec_ops.triton_kernels.common.launch import on
from specdec_ops.triton_kernels.linear.products import widened

FINISH_BLOCK = 128


@triton.jit
def _finish(x, weight, bias, score, stop, x_stride, rows, inputs, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The last layer for all rows, their sigmoids, and whether none is above the threshold. By one program."""
    k = tl.arange(0, BLOCK)
    above = tl.full([], 0, tl.int32)
    for first in range(0, rows, ROWS):
        n = first + tl.arange(0, ROWS)
        exists = n < rows
        x_at = x + n.to(tl.int64) * x_stride
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, inputs, BLOCK):
            d = start + k
            inside = exists[:, None] & (d < inputs)[None, :]
            values = widened(tl.load(x_at[:, None] + d[None, :], mask=inside, other=0.0, cache_modifier=".cg"))
            weights = widened(tl.load(weight + d, mask=d < inputs, other=0.0))
            sums += values * weights[None, :]
        # exp of a large number is infinity, and the score 0
        probability = 1.0 / (1.0 + tl.exp(-(tl.sum(sums, 1) + tl.load(bias))))
        tl.store(score + n, probability, mask=exists)
        above = tl.maximum(above, tl.max((exists & (probability > threshold)).to(tl.int32), 0))
    tl.store(stop, (1 - above).to(tl.int8))


@triton.jit(do_not_specialize=["rows", "threshold"])
def finish_kernel(x, weight, bias, score, stop, x_stride, rows, inputs, threshold, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Grid: (1). A model of one layer."""
    _finish(x, weight, bias, score, stop, x_stride, rows, inputs, threshold, ROWS, BLOCK)


@triton.jit(do_not_specialize=["rows", "threshold"])
def layer_kernel(
    x, weight, bias, y, last_weight, last_bias, score, stop, counter, x_stride, rows, inputs, outputs, threshold,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of outputs, row blocks). y = relu(x W^T + bias); with a last layer, the scores as well.

    Without one it clears the counter, if there is one; with one and no counter the grid has a single program.
    """
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    x_at = x + n.to(tl.int64) * x_stride
    weight_at = weight + o.to(tl.int64) * inputs
    sums = tl.zeros([ROWS, BLOCK_O], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        d = start + k
        values = tl.load(x_at[:, None] + d[None, :], mask=(n < rows)[:, None] & (d < inputs)[None, :], other=0.0)
        weights = tl.load(weight_at[:, None] + d[None, :], mask=(o < outputs)[:, None] & (d < inputs)[None, :],
                          other=0.0)  # fmt: skip
        if WIDEN:
            sums = tl.dot(widened(values), tl.trans(widened(weights)), sums)
        else:  # by a conversion: Triton 3.2 fails on operands that come of bit operations
            sums = tl.dot(values.to(tl.float32), tl.trans(weights.to(tl.float32)), sums, input_precision=PRECISION)
    sums += tl.load(bias + o, mask=o < outputs, other=0.0)[None, :]
    sums = tl.where(sums < 0.0, 0.0, sums)  # a NaN stays one
    y_at = y + n.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(y_at, sums, mask=(n < rows)[:, None] & (o < outputs)[None, :])
    if last_weight is not None:
        finishing = tl.program_id(0) == 0
        if counter is not None:
            finishing = arrives_last(counter, tl.num_programs(0) * tl.num_programs(1))
        else:
            tl.debug_barrier()
        if finishing:
            _finish(y, last_weight, last_bias, score, stop, outputs, rows, outputs, threshold, ROWS, BLOCK)
    elif counter is not None:
        tl.store(counter, 0)


def block_shape(rows: int, inputs: int, outputs: int, weight: torch.dtype, interpreted: bool) -> tuple[int, int, int]:
    """Rows, outputs and inputs of a step. Few outputs are one tile, many are cut so that every processor gets some."""
    block_rows = 16 if rows <= 16 else 32
    many = 128 if interpreted else 16
    tile = many if outputs > 64 else max(16, triton.next_power_of_2(outputs))
    step = min(32 if weight == torch.float32 and not interpreted else 128, max(16, triton.next_power_of_2(inputs)))
    return block_rows, tile, step


def exit_mlp(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_exit_mlp.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/early_exit/contract.py.
    """
    features, weights, biases, threshold = arguments
    score, stop = outputs.score, outputs.stop.view(torch.int8)
    rows, device = len(features), features.device
    last = weights[-1], biases[-1]
    with on(device):
        if len(weights) == 1:
            finish_kernel[(1,)](
                features, *last, score, stop, features.stride(0), rows, features.shape[1], threshold,
                ROWS=16, BLOCK=FINISH_BLOCK, num_warps=4,
            )  # fmt: skip
            return
        x, counter = features, None
        for index, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            width, inputs = weight.shape
            block_rows, tile, step = block_shape(rows, inputs, width, weight.dtype, not features.is_cuda)
            grid = triton.cdiv(width, tile), triton.cdiv(rows, block_rows)
            finishes = index == len(weights) - 2
            if counter is None and (grid != (1, 1) or not finishes):
                counter = (torch.zeros if finishes else torch.empty)((1,), dtype=torch.int32, device=device)
            y = torch.empty((rows, width), dtype=torch.float32, device=device)
            layer_kernel[grid](
                x, weight, bias, y, *(last if finishes else (None, None)), score, stop, counter, x.stride(0), rows,
                inputs, width, threshold, ROWS=block_rows, BLOCK_O=tile, BLOCK_K=step,
                PRECISION="ieee" if weight.dtype == torch.float32 else "tf32", BLOCK=FINISH_BLOCK,
                WIDEN=not features.is_cuda, num_warps=4,
                num_stages=2 if weight.dtype == torch.float32 else 5,
            )  # fmt: skip
            x = y
