"""vLLM's `rejection_sample`, the tensor form behind its RejectionSampler, on `chain_accept(rule="token")`. As in vLLM
0.32.0, and as in older versions, which took probabilities, with `target_probs=`.

What the target says comes as logits or as probabilities, and a mistake between them is silent: softmax makes
probabilities nearly uniform, and logits taken for probabilities make every choice greedy. So the name decides, never
the numbers:

- By place, the sixth argument is `target_logits`, as in vLLM 0.32.0.
- By name it is `target_logits=` or `target_probs=`. Given one of these, what follows must be named too.
- On a CPU, where looking waits for nothing, `target_probs` and `draft_probs` that are no distributions are refused, and
  so is what comes by place and is a distribution in every row: a call written for an older version. On other devices a
  look would wait for the device, and a call by place is served as logits. All-greedy calls are not looked at: logits
  and probabilities have the same argmax.

What is done otherwise than in the original:

- Each request draws one seed, from its own generator where it has one, and all of its noise follows from that. The
  original fills a row as long as the vocabulary from each generator in a Python loop. The same generators give other
  tokens.
- A draft token is accepted iff coin * draft probability < target probability, with coins that are never 0 or 1.
- A draft ends at its first token of -1, which is padding, and the target's own row gives the token there; the original
  takes the draft's row out of it. An id beyond the vocabulary is rejected; the original reads outside of its tensors.
- Rows that hold NaN give an id inside of the vocabulary, and touch no other request. So do vocabularies of any size,
  and more than 2^31 probabilities, all of which led to ids out of range or overflows in versions of the original.
- The token after a rejection is drawn for the rejected position only, where the original draws one for every
  position.
- Noise has 32 bits with and without `use_fp64_gumbel`, which has no effect.
- It is the same on a CPU, where the original's kernels silently did nothing in some versions, and where 0.32.0 knows no
  synthetic mode.

Rows are padded to [batch, max_spec_len + 1, vocab] on the way, one more copy. `chain_accept` itself takes logits
before temperature, top-k and top-p.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from specdec_ops import chain_accept, sample_tokens
from specdec_ops._core.checks import INT32_MAX, argument_error

from ._chains import coins, masses

PLACEHOLDER_TOKEN_ID = -1
_NAME = "compat.vllm.rejection_sample"
_T = TypeVar("_T")
_SUM_BAND = 1e-2
"""How far from 1 a row of a 16-bit distribution may sum."""


def _either_target(function: Callable[..., _T]) -> Callable[..., _T]:
    """Take target_probs= in place of target_logits, and look at what came by place. See the module."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*arguments, target_probs: torch.Tensor | None = None, **named):
        given = signature.bind_partial(*arguments, **named).arguments
        greedy = getattr(given.get("sampling_metadata"), "all_greedy", False)
        if target_probs is None:
            by_place = "target_logits" in given and "target_logits" not in named
            if by_place and not greedy and _are_distributions(given["target_logits"]):
                must = "logits, named target_logits= or, if these are probabilities, target_probs="
                raise ValueError(f"specdec_ops.{_NAME}: the sixth argument must be {must}, got distributions")
            return function(*arguments, **named)
        if "target_logits" in given:
            raise TypeError(f"specdec_ops.{_NAME}: target_probs must be given alone, got target_logits too")
        _check_rows("target_probs", target_probs, sum(given.get("num_draft_tokens", ())))
        if not greedy:
            _check_distributions("target_probs", target_probs)
            target_probs = masses(target_probs).log_()
        return function(*arguments, target_logits=target_probs, **named)

    return called


@_either_target
def rejection_sample(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata: Any,
    synthetic_mode: bool = False,
    synthetic_conditional_rates: torch.Tensor | None = None,
    use_fp64_gumbel: bool = False,
) -> torch.Tensor:
    """Speculative sampling of ragged chains (Leviathan et al., 2023; Chen et al., 2023). Lossless.

    The signature is that of vLLM 0.32.0. Older versions' `target_probs` may be given by name in place of target_logits.

    Args:
        draft_token_ids: int32 or int64 [tokens]: those of all requests, one request after another. -1 is padding.
        num_draft_tokens: per request.
        max_spec_len: at least the largest of num_draft_tokens.
        cu_num_draft_tokens: int32 or int64 [batch]: the sum of num_draft_tokens up to and including each request.
        draft_probs: [tokens, vocab], or None: the draft tokens were chosen deterministically, as by n-gram lookup.
        target_logits: [tokens, vocab], after temperature, top-k and top-p.
        bonus_token_ids: [batch, 1] or [batch]: the token of each request if all of its draft tokens are accepted.
        sampling_metadata: vLLM's, or any object with `all_greedy`, `all_random`, `temperature` (None, or [batch], not
            above 0 for greedy requests) and `generators` (a dict from requests to torch.Generator).
        synthetic_mode: accept at given rates, whatever the target says, to measure speed: the text is not the target's.
            Rejected tokens are replaced as ever: by the target's argmax for greedy requests, else from what the target
            has left.
        synthetic_conditional_rates: in synthetic mode, float [steps] of at least max(num_draft_tokens) steps: the
            chance that a step is accepted if those before it are.
        use_fp64_gumbel: no effect.

    Returns:
        int32 [batch, max_spec_len + 1]: accepted tokens, one more, then PLACEHOLDER_TOKEN_ID.

    Raises:
        ValueError: max_spec_len is too small, a shape does not fit, rates are given if and only if synthetic_mode is
            not, or, on a CPU, probabilities are no distributions.
        TypeError: an argument is no tensor, both target_logits and target_probs are given, or as in
            specdec_ops.chain_accept.
    """
    _check(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits)
    _check_rates(synthetic_mode, synthetic_conditional_rates, max(num_draft_tokens, default=0))
    batch, device = len(num_draft_tokens), target_logits.device
    bonus = _ids(bonus_token_ids.reshape(batch).to(device))
    ends = cu_num_draft_tokens.to(device, torch.int64)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    if target_logits.shape[0] == 0:
        return torch.cat([bonus[:, None], bonus.new_full((batch, max_spec_len), PLACEHOLDER_TOKEN_ID)], dim=1)

    steps = torch.arange(max_spec_len + 1, device=device)
    rows, tokens = _padded(draft_token_ids.long(), ends, counts, steps)
    if draft_probs is not None and not sampling_metadata.all_greedy:
        _check_distributions("draft_probs", draft_probs)
    given = (target_logits, draft_probs, tokens, rows, sampling_metadata, num_draft_tokens)
    accepted, out = _accept_at_rates(*given, synthetic_conditional_rates) if synthetic_mode else _accept(*given)
    everything = (accepted == counts)[:, None] & (steps == counts[:, None])
    return torch.where(everything, bonus[:, None], out)


def _ids(tokens: torch.Tensor) -> torch.Tensor:
    """Token ids as int32. One that int32 can't hold must not become another token: it becomes a placeholder."""
    if tokens.dtype == torch.int64:
        tokens = torch.where((tokens < 0) | (tokens > INT32_MAX), PLACEHOLDER_TOKEN_ID, tokens)
    return tokens.to(torch.int32)


def _padded(draft_token_ids, ends, counts, steps) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows int64 [batch, steps + 1] and tokens int64 [batch, steps] of chains as long as the longest.

    A draft ends at its first placeholder. The row after it is some other row; the bonus token replaces what it gives.
    """
    rows = (ends - counts)[:, None] + torch.minimum(steps, counts[:, None])
    rows = rows.clamp(0, draft_token_ids.shape[0] - 1)
    return rows, torch.where(steps < counts[:, None], draft_token_ids[rows], PLACEHOLDER_TOKEN_ID)[:, :-1]


def _accept(target_logits, draft_probs, tokens, rows, sampling_metadata, num_draft_tokens) -> tuple:
    """How many tokens of each request are accepted, [batch], and those, one more, then -1, int32 [batch, steps + 1]."""
    (batch, steps), vocab, device = tokens.shape, target_logits.shape[1], target_logits.device
    target = target_logits.float().index_select(0, rows.flatten()).view(batch, steps + 1, vocab)
    draft, seeds = None, 0
    if not sampling_metadata.all_greedy:
        seeds = _seeds(sampling_metadata.generators, num_draft_tokens, device)
        if draft_probs is not None:
            draft = masses(draft_probs.index_select(0, rows[:, :steps].flatten())).log_().view(batch, steps, vocab)
    temperature = _temperature(sampling_metadata, device)
    accepted = chain_accept(target, tokens, draft, seeds=seeds, positions=0, temperature=temperature)
    return accepted.num_accepted, accepted.tokens


def _accept_at_rates(target_logits, draft_probs, tokens, rows, sampling_metadata, num_draft_tokens, rates) -> tuple:
    """The same in synthetic mode: coins against rates."""
    (batch, steps), vocab, device = tokens.shape, target_logits.shape[1], target_logits.device
    seeds = _seeds(sampling_metadata.generators, num_draft_tokens, device)
    rates = torch.nn.functional.pad(rates.to(device).double(), (0, max(0, steps - rates.shape[0])))[:steps]
    drafted = (tokens >= 0) & (tokens < vocab)
    passed = drafted & (coins(seeds, steps, seeds.new_zeros(batch)) < rates)
    accepted = passed.long().cumprod(1).sum(1)

    at = accepted.clamp(max=steps - 1)[:, None]  # of the first rejection
    row, token = rows.gather(1, at)[:, 0], tokens.gather(1, at)
    logits = target_logits.index_select(0, row).float()
    target = logits.double().softmax(1)
    if draft_probs is None:
        taken = torch.zeros_like(target).scatter_(1, token.clamp(0, vocab - 1), torch.inf)
    else:
        taken = draft_probs.index_select(0, row).double()
    left = (target - torch.where(drafted.gather(1, at), taken, 0.0)).clamp(min=0)
    left = torch.where((left > 0).any(1, keepdim=True), left, target)
    temperature = _temperature(sampling_metadata, device)
    greedy = temperature <= 0 if isinstance(temperature, torch.Tensor) else left.new_full((batch,), temperature) <= 0
    drawn = torch.where(greedy[:, None], logits, left.log().float())
    replaced = sample_tokens(drawn, seeds=seeds, positions=0, temperature=temperature)

    columns = torch.arange(steps + 1, device=device)
    out = torch.nn.functional.pad(_ids(tokens), (0, 1))
    out = torch.where(columns == accepted[:, None], replaced[:, None], out)
    return accepted, torch.where(columns <= accepted[:, None], out, PLACEHOLDER_TOKEN_ID)


def _temperature(sampling_metadata, device) -> torch.Tensor | float:
    """Temperatures are in the logits already; all that is left is which requests are greedy."""
    if sampling_metadata.all_greedy:
        return 0.0
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


def _looks_wrong(rows: torch.Tensor) -> torch.Tensor:
    """Rows with entries below 0 or a sum far from 1, bool [tokens]. NaN and zeros pass: they harm one request."""
    sums = rows.sum(-1, dtype=torch.float32)
    return (rows.amin(-1) < -_SUM_BAND) | (((sums - 1).abs() > _SUM_BAND) & (sums != 0))


def _can_look(rows) -> bool:
    return isinstance(rows, torch.Tensor) and rows.device.type == "cpu" and rows.dim() == 2 and rows.numel() > 0


def _are_distributions(rows) -> bool:
    """Whether every row is one. The first row alone tells for nearly all logits."""
    if not _can_look(rows) or bool(_looks_wrong(rows[:1])):
        return False
    return not bool((_looks_wrong(rows) | ~(rows.sum(-1, dtype=torch.float32) > 0)).any())


def _check_distributions(name: str, probs) -> None:
    if _can_look(probs) and bool(_looks_wrong(probs).any()):
        must = "distributions, which hold nothing below 0 and sum to 1"
        raise ValueError(argument_error(_NAME, name, must, probs))


def _check_rates(synthetic_mode, rates, longest: int) -> None:
    if not synthetic_mode:
        if rates is not None:
            raise ValueError(argument_error(_NAME, "synthetic_conditional_rates", "None without synthetic_mode", rates))
    elif not isinstance(rates, torch.Tensor) or not rates.is_floating_point():
        raise TypeError(
            argument_error(_NAME, "synthetic_conditional_rates", "a tensor of floats in synthetic_mode", rates)
        )
    elif rates.dim() != 1 or rates.shape[0] < longest:
        raise ValueError(argument_error(_NAME, "synthetic_conditional_rates", f"[steps], of at least {longest}", rates))


def _check_rows(name: str, rows, tokens: int) -> None:
    if not isinstance(rows, torch.Tensor) or not rows.is_floating_point():
        raise TypeError(argument_error(_NAME, name, f"a tensor of floats [{tokens}, vocab]", rows))
    if rows.dim() != 2 or rows.shape[0] != tokens or rows.shape[1] < 1:
        raise ValueError(argument_error(_NAME, name, f"[{tokens}, vocab]", rows))


def _check(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target) -> None:
    batch, longest = len(num_draft_tokens), max(num_draft_tokens, default=0)
    _check_rows("target_logits", target, sum(num_draft_tokens))
    if max_spec_len < longest:
        raise ValueError(argument_error(_NAME, "max_spec_len", f"at least {longest}", max_spec_len))
    shape = tuple(target.shape)
    for name, tensor, must in (
        ("draft_probs", draft_probs, shape),
        ("draft_token_ids", draft_token_ids, shape[:1]),
        ("cu_num_draft_tokens", cu_num_draft_tokens, (batch,)),
    ):
        if tensor is not None and tuple(tensor.shape) != must:
            raise ValueError(argument_error(_NAME, name, str(list(must)), tensor))
