"""Which implementation runs an op: the table of backends, and why one is not available.

Every implementation of an op has one signature, whatever its backend: `implementation(arguments, outputs)`, the two
named tuples of the op's contract. It writes into preallocated outputs, checks nothing and returns None. Those of
Triton and the definitions are named as "module:function"; the compiled module has the others, OP_cpu and OP_cuda. All
are looked up when they are first used.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import torch

from . import loader
from .checks import KERNEL_DTYPES, describe_dtype
from .shield import shielded

BACKENDS = ("cuda", "triton", "cpu", "torch")
ENVIRONMENT = "SPECDEC_OPS_BACKEND"

IMPLEMENTATIONS = {
    "accept": {
        "triton": "specdec_ops.triton_kernels.acceptance.accept:accept",
        "torch": "specdec_ops.ops.acceptance.reference_accept:accept",
    },
    "bounded_exit": {
        "triton": "specdec_ops.triton_kernels.early_exit.bounded_exit:bounded_exit",
        "torch": "specdec_ops.ops.early_exit.reference_bounded_exit:bounded_exit",
    },
    "build_topology": {
        "triton": "specdec_ops.triton_kernels.topology.build_topology:build_topology",
        "torch": "specdec_ops.ops.topology.reference_build_topology:build_topology",
    },
    "exit_confidence": {
        "triton": "specdec_ops.triton_kernels.early_exit.exit_confidence:exit_confidence",
        "torch": "specdec_ops.ops.early_exit.reference_exit_confidence:exit_confidence",
    },
    "exit_mlp": {
        "triton": "specdec_ops.triton_kernels.early_exit.exit_mlp:exit_mlp",
        "torch": "specdec_ops.ops.early_exit.reference_exit_mlp:exit_mlp",
    },
    "gather_layer_kv": {
        "triton": "specdec_ops.triton_kernels.kv.gather_layer_kv:gather_layer_kv",
        "torch": "specdec_ops.ops.kv.reference_gather_layer_kv:gather_layer_kv",
    },
    "grow_tree": {
        "triton": "specdec_ops.triton_kernels.topology.grow_tree:grow_tree",
        "torch": "specdec_ops.ops.topology.reference_grow_tree:grow_tree",
    },
    "kv_append": {
        "triton": "specdec_ops.triton_kernels.kv.kv_append:kv_append",
        "torch": "specdec_ops.ops.kv.reference_kv_append:kv_append",
    },
    "kv_commit": {
        "triton": "specdec_ops.triton_kernels.kv.kv_commit:kv_commit",
        "torch": "specdec_ops.ops.kv.reference_kv_commit:kv_commit",
    },
    "kv_propagate": {
        "triton": "specdec_ops.triton_kernels.kv.kv_propagate:kv_propagate",
        "torch": "specdec_ops.ops.kv.reference_kv_propagate:kv_propagate",
    },
    "linear": {
        "triton": "specdec_ops.triton_kernels.linear.linear:linear",
        "torch": "specdec_ops.ops.linear.reference_linear:linear",
    },
    "merge_states": {
        "triton": "specdec_ops.triton_kernels.attention.merge_states:merge_states",
        "torch": "specdec_ops.ops.attention.reference_merge_states:merge_states",
    },
    "prune_tree": {
        "triton": "specdec_ops.triton_kernels.topology.prune_tree:prune_tree",
        "torch": "specdec_ops.ops.topology.reference_prune_tree:prune_tree",
    },
    "rms_norm": {
        "triton": "specdec_ops.triton_kernels.linear.rms_norm:rms_norm",
        "torch": "specdec_ops.ops.linear.reference_rms_norm:rms_norm",
    },
    "sample": {
        "triton": "specdec_ops.triton_kernels.acceptance.sample:sample",
        "torch": "specdec_ops.ops.acceptance.reference_sample:sample",
    },
    "screened_exit": {
        "triton": "specdec_ops.triton_kernels.early_exit.screened_exit:screened_exit",
        "torch": "specdec_ops.ops.early_exit.reference_screened_exit:screened_exit",
    },
    "tree_attention": {
        "triton": "specdec_ops.triton_kernels.attention.tree_attention:tree_attention",
        "torch": "specdec_ops.ops.attention.reference_tree_attention:tree_attention",
    },
}

# Every public op by its name, and which implementations run it.
PUBLIC_OPS = {
    **dict.fromkeys(("greedy_accept", "match_accept", "chain_accept", "tree_accept"), "accept"),
    **dict.fromkeys(("typical_accept", "longest_path_accept"), "accept"),
    **dict.fromkeys(("sample_tokens", "sample_children"), "sample"),
    "early_exit": "exit_confidence",
    **{name: name for name in ("build_topology", "exit_confidence", "exit_mlp", "gather_layer_kv", "grow_tree")},
    **{name: name for name in ("kv_append", "kv_commit", "kv_propagate", "linear", "merge_states", "prune_tree")},
    **{name: name for name in ("rms_norm", "tree_attention")},
}

_AUTO = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
_MAX_KERNEL_DIM = 256
PATH_INVARIANT_REFUSAL = "path_invariant=True is kept by backend='cpu' alone, on CPU tensors"
_MAX_FLOAT8_DIM = 128
_MAX_CUDA_VOCAB = {"accept": 393216, "sample": 2**20}  # as in csrc/acceptance/cuda/launchers.h
_SIZED = ("tree_attention", *_MAX_CUDA_VOCAB)  # ops whose last dimension decides, too
_NO_FLOATS = ("build_topology", "gather_layer_kv", "kv_commit")  # ops that compute none: any dtype will do
_resolved: dict[tuple, Callable] = {}
_choice_of_environment: list[str] = []  # what the variable names, once it was read


def backends(op: str, device: torch.device | str | int | torch.Tensor = "cpu") -> dict[str, str | None]:
    """Say which backends can run an op on a device.

    Args:
        op: the name of a function that takes a `backend`, such as "tree_accept". Also "screened_exit": exit_confidence
            and early_exit with a screen; "bounded_exit": early_exit with bounds; "accept": every op whose name ends
            so; "sample": sample_tokens and sample_children.
        device: a device, its name, or a tensor on it.

    Returns:
        `{"cuda": ..., "triton": ..., "cpu": ..., "torch": ...}`: None for an available backend, else the reason why it
        is not, as text.

    Raises:
        ValueError: the op is unknown.
    """
    op = PUBLIC_OPS.get(op, op)
    _known_op(op)
    device = device.device if isinstance(device, torch.Tensor) else torch.device(device)
    return {backend: _unavailable(op, backend, device) for backend in BACKENDS}


def resolve(
    op: str,
    backend: str,
    tensor: torch.Tensor,
    caches: tuple = (),
    out: torch.Tensor | None = None,
    path_invariant: bool = False,
) -> Callable:
    """Find the implementation of `op` for this tensor: its device, its dtype and, for attention, its dim.

    For attention also for the K and V caches: their dtype, and whether they, q and `out` have rows at multiples of 16
    bytes, which the CUDA kernel needs; and `path_invariant`, which the CPU kernels alone keep.

    "auto" takes the first available of cpu, torch on CPU tensors and of cuda, triton, torch on CUDA tensors, unless the
    environment variable SPECDEC_OPS_BACKEND (read once, at the first use) names one. A named backend never falls back.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend is not available, or its kernels don't take such a call; or no backend does.
    """
    cache_dtype = caches[0].dtype if caches else tensor.dtype
    aligned = not caches or not tensor.is_cuda or _is_aligned(tensor, *caches, out)
    size = tensor.shape[-1] if op in _SIZED else 0
    key = (op, backend, tensor.device, tensor.dtype, size, cache_dtype, aligned, path_invariant)
    try:
        found = _resolved.get(key)
    except TypeError as error:  # a list, say
        what = type(backend).__name__
        raise TypeError(f"specdec_ops.{op}: backend must be one of {_names()}, got {what}") from error
    if found is None:
        found = (
            _nothing
            if tensor.is_meta
            else _load(op, _choose(op, backend, tensor, cache_dtype, aligned, path_invariant))
        )
        _resolved[key] = found
    return found


def _nothing(*_) -> None:
    """The implementation for tensors without memory: their shapes are all there is of them."""


def _is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
        size = tensor.element_size()
        for stride in tensor.stride()[:-1]:
            bits |= stride * size
    return bits % 16 == 0


def is_free(backend: str) -> bool:
    """Whether neither the call nor the environment names a backend."""
    return backend == "auto" and _environment_choice() == "auto"


def takes_cpu_kernels(op: str, device: torch.device | str) -> bool:
    """Whether the CPU kernels run an op, where a call leaves it open: they are built, and the environment names no
    other backend.
    """
    cpu_device = torch.device(device).type == "cpu"
    return cpu_device and _environment_choice() in ("auto", "cpu") and backends(op, device)["cpu"] is None


def forget() -> None:
    """Drop every remembered choice, so that a changed environment is read again. For tests."""
    _resolved.clear()
    _choice_of_environment.clear()
    _load.cache_clear()


def _choose(
    op: str,
    backend: str,
    tensor: torch.Tensor,
    cache_dtype: torch.dtype,
    aligned: bool,
    path_invariant: bool = False,
) -> str:
    origin = ""
    call = (tensor, cache_dtype, aligned, path_invariant)
    if backend == "auto":
        chosen = _environment_choice()
        if chosen == "auto":
            names = _AUTO.get(tensor.device.type, ("torch",))
            reasons = {}
            for name in names:
                reasons[name] = _refusal(op, name, *call)
                if reasons[name] is None:
                    return name
            each = "; ".join(dict.fromkeys(reasons.values()))
            raise RuntimeError(f"specdec_ops.{op}: no backend takes this call on {tensor.device}: {each}")
        backend, origin = chosen, f" (from {ENVIRONMENT})"
    elif backend not in BACKENDS:
        raise ValueError(f"specdec_ops.{op}: backend must be one of {_names()}, got {backend!r}")
    reason = _refusal(op, backend, *call)
    if reason is not None:
        raise RuntimeError(f"specdec_ops.{op}: backend={backend!r}{origin} is unavailable: {reason}")
    return backend


def _environment_choice() -> str:
    """Read once. Not by functools.cache, which torch.compile warns of."""
    if not _choice_of_environment:
        name = os.environ.get(ENVIRONMENT) or "auto"
        if name != "auto" and name not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT} must be one of {_names()}, got {name!r}")
        _choice_of_environment.append(name)
    return _choice_of_environment[0]


def _names() -> str:
    return ", ".join(("auto", *BACKENDS))


def _known_op(op: str) -> None:
    if op not in IMPLEMENTATIONS:
        names = ", ".join(dict.fromkeys((*PUBLIC_OPS, *IMPLEMENTATIONS)))
        raise ValueError(f"specdec_ops.backends: op must be one of {names}, got {op!r}")


def _refusal(
    op: str,
    backend: str,
    tensor: torch.Tensor,
    cache_dtype: torch.dtype,
    aligned: bool,
    path_invariant: bool = False,
) -> str | None:
    """Why this backend can't run the op on this very tensor, or None."""
    if path_invariant and backend != "cpu":
        return PATH_INVARIANT_REFUSAL
    reason = _unavailable(op, backend, tensor.device)
    if reason is None and backend != "torch" and op not in _NO_FLOATS:
        ids = op == "accept" and tensor.dtype == torch.int32  # of greedy_accept
        if tensor.dtype not in KERNEL_DTYPES and not ids:
            dtype = describe_dtype(tensor.dtype)
            return f"its kernels take float32, bfloat16 and float16, not {dtype} (backend='torch' does)"
        dim = tensor.shape[-1]
        if backend == "cuda" and not ids and dim > _MAX_CUDA_VOCAB.get(op, dim):
            return f"its kernels take a vocabulary of at most {_MAX_CUDA_VOCAB[op]} tokens, not {dim}"
        if op == "tree_attention":
            reason = attention_refusal(backend, tensor.dtype, tensor.shape[-1], cache_dtype, aligned)
    return reason


def attention_refusal(
    backend: str, dtype: torch.dtype, dim: int, cache_dtype: torch.dtype, aligned: bool
) -> str | None:
    """Why a backend's attention kernels don't take such tensors, or None."""
    if dim % 16 != 0 or dim > _MAX_KERNEL_DIM:
        return f"its kernels take a dim that is a multiple of 16 up to {_MAX_KERNEL_DIM}, not {dim}"
    quantised = cache_dtype != dtype
    if backend in ("cpu", "triton"):
        return f"its kernels take caches of q's dtype, not {describe_dtype(cache_dtype)}" if quantised else None
    if dtype == torch.float32:
        return "its attention kernels take bfloat16 and float16, not float32 (backend='triton' does)"
    if quantised and dim > _MAX_FLOAT8_DIM:
        return f"its kernels take fp8 caches with a dim up to {_MAX_FLOAT8_DIM}, not {dim} (backend='torch' does)"
    if not aligned:
        return "its attention kernels need rows of q, out and the caches that start at multiples of 16 bytes"
    return None


def _unavailable(op: str, backend: str, device: torch.device) -> str | None:
    """Why this backend can't run the op on this device, or None."""
    if backend == "torch":
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _REASONS[backend](op, device)


def _cpu_reason(op: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it takes CPU tensors, these are on {device.type}"
    return loader.load()[1]


def _cuda_reason(op: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it takes CUDA tensors, these are on {device.type}"
    module, reason = loader.load()
    if module is None:
        return reason
    if not hasattr(module, f"{op}_cuda"):
        return f"the installed package was built without CUDA kernels: {module.build_info()['left_out']}"
    index = device.index if device.index is not None else torch.cuda.current_device()
    return module.cuda_device_error(index) or None


_LEAST_TRITON = (3, 4)  # older ones can't pass tuples that hold None to a function


def _triton_reason(op: str, device: torch.device) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "yes", "on"):
        return "Triton runs on CPU tensors in its interpreter only, and TRITON_INTERPRET is not 1"
    if device.type not in ("cpu", "cuda"):
        return f"it takes CUDA tensors, these are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    version = _triton_version()
    if version is not None and tuple(map(int, version.split(".")[:2])) < _LEAST_TRITON:
        return f"its kernels need Triton {'.'.join(map(str, _LEAST_TRITON))} or later, installed is {version}"
    return None


@functools.cache
def _triton_version() -> str | None:
    """Without importing it. Nightly builds of PyTorch bring it under the second name; others are not judged."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


_REASONS = {"cpu": _cpu_reason, "cuda": _cuda_reason, "triton": _triton_reason}


@functools.cache
def _load(op: str, backend: str) -> Callable:
    if backend in ("cpu", "cuda"):
        return importlib.import_module("specdec_ops._core.native").implementation(op, backend)
    module, function = IMPLEMENTATIONS[op][backend].split(":")
    implementation = getattr(importlib.import_module(module), function)
    return shielded(implementation) if backend == "torch" else implementation
