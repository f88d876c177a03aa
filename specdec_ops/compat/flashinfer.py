"""FlashInfer's `chain_speculative_sampling`, on `chain_accept(rule="token")`.

What is done otherwise than in the original:

- Seeds and offsets of [batch] are per request, so a request's tokens do not depend on its place in the batch. The
  original reads the first entry only, and tells requests apart by their place. An int, or a tensor of one entry, is
  spread over the requests by place here too.
- A draft token is accepted iff coin * draft probability < target probability, with coins that are never 0 or 1. The
  original's coin can be 1, where it rejects a token whose probabilities agree, and then draws from an empty residual:
  an id that was never set.
- A draft token with draft probability 0, which can't have been drawn, is rejected.
- Rows that hold NaN, or nothing positive, give an id inside of the vocabulary, and touch no other request.
- Offsets into the tensors are 64-bit. The original's wrap around at 2^32 probabilities.
- The same seeds give other tokens than the original's.
- `output_accepted_token_num` counts, like the original's, the tests that a request's tokens pass each on their own,
  also after the first rejection.
- It runs on a CPU too, and draws the final token by a race, which gives tails their due.
"""

from __future__ import annotations

import torch

from specdec_ops import chain_accept
from specdec_ops._checks import wrong
from specdec_ops.reference import noise

_NAME = "compat.flashinfer.chain_speculative_sampling"
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: multiples are different for all requests


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Speculative sampling of a chain of draft tokens (Leviathan et al., 2023; Chen et al., 2023). Lossless.

    Args:
        draft_probs: [batch, steps, vocab]: the distributions that the draft tokens were drawn from.
        draft_token_ids: int32 or int64 [batch, steps].
        target_probs: [batch, steps + 1, vocab].
        maybe_output_accepted_token_num: int32 or int64 [batch]: the accepted counts are added to it. By default zeros.
        maybe_output_emitted_draft_token_num: int32 or int64 [batch]: the same for the emitted counts.
        deterministic: no effect; results are always reproducible.
        generator: where seeds are drawn from if seed or offset is None; by default PyTorch's own.
        seed: an int, or int64 or uint64 [1] or [batch]. With equal seeds, offsets must differ from call to call.
        offset: an int, or int64 or uint64 [1] or [batch].

    Returns:
        Tokens int32 [batch, steps + 1]: accepted ones, one more, then -1. How many tokens pass their test on their own,
        [batch]. How many draft tokens were accepted, [batch]. The latter two are the tensors given, where given.

    Raises:
        TypeError, ValueError: as in specdec_ops.chain_accept; or seed and offset are not both ints or both tensors.
    """
    batch, steps = draft_token_ids.shape
    device = target_probs.device
    seeds, positions = _keys(seed, offset, generator, batch, device)
    tokens = draft_token_ids.int()
    accepted = chain_accept(
        target_probs.float().log(), tokens, draft_probs.float().log(), seeds=seeds, positions=positions
    )
    emitted = accepted.num_accepted

    # The walk stops at the first rejection; the tests after it are made here, with the coins the walk would have used.
    at = tokens.long().clamp(0, target_probs.shape[-1] - 1)[..., None]
    p, q = (probs[:, :steps].gather(2, at)[..., 0].double() for probs in (target_probs, draft_probs))
    node = torch.arange(1, steps + 1, device=device)
    words = noise.philox((node // 4, positions[:, None], noise.ACCEPT, 0), (seeds[:, None], seeds[:, None] >> 32))
    coins = noise.coins_of(torch.stack(words, dim=-1).gather(2, (node % 4).expand(batch, steps)[..., None])[..., 0])
    later = (coins * q < p) & (q > 0) & (node > emitted[:, None] + 1)
    counts = emitted + later.sum(1, dtype=torch.int32)
    return (
        accepted.tokens,
        _added(maybe_output_accepted_token_num, counts),
        _added(maybe_output_emitted_draft_token_num, emitted),
    )


def _added(output, counts):
    return counts.clone() if output is None else output.add_(counts.to(output.dtype))


def _keys(seed, offset, generator, batch: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds int64 [batch] and positions int32 [batch]."""
    if seed is None or offset is None:
        where = device if generator is None else generator.device
        seeds = torch.empty(batch, dtype=torch.int64, device=where).random_(generator=generator).to(device)
        return seeds, torch.zeros(batch, dtype=torch.int32, device=device)
    if isinstance(seed, torch.Tensor) != isinstance(offset, torch.Tensor):
        raise ValueError(f"specdec_ops.{_NAME}: seed and offset must be both ints or both tensors")
    seeds, offsets = (_spread_out(name, value, batch, device) for name, value in (("seed", seed), ("offset", offset)))
    if not isinstance(seed, torch.Tensor) or seed.numel() == 1:
        seeds = seeds + torch.arange(batch, device=device) * _SPREAD
    # Positions have 31 bits; what is above them goes into the key.
    return seeds + (offsets >> 31) * _SPREAD, (offsets & 0x7FFFFFFF).int()


def _spread_out(name: str, value, batch: int, device) -> torch.Tensor:
    """int64 [batch], of 64 bits whatever their sign."""
    if not isinstance(value, torch.Tensor):
        signed = (int(value) + (1 << 63)) % (1 << 64) - (1 << 63)
        return torch.full((batch,), signed, dtype=torch.int64, device=device)
    if value.dtype not in (torch.int64, torch.uint64) or value.dim() != 1 or value.shape[0] not in (1, batch):
        must = f"int64 or uint64 [1] or [{batch}]"
        raise ValueError(wrong(_NAME, name, must, value))
    return value.view(torch.int64).to(device).expand(batch)
