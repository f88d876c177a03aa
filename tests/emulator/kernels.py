"""The CUDA launchers, emulated: the backend "cuda-emulated" of the tests, and replays under a sanitizer.

Calls are marshalled by the compiled module, as in production. A call of a public op goes through `_core.native` to an
object that stands in for the module: it takes the parameters that the module makes, and the memory that `_core.native`
gives, to the emulated launcher.
"""

import contextlib
import ctypes
import functools
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from specdec_ops._core import dispatch, loader, native

from . import build

BACKEND = "cuda-emulated"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
MULTIPROCESSORS = 2  # few, so that blocks have several tiles
PATHS = {"auto": 0, "lazy": 1, "eager": 2}  # AcceptPath


class Launch:
    """A call of an op's launcher that can be run again, in any order, and changed.

    tensors: those of the contract by name, the ones in a list as NAME[0], NAME[1], ...; and scratch and counters. They
    may be replaced.
    """

    def __init__(self, op: str, arguments: tuple, outputs: tuple, *, multiprocessors=MULTIPROCESSORS, path="auto"):
        """With scratch of just the size that the call needs, which may hold anything, and counters of zeros."""
        self.op = op
        self._contract = (arguments, outputs)
        self._settings = (multiprocessors, PATHS[path])
        self.tensors = {name: tensor for part in self._contract for name, tensor in tensors_of(part)}
        self.output_names = [name for name, _ in tensors_of(outputs)]
        scratch_bytes, counters = scratch_sizes(op, self.call())
        self.tensors["scratch"] = torch.full((scratch_bytes,), 0xFF, dtype=torch.uint8)
        self.tensors["counters"] = torch.zeros(counters, dtype=torch.int32)

    @property
    def arguments(self) -> tuple:
        """With the tensors as they are now."""
        return self._renewed(self._contract[0])

    @property
    def outputs(self) -> tuple:
        """The same."""
        return self._renewed(self._contract[1])

    def call(self) -> bytes:
        """As specdec_run takes it."""
        memory = (self._address("scratch"), self._address("counters"))
        return call_of(self.op, params_of(self.op, self.arguments, self.outputs), *memory, *self._settings)

    def places(self, call: bytes, name: str) -> list[int]:
        """Where in a call the pointers to a tensor are."""
        if name in ("scratch", "counters"):
            return [memory_offset(call) + ("scratch", "counters").index(name) * 8]
        address = self._address(name)
        pointers = (place for _, place, _, is_pointer in fields(self.op) if is_pointer)
        return [place for place in pointers if address and struct.unpack_from("<Q", call, place)[0] == address]

    def _address(self, name: str) -> int:
        return self.tensors[name].data_ptr() if name in self.tensors else 0

    def _renewed(self, part: tuple) -> tuple:
        changed = {}
        for field, value in part._asdict().items():
            if isinstance(value, torch.Tensor):
                changed[field] = self.tensors[field]
            elif is_list_of_tensors(value):
                changed[field] = [self.tensors[f"{field}[{index}]"] for index in range(len(value))]
        return part._replace(**changed)


def is_list_of_tensors(value) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], torch.Tensor)


def tensors_of(part: tuple):
    """(name, tensor) of the arguments or outputs of a call."""
    for field, value in part._asdict().items():
        if isinstance(value, torch.Tensor):
            yield field, value
        elif is_list_of_tensors(value):
            yield from ((f"{field}[{index}]", tensor) for index, tensor in enumerate(value))


def captured(call: Callable) -> list[tuple]:
    """What a call of a public op would hand to implementations, [(op, arguments, outputs)]. Nothing runs."""
    found = []

    def resolve(op, *_):
        return lambda arguments, outputs: found.append((op, arguments, outputs))

    with mock.patch.object(dispatch, "resolve", resolve):
        call()
    return found


def launch_of(call: Callable, **settings) -> Launch:
    """The launch that a call of a public op makes, not run, with outputs that nobody has written."""
    return Launch(*captured(call)[-1], **settings)


def needs_of(call: Callable, multiprocessors=MULTIPROCESSORS, path="auto") -> tuple[int, int]:
    """Bytes of scratch, and counters, that a call of a public op needs. Its tensors may be on the meta device."""
    op, arguments, outputs = captured(call)[-1]
    return scratch_sizes(op, call_of(op, params_of(op, arguments, outputs), 0, 0, multiprocessors, PATHS[path]))


def params_of(op: str, arguments: tuple, outputs: tuple) -> bytes:
    """The launcher's parameters, as the compiled module makes them."""
    return getattr(loader.load()[0], f"{op}_params")(arguments, outputs)


@functools.cache
def fields(op: str) -> list[tuple]:
    """The fields of an op's parameters: [(name, offset, bytes, whether it is a pointer)]"""
    return getattr(loader.load()[0], f"{op}_fields")()


def call_of(op: str, params: bytes, scratch: int, counters: int, multiprocessors: int, path: int) -> bytes:
    """Parameters and memory in one piece: GivenCall in entry.cpp."""
    padding = bytes(-len(params) % 8)
    return params + padding + struct.pack("<QQii", scratch, counters, multiprocessors, path)


def memory_offset(call: bytes) -> int:
    return len(call) - struct.calcsize("<QQii")


def scratch_sizes(op: str, call: bytes) -> tuple[int, int]:
    """Bytes of scratch, and counters, that a call needs."""
    sizes = (ctypes.c_int64 * 2)()
    library(op, op).specdec_scratch(call, sizes)
    return tuple(sizes)


def counters_are_zero(tensors: dict) -> bool:
    """As every call leaves them."""
    return not tensors["counters"].any()


def launches(op: str) -> int:
    """Kernels that this op's library has launched so far."""
    return library(op, op).specdec_launches()


def permissions_asked(op: str) -> int:
    """How often this op's library has asked for more than 48 KiB of shared memory."""
    return library(op, op).specdec_permissions_asked()


class EmulatedModule:
    """Stands in for the compiled module: OP_cuda runs the emulated launcher of OP."""

    def __init__(self, **settings):
        self._settings = settings

    def __getattr__(self, name: str):
        op = name.removesuffix("_cuda")
        if op == name:
            raise AttributeError(name)
        return functools.partial(self._launch, op)

    def _launch(self, op, arguments, outputs, memory, device, stream, path=0):
        assert (device, stream) == _DEVICE.stream(None)
        settings = (self._settings.get("multiprocessors", MULTIPROCESSORS), path)
        params = params_of(op, arguments, outputs)
        scratch_bytes, count = scratch_sizes(op, call_of(op, params, 0, 0, *settings))
        scratch = counters = 0
        if scratch_bytes or count:
            scratch, counters = memory(scratch_bytes, count, stream, False)
        run_call(op, call_of(op, params, scratch, counters, *settings))
        left = bytes((ctypes.c_char * (4 * count)).from_address(counters)) if count else b""
        assert not any(left), f"{op} leaves counters that are not zero"


class EmulatedDevice(native.Device):
    """The one stream of a device that is none."""

    def stream(self, device):
        return 0, 0

    def zeroed(self, index, size):
        _SLABS.append(torch.zeros(size, dtype=torch.uint8))
        return _SLABS[-1].data_ptr()


_SLABS = []  # of counters
_DEVICE = EmulatedDevice()


def implementation(op: str, **settings) -> Callable:
    """An op's implementation, from `_core.native` to the emulated launcher."""
    run_op = native.cuda(op, EmulatedModule(**settings), _DEVICE)

    def checked(arguments, outputs, **options):
        if op == "tree_attention":  # refuses what dispatch refuses for the backend "cuda"
            q, k_cache = arguments.q, arguments.k_cache
            if arguments.path_invariant:
                raise RuntimeError(dispatch.PATH_INVARIANT_REFUSAL)
            aligned = dispatch._is_aligned(q, k_cache, arguments.v_cache, outputs.out)
            if reason := dispatch.attention_refusal("cuda", q.dtype, q.shape[-1], k_cache.dtype, aligned):
                raise RuntimeError(reason)
        run_op(arguments, outputs, **options)

    return checked


IMPLEMENTATIONS = {op: implementation(op) for op in build.OPS}


def run_call(op: str, call: bytes, order="forward", seed=0, library_name=None):
    """Emulate a call in this process. Raises RuntimeError for whatever the kernel does wrong."""
    loaded = library(library_name or op, op)
    assert len(call) == loaded.specdec_call_bytes(), "the compiled module is older than the sources; build it"
    message = loaded.specdec_run(call, ORDERS[order], seed)
    if message is not None:
        raise RuntimeError(f"{op} on the emulator: {message.decode()}")


def run(launch, order="forward", seed=0, library_name=None):
    """Emulate a launch in this process. Raises RuntimeError for whatever the kernel does wrong."""
    run_call(launch.op, launch.call(), order, seed, library_name)
    assert counters_are_zero(launch.tensors), "the counters are not back at zero"


@functools.cache
def library(name, op):
    """A library of an op, with the types of its functions."""
    loaded = ctypes.CDLL(build.made(f"{name}.so"))
    loaded.specdec_call_bytes.restype = ctypes.c_size_t
    loaded.specdec_launches.restype = loaded.specdec_permissions_asked.restype = ctypes.c_uint64
    loaded.specdec_scratch.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64)]
    loaded.specdec_scratch.restype = None
    loaded.specdec_run.restype = ctypes.c_char_p
    loaded.specdec_run.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64]
    return loaded


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
    call = launch.call()
    sharing = {}  # {address: the names of the tensors there}
    for name, tensor in tensors.items():
        sharing.setdefault(tensor.data_ptr() or name, []).append(name)  # an empty tensor may have no address
    parts = [numbers(len(call)), call, numbers(len(sharing))]
    for names in sharing.values():
        content = bytes_of(tensors[names[0]])
        places = sorted({place for name in names for place in launch.places(call, name)})
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
