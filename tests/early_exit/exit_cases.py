"""Inputs of the early exit tests, PyTorch's own form in the same dtype, whose error is the measure, and a counter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from specdec_ops import QuantizedHead, early_exit, exit_confidence


@dataclass
class ExitCase:
    """One call; hidden rows scaled so that the rows' confidences cover everything between unsure and sure."""

    hidden: torch.Tensor
    head: torch.Tensor | QuantizedHead
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> ExitCase:
        """Every floating input in another dtype, but the float32 ones that stay so in each call."""

        def move(name, value):
            if isinstance(value, QuantizedHead):
                return value.to(device)
            if not isinstance(value, torch.Tensor):
                return value.to(device) if hasattr(value, "to") else value
            kept = name in ("bias", "temperature") or not value.dtype.is_floating_point
            return value.to(device) if kept else value.to(device, dtype)

        options = {name: move(name, value) for name, value in self.options.items()}
        return replace(self, hidden=move("hidden", self.hidden), head=move("head", self.head), options=options)

    def first(self, rows: int) -> ExitCase:
        """The first rows alone."""
        options = dict(self.options)
        if isinstance(options.get("temperature"), torch.Tensor):
            options["temperature"] = options["temperature"][:rows]
        return replace(self, hidden=self.hidden[:rows], options=options)

    def run(self, backend: str, **options):
        return exit_confidence(self.hidden, self.head, **self.options, **options, backend=backend)

    def decide(self, backend: str, threshold, **options):
        return early_exit(self.hidden, self.head, threshold, **self.options, **options, backend=backend)

    def exact(self, **options):
        """The definition in float64, on the values that the case's dtype holds."""
        exact = self.to(torch.float64)
        return exact.run("torch", **options)

    def plain(self):
        """What PyTorch's users write, in the case's dtype: max_prob, margin, entropy and logsumexp."""
        options, dtype = self.options, self.hidden.dtype
        x = self.hidden
        if options.get("norm_weight") is not None:
            norm = torch.nn.functional.rms_norm(x.float(), x.shape[1:], None, options.get("norm_eps", 1e-6))
            x = (norm * options["norm_weight"].float()).to(dtype)
        head = self.head
        if isinstance(head, QuantizedHead):
            logits = (x @ head.values.to(dtype).T).float() * head.scales
        else:
            logits = (x @ head.T).float()
        if options.get("bias") is not None:
            logits = logits + options["bias"]
        temperature = options.get("temperature", 1.0)
        logits = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
        p = torch.softmax(logits, 1)
        best = p.topk(min(2, p.shape[1]), 1).values
        margin = best[:, 0] - best[:, 1] if p.shape[1] > 1 else best[:, 0]
        return best[:, 0], margin, torch.special.entr(p).sum(1), logits.logsumexp(1)


def make_case(rows: int, dim: int, vocab: int, dtype: torch.dtype, seed: int = 0, **options) -> ExitCase:
    """Random rows; every second one points along some head row, more or less."""
    generator = torch.Generator().manual_seed(seed + rows * 1009 + dim * 31 + vocab)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head = normal(vocab, dim)
    hidden = normal(rows, dim)
    chosen = torch.randint(vocab, (rows,), generator=generator)
    hidden[::2] += head[chosen[::2]] * torch.linspace(0, 2, len(hidden[::2]), dtype=torch.float64)[:, None]
    hidden *= 3 / dim**0.5
    if options.pop("norm", False):
        options["norm_weight"] = (normal(dim).abs() * 3 / dim**0.5).to(dtype)
    if options.pop("bias", False):
        options["bias"] = normal(vocab).float()
    if options.pop("temperatures", False):
        options["temperature"] = torch.rand(rows, generator=generator) + 0.3
    return ExitCase(hidden.to(dtype), head.to(dtype), options)


class Counted:
    """A Triton kernel whose launches are counted."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


def count_launches(monkeypatch, *modules) -> list[tuple]:
    """A list that gets the grid of every launch by these modules from now on."""
    grids: list[tuple] = []
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), grids))
    return grids


def many_rows(head: torch.Tensor, seed: int) -> torch.Tensor:
    """1,000 hidden rows, every second one towards a row of this head: the farther, the surer."""
    vocab, dim = head.shape
    hidden = make_case(1000, dim, vocab, head.dtype, seed).hidden
    strengths = torch.linspace(0, 6, 500)[torch.randperm(500)][:, None].to(head.dtype)
    hidden[::2] += head[torch.arange(500) % vocab] * strengths / dim**0.5
    return hidden
