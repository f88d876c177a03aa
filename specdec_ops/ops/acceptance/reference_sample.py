"""The definition of sample_tokens and sample_children, and of the distribution that a row of logits stands for."""

from typing import NamedTuple

import torch

from specdec_ops.ops.reference_settings import is_temperature, sampling_temperature
from specdec_ops.status import AcceptStatus

from . import reference_philox

MINUS_INFINITY = float("-inf")


class Settings(NamedTuple):
    """How one request's logits become a distribution."""

    temperature: float
    top_k: int
    top_p: float
    invalid: bool = False
    """Whether a number was given that has no meaning of its own."""

    @property
    def greedy(self) -> bool:
        """Temperature 0: the distribution is the argmax, and filters change nothing."""
        return not self.temperature > 0


class Law(NamedTuple):
    """The distribution of one row."""

    probabilities: torch.Tensor
    """float64 [vocab], summing to 1."""
    valid: bool
    """False where the row held NaN or +inf, or nothing but -inf. Then all probability is on one defined token."""
    logs: torch.Tensor
    """Natural logarithms of weights in the proportions of the probabilities, float64 [vocab]; -inf where impossible.

    A logit 20 below the greatest is 1,000 below it at temperature .02: its probability is 0 even in float64. Where the
    tokens above it are out, because they were drawn before, it matters all the same.
    """


def settings_of(request, temperature, temperatures, top_k, top_ks, top_p, top_ps) -> Settings:
    """The settings of one request: from the tensors [batch] where given, else the numbers; float32, as in kernels.

    Any numbers have a meaning. top_k up to 0, and top_p from 1 on or NaN, are off; top_p up to 0 keeps one token.
    """

    def value(number, tensor):
        return number if tensor is None else tensor[request].item()

    single = [
        torch.tensor(value(*pair), dtype=torch.float32).item()
        for pair in ((temperature, temperatures), (top_p, top_ps))
    ]
    heat, share = single
    invalid = not is_temperature(heat) or share != share
    return Settings(sampling_temperature(heat), int(value(top_k, top_ks)), share, invalid)


def law(logits, settings: Settings, disturb=None) -> Law:
    """The distribution of a row of logits [vocab]: temperature, then top-k, then top-p of what is left.

    Tokens are ordered by (logit descending, id ascending). top-k keeps the first k; top-p keeps the shortest leading
    part of these with at least that share of their mass, and at least one token.

    Args:
        logits: [vocab] in any floating dtype.
        settings: of the request.
        disturb: a function of the weights [vocab] that imitates rounding, for the margins of decisions. None: exact.
    """
    z = logits.double()
    if bool(z.isnan().any()) or bool((z == float("inf")).any()) or not bool((z > MINUS_INFINITY).any()):
        return certain(
            len(z), reference_philox.lowest_argmax(z.nan_to_num(MINUS_INFINITY, float("inf"), MINUS_INFINITY)), False
        )
    if settings.greedy:
        return certain(len(z), reference_philox.lowest_argmax(z), True)

    logs = (z - z.max()) / settings.temperature
    if disturb is not None:
        logs = logs + disturb(torch.ones_like(logs)).log()
    weights = torch.exp(logs)
    if not (settings.top_k > 0 or settings.top_p < 1):
        return Law(weights / weights.sum(), True, logs)
    order = torch.sort(z, descending=True, stable=True).indices
    if settings.top_k > 0:
        order = order[: settings.top_k]
    if settings.top_p < 1:
        mass = weights[order].cumsum(0)
        short = int((mass < settings.top_p * mass[-1]).sum())  # leading parts that are too small
        order = order[: short + 1]
    kept = torch.zeros_like(weights)
    kept[order] = weights[order]
    left = torch.full_like(logs, MINUS_INFINITY)
    left[order] = logs[order]
    return Law(kept / kept.sum(), True, left)


def certain(vocab: int, token: int, valid: bool) -> Law:
    """All probability on one token."""
    row = torch.zeros(vocab, dtype=torch.float64)
    row[token] = 1
    return Law(row, valid, row.log())


def without(logs: torch.Tensor, removed: list[int]) -> torch.Tensor | None:
    """The distribution that logarithms stand for, float64 [vocab], once some tokens are out; None if all are."""
    left = logs.clone()
    left[removed] = MINUS_INFINITY
    return torch.softmax(left, dim=0) if bool((left > MINUS_INFINITY).any()) else None


def ordered(values: torch.Tensor, count: int) -> list[int]:
    """Indices of the `count` greatest values > -inf, descending, the lowest index among equals first."""
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    return order[values[order] > MINUS_INFINITY].tolist()


def draw(logits, settings: Settings, count: int, replacement: bool, exponential) -> tuple[list[int], Law]:
    """`count` tokens of one row, or fewer where fewer are possible, in the order drawn.

    Args:
        logits: [vocab].
        settings: of the request. At temperature 0: the greatest logits; with replacement, the argmax again and again.
        count: at least 1.
        replacement: whether a token may be drawn again.
        exponential: a function of the draw's number: its exponential variables [vocab]. One race gives all tokens drawn
            without replacement.
    """
    row = law(logits, settings)
    if replacement:
        return [reference_philox.race(row.probabilities, exponential(number)) for number in range(count)], row
    if row.valid and settings.greedy:
        return ordered(logits.double(), count), row
    return reference_philox.first_of_race(row.logs, exponential(0), count), row


def sample(arguments, outputs) -> None:
    """Write `count` tokens for every row. The arguments and outputs: specdec_ops/ops/acceptance/contract.py."""
    logits, draft_to_target = arguments.logits, arguments.draft_to_target
    parents, first = arguments.parents, arguments.first_parent
    tokens, logprobs, logsumexp, status = outputs
    batch, rows, vocab = logits.shape
    tokens.fill_(-1)
    for output, fill in ((logprobs, MINUS_INFINITY), (logsumexp, MINUS_INFINITY), (status, 0)):
        if output is not None:
            output.fill_(fill)
    drafting = arguments.domain == "draft"
    for request in range(batch):
        settings = settings_of(
            *(request, arguments.temperature, arguments.temperatures),
            *(arguments.top_k, arguments.top_ks, arguments.top_p, arguments.top_ps),
        )
        key = arguments.seed if arguments.seeds is None else int(arguments.seeds[request])
        place = arguments.position if arguments.positions is None else int(arguments.positions[request])
        for row in range(rows):
            node = 0 if not drafting else first + row if parents is None else int(parents[request, row])

            def exponential(number, key=key, place=place, node=node):
                tag, detail = (
                    (reference_philox.DRAFT, node + (number << 16)) if drafting else (reference_philox.SAMPLE, 0)
                )
                return reference_philox.exponentials(vocab, key, place, tag, detail)

            if settings.invalid:
                status[request] |= AcceptStatus.SETTING_INVALID
            values = logits[request, row].cpu()
            drawn, distribution = draw(values, settings, arguments.count, arguments.replacement, exponential)
            if not distribution.valid:
                status[request] |= AcceptStatus.DRAFT_INVALID if drafting else AcceptStatus.TARGET_INVALID
            if not distribution.valid and drafting:
                continue
            ids = torch.tensor(drawn, dtype=torch.int64)
            tokens[request, row, : len(drawn)] = ids.int() if draft_to_target is None else draft_to_target.cpu()[ids]
            if logprobs is not None or logsumexp is not None:
                scaled = kept_logits(values, settings, distribution)
                total = torch.logsumexp(scaled, dim=0)
                if logprobs is not None:
                    logprobs[request, row, : len(drawn)] = (scaled[ids] - total).float()
                if logsumexp is not None:
                    logsumexp[request, row] = total.float()


def kept_logits(logits, settings: Settings, distribution: Law) -> torch.Tensor:
    """Logits / temperature, float64 [vocab], -inf where filtered out. At temperature 0: the logits."""
    z = logits.double()
    if settings.greedy:
        return z
    return torch.where(distribution.logs > MINUS_INFINITY, z / settings.temperature, MINUS_INFINITY)
