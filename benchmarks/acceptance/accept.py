"""Acceptance: the reference's decisions, and the contestants. PyTorch's forms are in peers.py.

The job is the same for everybody: from logits to the accepted tokens and the next one. Nobody is given probabilities.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import specdec_ops
from benchmarks.harness.contestant import Contestant, Expected, compiled, on_backends, unavailable
from benchmarks.harness.reading import reader

from . import peers
from .inputs import Inputs, call

BAND, BAND_TRIALS = 2.0**-20, 16  # a decision this near to another one may go either way; looked for after a difference


def expected(inputs: Inputs) -> Expected:
    """The reference's tokens for some requests. One differing decision is a wrong result."""
    some = sorted({0, inputs.case.batch // 2, inputs.case.batch - 1})
    picked = inputs.exact(some)
    exact = call(picked, "torch").tokens

    def take(result) -> list[torch.Tensor]:
        return [result.tokens[some] if isinstance(result, specdec_ops.Acceptance) else exact]

    def excuse(result) -> bool:
        """Whether each request's decisions are those of logits that differ by no more than rounding."""
        got, right = take(result)[0], torch.zeros(len(some), dtype=torch.bool, device=exact.device)
        for seed in range(BAND_TRIALS):
            right |= (call(nudged(picked, seed), "torch").tokens == got).all(1)
        return bool(right.all())

    return Expected(take, [exact], [0.0], excuse)


def nudged(inputs: Inputs, seed: int) -> Inputs:
    """The same with each logit moved by up to BAND of its size, one way or the other."""
    generator = torch.Generator(inputs.target.device).manual_seed(seed)

    def nudge(logits):
        if logits is None:
            return None
        signs = torch.randint(0, 2, logits.shape, generator=generator, device=logits.device) * 2 - 1
        return logits * (1 + BAND * signs)

    return replace(inputs, target=nudge(inputs.target), draft=nudge(inputs.draft))


def contestants(inputs: Inputs, options) -> list[Contestant]:
    def ours(backend: str, name: str) -> Contestant:
        return Contestant(name, "ours", lambda: call(inputs, backend))

    listed = on_backends(ours, options)
    if inputs.target.device.type == "cpu":
        listed.append(reader().control(inputs.case.bytes))
    if inputs.target.device.type == "cuda" and inputs.case.rule == "token" and inputs.case.top_p == 1:
        listed.append(flashinfer_chain(inputs))
    return listed + [peer(inputs, name, form, options) for name, form in peers.forms(inputs.case)]


def flashinfer_chain(inputs: Inputs) -> Contestant:
    """FlashInfer's chain kernel with its softmax before it, as an engine calls them. It draws its own noise.

    Its result is right if the accepted tokens are a leading part of the drafted ones and one token of the vocabulary
    follows them; its law is not tested here.
    """
    try:
        from flashinfer.sampling import chain_speculative_sampling, softmax
    except ImportError:
        return unavailable("flashinfer", "library", "FlashInfer is not installed")
    (batch, nodes, vocab), drafted = inputs.target.shape, inputs.tokens[:, 1:].contiguous()

    def probabilities(logits):
        return softmax(logits.reshape(-1, vocab), enable_pdl=False).view(batch, -1, vocab)

    def call():
        p, q = probabilities(inputs.target), probabilities(inputs.draft[:, :-1])
        return chain_speculative_sampling(q, drafted, p)[0]

    def to_result(tokens):
        """As the reference's result if it is well-formed, else as it is."""
        count = (tokens >= 0).sum(1, keepdim=True) - 1
        steps = torch.arange(nodes - 1, device=tokens.device)
        follows = (tokens[:, :-1] == drafted) | (steps >= count)
        sound = bool((count >= 0).all()) and bool(follows.all()) and bool((tokens < vocab).all())
        return None if sound else specdec_ops.Acceptance(tokens, tokens, count, count, count, count)

    return Contestant("flashinfer", "library", call, to_result)


def peer(inputs: Inputs, name: str, form, options) -> Contestant:
    """A PyTorch form. With our noise it must decide as the reference does; it is timed with PyTorch's own noise."""
    problem = peers.problem(inputs, form)
    if problem:
        return unavailable(name, "pytorch", problem)
    noise = peers.TorchNoise(inputs)
    if name.startswith("compiled"):
        form = compiled(form)
    return Contestant(name, "pytorch", lambda: form(inputs, noise))
