"""What this machine can do at best, measured in the same run: memory, and arithmetic per dtype.

A case can't be faster than reading its bytes or doing its arithmetic: roof = max(bytes / bandwidth, flops / rate).
Neither is the speed of one program: the bandwidth is that of the fastest way to read (reading.py), the rate the larger
of PyTorch's square matrix product and of multiply-adds in registers, with the best instructions for the dtype that the
kernels may use (SPECDEC_OPS_CPU_ISA); each of those instruction sets has a rate of its own beside it. Inside a
cell both are measured again beside the contestants, because a shared machine changes from minute to minute; the figures
of this module serve where those are absent. On a GPU the bandwidth is that of a copy, its reading and writing both
counted, and no cell measures it again.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass, field

import torch

from .contestant import Contestant
from .inputs import DTYPES
from .machine import native
from .reading import Reader, reader

SIZES = (512, 1024, 2048, 4096)
GPU_SIZES = (4096, 8192)
COPY_BYTES = 1 << 30
GPU_REPEATS = 20
# Instruction sets whose multiply-adds a dtype may use: float32's own, and for bfloat16 those that multiply pairs too.
LOOPS = {"fp32": ("generic", "avx2", "avx512"), "fp16": ("generic", "avx2", "avx512")}
LOOPS["bf16"] = (*LOOPS["fp32"], "avx512_bf16", "amx")
LOOP_ROUNDS, LOOP_SECONDS, LOOP_REPEATS = 50_000, 2e-3, 20  # at least so many rounds, or so long


@dataclass
class Loop:
    """Multiply-adds in registers: FLOP per second, the instruction set, and how many a call does."""

    rate: float
    isa: str
    rounds: int = 1
    flops: float = 0.0


@dataclass
class Roofs:
    """read: bytes per second. gemm: dtype -> (FLOP per second, size of the square product). how: "read" or "copy".

    loops: dtype -> Loop. way: how was read. rates: (dtype, instruction set) -> FLOP per second of multiply-adds.
    """

    read: float
    gemm: dict[str, tuple[float, int]] = field(default_factory=dict)
    how: str = "read"
    loops: dict[str, Loop] = field(default_factory=dict)
    way: str = ""
    rates: dict[tuple[str, str], float] = field(default_factory=dict)

    def describe(self) -> list[str]:
        way = f" ({self.way})" if self.way else ""
        lines = [f"roof: {self.how} {self.read / 1e9:.1f} GB/s from memory{way}"]
        for dtype, (rate, size) in self.gemm.items():
            loop = self.loops.get(dtype)
            also = f", multiply-adds in registers {loop.rate / 1e9:,.0f} ({loop.isa})" if loop else ""
            others = {isa: rate for (of, isa), rate in self.rates.items() if of == dtype and loop and isa != loop.isa}
            also += "".join(f", {isa} {rate / 1e9:,.0f}" for isa, rate in others.items())
            lines.append(f"roof: {dtype} matrix product {rate / 1e9:,.0f} GFLOP/s (size {size}){also}")
        return lines

    @property
    def columns(self) -> dict[str, str]:
        """What the CSV says of them."""
        return {"roofs": "; ".join([self.way or self.how, *(f"{d} {loop.isa}" for d, loop in self.loops.items())])}


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


def allowed_isas(dtype: str) -> list[str]:
    """The instruction sets that a dtype may use, the processor has, and the kernels are not kept from."""
    module = native()
    if module is None:
        return []
    order = LOOPS["bf16"]
    held = order.index(module.cpu_isa()) if os.environ.get("SPECDEC_OPS_CPU_ISA") else len(order)
    known = [isa for isa in LOOPS.get(dtype, ()) if order.index(isa) <= held]
    return [isa for isa in known if module.multiply_adds(isa, 1, 1) > 0]


def multiply_add_loop(isa: str) -> Loop:
    """Multiply-adds of one instruction set on all threads."""
    module, rounds, threads = native(), LOOP_ROUNDS, torch.get_num_threads()
    seconds = best_seconds(lambda: module.multiply_adds(isa, LOOP_ROUNDS, threads), "cpu", 3)
    rounds = max(rounds, int(rounds * LOOP_SECONDS / seconds))
    flops = module.multiply_adds(isa, rounds, threads)
    seconds = best_seconds(lambda: module.multiply_adds(isa, rounds, threads), "cpu", LOOP_REPEATS)
    return Loop(flops / seconds, isa, rounds, flops)


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


def measure(device: str, dtypes, seconds: float = 1.5, sizes=SIZES, reads: Reader | None = None) -> Roofs:
    sizes = GPU_SIZES if device == "cuda" else sizes
    known = [dtype for dtype in dtypes if dtype in DTYPES]
    gemm = {dtype: gemm_rate(dtype, device, sizes, seconds) for dtype in known}
    if device == "cuda":
        return Roofs(copy_bandwidth(), gemm, "copy")
    isas = {dtype: allowed_isas(dtype) for dtype in known}
    every = {isa: multiply_add_loop(isa) for isa in dict.fromkeys(itertools.chain(*isas.values()))}
    loops = {
        dtype: max((every[isa] for isa in some), key=lambda loop: loop.rate) for dtype, some in isas.items() if some
    }
    rates = {(dtype, isa): every[isa].rate for dtype, some in isas.items() for isa in some}
    for (dtype, isa), rate in list(rates.items()):  # a newer set has what the older ones have
        rates[dtype, isa] = max(rate, *(rates[dtype, older] for older in isas[dtype][: isas[dtype].index(isa) + 1]))
    reads = reads or reader()
    return Roofs(reads.bandwidth, gemm, "read", loops, reads.chosen.describe(), rates)


def gemm_control(roofs: Roofs, dtype: str, device: str) -> Contestant | None:
    """The fastest matrix product as a contestant, to run beside those of a cell."""
    if dtype not in roofs.gemm:
        return None
    a, b, out = gemm_operands(dtype, roofs.gemm[dtype][1], device)
    return Contestant("matrix product", "control", lambda: torch.mm(a, b, out=out))


def loop_control(roofs: Roofs, dtype: str) -> Contestant | None:
    """The same of the multiply-adds."""
    loop, threads = roofs.loops.get(dtype), torch.get_num_threads()
    if loop is None:
        return None
    return Contestant("multiply-adds", "control", lambda: native().multiply_adds(loop.isa, loop.rounds, threads))
