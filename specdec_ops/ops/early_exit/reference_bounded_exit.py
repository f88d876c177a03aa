"""The definition of early exit with bounds: a row has seen as many parts of the head as its decision takes."""

import torch

from specdec_ops.status import ExitStatus

from .reference_exit_confidence import (
    decide_by_figure,
    limit_of,
    logits,
    multiplied,
    stats_of,
    temperatures_of,
    write_stats,
)

_ROOM = 1e-4  # relative, for the float sums of kernels; theirs and these must call the same rows certain
_LEAD_ROOM = 1e-6  # of the difference of two probabilities
_MOST_ABOVE = 600.0  # exp of which times any vocabulary is finite
_MOST_PRODUCT = 1e30  # of lengths, or of a length alone, above which a float32 sum might overflow


def bounded_exit(arguments, outputs) -> None:
    """Write what exit_confidence does, of the entries that each row has seen when its decision is certain.

    The arguments, with a measure, and outputs: specdec_ops/ops/early_exit/contract.py.
    """
    hidden, bias, measure, level = arguments.hidden, arguments.bias, arguments.measure, arguments.level
    unscaled = logits(arguments)
    row_temperatures, told = temperatures_of(unscaled, arguments.temperature, arguments.temperatures)
    scaled = unscaled / row_temperatures[:, None]
    lengths = multiplied(arguments).double().norm(dim=1)
    limit = limit_of(arguments)
    stats = {name: output for name, output in stats_of(outputs).items() if output is not None}
    unasked = {name: None for name, output in stats_of(outputs).items() if output is None}
    returned = 1 if outputs.top_tokens is None else outputs.top_tokens.shape[1]
    open_rows = torch.arange(len(hidden), device=hidden.device)
    for norm, end in zip(arguments.norms_after.double(), arguments.ends, strict=True):
        part = {name: output[open_rows] for name, output in stats.items()}
        write_stats(scaled[open_rows, :end], told[open_rows], arguments.token_map, **part, **unasked)
        for name, output in stats.items():
            output[open_rows] = part[name]
        outputs.seen[open_rows] = end
        left = scaled.shape[1] - end
        if left == 0 or len(open_rows) == 0:
            break
        highest_bias = 0.0 if bias is None else bias[end:].max().double()
        ceiling = _ceiling(lengths[open_rows], norm, highest_bias, hidden.shape[1]) / row_temperatures[open_rows]
        masked = (scaled[open_rows, :end] == float("-inf")).all(dim=1)
        invalid = (part["status"] & ExitStatus.INVALID != 0) & ~masked
        invalid |= ~told[open_rows]
        no, yes, known = verdicts(
            scaled[open_rows, :end].double(), invalid, ceiling, left, measure, limit[open_rows], returned
        )
        open_rows = open_rows[~settled(no, yes, known, level)]
    decide_by_figure(arguments, outputs)


def _ceiling(lengths, norm, bias, dim):
    """What no unread logit is above: the lengths' product (Cauchy and Schwarz) and the greatest bias, outward."""
    product = lengths * norm * (1 + (dim + 64) * 2.0**-22)
    highest = product + bias
    bounded = (product < _MOST_PRODUCT) & (lengths < _MOST_PRODUCT)
    return torch.where(bounded, highest + 2.0**-20 * highest.abs().nan_to_num(0, 0, 0), float("inf"))


def verdicts(scaled, invalid, ceiling, left, measure, limit, returned):
    """Which rows cannot pass, which must, and of which nothing that they return can change: bool [rows] each.

    See csrc/early_exit/bound_verdict.h for why.

    Args:
        scaled: float64 [rows, entries], logits over the temperature that have been seen.
        invalid: bool [rows]: NaN or +inf is among them.
        ceiling: float64 [rows]: none of the others is above.
        left: how many others there are.
        measure: "max_prob", "margin" or "entropy".
        limit: float32 [rows].
        returned: how many of the greatest are returned.
    """
    best = (
        scaled.nan_to_num(float("-inf"), float("inf"), float("-inf"))
        .topk(min(max(returned, 2), scaled.shape[1]), dim=1)
        .values
    )
    missing = torch.full((len(scaled), max(returned, 2) - best.shape[1]), float("-inf"), dtype=scaled.dtype)
    best = torch.cat((best, missing.to(best.device)), dim=1)
    below = torch.where(scaled > float("-inf"), scaled - best[:, :1], float("-inf"))
    weight = below.exp()
    size, fall = weight.sum(dim=1), -torch.where(weight > 0, weight * below, 0.0).sum(dim=1)
    up = ceiling - best[:, 0]
    peak = up.exp()
    above, rest = up > 0, left * peak
    if measure == "entropy":
        entropy, most = size.log() + fall / size, rest / (size + rest)
        others = torch.full_like(entropy, left).log()
        mixed = torch.special.entr(most) + torch.special.entr(1 - most) + (1 - most) * entropy
        inside = left / (left + entropy.exp()) <= most
        high = torch.where(inside, (entropy.exp() + left).log(), mixed + most * others)
        room = 2 * _ROOM * (1 + high)
        no, yes = torch.minimum(entropy, mixed) - room > limit, high + room <= limit
    else:
        lead = room = 0.0
        first, least = 1 / size, 1 / (size + rest)
        if measure == "margin":
            gap, lead, room = best[:, 1] - best[:, 0], 1.0, _LEAD_ROOM
            first, least = -torch.expm1(gap) * first, -torch.expm1(torch.maximum(gap, up)) * least
        high = torch.maximum(first, torch.where(above, (peak - lead) / (size + peak), 0.0)) + room
        low = torch.where(above, 0.0, least) - room
        no, yes = high * (1 + _ROOM) < limit, low * (1 - _ROOM) >= limit
    bounded = (best[:, 0] > float("-inf")) & (up <= _MOST_ABOVE)
    known = bounded & (ceiling <= best[:, returned - 1])
    return (bounded & no) | invalid, bounded & yes & ~invalid, known | invalid


def settled(no, yes, known, level):
    """Which rows need no more: each by itself, or none before the decision for all is certain."""
    if level == "row":
        return no | (yes & known)
    exits = known.all() & (yes.any() if level == "any" else yes.all())
    done = exits | (no.all() if level == "any" else no.any())
    return done.expand(no.shape)
