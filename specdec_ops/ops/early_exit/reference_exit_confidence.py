"""The definition of exit_confidence and early_exit: all logits, and their softmax."""

import torch

from specdec_ops.ops.reference_settings import is_temperature, softmax_temperature
from specdec_ops.status import ExitStatus

MINUS_INFINITY = float("-inf")


FIGURES = ("token", "max_prob", "margin", "entropy", "logsumexp", "top_tokens", "top_logprobs", "status")


def exit_confidence(arguments, outputs) -> None:
    """Write what the head says of each row and, if `measure` is not "", which rows exit.

    The arguments and outputs: specdec_ops/ops/early_exit/contract.py.
    """
    unscaled = logits(arguments)
    row_temperatures, told = temperatures_of(unscaled, arguments.temperature, arguments.temperatures)
    write_stats(unscaled / row_temperatures[:, None], told, arguments.token_map, **stats_of(outputs))
    if arguments.measure:
        decide_by_figure(arguments, outputs)


def stats_of(outputs) -> dict:
    """What is said of rows, by name."""
    return {name: getattr(outputs, name) for name in FIGURES}


def decide_by_figure(arguments, outputs) -> None:
    """Write which rows exit, by the statistics that are written already."""
    passed = passes(outputs.status, getattr(outputs, arguments.measure), limit_of(arguments), arguments.measure)
    decide(passed, arguments.level, outputs.exited, outputs.active_rows, outputs.inverse, num_active=outputs.num_active)


def limit_of(arguments):
    """The threshold of each row, float32 [rows]."""
    if arguments.thresholds is not None:
        return arguments.thresholds
    rows, device = len(arguments.hidden), arguments.hidden.device
    return torch.full((rows,), arguments.threshold, dtype=torch.float32, device=device)


def temperatures_of(logits, temperature, temperatures):
    """What divides the logits of each row, in their dtype, and whether a temperature was given: [rows] each."""
    given = torch.full_like(logits[:, 0], temperature, dtype=torch.float32) if temperatures is None else temperatures
    return softmax_temperature(given).to(logits.dtype), is_temperature(given)


def write_stats(
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
    stats = {
        "max_prob": 1 / size,
        "margin": 1 / size - second,
        "entropy": torch.log(size) - torch.where(probabilities > 0, probabilities * below, 0.0).sum(dim=1),
    }
    token.copy_(tokens[:, 0])
    for output, name in ((max_prob, "max_prob"), (margin, "margin"), (entropy, "entropy")):
        output.copy_(torch.where(valid, stats[name], 0.0))
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


def logits(arguments):
    """RMSNorm, head, bias: [rows, vocab], in float64 if hidden is, else in float32."""
    x = multiplied(arguments)
    compute = x.dtype
    product = x @ arguments.head.to(compute).T
    if arguments.scales is not None:
        product = product * arguments.scales.to(compute)
    return product if arguments.bias is None else product + arguments.bias.to(compute)


def multiplied(arguments):
    """What is multiplied with the head: [rows, dim], hidden or its RMSNorm."""
    x = arguments.hidden.to(torch.promote_types(arguments.hidden.dtype, torch.float32))
    if arguments.norm_weight is None:
        return x
    scale = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + arguments.norm_eps)
    return x * scale * arguments.norm_weight.to(x.dtype)


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
