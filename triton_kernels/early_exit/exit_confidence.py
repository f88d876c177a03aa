"""Launch of exit_confidence: the type that is multiplied, block shapes and scratch. The kernels: exit_kernels.py.

Hidden rows are rounded to the head's 16-bit type before the product, as PyTorch does it. Scratch: y, and 16 bytes
plus 8 per listed entry of each row and program. Launches depend on shapes and the device alone: nothing syncs, and the
call can be captured in a CUDA graph.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from specdec_ops.triton_kernels.common.launch import on

from .exit_kernels import COUNTERS, LISTS, head_kernel, merge_kernel, rows_kernel

PROGRAMS_PER_PROCESSOR = 2
DECISION_BLOCK = 256


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Compile-time shape of the product: hidden rows, entries and elements of the dim per step; warps, stages."""

    rows: int
    entries: int
    dims: int
    warps: int
    stages: int

    def options(self, hidden) -> dict:
        """Of every kernel that multiplies."""
        return {
            "ROWS": self.rows, "BLOCK_V": self.entries, "BLOCK_K": self.dims, "EVEN": hidden.shape[1] % self.dims == 0,
            "WIDEN": not hidden.is_cuda, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


# The launches' shapes by hidden rows. 24 to 64 KiB of the head under way per program, two of which fit a multiprocessor
# of Hopper, and nothing spills (tests/package/test_triton_aot.py); chosen by that, not yet by time on a GPU. Float32
# has no tensor cores: its operands go through registers, which leaves few for a pipeline.
SIXTEEN_BITS = {16: BlockShape(16, 64, 128, 4, 5), 32: BlockShape(32, 64, 128, 4, 4), 64: BlockShape(64, 128, 64, 8, 4)}
EIGHT_BITS = {16: BlockShape(16, 128, 128, 4, 4), 32: BlockShape(32, 64, 128, 4, 5), 64: BlockShape(64, 64, 128, 8, 4)}
FLOAT32 = {16: BlockShape(16, 64, 32, 4, 2), 32: BlockShape(32, 64, 32, 4, 2), 64: BlockShape(64, 64, 16, 8, 2)}


def block_shape(rows: int, multiplied: torch.dtype, stored: torch.dtype) -> BlockShape:
    """From the hidden rows, the type that is multiplied and the one that the head is stored in."""
    shapes = FLOAT32 if multiplied == torch.float32 else EIGHT_BITS if stored == torch.int8 else SIXTEEN_BITS
    return shapes[16 if rows <= 16 else 32 if rows <= 32 else 64]


def multiplied_type(hidden: torch.dtype, head: torch.dtype) -> torch.dtype:
    """The head's own, if it is floating; rows of another type might overflow float16. Of int8 heads that of hidden."""
    if head == torch.int8:
        return hidden
    return torch.float32 if head == torch.float16 != hidden else head


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter so few that a small head has several tiles for each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What all launches of a call share."""

    shape: BlockShape
    multiplied: torch.dtype
    programs: int
    listed: int
    row_stride: int

    @property
    def list(self) -> int:
        return triton.next_power_of_2(self.listed)


def plan_of(hidden, head, top_k: int) -> Plan:
    multiplied = multiplied_type(hidden.dtype, head.dtype)
    shape = block_shape(len(hidden), multiplied, head.dtype)
    programs = min(triton.cdiv(len(head), shape.entries), PROGRAMS_PER_PROCESSOR * processors(head.device))
    return Plan(shape, multiplied, programs, max(2, top_k), triton.cdiv(hidden.shape[1], shape.dims) * shape.dims)


def exit_confidence(arguments, outputs) -> None:
    """Launch on checked arguments, of at least one row; reference_exit_confidence.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/early_exit/contract.py.
    """
    hidden, head = arguments.hidden, arguments.head
    rows, dim, device = *hidden.shape, hidden.device
    vocab = len(head)
    top_k = 0 if outputs.top_tokens is None else outputs.top_tokens.shape[1]
    plan = plan_of(hidden, head, top_k)
    y = torch.empty((rows, plan.row_stride), dtype=plan.multiplied, device=device)
    counters = torch.empty((rows, COUNTERS.value), dtype=torch.int32, device=device)
    state = torch.empty((LISTS.value + 2 * plan.list, rows, plan.programs), dtype=torch.float32, device=device)
    with on(device):
        prepare(hidden, arguments.norm_weight, y, None, counters, arguments.norm_eps, 0.0)
        head_kernel[(triton.cdiv(rows, plan.shape.rows), plan.programs)](
            head, arguments.scales, arguments.bias, arguments.temperatures, y, state, plan.row_stride, dim, rows, vocab,
            plan.programs, arguments.temperature, LIST=plan.list, **plan.shape.options(hidden),
        )  # fmt: skip
        merge_kernel[(rows,)](
            state, counters, arguments.temperatures, arguments.token_map, arguments.thresholds, outputs.token,
            outputs.max_prob, outputs.margin, outputs.entropy, outputs.logsumexp, outputs.top_tokens,
            outputs.top_logprobs, outputs.status, bytes_of(outputs.exited), outputs.active_rows, outputs.inverse,
            outputs.num_active, rows, vocab, plan.programs, top_k, arguments.temperature, arguments.threshold,
            MEASURE=arguments.measure, LEVEL=arguments.level, LISTED=plan.listed, LIST=plan.list,
            PROGRAMS=triton.next_power_of_2(plan.programs), BLOCK=DECISION_BLOCK, num_warps=8 if plan.list > 4 else 4,
        )  # fmt: skip


def prepare(hidden, norm_weight, y, bounds, counters, norm_eps, share) -> None:
    """Launch rows_kernel."""
    block = min(4096, max(128, triton.next_power_of_2(y.shape[1])))
    rows_kernel[(len(hidden),)](
        hidden, norm_weight, y, bounds, counters, hidden.stride(0), y.stride(0), hidden.shape[1], norm_eps, share,
        BLOCK=block, WIDEN=not hidden.is_cuda, num_warps=max(1, block // 512),
    )  # fmt: skip


def bytes_of(flags):
    """Bools as what Triton can store."""
    return None if flags is None else flags.view(torch.int8)
