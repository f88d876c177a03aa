"""The acceptance and sampling ops as torch.library operators; _core.library says when a call goes through them.

`accept` is one operator for all acceptance rules and `sample` one for both samplers, as their implementations are.
"""

import torch

from specdec_ops._core import alloc, dispatch
from specdec_ops._core.library import define, fake_empty, short_cut_of

_NAMESPACE = torch.ops.specdec_ops


# accept. `arguments` is everything from rule to child_rows, in the order of the schema below.

_LAW = (
    "float {0}temperature, Tensor? {0}temperatures, SymInt {0}top_k, Tensor? {0}top_ks, "
    "float {0}top_p, Tensor? {0}top_ps, "
)
_NOISE = "SymInt seed, Tensor? seeds, SymInt position, Tensor? positions"
_ACCEPT = (
    "str rule, Tensor target, Tensor draft_tokens, Tensor? draft_logits, Tensor? target_to_draft, Tensor? first_child, "
    f"Tensor? next_sibling, Tensor num_nodes, {_LAW.format('')}{_LAW.format('draft_')}{_NOISE}, int[] eos, "
    "float[] thresholds, bool replacement, bool child_rows"
)
_accept_short_cut = short_cut_of(_ACCEPT)


def accept(arguments: tuple, max_depth: int, width: int, backend: str, out: tuple | None = None) -> tuple:
    """Checked arguments in; (tokens, nodes, num_accepted, next_tokens, status, finished) out.

    next_tokens is [batch, width], or [batch] with a width of 0: one next token.
    """
    if _accept_short_cut(arguments, *(out or ())):
        if out is None:
            _, target, *_ = arguments
            out = _outputs(alloc.empty, target, max_depth, width)
        _run(arguments, backend, out)
    elif out is None:
        return _NAMESPACE.accept(*arguments, backend, max_depth, width)
    else:
        _NAMESPACE.accept.out(*arguments, backend, **dict(zip(_OUTPUTS, out, strict=True)))
    return out


_OUTPUTS = ("tokens", "nodes", "num_accepted", "next_tokens", "status", "finished")


def _outputs(empty, target, max_depth: int, width: int) -> tuple:
    batch, device, columns = target.shape[0], target.device, max_depth + 1
    return (
        empty((batch, columns), torch.int32, device),
        empty((batch, columns), torch.int32, device),
        empty((batch,), torch.int32, device),
        empty((batch, width) if width else (batch,), torch.int32, device),
        empty((batch,), torch.int32, device),
        empty((batch,), torch.bool, device),
    )


def _run(arguments, backend: str, out: tuple) -> None:
    target = arguments[1]
    implementation = dispatch.resolve("accept", backend, target)
    if target.shape[0]:
        implementation(*arguments, *out)


def _run_accept(*arguments):
    *arguments, backend, max_depth, width = arguments
    out = _outputs(alloc.empty, arguments[1], max_depth, width)
    _run(arguments, backend, out)
    return out


def _run_accept_out(*arguments, **out):
    _run(arguments[:-1], arguments[-1], tuple(out[name] for name in _OUTPUTS))


define(
    "accept",
    f"{_ACCEPT}, str backend",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ", ".join(f"Tensor({chr(ord('a') + i)}!) {name}" for i, name in enumerate(_OUTPUTS)),
    _run_accept,
    _run_accept_out,
    lambda *arguments: _outputs(fake_empty, arguments[1], *arguments[-2:]),
    what=", SymInt max_depth, SymInt width",
)


# sample. `arguments` is everything from logits to positions, in the order of the schema below.

_SAMPLE = (
    "Tensor logits, Tensor? draft_to_target, SymInt count, bool replacement, Tensor? parents, SymInt first_parent, "
    f"str domain, {_LAW.format('')}{_NOISE}"
)
_sample_short_cut = short_cut_of(_SAMPLE)


def sample(arguments: tuple, with_law: bool, backend: str, out: tuple | None = None) -> tuple:
    """Checked arguments in; (tokens, logprobs, logsumexp, status) out. Without with_law the two are None or empty."""
    if _sample_short_cut(arguments, *(out or ())):
        if out is None:
            out = _sampled(alloc.empty, arguments, with_law)
        _run_sample_out(*arguments, backend, *out)
    elif out is None:
        return _NAMESPACE.sample(*arguments, backend, with_law)
    else:
        tokens, logprobs, logsumexp, status = out
        _NAMESPACE.sample.out(*arguments, backend, tokens=tokens, logprobs=logprobs, logsumexp=logsumexp, status=status)
    return out


def _sampled(empty, arguments, with_law: bool) -> tuple:
    batch, rows, _ = arguments[0].shape
    count, device = arguments[2], arguments[0].device
    return (
        empty((batch, rows, count), torch.int32, device),
        empty((batch, rows, count), torch.float32, device) if with_law else None,
        empty((batch, rows), torch.float32, device) if with_law else None,
        empty((batch,), torch.int32, device),
    )


def _run_sample(*arguments):
    *arguments, backend, with_law = arguments
    tokens, logprobs, logsumexp, status = _sampled(alloc.empty, arguments, with_law)
    _run_sample_out(*arguments, backend, tokens, logprobs, logsumexp, status)
    if with_law:
        return tokens, logprobs, logsumexp, status
    device = tokens.device  # an operator can't return None for a Tensor
    return tokens, alloc.empty((0,), torch.float32, device), alloc.empty((0,), torch.float32, device), status


def _run_sample_out(*arguments):
    logits = arguments[0]
    implementation = dispatch.resolve("sample", arguments[17], logits)
    if logits.shape[0] and logits.shape[1]:
        implementation(*arguments[:17], *arguments[18:])
    elif logits.shape[0]:  # requests without rows have nothing to report
        arguments[-1].zero_()


def _fake_sample(*arguments):
    *arguments, _, with_law = arguments
    tokens, logprobs, logsumexp, status = _sampled(fake_empty, arguments, with_law)
    if with_law:
        return tokens, logprobs, logsumexp, status
    device = tokens.device
    return tokens, fake_empty((0,), torch.float32, device), fake_empty((0,), torch.float32, device), status


define(
    "sample",
    f"{_SAMPLE}, str backend",
    "(Tensor, Tensor, Tensor, Tensor)",
    "Tensor(a!) tokens, Tensor(b!)? logprobs, Tensor(c!)? logsumexp, Tensor(d!) status",
    _run_sample,
    lambda *arguments, tokens, logprobs=None, logsumexp=None, status: _run_sample_out(
        *arguments, tokens, logprobs, logsumexp, status
    ),
    _fake_sample,
    what=", bool with_law",
)
