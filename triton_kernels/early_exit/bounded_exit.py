"""Launch of early exit with bounds: one launch, and two for each part. The kernels: bounded_kernels.py.

Scratch, besides that of exit_confidence: 48 bytes and 8 per listed entry of each row, 4 per row and program. Which rows
are open is known to the device alone; launches depend on shapes and ends: nothing syncs, and the call can be captured
in a CUDA graph.
"""

import torch
import triton
from specdec_ops.triton_kernels.common.launch import on

from .bounded_kernels import part_kernel, settle_kernel
from .exit_confidence import DECISION_BLOCK, bytes_of, plan_of, prepare
from .exit_kernels import COUNTERS, LISTS


def bounded_exit(*arguments) -> None:
    """Launch on checked arguments, of at least one row; reference_bounded_exit.py defines the result."""
    hidden, head, scales, norm_weight, norm_eps, bias, temperature, temperatures, token_map, threshold, thresholds = (
        arguments[:11]
    )
    measure, level, *outputs = arguments[11:25]
    norms_after, ends, seen = arguments[25:]
    exited, *lists = outputs[8:]
    rows, dim, device, vocab = *hidden.shape, hidden.device, len(head)
    top_k = 0 if outputs[5] is None else outputs[5].shape[1]
    plan = plan_of(hidden, head, top_k)

    def scratch(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=device)

    y, bounds = scratch(plan.multiplied, rows, plan.row_stride), scratch(torch.float32, rows, 4)
    counters = scratch(torch.int32, rows, COUNTERS.value)
    state = scratch(torch.float32, LISTS.value + 2 * plan.list + 1, rows, plan.programs)
    carried_sums, carried_best = scratch(torch.float64, rows, LISTS.value), scratch(torch.int64, rows, plan.list)
    with on(device):
        prepare(hidden, norm_weight, y, bounds, counters, norm_eps, (1.125 * dim + 64) * 2.0**-23)
        for part, (begin, end) in enumerate(zip((0, *ends), ends)):  # noqa: B905 (one is longer)
            programs = min(triton.cdiv(end - begin, plan.shape.entries), plan.programs)
            part_kernel[(triton.cdiv(rows, plan.shape.rows), programs)](
                head, scales, bias, temperatures, y, state, counters, plan.row_stride, dim, rows, vocab, begin, end,
                programs, temperature, LIST=plan.list, **plan.shape.options(hidden),
            )  # fmt: skip
            settle_kernel[(rows,)](
                state, carried_sums, carried_best, bounds, norms_after, bias, counters, temperatures, token_map,
                thresholds, *outputs[:8], bytes_of(exited), *lists, seen, rows, vocab, part, begin, end, programs,
                top_k, temperature, threshold, MEASURE=measure, LEVEL=level, LISTED=plan.listed, LIST=plan.list,
                PROGRAMS=triton.next_power_of_2(plan.programs), BLOCK=DECISION_BLOCK,
                num_warps=8 if plan.list > 4 else 4,
            )  # fmt: skip
