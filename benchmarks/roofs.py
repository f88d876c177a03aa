"""What this machine can do at best, measured in the same run: memory, and matrix products per dtype.

A case can't be faster than reading its bytes or doing its arithmetic: roof = max(bytes / bandwidth, flops / rate).
Inside a cell both are measured again beside the contestants (a plain read of the same K and V, and the product that was
fastest here), because a shared machine changes from minute to minute; the figures of this module serve where those are
absent. On a GPU the bandwidth is that of a copy, its reading and writing both counted, and no cell measures it again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from .attention import DTYPES
from .contestant import Contestant
from .machine import native

SIZES = (512, 1024, 2048, 4096)
GPU_SIZES = (4096, 8192)
READ_BYTES = 256 << 20
COPY_BYTES = 1 << 30
GPU_REPEATS = 20


@dataclass
class Roofs:
    """read: bytes per second. gemm: dtype -> (FLOP per second, size of the square product). how: "read" or "copy"."""

    read: float
    gemm: dict[str, tuple[float, int]] = field(default_factory=dict)
    how: str = "read"

    def describe(self) -> str:
        rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s (size {n})" for dtype, (rate, n) in self.gemm.items())
        return f"{self.how} {self.read / 1e9:.1f} GB/s, from memory; matrix product {rates}"


def best_seconds(call, device: str, repeats: int, prepare=None) -> float:
    """The fastest of some calls."""
    call()
    best = float("inf")
    for _ in range(repeats):
        if prepare is not None:
            prepare()
        best = min(best, _gpu_seconds(call) if device == "cuda" else _cpu_seconds(call))
    return best


def _cpu_seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(size: int = COPY_BYTES) -> float:
    """Bytes per second of copying a buffer on the GPU to another one: what is read plus what is written."""
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), "cuda", GPU_REPEATS)


def read_bandwidth(size: int = READ_BYTES, repeats: int = 4) -> float:
    """Bytes per second of reading a buffer that is in no cache of the CPU."""
    buffer = torch.ones(size // 4)
    module, address, total = native(), buffer.data_ptr(), buffer.numel() * 4
    evict, read = getattr(module, "evict_from_cache", None), getattr(module, "read_bytes", None)

    def call():
        return read(address, total, torch.get_num_threads()) if read is not None else buffer.sum()

    def prepare():
        if evict is not None:
            evict(address, total)

    return total / best_seconds(call, "cpu", repeats, prepare)


def gemm_operands(dtype: str, size: int, device: str) -> tuple[torch.Tensor, ...]:
    a = torch.randn(size, size, device=device).to(DTYPES[dtype])
    return a, a.t().contiguous(), torch.empty_like(a)


def gemm_rate(dtype: str, device: str, sizes=SIZES, seconds: float = 1.5) -> tuple[float, int]:
    """(FLOP per second, size) of the fastest square product; the smallest size within 3% of it."""
    rates: dict[int, float] = {}
    start = time.perf_counter()
    for size in sizes:
        expected = 2 * size**3 / max(rates.values(), default=1e11)
        if rates and time.perf_counter() - start + 4 * expected > seconds:
            break
        a, b, out = gemm_operands(dtype, size, device)
        repeats = GPU_REPEATS if device == "cuda" else 3
        rates[size] = 2 * size**3 / best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, repeats)
    top = max(rates.values())
    return next((rate, size) for size, rate in rates.items() if rate >= 0.97 * top)


def measure(device: str, dtypes, seconds: float = 1.5, sizes=SIZES, read_size: int = READ_BYTES) -> Roofs:
    sizes = GPU_SIZES if device == "cuda" else sizes
    gemm = {dtype: gemm_rate(dtype, device, sizes, seconds) for dtype in dtypes if dtype in DTYPES}
    if device == "cuda":
        return Roofs(copy_bandwidth(), gemm, "copy")
    return Roofs(read_bandwidth(read_size), gemm)


def gemm_control(roofs: Roofs, dtype: str, device: str) -> Contestant | None:
    """The fastest matrix product as a contestant, to run beside those of a cell."""
    if dtype not in roofs.gemm:
        return None
    a, b, out = gemm_operands(dtype, roofs.gemm[dtype][1], device)
    return Contestant("matrix product", "control", lambda: torch.mm(a, b, out=out))
