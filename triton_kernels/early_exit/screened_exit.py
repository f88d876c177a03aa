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
MOST_PARTS = 64


def screened_exit(*arguments) -> None:
    """Launch on checked arguments, of at least one row; reference_screened_exit.py defines the result."""
    hidden, head, _, norm_weight, norm_eps, bias, temperature, temperatures, token_map, threshold, thresholds = (
        arguments[:11]
    )
    measure, level, *outputs = arguments[11:25]
    *screen, tolerance, rechecked = arguments[25:]
    rows, vocab = len(hidden), len(head)
    plan = plan_of(hidden, head, 0 if outputs[5] is None else outputs[5].shape[1])
    step = max(LEAST_ROWS, SCRATCH_BYTES // (9 * vocab) // LEAST_ROWS * LEAST_ROWS)
    with on(hidden.device):
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            settings = [None if each is None else each[part] for each in (temperatures, thresholds)]
            figures = [None if each is None else each[part] for each in (*outputs[:8], rechecked)]
            last = measure if part.stop == rows else ""
            _screen(
                plan, hidden[part], head, norm_weight, norm_eps, bias, temperature, token_map, threshold, settings,
                measure, figures, screen, tolerance, (last, level, rows, thresholds, outputs),
            )  # fmt: skip


def _screen(
    plan, hidden, head, norm_weight, norm_eps, bias, temperature, token_map, threshold, settings, measure, figures,
    screen, tolerance, deciding,
) -> None:  # fmt: skip
    """Some rows of a call; `deciding` is what the decision about all of them takes, its first part "" for none."""
    values, scales, error_norms, norms, error_gain = screen
    temperatures, thresholds = settings
    *written, status, rechecked = figures
    rows, dim, device, vocab = *hidden.shape, hidden.device, len(head)
    top_tokens = written[5]
    top_k = 0 if top_tokens is None else top_tokens.shape[1]
    small = block_shape(plan.shape.rows, plan.multiplied, torch.int8)
    stride = triton.cdiv(dim, max(plan.shape.dims, small.dims)) * max(plan.shape.dims, small.dims)
    lanes = 32 * plan.shape.warps if hidden.is_cuda else LEAST_CHUNK
    chunk = max(LEAST_CHUNK, triton.next_power_of_2(triton.cdiv(vocab, MOST_PARTS)))
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
    prepare(hidden, norm_weight, y, bounds, counters, norm_eps, (1.125 * dim + 64) * 2.0**-22)
    approximate_kernel[grid](
        values, scales, error_norms, norms, bias, y, bounds, approximate, state, stride, dim, rows, vocab,
        plan.programs, LIST=plan.list, **small.options(hidden),
    )  # fmt: skip
    scan_kernel[(rows, parts)](
        head, bias, temperatures, token_map, thresholds, error_norms, norms, error_gain, y, bounds, approximate, state,
        sums, found, known, counters, *written, status, rechecked, stride, dim, rows, vocab, plan.programs, parts,
        limit, top_k, temperature, threshold, tolerance, MEASURE=measure, PARTS=triton.next_power_of_2(parts),
        CHUNK=chunk, LANES=lanes, **lists, **options,
    )  # fmt: skip
    last, level, all_rows, all_thresholds, outputs = deciding
    exited, active_rows, inverse, num_active = outputs[8:]
    fallback_kernel[grid](
        head, bias, temperatures, token_map, y, state, counters, *written, status, rechecked, outputs[7], *outputs[1:4],
        all_thresholds, bytes_of(exited), active_rows, inverse, num_active, stride, dim, rows, all_rows, vocab,
        plan.programs, top_k, temperature, threshold, MEASURE=last, LEVEL=level, BLOCK=DECISION_BLOCK, **lists,
        **options,
    )  # fmt: skip
