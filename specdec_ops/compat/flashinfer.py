"""FlashInfer's `chain_speculative_sampling`, on `chain_accept(rule="token")`. As in flashinfer-python 0.7.4.

What is done otherwise than in the original:

- With seeds and offsets of [batch] a request's tokens do not depend on its place in the batch. The original mixes the
  place into its noise, and older versions read the first entry only. An int, or a tensor of one entry, is spread
  over the requests by place here too.
- A draft token is accepted iff coin * draft probability < target probability, with coins that are never 0 or 1. The
  original's coin can be 1, where it rejects a token whose probabilities agree, and then draws from an empty residual:
  an id that was never set.
- A draft token with draft probability 0, which can't have been drawn, is rejected.
- A draft ends at its first token of -1, which is padding, and the target's own row gives the token there. An id beyond
  the vocabulary is rejected. The original reads outside of its tensors for both.
- Rows need not sum to 1. Numbers below 0 count as 0. Rows that hold NaN, or nothing positive, give an id inside of the
  vocabulary, and touch no other request.
- Offsets into the tensors are 64-bit. The original's wrap around at 2^32 probabilities.
- The same seeds give other tokens than the original's.
- `output_accepted_token_num` counts, like the original's, the tests that a request's tokens pass each on their own,
  also after the first rejection. What is padding or beyond the vocabulary passes none.
- Counts are added to int64 tensors too. The original adds to a copy of them.
- It runs on a CPU too, and draws the final token by a race, which gives tails their due.
"""

from __future__ import annotations

import torch

from specdec_ops import chain_accept
from specdec_ops._core.checks import argument_error

from ._chains import coins, masses

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

    The signature is that of flashinfer-python 0.7.4.

    Args:
        draft_probs: [batch, steps, vocab]: the distributions that the draft tokens were drawn from.
        draft_token_ids: int32 or int64 [batch, steps]. -1 is padding: it ends the draft.
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
        TypeError: an argument is no tensor of a dtype named above.
        ValueError: a shape does not fit, or seed and offset are not both ints or both tensors.
        RuntimeError: an input requires grad.
    """
    counted = (maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num)
    batch = _check(draft_probs, draft_token_ids, target_probs, *counted)
    seeds, positions = _keys(seed, offset, generator, batch, target_probs.device)
    inside = (draft_token_ids >= 0).cumprod(1).bool() & (draft_token_ids < target_probs.shape[2])
    at = torch.where(inside, draft_token_ids, 0).long()[..., None]
    (target, p), (draft, q) = (_logits_and_shares(probs, at) for probs in (target_probs, draft_probs))
    accepted = chain_accept(target, draft_token_ids, draft, seeds=seeds, positions=positions)
    emitted = accepted.num_accepted

    # The walk has made the tests up to its end: what it rejected there must not be counted by another rounding.
    step = torch.arange(at.shape[1], device=at.device)
    alone = inside & (coins(seeds, at.shape[1], positions) * q < p) & (q > 0) & (step > emitted[:, None])
    counts = emitted + alone.sum(1, dtype=torch.int32)
    return accepted.tokens, _added(counted[0], counts), _added(counted[1], emitted)


def _logits_and_shares(probs, at) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all rows, and float64 [batch, steps] what the entries `at` of the leading rows are of these rows."""
    rows = masses(probs)
    leading = rows[:, : at.shape[1]]
    shares = leading.gather(-1, at)[..., 0].double() / leading.sum(-1).double()
    return rows.log_(), shares


def _added(output, counts):
    return counts.clone() if output is None else output.add_(counts.to(output.dtype))


def _check(draft_probs, draft_token_ids, target_probs, accepted, emitted) -> int:
    """Check tensors against draft_token_ids [batch, steps] and the vocabulary of target_probs; return the batch."""
    if not isinstance(draft_token_ids, torch.Tensor) or draft_token_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(argument_error(_NAME, "draft_token_ids", "int32 or int64 [batch, steps]", draft_token_ids))
    if draft_token_ids.dim() != 2:
        raise ValueError(argument_error(_NAME, "draft_token_ids", "int32 or int64 [batch, steps]", draft_token_ids))
    for name, probs in (("target_probs", target_probs), ("draft_probs", draft_probs)):
        if not isinstance(probs, torch.Tensor) or not probs.is_floating_point():
            raise TypeError(argument_error(_NAME, name, "a tensor of floats", probs))
    batch, steps = draft_token_ids.shape
    if target_probs.dim() != 3 or target_probs.shape[:2] != (batch, steps + 1) or target_probs.shape[2] < 1:
        raise ValueError(argument_error(_NAME, "target_probs", f"[{batch}, {steps + 1}, vocab]", target_probs))
    vocab = target_probs.shape[2]
    if draft_probs.shape != (batch, steps, vocab):
        raise ValueError(argument_error(_NAME, "draft_probs", f"[{batch}, {steps}, {vocab}]", draft_probs))
    for name, counts in (("accepted_token_num", accepted), ("emitted_draft_token_num", emitted)):
        if counts is None:
            continue
        if not isinstance(counts, torch.Tensor) or counts.dtype not in (torch.int32, torch.int64):
            raise TypeError(argument_error(_NAME, f"maybe_output_{name}", f"int32 or int64 [{batch}]", counts))
        if counts.shape != (batch,):
            raise ValueError(argument_error(_NAME, f"maybe_output_{name}", f"int32 or int64 [{batch}]", counts))
    return batch


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
        raise ValueError(argument_error(_NAME, name, must, value))
    return value.view(torch.int64).to(device).expand(batch)
