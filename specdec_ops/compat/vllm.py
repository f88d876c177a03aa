"""vLLM's `rejection_sample`, the tensor form behind its RejectionSampler, on `chain_accept(rule="token")`.

What is done otherwise than in the original:

- Each request draws one seed, from its own generator where it has one, and all of its noise follows from that. The
  original fills a row as long as the vocabulary from each generator in a Python loop. The same generators give other
  tokens.
- A draft token is accepted iff coin * draft probability < target probability, with coins that are never 0 or 1.
- Rows that hold NaN give an id inside of the vocabulary, and touch no other request. So do vocabularies of any size,
  and more than 2^31 probabilities, all of which led to ids out of range or overflows in versions of the original.
- The token after a rejection is drawn for the rejected position only, where the original draws one for every
  position.
- It is the same on a CPU, where the original's kernels silently did nothing in some versions.

Rows are padded to [batch, max_spec_len + 1, vocab] on the way, one more copy. `chain_accept` itself takes logits,
with temperature, top-k and top-p.
"""

from __future__ import annotations

from typing import Any

import torch

from specdec_ops import chain_accept
from specdec_ops._checks import wrong

PLACEHOLDER_TOKEN_ID = -1


def rejection_sample(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata: Any,
) -> torch.Tensor:
    """Speculative sampling of ragged chains (Leviathan et al., 2023; Chen et al., 2023). Lossless.

    Args:
        draft_token_ids: int32 or int64 [tokens]: those of all requests, one request after another.
        num_draft_tokens: per request.
        max_spec_len: at least the largest of num_draft_tokens.
        cu_num_draft_tokens: int32 or int64 [batch]: the sum of num_draft_tokens up to and including each request.
        draft_probs: [tokens, vocab], or None: the draft tokens were chosen deterministically, as by n-gram lookup.
        target_probs: [tokens, vocab], after temperature, top-k and top-p. With all_greedy, logits will do.
        bonus_token_ids: [batch, 1] or [batch]: the token of each request if all of its draft tokens are accepted.
        sampling_metadata: vLLM's, or any object with `all_greedy`, `all_random`, `temperature` (None, or [batch], not
            above 0 for greedy requests) and `generators` (a dict from requests to torch.Generator).

    Returns:
        int32 [batch, max_spec_len + 1]: accepted tokens, one more, then PLACEHOLDER_TOKEN_ID.

    Raises:
        ValueError: max_spec_len is too small, or a shape does not fit.
        TypeError: as in specdec_ops.chain_accept.
    """
    batch, vocab, device = len(num_draft_tokens), target_probs.shape[-1], target_probs.device
    _check(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_probs)
    bonus = bonus_token_ids.view(batch).to(device, torch.int32)
    ends = cu_num_draft_tokens.to(device, torch.int64)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    if target_probs.shape[0] == 0:
        return torch.cat([bonus[:, None], bonus.new_full((batch, max_spec_len), PLACEHOLDER_TOKEN_ID)], dim=1)

    # A draft ends at its first placeholder. The row after it is some other row; the bonus token replaces what it gives.
    steps = torch.arange(max_spec_len + 1, device=device)
    rows = ((ends - counts)[:, None] + torch.minimum(steps, counts[:, None])).clamp(max=target_probs.shape[0] - 1)
    tokens = torch.where(steps < counts[:, None], draft_token_ids.long()[rows], PLACEHOLDER_TOKEN_ID)[:, :max_spec_len]
    target = target_probs.float().index_select(0, rows.flatten()).view(batch, max_spec_len + 1, vocab)
    draft, temperature = None, 0.0
    if not sampling_metadata.all_greedy:  # logits and probabilities have the same argmax, but only these a logarithm
        target = target.log_()
        if draft_probs is not None:
            draft = draft_probs.float().index_select(0, rows[:, :max_spec_len].flatten()).log_()
            draft = draft.view(batch, max_spec_len, vocab)
        temperature = _temperature(sampling_metadata, device)
    accepted = chain_accept(
        target,
        tokens.int(),
        draft,
        seeds=_seeds(sampling_metadata.generators, num_draft_tokens, device),
        positions=0,
        temperature=temperature,
    )
    everything = (accepted.num_accepted == counts)[:, None] & (steps == counts[:, None])
    return torch.where(everything, bonus[:, None], accepted.tokens)


def _temperature(sampling_metadata, device) -> torch.Tensor | float:
    """Temperatures are in the probabilities already; all that is left is which requests are greedy."""
    if sampling_metadata.all_random or sampling_metadata.temperature is None:
        return 1.0
    return (sampling_metadata.temperature.to(device) > 0).float()


def _seeds(generators: dict[int, torch.Generator], num_draft_tokens: list[int], device) -> torch.Tensor:
    """int64 [batch]. A request without draft tokens leaves its generator alone."""
    seeds = torch.empty(len(num_draft_tokens), dtype=torch.int64, device=device).random_()
    for request, generator in generators.items():
        if num_draft_tokens[request] > 0:
            seeds[request] = torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator)
    return seeds


def _check(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_probs) -> None:
    op, batch, longest = "compat.vllm.rejection_sample", len(num_draft_tokens), max(num_draft_tokens, default=0)
    if max_spec_len < longest:
        raise ValueError(wrong(op, "max_spec_len", f"at least {longest}", max_spec_len))
    shape = (sum(num_draft_tokens), target_probs.shape[-1])
    for name, tensor, must in (
        ("target_probs", target_probs, shape),
        ("draft_probs", draft_probs, shape),
        ("draft_token_ids", draft_token_ids, shape[:1]),
        ("cu_num_draft_tokens", cu_num_draft_tokens, (batch,)),
    ):
        if tensor is not None and tuple(tensor.shape) != must:
            raise ValueError(wrong(op, name, str(list(must)), tensor))
