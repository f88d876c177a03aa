"""Calls into the compiled module: the implementations of the backends "cpu" and "cuda" of every op.

The module reads tensors and numbers from the contract's named tuples itself. What is left to do here are threads,
streams and memory. Nothing is checked; the public ops have done so.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import torch

from . import alloc, loader


def implementation(op: str, backend: str) -> Callable:
    """The function `implementation(arguments, outputs)` of an op in the compiled module."""
    found = cpu(op, _module()) if backend == "cpu" else cuda(op, _module(), Device())
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
    """What a CUDA call asks of PyTorch. Tests have one of their own, without a GPU."""

    def stream(self, device: torch.device) -> tuple[int, int]:
        """The device's index and the handle of the stream that PyTorch uses there now."""
        stream = torch.cuda.current_stream(device)
        return stream.device_index, stream.cuda_stream

    def is_capturing(self, device: torch.device) -> bool:
        """Whether that stream's calls are being captured into a CUDA graph."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()


def cuda(op: str, module, on: Device) -> Callable:
    """The CUDA kernels of an op, launched on PyTorch's current stream."""
    launch = getattr(module, f"{op}_cuda")

    def implementation(arguments: tuple, outputs: tuple, **options) -> None:
        device = next(value for value in arguments if isinstance(value, torch.Tensor)).device
        index, stream = on.stream(device)
        scratch = counters = None  # kept until the launch has been made

        def memory(scratch_bytes: int, count: int) -> tuple[int, int]:
            """Addresses of what the launcher says that it needs; see `_counters`.

            Scratch may hold anything and is this call's alone: PyTorch hands it on in the order of the stream.
            """
            nonlocal scratch, counters
            scratch = alloc.empty((scratch_bytes,), torch.uint8, device)
            counters = _counters(on, device, stream, count)
            return scratch.data_ptr(), counters.data_ptr()

        launch(arguments, outputs, memory, index, stream, **options)

    return implementation


_zeroed: dict[tuple, torch.Tensor] = {}


def _counters(on: Device, device: torch.device, stream: int, count: int) -> torch.Tensor:
    """Zeroed int32 counters for the next call on this stream.

    Calls on one stream run one after another, and each leaves zeros, so they share one tensor that lives on. A call
    that is captured into a CUDA graph gets counters of its own, zeroed by the graph in each replay: they live in the
    graph's memory, and a graph may be replayed on any stream, beside others.
    """
    if on.is_capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    counters = _zeroed.get((device, stream))
    if counters is None or counters.shape[0] < count:
        size = max(1024, 1 << (count - 1).bit_length())
        counters = _zeroed[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return counters
