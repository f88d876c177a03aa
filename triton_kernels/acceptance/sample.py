"""Launch of the sampling kernel: one program per row, one launch (and the clearing of a status shared by rows)."""

import torch
import triton
from specdec_ops.triton_kernels.common.launch import on

from .sample_kernels import sample_kernel

MAX_BLOCK = 1024


def block_of(size: int) -> int:
    """Tokens per pass of the loop over a row: small rows are one block, large ones 2 tokens for each of 512 threads."""
    return min(MAX_BLOCK, max(64, triton.next_power_of_2(size)))


def warps_of(block: int) -> int:
    return max(1, block // 64)


def seed_words(seed: int) -> tuple[int, int]:
    """The halves of a 64-bit seed as signed 32-bit integers, which is how Triton always passes small integers."""
    return tuple(word - (word >> 31 << 32) for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


def filters(top_k, top_ks, top_p, top_ps) -> bool:
    """Whether any request may have a filter, from what is known without reading a tensor."""
    return top_ks is not None or top_ps is not None or top_k > 0 or top_p < 1


def sample(arguments, outputs) -> None:
    """Draw `count` tokens of every row, on checked arguments.

    What they are is told in specdec_ops/ops/acceptance/contract.py. For tests, status may also be [batch, rows] or
    None.
    """
    logits, parents, top_k, top_p = arguments.logits, arguments.parents, arguments.top_k, arguments.top_p
    tokens, logprobs, logsumexp, status = outputs
    batch, rows, size = logits.shape
    per_row = status is None or status.dim() == 2
    if status is None:
        status = torch.empty((batch, rows), dtype=torch.int32, device=logits.device)
    elif not per_row:
        status.zero_()
    block = block_of(size)
    with on(logits.device):
        sample_kernel[(rows, batch)](
            (logits, *logits.stride()[:2], size), arguments.draft_to_target, parents,
            (arguments.temperature, arguments.temperatures, arguments.top_ks, top_p, arguments.top_ps),
            (arguments.seeds, arguments.positions), (tokens, logprobs, logsumexp, status),
            *((0, 0) if parents is None else parents.stride()), rows, arguments.count, arguments.first_parent, top_k,
            *seed_words(arguments.seed or 0), arguments.position or 0, REPLACEMENT=arguments.replacement,
            DRAFTING=arguments.domain == "draft", FILTER=filters(top_k, arguments.top_ks, top_p, arguments.top_ps),
            PER_ROW=per_row, BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
