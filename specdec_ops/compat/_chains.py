"""What the chain functions of FlashInfer and vLLM share: logits of probabilities, and the coins of a walk."""

from __future__ import annotations

import torch

from specdec_ops.reference import noise


def logits_of(probs: torch.Tensor) -> torch.Tensor:
    """Logarithms of probabilities, float32, contiguous. Numbers below 0 count as 0, NaN stays NaN."""
    return probs.float().clamp(min=0).contiguous().log_()


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
    domain = node.new_full((), noise.ACCEPT)  # a tensor: a number would be copied to the device, which waits
    counter = (node // 4, positions[:, None], domain, torch.zeros_like(domain))
    with seeds.device:  # or philox would move its words to the default device
        words = noise.philox(counter, (seeds[:, None], seeds[:, None] >> 32))
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    lane = (node % 4).expand(words.shape[:-1])
    return noise.coins_of(words.gather(-1, lane[..., None])[..., 0])
