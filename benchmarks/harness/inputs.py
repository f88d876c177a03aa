"""What the inputs of all families are made with."""

from __future__ import annotations

import math

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORM_EPS = 1e-6  # of every RMSNorm


def fill_random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    """Normal numbers, repeated after some millions: drawing every one would take longer than the measurement."""
    base = torch.randn(min(math.prod(shape), (1 << 22) + 13), generator=torch.Generator().manual_seed(seed))
    base = base.to(device, dtype)
    repeats = -(-math.prod(shape) // base.numel())
    return base.repeat(repeats)[: math.prod(shape)].view(shape)
