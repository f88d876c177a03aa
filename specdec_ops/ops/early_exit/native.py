"""Calls of the early exit kernels in the compiled module. Nothing is checked here; the public ops have done so.

The order of arguments is that of csrc/bindings/early_exit.cpp.
"""

import functools

import torch

from specdec_ops._core import alloc
from specdec_ops._core.native import _DTYPE_CODES, _address, _counters, _module, _stream

_HEAD_TYPES = {**_DTYPE_CODES, torch.int8: 3}  # HeadType in csrc/early_exit/params.h
_MEASURES = ("", "max_prob", "margin", "entropy")  # ExitMeasure
_LEVELS = ("row", "any", "all")  # ExitLevel


def exit_confidence_cpu(*arguments):
    """See specdec_ops.ops.early_exit.reference_exit_confidence for the arguments."""
    _module().exit_confidence_cpu(*_exit_arguments(*arguments), torch.get_num_threads())


def exit_confidence_cuda(hidden, *others):
    """See specdec_ops.ops.early_exit.reference_exit_confidence for the arguments."""
    arguments = _exit_arguments(hidden, *others)
    module = _module()
    module.exit_confidence_cuda(*arguments, *_scratch(module.exit_confidence_scratch, arguments, hidden.device))


def screened_exit_cuda(hidden, *others):
    """See specdec_ops.ops.early_exit.reference_screened_exit for the arguments."""
    arguments, *screen = _screened_arguments(hidden, *others)
    module = _module()
    memory = _scratch(module.screened_exit_scratch, arguments, hidden.device)
    module.screened_exit_cuda(*arguments, *screen, *memory)


def _scratch(sizes_of, arguments, device):
    """What follows the other arguments: scratch, counters and multiprocessors, the device and the stream.

    Scratch may hold anything and is this call's alone; the counters are the stream's, see specdec_ops._core.native.
    """
    rows, _, vocab, top_k = arguments[-1]
    index, stream = _stream(device)
    multiprocessors = _multiprocessors(index)
    scratch_bytes, count = _scratch_sizes(sizes_of, rows, vocab, top_k, multiprocessors)
    scratch = alloc.empty((scratch_bytes,), torch.uint8, device)
    counters = _counters(device, stream, count)
    return (scratch.data_ptr(), counters.data_ptr(), multiprocessors), index, stream


@functools.cache
def _multiprocessors(index: int) -> int:
    """How many the device has: they share the vocabulary."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _scratch_sizes(sizes_of, *sizes) -> tuple[int, int]:
    return sizes_of(*sizes)


def screened_exit_cpu(*arguments):
    """See specdec_ops.ops.early_exit.reference_screened_exit for the arguments."""
    exit_arguments, *screen = _screened_arguments(*arguments)
    _module().screened_exit_cpu(*exit_arguments, *screen, torch.get_num_threads())


def bounded_exit_cpu(*arguments):
    """See specdec_ops.ops.early_exit.reference_bounded_exit for the arguments."""
    _module().bounded_exit_cpu(*_bounded_arguments(*arguments), torch.get_num_threads())


def bounded_exit_cuda(hidden, *others):
    """See specdec_ops.ops.early_exit.reference_bounded_exit for the arguments."""
    arguments = _bounded_arguments(hidden, *others)
    module = _module()
    memory = _scratch(module.bounded_exit_scratch, arguments[:-3], hidden.device)
    module.bounded_exit_cuda(*arguments, *memory)


def _bounded_arguments(*arguments):
    """Those of exit_confidence in a tuple, then what bounds add."""
    *exit_arguments, norms_after, ends, seen = arguments
    return (*_exit_arguments(*exit_arguments), norms_after.data_ptr(), list(ends), seen.data_ptr())


def exit_mlp_cpu(*arguments):
    """See specdec_ops.ops.early_exit.reference_exit_mlp for the arguments."""
    _module().exit_mlp_cpu(*_mlp_arguments(*arguments), torch.get_num_threads())


def exit_mlp_cuda(features, weights, *others):
    """See specdec_ops.ops.early_exit.reference_exit_mlp for the arguments.

    Scratch may hold anything and is this call's alone; for the counters see specdec_ops._core.native.
    """
    arguments = _mlp_arguments(features, weights, *others)
    scratch_bytes, counters = _mlp_scratch(*features.shape, tuple(weight.shape[0] for weight in weights))
    device, stream = _stream(features.device)
    scratch = alloc.empty((scratch_bytes,), torch.uint8, features.device)
    counter = _counters(features.device, stream, counters)
    _module().exit_mlp_cuda(*arguments, (scratch.data_ptr(), counter.data_ptr()), device, stream)


@functools.lru_cache(maxsize=1024)
def _mlp_scratch(rows, inputs, outputs) -> tuple[int, int]:
    return _module().exit_mlp_scratch(rows, inputs, outputs)


def _mlp_arguments(features, weights, biases, threshold, score, stop):
    layers = [
        (weight.data_ptr(), _HEAD_TYPES[weight.dtype], bias.data_ptr(), weight.shape[0])
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return (
        (features.data_ptr(), _DTYPE_CODES[features.dtype], features.stride(0)),
        layers,
        threshold,
        score.data_ptr(),
        stop.data_ptr(),
        tuple(features.shape),
    )


def _screened_arguments(*arguments):
    """Those of exit_confidence in a tuple, then what a screen adds."""
    *exit_arguments, values, scales, error_norms, norms, error_gain, tolerance, rechecked = arguments
    screen = tuple(map(_address, (values, scales, error_norms, norms, error_gain)))
    return _exit_arguments(*exit_arguments), screen, tolerance, _address(rechecked)


def _exit_arguments(
    hidden,
    head,
    scales,
    norm_weight,
    norm_eps,
    bias,
    temperature,
    temperatures,
    token_map,
    threshold,
    thresholds,
    measure,
    level,
    token,
    max_prob,
    margin,
    entropy,
    logsumexp,
    top_tokens,
    top_logprobs,
    status,
    exited,
    active_rows,
    inverse,
    num_active,
):
    norm_code = 0 if norm_weight is None else _DTYPE_CODES[norm_weight.dtype]
    figures = (token, max_prob, margin, entropy, logsumexp, top_tokens, top_logprobs, status)
    return (
        (hidden.data_ptr(), _DTYPE_CODES[hidden.dtype], hidden.stride(0)),
        (head.data_ptr(), _HEAD_TYPES[head.dtype], _address(scales)),
        (_address(norm_weight), norm_code, norm_eps),
        _address(bias),
        (temperature, _address(temperatures)),
        _address(token_map),
        (threshold, _address(thresholds)),
        _MEASURES.index(measure),
        _LEVELS.index(level),
        tuple(map(_address, figures)),
        tuple(map(_address, (exited, active_rows, inverse, num_active))),
        (*hidden.shape, head.shape[0], 0 if top_tokens is None else top_tokens.shape[1]),
    )
