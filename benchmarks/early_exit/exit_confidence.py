"""Early exit: inputs, exact figures, and contestants: RMSNorm, head, softmax, and what is asked of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.attention.tree_attention import DTYPES, fill_random
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, allowed_error, compiled, largest_error
from benchmarks.harness.reading import reader

from .cases import ExitCase

EPS = 1e-6
TOLERANCE = 0.01  # of a probability that a screened call gives: the op's default
THRESHOLD = 0.9  # of max_prob, where bounds are measured
CHECKED = 2  # rows computed in float64
PIECE = 4096  # rows of the head, at a time


@dataclass
class Inputs:
    case: ExitCase
    hidden: torch.Tensor
    head: torch.Tensor
    norm_weight: torch.Tensor
    screen: specdec_ops.QuantizedHead | None = None
    bounds: specdec_ops.HeadBounds | None = None


@functools.lru_cache(maxsize=1)
def make_screen(vocab: int, dim: int, dtype: str, device: str) -> specdec_ops.QuantizedHead:
    """Of the head that make_inputs makes, which is the same for every number of rows; it takes seconds."""
    return specdec_ops.quantize_head(make_head(vocab, dim, dtype).to(device))


def make_head(vocab: int, dim: int, dtype: str, falling: bool = False) -> torch.Tensor:
    """Rows of length 4, or of lengths from 4 down to 0.1."""
    head = fill_random((vocab, dim), DTYPES[dtype], 1) * (4 / dim**0.5)
    return head.div_(1 + 40 * torch.arange(vocab)[:, None] / vocab) if falling else head


def make_inputs(case: ExitCase, device: str = "cpu") -> Inputs:
    """Rows that point along a row of the head, more or less, so that some are sure and some are not."""
    dtype = DTYPES[case.dtype]
    head = make_head(case.vocab, case.dim, case.dtype, case.bounds == "falling")
    hidden = fill_random((case.rows, case.dim), torch.float32, 2)
    chosen = torch.arange(case.rows) * 37 % case.vocab
    strength = torch.linspace(0, 1, case.rows)[:, None] * case.dim**0.5 / 4
    hidden = (hidden + strength * head[chosen].float()).to(dtype)
    screen = make_screen(case.vocab, case.dim, case.dtype, device) if case.screened else None
    head = head.to(device)
    bounds = specdec_ops.bound_head(head) if case.bounds else None
    return Inputs(case, hidden.to(device), head, torch.ones(case.dim, dtype=dtype, device=device), screen, bounds)


def ours(inputs: Inputs, backend: str, name: str, screened: bool | None = None) -> Contestant:
    """screened: by default as the case is."""
    i = inputs
    screen = {"screen": i.screen, "tolerance": TOLERANCE} if i.screen is not None and screened is not False else {}

    def call():
        return specdec_ops.exit_confidence(
            i.hidden, i.head, norm_weight=i.norm_weight, norm_eps=EPS, top_k=i.case.top_k, **screen, backend=backend
        )

    return Contestant(name, "ours", call, figures, (i.screen.values, i.head) if screen else (i.head,))


def our_exits(inputs: Inputs, backend: str, name: str, bounded: bool = True) -> Contestant:
    """Which rows exit, with the bounds or without."""
    i, bounds = inputs, inputs.bounds if bounded else None

    def call():
        return specdec_ops.early_exit(
            i.hidden, i.head, THRESHOLD, norm_weight=i.norm_weight, norm_eps=EPS, bounds=bounds, backend=backend
        )

    return Contestant(name, "ours", call, lambda got: [got.exited], (i.head,))


def figures(confidence: specdec_ops.Confidence) -> list[torch.Tensor]:
    return [confidence.max_prob, confidence.logsumexp, confidence.token]


def normalised(inputs: Inputs) -> torch.Tensor:
    hidden = inputs.hidden
    return torch.nn.functional.rms_norm(hidden, hidden.shape[1:], inputs.norm_weight, EPS)


def eager(inputs: Inputs):
    """The least work that PyTorch can do for it: no softmax is written."""
    logits = (normalised(inputs) @ inputs.head.T).float()
    top, token = best(logits, inputs.case.top_k)
    total = logits.logsumexp(1)
    return [(top - total).exp(), total, token]


def softmax(inputs: Inputs):
    """As it is usually written."""
    logits = (normalised(inputs) @ inputs.head.T).float()
    top, token = best(torch.softmax(logits, 1), inputs.case.top_k)
    return [top, logits.logsumexp(1), token]


def best(values: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest of each row and where it is; with top_k, the first of so many."""
    if top_k:
        found = values.topk(top_k, 1)
        return found.values[:, 0], found.indices[:, 0]
    return values.max(1)


def expected(inputs: Inputs) -> Expected:
    """Probability, the exact logit of the chosen token in place of the token and, without a screen, log-sum-exp."""
    rows = sorted({0, inputs.case.rows - 1})[:CHECKED]
    x = inputs.hidden[rows].double()
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * inputs.norm_weight.double()
    dtype, pieces = DTYPES[inputs.case.dtype], inputs.head.split(PIECE)
    logits = [x @ piece.double().T for piece in pieces]
    errors = [rounding.product(x, *both, dtype) for both in zip(pieces, logits, strict=True)]
    logits, errors = torch.cat(logits, 1), torch.cat(errors, 1)
    greatest, total = logits.max(1).values, logits.logsumexp(1)
    exact = [(greatest - total).exp(), greatest, total]
    count = 2 if inputs.screen is not None else 3

    def take(result) -> list[torch.Tensor]:
        max_prob, logsumexp, token = (figure[rows] for figure in result)
        token = token.long().clamp(0, inputs.case.vocab - 1)[:, None]
        return [max_prob, logits.gather(1, token)[:, 0], logsumexp][:count]

    plain = [largest_error(*both) for both in zip(take(eager(inputs)), exact[:count], strict=True)]
    max_prob, lse, chosen = rounding.exit_figures(logits, errors)
    bounds = [max_prob, chosen, lse][:count]
    allowed = [allowed_error(*each) for each in zip(exact[:count], plain, bounds, strict=True)]
    if inputs.screen is not None:
        allowed[0] += TOLERANCE
    return Expected(take, exact[:count], allowed)


def expected_exits(inputs: Inputs) -> Expected:
    """Which of the rows exit. Those of the cases are clearly above or below the threshold."""
    logits = torch.cat([normalised(inputs).double() @ piece.double().T for piece in inputs.head.split(PIECE)], 1)
    max_prob = torch.softmax(logits, 1).amax(1)
    if ((max_prob - THRESHOLD).abs() < 0.05).any():
        raise ValueError(f"{inputs.case.label}: a row is too near to the threshold to be checked: {max_prob.tolist()}")
    return Expected(lambda result: [result[0].double()], [(max_prob >= THRESHOLD).double()], [0.0])


def exits_contestants(inputs: Inputs, options) -> list[Contestant]:
    listed = [our_exits(inputs, "auto", "specdec_ops")]
    listed += [our_exits(inputs, backend, f"specdec_ops {backend}") for backend in options.backends]
    listed.append(our_exits(inputs, "auto", "specdec_ops full head", bounded=False))
    return [*listed, *pytorch_forms(inputs, lambda result: [result[0] >= THRESHOLD])]


def contestants(inputs: Inputs, options) -> list[Contestant]:
    listed = [ours(inputs, "auto", "specdec_ops")]
    listed += [ours(inputs, backend, f"specdec_ops {backend}") for backend in options.backends]
    if inputs.screen is not None:
        listed.append(ours(inputs, "auto", "specdec_ops full head", screened=False))
    return [*listed, *pytorch_forms(inputs, list)]


def pytorch_forms(inputs: Inputs, to_result) -> list[Contestant]:
    """And, on a CPU, a plain read."""
    forms = [("eager", eager), ("softmax", softmax)]
    if inputs.case.compiled:
        forms.append(("compiled", compiled(eager)))
    listed = [
        Contestant(name, "pytorch", lambda form=form: form(inputs), to_result, (inputs.head,)) for name, form in forms
    ]
    return [*listed, reader().control(inputs.case.bytes)] if inputs.head.device.type == "cpu" else listed
