"""The ops for other frameworks: arrays with `__dlpack__` in, arrays of the same framework out, nothing copied.

    from specdec_ops import Tree, dlpack

    out = dlpack.tree_attention(q, k_cache, v_cache, Tree.chain(4).to("cpu"), context_lens)  # NumPy in, NumPy out

Each function takes the arguments of the op of the same name in `specdec_ops`; see there. Arrays may stand wherever the
op takes tensors, `out` included. GPU work is queued on the stream that PyTorch uses.
"""

import dataclasses
import functools
import sys
import warnings

import numpy as np
import torch

from .accept import Acceptance
from .accept import chain_accept as _chain_accept
from .accept import greedy_accept as _greedy_accept
from .accept import match_accept as _match_accept
from .accept import tree_accept as _tree_accept
from .accept_lossy import LongestPath
from .accept_lossy import longest_path_accept as _longest_path_accept
from .accept_lossy import typical_accept as _typical_accept
from .sampling import Children
from .sampling import sample_children as _sample_children
from .sampling import sample_tokens as _sample_tokens
from .topology import build_topology as _build_topology
from .tree_attention import merge_states as _merge_states
from .tree_attention import tree_attention as _tree_attention


def to_torch(value, name: str = "an argument"):
    """A tensor on the memory of an array; anything that is not an array is returned as it is.

    Raises:
        TypeError: the array's framework can't export it, for instance for its dtype.
    """
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__") or np.isscalar(value):
        return value
    try:
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            with warnings.catch_warnings():  # DLPack can't say "read-only" to PyTorch; the ops don't write to inputs
                warnings.simplefilter("ignore", UserWarning)
                return torch.from_numpy(value)
        return torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"specdec_ops.dlpack: {name} can't be shared through DLPack: {error}") from error


def from_torch(tensor: torch.Tensor, like):
    """The tensor's memory as an array of the framework that `like` comes from."""
    if isinstance(like, torch.Tensor):
        return tensor
    if isinstance(like, np.ndarray):
        return tensor.numpy()
    framework = sys.modules[type(like).__module__.partition(".")[0].removesuffix("lib")]  # JAX's arrays are jaxlib's
    import_array = getattr(framework, "from_dlpack", None) or framework.dlpack.from_dlpack
    return import_array(tensor)


def _shared(op):
    """`op` for arrays: the first argument decides the framework of the results."""

    @functools.wraps(op)
    def call(first, *others, out=None, **options):
        tensors = [to_torch(value, f"argument {index}") for index, value in enumerate((first, *others))]
        options = {name: to_torch(value, name) for name, value in options.items()}
        if out is not None:
            arrays = _fields(out)
            _refuse_read_only(*(arrays or (out,)))
            into = type(out)(*map(to_torch, arrays)) if arrays else to_torch(out, "out")
            op(*tensors, out=into, **options)
            return out
        result = op(*tensors, **options)
        if fields := _fields(result):
            return type(result)(*(from_torch(tensor, first) for tensor in fields))
        return from_torch(result, first) if isinstance(result, torch.Tensor) else result

    return call


def _fields(result) -> tuple | None:
    """The tensors or arrays of a result that has several, all of which become arrays; else None."""
    if isinstance(result, tuple):
        return result
    if isinstance(result, Acceptance | LongestPath | Children):
        return tuple(getattr(result, field.name) for field in dataclasses.fields(result))
    return None


def _refuse_read_only(*arrays) -> None:
    for array in arrays:
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError("specdec_ops.dlpack: out must be writeable, got a read-only array")


tree_attention = _shared(_tree_attention)
merge_states = _shared(_merge_states)
build_topology = _shared(_build_topology)
greedy_accept = _shared(_greedy_accept)
match_accept = _shared(_match_accept)
chain_accept = _shared(_chain_accept)
tree_accept = _shared(_tree_accept)
typical_accept = _shared(_typical_accept)
longest_path_accept = _shared(_longest_path_accept)
sample_tokens = _shared(_sample_tokens)
sample_children = _shared(_sample_children)
