"""Calls into the compiled module: the implementations of the backends "cpu" and "cuda" of every op.

The module reads tensors and numbers from the contract's named tuples itself. What is left to do here are threads,
streams and memory. Nothing is checked; the public ops have done so.
"""

import functools
import threading
from collections.abc import Callable
from types import ModuleType

import torch

from . import alloc, loader


def implementation(op: str, backend: str) -> Callable:
    """The function `implementation(arguments, outputs)` of an op in the compiled module."""
    found = cpu(op, _module()) if backend == "cpu" else cuda(op, _module(), _DEVICE)
    found.__name__ = found.__qualname__ = f"{op}_{backend}"
    return found


@functools.cache
def _module() -> ModuleType:
    module, reason = loader.load()
    if module is None:
        raise RuntimeError(f"specdec_ops: {reason}")
    return module


def cpu(op: str, module) -> Callable:
    """The CPU kernel of an op. It uses as many threads as PyTorch does."""
    kernel, threads = getattr(module, f"{op}_cpu"), torch.get_num_threads

    def implementation(arguments: tuple, outputs: tuple) -> None:
        kernel(arguments, outputs, threads())

    return implementation


class Device:
    """What a CUDA call asks of PyTorch and of the compiled module. Tests have one of their own, without a GPU."""

    def stream(self, device: torch.device) -> tuple[int, int]:
        """The device's index and the handle of the stream that PyTorch uses there now."""
        stream = torch.cuda.current_stream(device)
        return stream.device_index, stream.cuda_stream

    def zeroed(self, index: int, size: int) -> int:
        """The address of `size` bytes of zeros on a device, which live as long as the process."""
        return _module().zeroed_memory(index, size)


_DEVICE = Device()


def cuda(op: str, module, on: Device) -> Callable:
    """The CUDA kernels of an op, launched on PyTorch's current stream."""
    launch = getattr(module, f"{op}_cuda")

    def implementation(arguments: tuple, outputs: tuple, **options) -> None:
        device = next(value for value in arguments if isinstance(value, torch.Tensor)).device
        index, stream = on.stream(device)
        scratch = None  # kept until the launch has been made

        def memory(scratch_bytes: int, count: int, stream_id: int, captured: bool) -> tuple[int, int]:
            """Addresses of what the launcher says that it needs; see `Counters`.

            Scratch may hold anything and is this call's alone: PyTorch hands it on in the order of the stream.
            """
            nonlocal scratch
            scratch = alloc.empty((scratch_bytes,), torch.uint8, device)
            counters = _counters_of(on, index).of_call(count, stream_id, captured) if count > 0 else 0
            return scratch.data_ptr(), counters

        launch(arguments, outputs, memory, index, stream, **options)

    return implementation


@functools.cache
def _counters_of(on: Device, index: int) -> "Counters":
    return Counters(functools.partial(on.zeroed, index))


class Counters:
    """The int32 counters of a device's calls: slices of slabs that are zeroed once and never freed.

    Every call leaves the zeros that it has found. Calls on one stream run one after another, so they share a slice. A
    call that is captured into a CUDA graph gets a slice of its own: a graph may be replayed on any stream, beside
    others, and nobody says when it ends. So a graph needs no node that writes zeros, and costs 4 bytes per counter for
    the life of the process.

    A stream is known by its number, not by its address: the address of one that is destroyed goes to the next one,
    while calls of the old one may still run.
    """

    SLAB = 1 << 18  # counters: 1 MiB
    LEAST = 1024  # of a stream
    GRAIN = 32  # no two slices in one line of the cache

    def __init__(self, zeroed: Callable[[int], int]) -> None:
        """zeroed: gives the address of so many bytes of zeros."""
        self._zeroed, self._lock = zeroed, threading.Lock()
        self._next = self._left = 0  # of the newest slab: an address, and counters
        self._of_stream: dict[int, tuple[int, int]] = {}  # address and counters

    def of_call(self, count: int, stream_id: int, captured: bool) -> int:
        """The address of `count` zeroed counters for the next call on a stream."""
        if captured:
            return self._slice(count)
        address, size = self._of_stream.get(stream_id, (0, 0))
        if size < count:
            size = max(self.LEAST, 1 << (count - 1).bit_length())
            address = self._slice(size)
            self._of_stream[stream_id] = (address, size)
        return address

    def _slice(self, count: int) -> int:
        count = -(-count // self.GRAIN) * self.GRAIN
        with self._lock:
            if self._left < count:
                self._left = max(count, self.SLAB)
                self._next = self._zeroed(4 * self._left)
            address, self._next, self._left = self._next, self._next + 4 * count, self._left - count
        return address
