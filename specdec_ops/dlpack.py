"""The ops for other frameworks: arrays with `__dlpack__` in, arrays of the same framework out, nothing copied.

    from specdec_ops import Tree, dlpack

    out = dlpack.tree_attention(q, k_cache, v_cache, Tree.chain(4).to("cpu"), context_lens)  # NumPy in, NumPy out

Each function takes the arguments of the op of the same name in `specdec_ops`; see there. Arrays may stand wherever the
op takes tensors, `out` included. GPU work is queued on the stream that PyTorch uses.
"""

import functools
import sys
import warnings

import numpy as np
import torch

from .topology import build_topology as _build_topology
from .tree_attention import AttentionState
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
            _refuse_read_only(*(out if isinstance(out, tuple) else (out,)))
            into = AttentionState(*map(to_torch, out)) if isinstance(out, tuple) else to_torch(out, "out")
            op(*tensors, out=into, **options)
            return out
        result = op(*tensors, **options)
        if isinstance(result, AttentionState):
            return AttentionState(*(from_torch(tensor, first) for tensor in result))
        return from_torch(result, first) if isinstance(result, torch.Tensor) else result

    return call


def _refuse_read_only(*arrays) -> None:
    for array in arrays:
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError("specdec_ops.dlpack: out must be writeable, got a read-only array")


tree_attention = _shared(_tree_attention)
merge_states = _shared(_merge_states)
build_topology = _shared(_build_topology)
