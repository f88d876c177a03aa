"""Launch of the acceptance kernels: one program per request, one launch per call, whatever the rule.

Scratch is one bit per token of the vocabulary and 96 bytes per node for each request. Nothing of it is read before the
kernel has written it. Launches depend on shapes alone: nothing syncs, and the call can be captured in a CUDA graph.
"""

import torch
from specdec_ops.triton_kernels.common.launch import batch_stride, on

from . import sample
from .accept_kernels import accept_walk_kernel
from .accept_lossy_kernels import accept_lossy_kernel
from .accept_state import NODE_WORDS
from .accept_traversal_kernel import accept_traversal_kernel

RULES = ("greedy", "match", "recursive", "target_only", "kseq", "traversal", "typical", "longest")
KERNELS = {"traversal": accept_traversal_kernel, "typical": accept_lossy_kernel, "longest": accept_lossy_kernel}
MAX_EOS = 8


def accept(
    rule, target, draft_tokens, draft_logits, target_to_draft, first_child, next_sibling, num_nodes, temperature,
    temperatures, top_k, top_ks, top_p, top_ps, draft_temperature, draft_temperatures, draft_top_k, draft_top_ks,
    draft_top_p, draft_top_ps, seed, seeds, position, positions, eos, thresholds, replacement, child_rows, tokens,
    nodes, num_accepted, next_tokens, status, finished,
) -> None:  # fmt: skip
    """Accept drafted tokens by one of RULES, on checked arguments; reference_accept.py defines the result.

    target [batch, nodes, vocab] logits, or for "greedy" int32 ids [batch, nodes]; draft_tokens int32 [batch, nodes], or
    [batch, nodes - 1] for a chain, which is first_child None; draft_logits [batch, rows, draft_vocab] or None;
    target_to_draft int32 [vocab] or None; first_child, next_sibling int32 [batch or 1, nodes]; num_nodes int32
    [batch or 1]. Logits have a unit last stride. Each setting is a number, used where its tensor [batch] is None.
    eos: up to 8 tokens. Outputs are contiguous: tokens, nodes int32 [batch, max_depth + 1], num_accepted, status int32
    [batch], next_tokens int32 [batch, width] or [batch], finished bool [batch].
    """
    batch, depths = tokens.shape
    if batch == 0:
        return
    ids = target.dim() == 2
    columns, size = target.shape[1], 2**31 - 1 if ids else target.shape[2]
    draft = None if rule in ("greedy", "match", "target_only", "typical") else draft_logits
    block = 64 if ids else sample.block_of(size)
    scratch = None
    if not ids:
        words = (size + 31) // 32 + columns * NODE_WORDS.value
        scratch = torch.empty((batch, words), dtype=torch.int32, device=target.device)
    with on(target.device):
        KERNELS.get(rule, accept_walk_kernel)[(batch,)](
            target, draft_tokens, draft, None if draft is None else target_to_draft, first_child, next_sibling,
            num_nodes, temperatures, top_ks, top_ps, draft_temperatures, draft_top_ks, draft_top_ps, seeds, positions,
            tokens, nodes, num_accepted, next_tokens, status, finished.view(torch.int8),
            scratch, *target.stride()[:2], *draft_tokens.stride(),
            *((0, 0) if draft is None else draft.stride()[:2]), batch_stride(first_child),
            batch_stride(next_sibling), batch_stride(num_nodes), 0 if ids else scratch.shape[1], columns, size,
            0 if draft is None else draft.shape[2], depths - 1, next_tokens.numel() // batch, temperature, top_k, top_p,
            draft_temperature, draft_top_k, draft_top_p, *sample.seed_words(seed or 0), position or 0,
            *eos, *[-1] * (MAX_EOS - len(eos)), *thresholds, RULE=RULES.index(rule), IDS=ids, REPLACEMENT=replacement,
            CHILD_ROWS=child_rows, FILTER=sample.filters(top_k, top_ks, top_p, top_ps),
            DRAFT_FILTER=sample.filters(draft_top_k, draft_top_ks, draft_top_p, draft_top_ps), BLOCK=block,
            num_warps=sample.warps_of(block),
        )  # fmt: skip
