"""The definition of exit_confidence and early_exit: all logits, and their softmax."""

import torch

from specdec_ops.ops.reference_settings import is_temperature, softmax_temperature
from specdec_ops.status import ExitStatus

MINUS_INFINITY = float("-inf")


def exit_confidence(
    hidden,
    head,
    scales,
    norm_weight,
    norm_eps,
    bias,
    temperature,
    temperatures,
    token_map,
    threshold,
    thresholds,
    measure,
    level,
    token,
    max_prob,
    margin,
    entropy,
    logsumexp,
    top_tokens,
    top_logprobs,
    status,
    exited,
    active_rows,
    inverse,
    num_active,
) -> None:
    """Write what the head says of each row and, if `measure` is not "", which rows exit.

    Args:
        hidden: [rows, dim].
        head: [vocab, dim], floating or int8.
        scales: float32 [vocab] of an int8 head, else None.
        norm_weight: [dim] of the RMSNorm before the head, or None: no norm.
        norm_eps: of the norm.
        bias: float32 [vocab] or None. -inf masks an entry.
        temperature: a number, used where `temperatures` [rows] is None.
        temperatures: see above.
        token_map: int32 [vocab]: the token of each entry, or None: entries are tokens.
        threshold: a number, used where `thresholds` [rows] is None.
        thresholds: see above.
        measure: "max_prob", "margin" or "entropy": what is compared; "": no decision, and its outputs are None.
        level: "row", or "any" or "all": one decision for all rows.
        token: int32 [rows].
        max_prob: float32 [rows], like margin, entropy and logsumexp.
        margin: see above.
        entropy: see above.
        logsumexp: see above.
        top_tokens: int32 [rows, top_k] or None.
        top_logprobs: float32 [rows, top_k] or None.
        status: int32 [rows].
        exited: bool [rows].
        active_rows: int32 [rows].
        inverse: int32 [rows].
        num_active: int32 [1].
    """
    unscaled = logits(hidden, head, scales, norm_weight, norm_eps, bias)
    degrees, told = degrees_of(unscaled, temperature, temperatures)
    figures = (token, max_prob, margin, entropy, logsumexp, top_tokens, top_logprobs, status)
    write_figures(unscaled / degrees[:, None], told, token_map, *figures)
    if measure:
        figure = {"max_prob": max_prob, "margin": margin, "entropy": entropy}[measure]
        limit = torch.full_like(figure, threshold) if thresholds is None else thresholds
        decide(passes(status, figure, limit, measure), level, exited, active_rows, inverse, num_active)


def degrees_of(logits, temperature, temperatures):
    """What divides the logits of each row, in their dtype, and whether a temperature was given: [rows] each."""
    given = torch.full_like(logits[:, 0], temperature, dtype=torch.float32) if temperatures is None else temperatures
    return softmax_temperature(given).to(logits.dtype), is_temperature(given)


def write_figures(
    scaled, told, token_map, token, max_prob, margin, entropy, logsumexp, top_tokens, top_logprobs, status
) -> None:
    """Write what logits [rows, entries] over the temperature, the first ones of a head, say of each row.

    Of a row that was told no temperature, that is its token.
    """
    sound = (scaled < float("inf")).all(dim=1) & (scaled > MINUS_INFINITY).any(dim=1)  # NaN is not below infinity
    valid = sound & told
    comparable = scaled.nan_to_num(MINUS_INFINITY, float("inf"), MINUS_INFINITY)

    # A stable descending sort keeps the lowest id first among equals.
    count = min(max(2, 0 if top_tokens is None else top_tokens.shape[1]), scaled.shape[1])
    best, entries = (part[:, :count] for part in torch.sort(comparable, dim=1, descending=True, stable=True))
    tokens = entries if token_map is None else token_map.long()[entries]

    safe = torch.where(valid[:, None], scaled, 0.0)
    highest = safe.max(dim=1, keepdim=True).values
    below = safe - highest  # what is small in a sure row is not to be the difference of two large numbers
    size = torch.exp(below).sum(dim=1)
    total = highest[:, 0] + torch.log(size)
    probabilities = torch.exp(below) / size[:, None]
    fall = torch.where(valid[:, None], best - highest, MINUS_INFINITY)
    second = torch.exp(fall[:, 1]) / size if count > 1 else torch.zeros_like(total)
    figures = {
        "max_prob": 1 / size,
        "margin": 1 / size - second,
        "entropy": torch.log(size) - torch.where(probabilities > 0, probabilities * below, 0.0).sum(dim=1),
    }
    token.copy_(tokens[:, 0])
    for output, name in ((max_prob, "max_prob"), (margin, "margin"), (entropy, "entropy")):
        output.copy_(torch.where(valid, figures[name], 0.0))
    logsumexp.copy_(torch.where(valid, total, MINUS_INFINITY))
    status.copy_(torch.where(sound, 0, ExitStatus.INVALID) | torch.where(told, 0, ExitStatus.SETTING_INVALID))
    if top_tokens is not None:
        listed = min(top_tokens.shape[1], count)
        exists = valid[:, None] & (best[:, :listed] > MINUS_INFINITY)
        top_tokens.fill_(-1)
        top_logprobs.fill_(MINUS_INFINITY)
        top_tokens[:, :listed] = torch.where(exists, tokens[:, :listed], -1)
        top_logprobs[:, :listed] = torch.where(exists, fall[:, :listed] - torch.log(size)[:, None], MINUS_INFINITY)


def passes(status, figure, limit, measure):
    """Which rows pass by themselves. Figures are compared as float32: what is returned and decided must agree."""
    return (status == 0) & (figure <= limit if measure == "entropy" else figure >= limit)


def logits(hidden, head, scales, norm_weight, norm_eps, bias):
    """RMSNorm, head, bias: [rows, vocab], in float64 if hidden is, else in float32."""
    x = multiplied(hidden, norm_weight, norm_eps)
    compute = x.dtype
    product = x @ head.to(compute).T
    if scales is not None:
        product = product * scales.to(compute)
    return product if bias is None else product + bias.to(compute)


def multiplied(hidden, norm_weight, norm_eps):
    """What is multiplied with the head: [rows, dim], hidden or its RMSNorm."""
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if norm_weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + norm_eps) * norm_weight.to(x.dtype)


def decide(passed, level, exited, active_rows, inverse, num_active) -> None:
    """Which rows exit, and the others in their order."""
    if level != "row":
        together = passed.any() if level == "any" else passed.all() & (passed.numel() > 0)
        passed = together.expand(passed.shape)
    exited.copy_(passed)
    active = (~passed).nonzero()[:, 0].to(torch.int32)
    active_rows.fill_(-1)
    inverse.fill_(-1)
    active_rows[: len(active)] = active
    inverse[active.long()] = torch.arange(len(active), dtype=torch.int32, device=inverse.device)
    num_active.fill_(len(active))
