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


def sample(
    logits, draft_to_target, count, replacement, parents, first_parent, domain, temperature, temperatures, top_k,
    top_ks, top_p, top_ps, seed, seeds, position, positions, tokens, logprobs, logsumexp, status,
) -> None:  # fmt: skip
    """Draw `count` tokens of every row, on checked arguments.

    logits [batch, rows, vocab] with unit last stride; tokens int32 [batch, rows, count] and, unless None, logprobs
    float32 alike and logsumexp float32 [batch, rows] are contiguous; status int32 [batch] or [batch, rows] or None.
    draft_to_target int32 [vocab] or None; parents int32 [batch, rows] or None: first_parent + row. domain "sample" or
    "draft" says which noise. Each setting is a number, used where its tensor [batch] is None.
    """
    batch, rows, size = logits.shape
    if tokens.numel() == 0:
        return
    per_row = status is None or status.dim() == 2
    if status is None:
        status = torch.empty((batch, rows), dtype=torch.int32, device=logits.device)
    elif not per_row:
        status.zero_()
    block = block_of(size)
    with on(logits.device):
        sample_kernel[(rows, batch)](
            (logits, *logits.stride()[:2], size), draft_to_target, parents,
            (temperature, temperatures, top_ks, top_p, top_ps), (seeds, positions),
            (tokens, logprobs, logsumexp, status), *((0, 0) if parents is None else parents.stride()), rows, count,
            first_parent, top_k, *seed_words(seed or 0), position or 0,
            REPLACEMENT=replacement, DRAFTING=domain == "draft", FILTER=filters(top_k, top_ks, top_p, top_ps),
            PER_ROW=per_row, BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
