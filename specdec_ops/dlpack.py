"""The ops for other frameworks: arrays with `__dlpack__` in, arrays of the same framework out, nothing copied.

    >>> import numpy as np
    >>> from specdec_ops import dlpack
    >>> logits = np.log(np.array([[0.1, 0.2, 0.7]], np.float32))
    >>> dlpack.sample_tokens(logits, seeds=1, positions=0, temperature=0)  # NumPy in, NumPy out
    array([2], dtype=int32)

Every op is here. Each function takes the arguments of the op of the same name in `specdec_ops`; see there. Arrays may
stand wherever the op takes tensors, in lists and in `out` too. GPU work is queued on the stream that PyTorch uses.
"""

import dataclasses
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import topology
from .ops.acceptance import accept, accept_lossy, sample
from .ops.attention.merge_states import merge_states as _merge_states
from .ops.attention.tree_attention import tree_attention as _tree_attention
from .ops.early_exit import exit_mlp as _exit_mlp
from .ops.early_exit import head_bounds, quantized_head
from .ops.early_exit.early_exit import Exit
from .ops.early_exit.early_exit import early_exit as _early_exit
from .ops.early_exit.exit_confidence import Confidence
from .ops.early_exit.exit_confidence import exit_confidence as _exit_confidence
from .ops.kv import gather_layer_kv as _gather_layer_kv
from .ops.kv import kv_commit as _kv_commit
from .ops.kv import kv_propagate as _kv_propagate
from .ops.linear import linear as _linear
from .ops.linear import quantized_weight
from .ops.linear import rms_norm as _rms_norm
from .ops.topology import grow_tree as _grow_tree
from .ops.topology import prune_tree as _prune_tree

_GROWN = (_grow_tree.Frontier, _prune_tree.PrunedTree)
_RECORDS = (accept.Acceptance, accept_lossy.LongestPath, sample.Children, Confidence, Exit, *_GROWN)
"""What holds several results, each of which becomes an array. (A Topology stays one of tensors, and so does a
CandidatePool: the ops take them.)"""


def to_torch(value: Any, name: str = "an argument") -> Any:
    """A tensor on the memory of an array; a NumPy number as Python's; anything else is returned as it is.

    Raises:
        TypeError: the array's framework can't export it, for instance for its dtype.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    try:
        # DLPack can't say "read-only" to PyTorch, and strides below 0 end the process there: from_numpy refuses them.
        if isinstance(value, np.ndarray) and (not value.flags.writeable or any(step < 0 for step in value.strides)):
            with warnings.catch_warnings():  # the ops don't write to inputs
                warnings.simplefilter("ignore", UserWarning)
                return torch.from_numpy(value)
        return torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"specdec_ops.dlpack: {name} can't be shared through DLPack: {error}") from error


def from_torch(tensor: Any, like: Any) -> Any:
    """The tensor's memory as an array of the framework that `like` comes from; what is no tensor stays as it is."""
    if isinstance(like, torch.Tensor) or not isinstance(tensor, torch.Tensor):
        return tensor
    if isinstance(like, np.ndarray):
        return tensor.numpy()
    framework = sys.modules[type(like).__module__.partition(".")[0].removesuffix("lib")]  # JAX's arrays are jaxlib's
    import_array = getattr(framework, "from_dlpack", None) or framework.dlpack.from_dlpack
    return import_array(tensor)


def _shared(op: Callable[..., Any], writes: tuple[str, ...] = (), like: str = "") -> Callable[..., Any]:
    """`op` for arrays. `writes` are inputs that it changes.

    The argument `like` decides the framework of the results, by default the first one.
    """
    parameters = tuple(inspect.signature(op).parameters)
    decides = like or parameters[0]

    @functools.wraps(op)
    def call(*arguments, out=None, **options):
        given = {**dict(zip(parameters, arguments, strict=False)), **options}
        for name in writes:
            _map(_refuse_read_only, given.get(name), name)
        tensors = [_map(to_torch, value, name) for name, value in zip(parameters, arguments, strict=False)]
        options = {name: _map(to_torch, value, name) for name, value in options.items()}
        if out is not None:
            _map(_refuse_read_only, out, "out")
            op(*tensors, *arguments[len(tensors) :], out=_map(to_torch, out, "out"), **options)
            return out
        like = _first_array(given.get(decides))
        result = op(*tensors, *arguments[len(tensors) :], **options)
        return _map(lambda value, _: from_torch(value, like), result, "")

    return call


def _parts(value) -> tuple | None:
    """What a list, a tuple or a record consists of; None for anything else."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return tuple(getattr(value, f.name) for f in dataclasses.fields(value)) if isinstance(value, _RECORDS) else None


def _map(function, value, name: str):
    """`function(part, name)` for all parts of a value, however nested, in the same form."""
    parts = _parts(value)
    if parts is None:
        return function(value, name)
    parts = [_map(function, part, name) for part in parts]
    return type(value)(parts) if type(value) in (list, tuple) else type(value)(*parts)


def _first_array(value):
    """The first part of a value that is a tensor or an array; the value itself if there is none."""
    parts = _parts(value)
    if parts is None:
        return value
    return next((found for found in map(_first_array, parts) if hasattr(found, "__dlpack__")), value)


def _refuse_read_only(array, name: str) -> None:
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"specdec_ops.dlpack: {name} must be writeable, got a read-only array")


tree_attention = _shared(_tree_attention)
merge_states = _shared(_merge_states)
build_topology = _shared(topology.build_topology)
greedy_accept = _shared(accept.greedy_accept)
match_accept = _shared(accept.match_accept)
chain_accept = _shared(accept.chain_accept)
tree_accept = _shared(accept.tree_accept)
typical_accept = _shared(accept_lossy.typical_accept)
longest_path_accept = _shared(accept_lossy.longest_path_accept)
sample_tokens = _shared(sample.sample_tokens)
sample_children = _shared(sample.sample_children)
exit_confidence = _shared(_exit_confidence)
early_exit = _shared(_early_exit)
quantize_head = _shared(quantized_head.quantize_head)
bound_head = _shared(head_bounds.bound_head)
exit_mlp = _shared(_exit_mlp.exit_mlp)
exit_features = _shared(_exit_mlp.exit_features)
entropy_stop = _shared(_exit_mlp.entropy_stop)
gather_layer_kv = _shared(_gather_layer_kv.gather_layer_kv)
kv_commit = _shared(_kv_commit.kv_commit, writes=("k_caches", "v_caches"))
kv_propagate = _shared(_kv_propagate.kv_propagate, writes=("k_caches", "v_caches"))
linear = _shared(_linear.linear)
rms_norm = _shared(_rms_norm.rms_norm)
quantize_linear = _shared(quantized_weight.quantize_linear)
grow_tree = _shared(_grow_tree.grow_tree, like="top_tokens")
prune_tree = _shared(_prune_tree.prune_tree, like="root_tokens")
