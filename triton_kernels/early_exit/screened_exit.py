"""Launch of the screened head: four launches per 64 rows and more. The kernels: screen_kernels.py.

Scratch, besides that of exit_confidence: for each row 8.5 bytes per entry of the vocabulary (approximations, lists of
entries, rechecked logits), and 384 bytes per part. When all rows would need more than SCRATCH_BYTES, they are served
64 or more at a time. Launches depend on shapes alone: nothing syncs.
"""

import torch
import triton
from specdec_ops.triton_kernels.common.launch import on

from .exit_confidence import DECISION_BLOCK, block_shape, bytes_of, plan_of, prepare
from .exit_kernels import COUNTERS, LISTS
from .screen_kernels import approximate_kernel, fallback_kernel, scan_kernel
from .screen_stats import BINS, SUMS

SCRATCH_BYTES = 256 * 2**20
LEAST_ROWS = 64  # of a pass
LEAST_LIMIT = 64  # entries that may always be rechecked
LEAST_CHUNK = 1024
MAX_PARTS = 64
OF_ROWS = ("token", "max_prob", "margin", "entropy", "logsumexp", "top_tokens", "top_logprobs", "status", "rechecked")


def screened_exit(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_screened_exit.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/early_exit/contract.py.
    """
    hidden, head = arguments.hidden, arguments.head
    rows, vocab = len(hidden), len(head)
    plan = plan_of(hidden, head, 0 if outputs.top_tokens is None else outputs.top_tokens.shape[1])
    step = max(LEAST_ROWS, SCRATCH_BYTES // (9 * vocab) // LEAST_ROWS * LEAST_ROWS)
    with on(hidden.device):
        for begin in range(0, rows, step):
            some = slice(begin, min(begin + step, rows))
            part = arguments._replace(
                **{name: _some_of(getattr(arguments, name), some) for name in ("hidden", "temperatures", "thresholds")}
            )
            written = outputs._replace(**{name: _some_of(getattr(outputs, name), some) for name in OF_ROWS})
            _screen(plan, part, written, arguments, outputs, decides=some.stop == rows)


def _some_of(tensor, rows: slice):
    return None if tensor is None else tensor[rows]


def _screen(plan, part, written, arguments, outputs, decides: bool) -> None:
    """Some rows of a call, in `part` and `written`. The last ones make the decision about all of them."""
    hidden, head, bias, top_tokens = part.hidden, part.head, part.bias, written.top_tokens
    rows, dim, device, vocab = *hidden.shape, hidden.device, len(head)
    top_k = 0 if top_tokens is None else top_tokens.shape[1]
    small = block_shape(plan.shape.rows, plan.multiplied, torch.int8)
    stride = triton.cdiv(dim, max(plan.shape.dims, small.dims)) * max(plan.shape.dims, small.dims)
    lanes = 32 * plan.shape.warps if hidden.is_cuda else LEAST_CHUNK
    chunk = max(LEAST_CHUNK, triton.next_power_of_2(triton.cdiv(vocab, MAX_PARTS)))
    parts, limit = triton.cdiv(vocab, chunk), max(LEAST_LIMIT, vocab // 8)

    def scratch(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=device)

    y, bounds = scratch(plan.multiplied, rows, stride), scratch(torch.float32, rows, 4)
    counters, found = scratch(torch.int32, rows, COUNTERS.value), scratch(torch.int32, rows, BINS.value, limit)
    state = scratch(torch.float32, LISTS.value + 2 * plan.list, rows, plan.programs)
    approximate, known = scratch(torch.float32, rows, vocab), scratch(torch.float32, rows, limit)
    sums = scratch(torch.float32, SUMS.value, rows, parts, BINS.value)
    grid = triton.cdiv(rows, plan.shape.rows), plan.programs
    lists = {"LISTED": plan.listed, "LIST": plan.list, "PROGRAMS": triton.next_power_of_2(plan.programs)}
    options = plan.shape.options(hidden)
    prepare(hidden, part.norm_weight, y, bounds, counters, part.norm_eps, (1.125 * dim + 64) * 2.0**-22)
    approximate_kernel[grid](
        part.screen_values, part.screen_scales, part.error_norms, part.norms, bias, y, bounds, approximate, state,
        stride, dim, rows, vocab, plan.programs, LIST=plan.list, **small.options(hidden),
    )  # fmt: skip
    scan_kernel[(rows, parts)](
        head, bias, part.temperatures, part.token_map, part.thresholds, part.error_norms, part.norms, part.error_gain,
        y, bounds, approximate, state, sums, found, known, counters, written.token, written.max_prob, written.margin,
        written.entropy, written.logsumexp, top_tokens, written.top_logprobs, written.status, written.rechecked,
        stride, dim, rows, vocab, plan.programs, parts, limit, top_k, part.temperature, part.threshold, part.tolerance,
        MEASURE=part.measure, PARTS=triton.next_power_of_2(parts), CHUNK=chunk, LANES=lanes, **lists, **options,
    )  # fmt: skip
    fallback_kernel[grid](
        head, bias, part.temperatures, part.token_map, y, state, counters, written.token, written.max_prob,
        written.margin, written.entropy, written.logsumexp, top_tokens, written.top_logprobs, written.status,
        written.rechecked, outputs.status, outputs.max_prob, outputs.margin, outputs.entropy, arguments.thresholds,
        bytes_of(outputs.exited), outputs.active_rows, outputs.inverse, outputs.num_active, stride, dim, rows,
        len(arguments.hidden), vocab, plan.programs, top_k, part.temperature, part.threshold,
        MEASURE=part.measure if decides else "", LEVEL=part.level, BLOCK=DECISION_BLOCK, **lists, **options,
    )  # fmt: skip
