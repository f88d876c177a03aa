"""Calls of the acceptance and sampling kernels in the compiled module. Nothing is checked here; the ops have done so.

The order of arguments is that of csrc/bindings/acceptance.cpp.
"""

import functools

import torch

from specdec_ops._core import alloc
from specdec_ops._core.native import _DTYPE_CODES, _address, _counters, _module, _stream

_RULES = ("greedy", "match", "recursive", "traversal", "target_only", "kseq", "typical", "longest")  # AcceptRule
_DOMAINS = ("sample", "draft")  # SampleDomain


def accept_cpu(*arguments):
    """See specdec_ops.ops.acceptance.reference_accept.accept for the arguments."""
    _module().accept_cpu(*_accept_arguments(*arguments), torch.get_num_threads())


def sample_cpu(*arguments):
    """See specdec_ops.ops.acceptance.reference_sample.sample for the arguments."""
    _module().sample_cpu(*_sample_arguments(*arguments), torch.get_num_threads())


def accept_cuda(rule, target, *others, path=0):
    """See specdec_ops.ops.acceptance.reference_accept.accept for the arguments.

    path, for tests: 0 chooses by the sizes, 1 is lazy, 2 is eager (csrc/acceptance/cuda/accept.cu).
    """
    arguments = _accept_arguments(rule, target, *others)
    (ids, _, child_rows), (batch, nodes, vocab, _, max_depth, _) = arguments[-3], arguments[-1]
    sizes = _accept_scratch(arguments[0], batch, nodes, vocab, max_depth, ids, others[1] is not None, child_rows, path)
    _launch(_module().accept_cuda, arguments, target.device, *sizes, path)


def sample_cuda(logits, *others):
    """See specdec_ops.ops.acceptance.reference_sample.sample for the arguments."""
    arguments = _sample_arguments(logits, *others)
    _launch(_module().sample_cuda, arguments, logits.device, *_sample_scratch(*arguments[-1]), 0)


def _launch(function, arguments, device, scratch_bytes, counters, path):
    """Adds scratch, which may hold anything and is this call's alone, and the stream's counters; see _counters."""
    index, stream = _stream(device)
    scratch = alloc.empty((scratch_bytes,), torch.uint8, device) if scratch_bytes else None
    counter = _counters(device, stream, counters) if counters else None
    function(*arguments, (_address(scratch), _address(counter), path), index, stream)


@functools.lru_cache(maxsize=1024)
def _accept_scratch(*sizes) -> tuple[int, int]:
    return _module().accept_scratch(*sizes)


@functools.lru_cache(maxsize=1024)
def _sample_scratch(*sizes) -> tuple[int, int]:
    return _module().sample_scratch(*sizes)


def _rows(tensor):
    """Address, dtype and strides of logits [batch, rows, vocab]."""
    if tensor is None:
        return (0, 0, (0, 0))
    return (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.stride()[:2])


def _broadcast(tensor):
    """The stride of a first dimension that is the batch, or 1."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def _accept_arguments(
    rule,
    target,
    draft_tokens,
    draft_logits,
    target_to_draft,
    first_child,
    next_sibling,
    num_nodes,
    temperature,
    temperatures,
    top_k,
    top_ks,
    top_p,
    top_ps,
    draft_temperature,
    draft_temperatures,
    draft_top_k,
    draft_top_ks,
    draft_top_p,
    draft_top_ps,
    seed,
    seeds,
    position,
    positions,
    eos,
    thresholds,
    replacement,
    child_rows,
    tokens,
    nodes,
    num_accepted,
    next_tokens,
    status,
    finished,
):
    ids = target.dim() == 2
    vocab = 0 if ids else target.shape[-1]
    return (
        _RULES.index(rule),
        (target.data_ptr(), 0, target.stride()) if ids else _rows(target),
        _rows(draft_logits),
        (draft_tokens.data_ptr(), draft_tokens.stride(0), int(first_child is None)),
        _address(target_to_draft),
        (_address(first_child), _address(next_sibling), _broadcast(first_child)),
        (num_nodes.data_ptr(), _broadcast(num_nodes)),
        ((temperature, _address(temperatures)), (top_k, _address(top_ks)), (top_p, _address(top_ps))),
        (
            (draft_temperature, _address(draft_temperatures)),
            (draft_top_k, _address(draft_top_ks)),
            (draft_top_p, _address(draft_top_ps)),
        ),
        (seed, _address(seeds)),
        (position, _address(positions)),
        eos,
        thresholds,
        (ids, replacement, child_rows),
        (
            *(tokens.data_ptr(), nodes.data_ptr(), num_accepted.data_ptr(), next_tokens.data_ptr()),
            *(status.data_ptr(), finished.data_ptr()),
        ),
        (
            tokens.shape[0],
            target.shape[1],
            vocab,
            vocab if draft_logits is None else draft_logits.shape[-1],
            tokens.shape[1] - 1,
            next_tokens.shape[1] if next_tokens.dim() == 2 else 1,
        ),
    )


def _sample_arguments(
    logits,
    draft_to_target,
    count,
    replacement,
    parents,
    first_parent,
    domain,
    temperature,
    temperatures,
    top_k,
    top_ks,
    top_p,
    top_ps,
    seed,
    seeds,
    position,
    positions,
    tokens,
    logprobs,
    logsumexp,
    status,
):
    return (
        _rows(logits),
        _address(draft_to_target),
        _address(parents),
        first_parent,
        _DOMAINS.index(domain),
        replacement,
        ((temperature, _address(temperatures)), (top_k, _address(top_ks)), (top_p, _address(top_ps))),
        (seed, _address(seeds)),
        (position, _address(positions)),
        (tokens.data_ptr(), _address(logprobs), _address(logsumexp), status.data_ptr()),
        (*logits.shape, count),
    )
