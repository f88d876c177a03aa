"""Early exit: inputs, exact figures, and contestants: RMSNorm, head, softmax, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import specdec_ops

from .attention import DTYPES, fill_random
from .contestant import Contestant, Expected, allowed_error, largest_error, unavailable
from .exit_cases import ExitCase
from .machine import native

EPS = 1e-6
CHECKED = 2  # rows computed in float64
PIECE = 4096  # rows of the head, at a time


@dataclass
class Inputs:
    case: ExitCase
    hidden: torch.Tensor
    head: torch.Tensor
    norm_weight: torch.Tensor


def make_inputs(case: ExitCase, device: str = "cpu") -> Inputs:
    """Rows that point along a row of the head, more or less, so that some are sure and some are not."""
    dtype = DTYPES[case.dtype]
    head = fill_random((case.vocab, case.dim), dtype, 1) * (4 / case.dim**0.5)
    hidden = fill_random((case.rows, case.dim), torch.float32, 2)
    chosen = torch.arange(case.rows) * 37 % case.vocab
    strength = torch.linspace(0, 1, case.rows)[:, None] * case.dim**0.5 / 4
    hidden = (hidden + strength * head[chosen].float()).to(dtype)
    return Inputs(case, hidden.to(device), head.to(device), torch.ones(case.dim, dtype=dtype, device=device))


def ours(inputs: Inputs, backend: str, name: str) -> Contestant:
    def call():
        i = inputs
        return specdec_ops.exit_confidence(
            i.hidden, i.head, norm_weight=i.norm_weight, norm_eps=EPS, top_k=i.case.top_k, backend=backend
        )

    return Contestant(name, "ours", call, figures, (inputs.head,))


def figures(confidence: specdec_ops.Confidence) -> list[torch.Tensor]:
    return [confidence.max_prob, confidence.logsumexp]


def normalised(inputs: Inputs) -> torch.Tensor:
    hidden = inputs.hidden
    return torch.nn.functional.rms_norm(hidden, hidden.shape[1:], inputs.norm_weight, EPS)


def eager(inputs: Inputs):
    """The least work that PyTorch can do for it: no softmax is written."""
    logits = (normalised(inputs) @ inputs.head.T).float()
    best = logits.topk(inputs.case.top_k, 1) if inputs.case.top_k else logits.max(1)
    top = best.values[:, 0] if inputs.case.top_k else best.values
    total = logits.logsumexp(1)
    return [(top - total).exp(), total]


def softmax(inputs: Inputs):
    """As it is usually written."""
    logits = (normalised(inputs) @ inputs.head.T).float()
    p = torch.softmax(logits, 1)
    best = p.topk(inputs.case.top_k, 1) if inputs.case.top_k else p.max(1)
    return [best.values[:, 0] if inputs.case.top_k else best.values, logits.logsumexp(1)]


def expected(inputs: Inputs) -> Expected:
    rows = sorted({0, inputs.case.rows - 1})[:CHECKED]
    x = inputs.hidden[rows].double()
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * inputs.norm_weight.double()
    logits = torch.cat([x @ piece.double().T for piece in inputs.head.split(PIECE)], 1)
    total = logits.logsumexp(1)
    exact = [(logits.max(1).values - total).exp(), total]

    def take(result) -> list[torch.Tensor]:
        return [figure[rows] for figure in result]

    errors = [largest_error(*both) for both in zip(take(eager(inputs)), exact, strict=True)]
    dtype = DTYPES[inputs.case.dtype]  # a row or two may happen to be exact in PyTorch
    return Expected(take, exact, [allowed_error(*both, dtype) for both in zip(exact, errors, strict=True)])


def contestants(inputs: Inputs, options) -> list[Contestant]:
    listed = [ours(inputs, "auto", "specdec_ops")]
    listed += [ours(inputs, backend, f"specdec_ops {backend}") for backend in options.backends]
    forms = [("eager", eager), ("softmax", softmax)]
    if inputs.case.compiled:
        forms.append(("compiled", torch.compile(eager, dynamic=False)))
    listed += [
        Contestant(name, "pytorch", lambda form=form: form(inputs), list, (inputs.head,)) for name, form in forms
    ]
    return [*listed, read_control(inputs)] if inputs.head.device.type == "cpu" else listed


def read_control(inputs: Inputs) -> Contestant:
    """A plain read of the head."""
    module, threads, head = native(), torch.get_num_threads(), inputs.head
    if module is None:
        return unavailable("plain read", "control", "the compiled module is missing")
    return Contestant(
        "plain read", "control", lambda: module.read_bytes(head.data_ptr(), head.nbytes, threads), reads=(head,)
    )
