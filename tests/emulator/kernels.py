"""The CUDA launchers, emulated: the backend "cuda-emulated" of the tests, and replays under a sanitizer."""

import contextlib
import ctypes
import functools
import re
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from specdec_ops._core import dispatch
from specdec_ops._core.native import MAX_SLOTS

from . import build

BACKEND = "cuda-emulated"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}
_COUNTS = {"kMaxEos": 8, "kMaxLayers": 8, "kMaxParts": 16, "kMaxKvLayers": 32}
_PREFIXES = {"draft_sampling": "draft_", "ScreenedParams": "screen_"}  # of the fields of a structure in another one
_HEADERS = ("*/params.h", "*/cuda/*_launch.h")


class Launch(NamedTuple):
    """A call of an op's launcher: the tensors that its parameters point to, by name, and the other parameters."""

    op: str
    tensors: dict
    numbers: dict


def build_topology_launch(
    parents, num_nodes, parents_out, depths, ancestors, first_child, next_sibling, num_nodes_out, status
):
    tensors = dict(locals())
    return Launch("build_topology", tensors, dict(zip(("batch", "nodes", "words"), ancestors.shape, strict=True)))


def merge_states_launch(out_a, lse_a, out_b, lse_b, out, lse):
    tensors = dict(locals())
    numbers = {"rows": lse.numel(), "dim": out.shape[-1], "dtype": DTYPES[out.dtype]}
    return Launch("merge_states", tensors, numbers)


def tree_attention_launch(
    q, k_cache, v_cache, ancestors, depths, num_nodes, offsets, context_lens, page_table, query_starts, query_start,
    max_queries, scale, window, softcap, sinks, alibi_slopes, out_scale, num_splits, out, lse,
):  # fmt: skip
    """With scratch of just the size that the call needs, which may hold anything, and counters of zeros."""
    given = dict(locals())
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    own = {name: given[name] for name in ("query_start", "scale", "window", "softcap", "out_scale", "num_splits")}
    for name, tensor in (("q", q), ("out", out), ("k", k_cache), ("v", v_cache)):
        strides = tensor.stride()[:-1] if tensor.dim() == 4 else (0, *tensor.stride()[:-1])
        middle = "row" if name in ("q", "out") else "slot"
        own |= dict(zip((f"{name}_stride_{axis}" for axis in ("batch", middle, "head")), strides, strict=True))
    sizes = {"batch": context_lens.shape[0], "queries": q.shape[-3], "heads": q.shape[-2], "dim": q.shape[-1]}
    sizes |= {"kv_heads": k_cache.shape[2], "slots": min(k_cache.shape[1], MAX_SLOTS), "topology_batch": 1}
    sizes |= {"dtype": DTYPES[q.dtype], "float8_cache": k_cache.dtype == torch.float8_e4m3fn}
    if page_table is not None:
        pages, page_size = k_cache.shape[:2]
        sizes |= {"slots": min(page_table.shape[1] * page_size, MAX_SLOTS), "pages": pages, "page_size": page_size}
        sizes["page_table_stride"] = page_table.stride(0)
    if ancestors is not None:
        sizes |= dict(zip(("topology_batch", "nodes", "words"), ancestors.shape, strict=True))
    launch = Launch("tree_attention", tensors, {**own, **sizes})
    floats, counters = scratch_sizes(launch)
    tensors["scratch"] = torch.full((floats,), float("nan"))
    tensors["counters"] = torch.zeros(counters, dtype=torch.int32)
    return launch


def scratch_sizes(launch):
    """What tree_attention_scratch says of a call."""
    sizes = (ctypes.c_int64 * 2)()
    library("tree_attention", "tree_attention").specdec_scratch(ctypes.byref(params_of(launch)), sizes)
    return tuple(sizes)


# The signature that all backends of an op share.
def build_topology(*arguments):
    run(build_topology_launch(*arguments))


def merge_states(*arguments):
    run(merge_states_launch(*arguments))


def tree_attention(*arguments):
    """Refuses what dispatch refuses for the backend "cuda"."""
    q, k_cache, v_cache, *_, out, _ = arguments
    aligned = dispatch._is_aligned(q, k_cache, v_cache, out)
    if reason := dispatch.attention_refusal("cuda", q.dtype, q.shape[-1], k_cache.dtype, aligned):
        raise RuntimeError(reason)
    launch = tree_attention_launch(*arguments)
    run(launch)
    assert not launch.tensors["counters"].any()


IMPLEMENTATIONS = {"build_topology": build_topology, "merge_states": merge_states, "tree_attention": tree_attention}


@functools.cache
def params_type(op):
    """The ctypes structure of an op's parameters, read from the headers in csrc."""
    return type(build.OPS[op], (ctypes.Structure,), {"_fields_": fields_of(build.OPS[op])})


def fields_of(struct, prefix=""):
    """The fields of a structure, and in their places those of the structures in it: [(name, type)]

    A PerRequest is a pointer NAMEs and a number NAME. The third of an array of structures has fields NAME2_*.
    """
    text = "".join(path.read_text() for header in _HEADERS for path in (build.ROOT / "csrc").glob(header))
    body = re.search(rf"struct {struct} \{{(.*?)\n\}};", re.sub(r"//.*", "", text), re.DOTALL)[1]
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+(?:<\w+>)?\*?) (.*)", declaration, re.DOTALL).groups()
        for name in (prefix + name.strip() for name in names.split(",")):
            name, _, count = name.rstrip("]").partition("[")
            if kind.endswith("*"):
                fields.append((name, ctypes.c_void_p))
            elif kind.startswith("PerRequest"):
                fields += [(f"{name}s", ctypes.c_void_p), (name, _C_TYPES[kind[len("PerRequest<") : -1]])]
            elif kind.endswith("Params"):
                fields += fields_of(kind, _PREFIXES.get(name, _PREFIXES.get(kind, "")))
            elif kind.endswith("Layer"):
                for index in range(_COUNTS[count]):
                    fields += fields_of(kind, f"{name}{index}_")
            elif count:
                fields.append((name, _C_TYPES[kind] * (_COUNTS.get(count) or int(count))))
            else:
                fields.append((name, _C_TYPES.get(kind, ctypes.c_int32)))  # others are enums
    return fields


@functools.cache
def library(name, op):
    """A library of an op, with the types of its functions."""
    loaded = ctypes.CDLL(build.made(f"{name}.so"))
    loaded.specdec_params_bytes.restype = ctypes.c_size_t
    loaded.specdec_launches.restype = ctypes.c_uint64
    loaded.specdec_run.restype = ctypes.c_char_p
    loaded.specdec_run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
    assert loaded.specdec_params_bytes() == ctypes.sizeof(params_type(op))
    return loaded


def params_of(launch):
    addresses = {name: tensor.data_ptr() for name, tensor in launch.tensors.items() if tensor is not None}
    return params_type(launch.op)(**addresses, **launch.numbers)


@contextlib.contextmanager
def small_device(op):
    """Blocks of an op get the shared memory of the smallest devices meanwhile: 99 KiB, else 227 KiB."""
    grant = library(op, op).specdec_grant
    grant.argtypes = [ctypes.c_size_t]
    grant(99 * 1024)
    try:
        yield
    finally:
        grant(227 * 1024)


def run(launch, order="forward", seed=0, library_name=None):
    """Emulate a launch in this process. Raises RuntimeError for whatever the kernel does wrong."""
    params = params_of(launch)
    message = library(library_name or launch.op, launch.op).specdec_run(ctypes.byref(params), ORDERS[order], seed)
    if message is not None:
        raise RuntimeError(f"{launch.op} on the emulator: {message.decode()}")


def extent(tensor):
    """The bytes from the first element of a tensor to the end of its last one, holes included."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class Traffic(NamedTuple):
    """Bytes that the threads of a launch have read from a tensor, and written to it."""

    read: int
    written: int


def traffic(launch):
    """Emulate a launch, and count what its threads read and write of each tensor, in {name: Traffic}."""
    name = f"{launch.op}_traffic"
    counter = library(name, launch.op)
    counter.specdec_watch.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for function in (counter.specdec_bytes_read, counter.specdec_bytes_written):
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_uint64
    tensors = {name: tensor for name, tensor in launch.tensors.items() if tensor is not None}
    try:
        for tensor in tensors.values():
            counter.specdec_watch(tensor.data_ptr(), extent(tensor))
        run(launch, library_name=name)
        return {
            name: Traffic(counter.specdec_bytes_read(index), counter.specdec_bytes_written(index))
            for index, name in enumerate(tensors)
        }
    finally:
        counter.specdec_forget_watched()


def replay(launch, sanitizer, program=None):
    """Emulate a launch in a process with a sanitizer, in several orders.

    Every tensor gets memory of just its size; two share theirs if they start at one address. The given tensors stay as
    they are. `program` may name another build of the op, or be a path. Orders may leave scratch as they like.

    Returns:
        {name: the tensor after the launch}

    Raises:
        RuntimeError: the emulator or the sanitizer found something wrong, or orders differ in their result.
    """
    tensors = {name: tensor for name, tensor in launch.tensors.items() if tensor is not None}
    kind = params_type(launch.op)
    params = bytes(kind(**launch.numbers))
    sharing = {}  # {address: the names of the tensors there}
    for name, tensor in tensors.items():
        sharing.setdefault(tensor.data_ptr() or name, []).append(name)  # an empty tensor may have no address
    parts = [numbers(len(params)), params, numbers(len(sharing))]
    for names in sharing.values():
        content = bytes_of(tensors[names[0]])
        places = [getattr(kind, name).offset for name in names]
        parts += [numbers("scratch" not in names, len(places), *places, len(content)), content]
    with tempfile.TemporaryDirectory() as folder:
        file, results = Path(folder, "launch"), Path(folder, "results")
        file.write_bytes(b"".join(parts))
        target = program if program and Path(program).is_absolute() else f"{sanitizer}/{program or launch.op}"
        status, output = build.run(target, file, results)
        if status != 0:
            raise RuntimeError(f"{launch.op} on the emulator ({sanitizer}): {output}")
        content = results.read_bytes()
    after = {}
    for names in sharing.values():
        size = extent(tensors[names[0]])
        after |= {name: tensor_of(content[:size], tensors[name]) for name in names}
        content = content[size:]
    return after


def numbers(*values):
    """64-bit numbers, as replay.cpp reads them."""
    return struct.pack(f"<{len(values)}Q", *values)


def bytes_of(tensor):
    """The bytes of a tensor's extent."""
    if tensor.numel() == 0:
        return b""
    flat = tensor.as_strided((extent(tensor) // tensor.element_size(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes()


def tensor_of(content, like):
    """A tensor with the shape and strides of another one, over these bytes."""
    if not content:
        return torch.empty_like(like)
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(like.dtype)
    return flat.as_strided(like.shape, like.stride())
