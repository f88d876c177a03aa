"""The early exit launchers, emulated: scratch, counters, and how many multiprocessors share the vocabulary."""

import ctypes

import torch

from . import kernels
from .accept_kernels import run, with_scratch
from .kernels import DTYPES, Launch

HEAD_TYPES = {**DTYPES, torch.int8: 3}  # HeadType
MEASURES = ("", "max_prob", "margin", "entropy")  # ExitMeasure
LEVELS = ("row", "any", "all")  # ExitLevel
MOST_PARTS = 16
MULTIPROCESSORS = 2  # few, so that blocks have several tiles


def exit_confidence_launch(
    hidden, head, scales, norm_weight, norm_eps, bias, temperature, temperatures, token_map, threshold, thresholds,
    measure, level, token, max_prob, margin, entropy, logsumexp, top_tokens, top_logprobs, status, exited,
    active_rows, inverse, num_active, multiprocessors=MULTIPROCESSORS,
):  # fmt: skip
    """With scratch of just the size that the call needs, which may hold anything, and counters of zeros."""
    given = dict(locals())
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in given.items() if isinstance(value, (int, float))}
    numbers |= {"hidden_stride_row": hidden.stride(0), "hidden_dtype": DTYPES[hidden.dtype]}
    numbers |= {"norm_dtype": 0 if norm_weight is None else DTYPES[norm_weight.dtype]}
    numbers |= {"head_type": HEAD_TYPES[head.dtype], "measure": MEASURES.index(measure), "level": LEVELS.index(level)}
    numbers |= {"rows": hidden.shape[0], "dim": hidden.shape[1], "vocab": head.shape[0]}
    numbers["top_k"] = 0 if top_tokens is None else top_tokens.shape[1]
    return with_scratch(Launch("exit_confidence", tensors, numbers))


def screened_exit_launch(*arguments, multiprocessors=MULTIPROCESSORS):
    """The same with a screen; its parameters begin with screen_."""
    *arguments, values, scales, error_norms, norms, error_gain, tolerance, rechecked = arguments
    screen = {"values": values, "scales": scales, "error_norms": error_norms, "norms": norms, "error_gain": error_gain}
    screen = {f"screen_{name}": tensor for name, tensor in (screen | {"rechecked": rechecked}).items()}
    whole = exit_confidence_launch(*arguments, multiprocessors=multiprocessors)
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name not in ("scratch", "counters")}
    return with_scratch(Launch("screened_exit", tensors | screen, whole.numbers | {"screen_tolerance": tolerance}))


def bounded_exit_launch(*arguments, multiprocessors=MULTIPROCESSORS):
    """The same with bounds."""
    *arguments, norms_after, ends, seen = arguments
    whole = exit_confidence_launch(*arguments, multiprocessors=multiprocessors)
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name not in ("scratch", "counters")}
    tensors |= {"norms_after": norms_after, "seen": seen}
    parts = {"ends": (ctypes.c_int32 * MOST_PARTS)(*ends), "parts": len(ends)}
    return with_scratch(Launch("bounded_exit", tensors, whole.numbers | parts))


def launches(op):
    """Kernels that this op's library has launched so far."""
    return kernels.library(op, op).specdec_launches()


# The signature that all backends of an op share.
def exit_confidence(*arguments):
    run(exit_confidence_launch(*arguments))


def screened_exit(*arguments):
    run(screened_exit_launch(*arguments))


def bounded_exit(*arguments):
    run(bounded_exit_launch(*arguments))


IMPLEMENTATIONS = {"exit_confidence": exit_confidence, "bounded_exit": bounded_exit, "screened_exit": screened_exit}
