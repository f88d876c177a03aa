"""What the chain functions of FlashInfer and vLLM share: probabilities to make logits of, and the coins of a walk."""

from __future__ import annotations

import torch

from specdec_ops.ops.acceptance import reference_philox


def masses(probs: torch.Tensor) -> torch.Tensor:
    """A float32 copy of probabilities, contiguous, to be made logits in place. What is below 0 becomes 0, NaN stays."""
    return probs.float().clamp(min=0).contiguous()


def coins(seeds: torch.Tensor, steps: int, positions: torch.Tensor) -> torch.Tensor:
    """The coins that chain_accept(rule="token") tests the steps of each request with.

    Args:
        seeds: int64 [batch].
        steps: of the chain; step i is node i + 1.
        positions: int [batch].

    Returns:
        float64 [batch, steps], in (0, 1).
    """
    node = torch.arange(1, steps + 1, device=seeds.device)
    domain = node.new_full((), reference_philox.ACCEPT)  # a tensor: a number would be copied to the device, which waits
    counter = (node // 4, positions[:, None], domain, torch.zeros_like(domain))
    words = reference_philox.philox(counter, (seeds[:, None], seeds[:, None] >> 32))
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    lane = (node % 4).expand(words.shape[:-1])
    return reference_philox.coins_of(words.gather(-1, lane[..., None])[..., 0])
