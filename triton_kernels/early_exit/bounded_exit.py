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


def bounded_exit(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_bounded_exit.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/early_exit/contract.py.
    """
    hidden, head, bias, ends = arguments.hidden, arguments.head, arguments.bias, arguments.ends
    rows, dim, device, vocab = *hidden.shape, hidden.device, len(head)
    top_k = 0 if outputs.top_tokens is None else outputs.top_tokens.shape[1]
    plan = plan_of(hidden, head, top_k)

    def scratch(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=device)

    y, bounds = scratch(plan.multiplied, rows, plan.row_stride), scratch(torch.float32, rows, 4)
    counters = scratch(torch.int32, rows, COUNTERS.value)
    state = scratch(torch.float32, LISTS.value + 2 * plan.list + 1, rows, plan.programs)
    carried_sums, carried_best = scratch(torch.float64, rows, LISTS.value), scratch(torch.int64, rows, plan.list)
    with on(device):
        share = (1.125 * dim + 64) * 2.0**-23
        prepare(hidden, arguments.norm_weight, y, bounds, counters, arguments.norm_eps, share)
        for part, (begin, end) in enumerate(zip((0, *ends), ends)):  # noqa: B905 (one is longer)
            programs = min(triton.cdiv(end - begin, plan.shape.entries), plan.programs)
            part_kernel[(triton.cdiv(rows, plan.shape.rows), programs)](
                head, arguments.scales, bias, arguments.temperatures, y, state, counters, plan.row_stride, dim, rows,
                vocab, begin, end, programs, arguments.temperature, LIST=plan.list, **plan.shape.options(hidden),
            )  # fmt: skip
            settle_kernel[(rows,)](
                state, carried_sums, carried_best, bounds, arguments.norms_after, bias, counters,
                arguments.temperatures, arguments.token_map, arguments.thresholds, outputs.token, outputs.max_prob,
                outputs.margin, outputs.entropy, outputs.logsumexp, outputs.top_tokens, outputs.top_logprobs,
                outputs.status, bytes_of(outputs.exited), outputs.active_rows, outputs.inverse, outputs.num_active,
                outputs.seen, rows, vocab, part, begin, end, programs, top_k, arguments.temperature,
                arguments.threshold, MEASURE=arguments.measure, LEVEL=arguments.level, LISTED=plan.listed,
                LIST=plan.list, PROGRAMS=triton.next_power_of_2(plan.programs), BLOCK=DECISION_BLOCK,
                num_warps=8 if plan.list > 4 else 4,
            )  # fmt: skip
