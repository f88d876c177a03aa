"""What PyTorch's users write for early exit: RMSNorm, head, softmax, and what is asked of it."""

from __future__ import annotations

import torch

from benchmarks.harness.contestant import Contestant, compiled
from benchmarks.harness.inputs import NORM_EPS
from benchmarks.harness.reading import reader

from .inputs import Inputs


def normalised(inputs: Inputs) -> torch.Tensor:
    hidden = inputs.hidden
    return torch.nn.functional.rms_norm(hidden, hidden.shape[1:], inputs.norm_weight, NORM_EPS)


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


def contestants(inputs: Inputs, to_result) -> list[Contestant]:
    """And, on a CPU, a plain read."""
    forms = [("eager", eager), ("softmax", softmax)]
    if inputs.case.compiled:
        forms.append(("compiled", compiled(eager)))
    listed = [
        Contestant(name, "pytorch", lambda form=form: form(inputs), to_result, (inputs.head,)) for name, form in forms
    ]
    return [*listed, reader().control(inputs.case.bytes)] if inputs.head.device.type == "cpu" else listed
