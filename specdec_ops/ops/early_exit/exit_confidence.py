"""exit_confidence: what a head says of each row at some layer, from one pass. Which rows may stop: early_exit.py."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core.checks import (
    FLOAT_MAX,
    INT32_MAX,
    KERNEL_DTYPES,
    argument_error,
    as_float32,
    device_error,
    grad_error,
    is_int,
    is_number,
    strides_error,
)
from specdec_ops.vocab_map import VocabMap

from . import contract
from .quantized_head import QuantizedHead

MAX_TOP_K = 16
_DTYPES = (*KERNEL_DTYPES, torch.float64)
_NO_DECISION = (0.0, None, "", "row")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Confidence:
    """Statistics of each row's softmax(logits / temperature) over the head's entries, on the device of the rows.

    Attributes:
        token: int32 `[rows]`: the most likely token, the lowest entry among equals.
        max_prob: float32 `[rows]`: its probability, 0 to 1.
        margin: float32 `[rows]`: max_prob less the second greatest probability.
        entropy: float32 `[rows]`: of the distribution, in nats.
        logsumexp: float32 `[rows]`: of logits / temperature, a natural logarithm.
        top_tokens: int32 `[rows, top_k]`: most likely first, -1 where fewer have a probability; None without top_k.
        top_logprobs: float32 like top_tokens: natural logarithms of their probabilities; -inf beside -1.
        status: int32 `[rows]`: 0, or `ExitStatus` bits.
        rechecked: int32 `[rows]`: entries of the head that were read in full precision (some twice, if the first
            pass left something open); all of them for a row that fell back. None without a screen.
    """

    token: torch.Tensor
    max_prob: torch.Tensor
    margin: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    top_tokens: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    status: torch.Tensor
    rechecked: torch.Tensor | None = None


_STATS = ("token", "max_prob", "margin", "entropy", "logsumexp", "top_tokens", "top_logprobs", "status")


def exit_confidence(
    hidden: torch.Tensor,
    head: torch.Tensor | QuantizedHead,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 1.0,
    top_k: int = 0,
    vocab_map: VocabMap | None = None,
    screen: QuantizedHead | None = None,
    tolerance: float = 0.01,
    out: Confidence | None = None,
    backend: str = "auto",
) -> Confidence:
    """RMSNorm, LM head and the statistics of its softmax, in one pass over the head. Logits are never in memory.

    Args:
        hidden: float32, bfloat16 or float16 `[rows, dim]`, before the final norm, with a contiguous last dimension.
        head: float32, bfloat16 or float16 `[vocab, dim]`, contiguous; or a QuantizedHead. All nested sub-models of a
            sorted draft share it.
        norm_weight: `[dim]`, in hidden's dtype or float32: the RMSNorm before the head. None: hidden is taken as it is.
        norm_eps: added to the mean square.
        bias: float32 `[vocab]`. An entry of -inf masks a token.
        temperature: float32 `[rows]` or a number, above 0. In a tensor NaN and negative values are none: the row has
            its token, else what an invalid one has, and `ExitStatus.SETTING_INVALID`. What is below 1e-20 counts
            as 1e-20, so that 0 is sure of the argmax, and what is above 1e20 as 1e20, so that infinity is sure of none.
        top_k: how many of the most likely tokens to return, 0 to 16.
        vocab_map: the tokens that the rows of a reduced head stand for.
        screen: `quantize_head(head)`, made from this very head, which must be a tensor. The int8 copy is read instead
            of the head, and then those entries of the head that matter: half the bytes of a bfloat16 head. token and
            top_tokens are the whole head's by proof. So are max_prob and margin up to `tolerance`, and logsumexp and
            top_logprobs up to about tolerance / max_prob; entropy is an estimate. A row for which
            an eighth of the head does not suffice falls back to the whole head.
        tolerance: of max_prob and margin with a screen, absolute, at least 0.001.
        out: a Confidence to write into, with contiguous tensors.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("exit_confidence")`, with a
            screen `backends("screened_exit")`. A named backend never falls back. float64 hidden rows run with the torch
            backend.

    Returns:
        A Confidence, `out` where given. Nothing waits for the device; a row's statistics depend on that row alone.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    The maximum's probability is the confidence of S2D (Kavehzadeh et al., 2024); margin that of CALM (Schuster et al.,
    2022); entropy and the top 10 feed the decision model of improved multi-candidate decoding (Lu et al., 2024).
    """
    op = "exit_confidence"
    arguments = check_arguments(op, hidden, head, norm_weight, norm_eps, bias, temperature, vocab_map)
    check_top_k(op, top_k)
    screening = check_screen(op, screen, tolerance, hidden, head)
    if out is not None:
        check_out(op, "out", out, hidden, top_k, screen is not None)
    results = run_head((*arguments, *_NO_DECISION), screening, top_k, backend, out)
    return confidence_of(results, screen is not None) if out is None else out


def run_head(arguments: tuple, screening: tuple, top_k: int, backend: str, out: Confidence | None = None):
    """The outputs of exit_confidence, or with a screen of screened_exit."""
    into = None
    if out is not None:
        into = {name: getattr(out, name) for name in _STATS}
        into |= {"exited": None, "active_rows": None, "inverse": None, "num_active": None}
    if not screening:
        into = None if into is None else contract.ExitConfidenceOutputs(**into)
        return contract.exit_confidence(contract.ExitConfidenceArguments(*arguments), backend, into, top_k=top_k)
    into = None if into is None else contract.ScreenedExitOutputs(**into, rechecked=out.rechecked)
    return contract.screened_exit(contract.ScreenedExitArguments(*arguments, *screening), backend, into, top_k=top_k)


def confidence_of(results, screened: bool) -> Confidence:
    """A Confidence of an operator's outputs."""
    rechecked = results.rechecked if screened else None
    return Confidence(**{name: getattr(results, name) for name in _STATS}, rechecked=rechecked)


def check_arguments(op: str, hidden, head, norm_weight, norm_eps, bias, temperature, vocab_map) -> tuple:
    """What the implementations take, from hidden to token_map."""
    if not isinstance(hidden, torch.Tensor) or hidden.dtype not in _DTYPES:
        raise TypeError(argument_error(op, "hidden", "float32, bfloat16 or float16 [rows, dim]", hidden))
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(argument_error(op, "hidden", "[rows, dim] with a dim of at least 1", hidden))
    if hidden.stride(1) != 1 and hidden.shape[1] > 1:
        raise ValueError(strides_error(op, "hidden", "contiguous in its last dimension", hidden))
    if hidden.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(op))
    rows, dim = hidden.shape
    head, scales = check_head(op, head, dim, hidden)
    vocab = head.shape[0]
    if not rows <= INT32_MAX >= dim or vocab > INT32_MAX:
        name, value = ("head", head) if vocab > INT32_MAX else ("hidden", hidden)
        raise ValueError(argument_error(op, name, "of sizes below 2**31", value))
    if norm_weight is not None:
        check_vector(op, "norm_weight", norm_weight, dim, (hidden.dtype, torch.float32), hidden.device)
    if not is_number(norm_eps) or not 0 <= norm_eps <= FLOAT_MAX:
        raise ValueError(argument_error(op, "norm_eps", "a finite number of at least 0", norm_eps))
    if bias is not None:
        check_vector(op, "bias", bias, vocab, (torch.float32,), hidden.device)
    token_map = None
    if vocab_map is not None:
        if not isinstance(vocab_map, VocabMap):
            raise TypeError(argument_error(op, "vocab_map", "a specdec_ops.VocabMap or None", vocab_map))
        token_map = vocab_map.draft_to_target
        check_vector(op, "vocab_map.draft_to_target", token_map, vocab, (torch.int32,), hidden.device)
    if is_number(temperature) and not 0 < temperature <= FLOAT_MAX:
        raise ValueError(argument_error(op, "temperature", "a finite number above 0", temperature))
    temperature = per_row(op, "temperature", temperature, hidden)
    return hidden, head, scales, norm_weight, float(norm_eps), bias, *temperature, token_map


def check_head(op: str, head, dim: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The head's rows, and its scales if it is quantised."""
    scales = None
    if isinstance(head, QuantizedHead):
        head, scales = head.values, head.scales
    elif not isinstance(head, torch.Tensor) or head.dtype not in _DTYPES:
        must = "float32, bfloat16 or float16 [vocab, dim], or a specdec_ops.QuantizedHead"
        raise TypeError(argument_error(op, "head", must, head))
    elif (head.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(argument_error(op, "head", "float64 if and only if hidden is", head))
    elif head.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(op))
    if head.dim() != 2 or head.shape[1] != dim or head.shape[0] < 1:
        how = "; head.T.contiguous() fits" if head.dim() == 2 and head.shape[0] == dim else ""
        raise ValueError(argument_error(op, "head", f"[vocab, {dim}] with a vocab of at least 1", head) + how)
    if not head.is_contiguous():
        raise ValueError(strides_error(op, "head", "contiguous", head))
    if head.device != hidden.device:
        raise ValueError(device_error(op, "head", hidden.device, head))
    return head, scales


def check_screen(op: str, screen, tolerance, hidden: torch.Tensor, head) -> tuple:
    """What the implementations take of a screen, or ()."""
    if not is_number(tolerance) or not tolerance >= 1e-3:
        raise ValueError(argument_error(op, "tolerance", "a number of at least 0.001", tolerance))
    if screen is None:
        return ()
    if not isinstance(screen, QuantizedHead):
        raise TypeError(argument_error(op, "screen", "a specdec_ops.QuantizedHead or None", screen))
    if isinstance(head, QuantizedHead):
        raise TypeError(argument_error(op, "head", "the tensor that the screen was made from", head))
    if screen.values.shape != head.shape:
        raise ValueError(argument_error(op, "screen.values", f"int8 {list(head.shape)} like the head", screen.values))
    if screen.values.device != hidden.device:
        raise ValueError(device_error(op, "screen.values", hidden.device, screen.values))
    return (
        screen.values,
        screen.scales,
        screen.error_norms,
        screen.norms,
        screen.error_gain,
        as_float32(op, "tolerance", tolerance),
    )


def check_vector(op: str, name: str, value, length: int, dtypes: tuple, device) -> None:
    """Check for a contiguous [length] of one of the dtypes."""
    names = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        raise TypeError(argument_error(op, name, f"{names} [{length}]", value))
    if value.shape != (length,):
        raise ValueError(argument_error(op, name, f"{names} [{length}]", value))
    if not value.is_contiguous():
        raise ValueError(strides_error(op, name, "contiguous", value))
    if value.device != device:
        raise ValueError(device_error(op, name, device, value))
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(op))


def per_row(op: str, name: str, value, hidden: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """(number, None) or (0.0, float32 [rows])."""
    if is_number(value):
        return as_float32(op, name, value), None
    if not isinstance(value, torch.Tensor):
        raise TypeError(argument_error(op, name, f"a number or float32 [{hidden.shape[0]}]", value))
    if value.dim() == 0:
        value = value.expand(hidden.shape[0]).contiguous()
    check_vector(op, name, value, hidden.shape[0], (torch.float32,), hidden.device)
    return 0.0, value


def check_top_k(op: str, top_k) -> None:
    """Check for an int from 0 to MAX_TOP_K."""
    if not is_int(top_k):
        raise TypeError(argument_error(op, "top_k", "an int", top_k))
    if not 0 <= top_k <= MAX_TOP_K:
        raise ValueError(argument_error(op, "top_k", f"from 0 to {MAX_TOP_K}", top_k))


def fields(confidence: Confidence) -> tuple:
    """The tensors of a Confidence."""
    return tuple(getattr(confidence, field.name) for field in dataclasses.fields(Confidence))


def check_out(op: str, name: str, out, hidden: torch.Tensor, top_k: int, screened: bool = False) -> None:
    """Check a Confidence to write into."""
    if not isinstance(out, Confidence):
        raise TypeError(argument_error(op, name, "a specdec_ops.Confidence", out))
    rows = hidden.shape[0]
    for field, value in zip(dataclasses.fields(Confidence), fields(out), strict=True):
        dtype = torch.int32 if field.name in ("token", "top_tokens", "status", "rechecked") else torch.float32
        shape = (rows, top_k) if field.name.startswith("top_") else (rows,)
        if field.name.startswith("top_") and top_k == 0:
            if value is not None:
                raise ValueError(argument_error(op, f"{name}.{field.name}", "None without top_k", value))
            continue
        if field.name == "rechecked" and not screened:
            continue
        must = f"contiguous {str(dtype).removeprefix('torch.')} {list(shape)}"
        if not isinstance(value, torch.Tensor) or value.dtype != dtype:
            raise TypeError(argument_error(op, f"{name}.{field.name}", must, value))
        if value.shape != shape or not value.is_contiguous():
            raise ValueError(strides_error(op, f"{name}.{field.name}", must, value))
        if value.device != hidden.device:
            raise ValueError(device_error(op, f"{name}.{field.name}", hidden.device, value))
