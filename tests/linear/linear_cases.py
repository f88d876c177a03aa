"""Weights of every kind, and what linear makes of them by another way: Python's numbers and NumPy's float64."""

import struct

import numpy as np
import torch

from specdec_ops import GgufWeight, QuantizedWeight, quantize_linear
from specdec_ops._core import loader
from tests.harness.close import assert_as_good_as_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
KINDS = ("plain", "bfloat16", "float16", "int8", *BLOCK_BYTES)
"""bfloat16 and float16: below rows of float32."""
COMBINATIONS = [
    (dtype, kind) for dtype in DTYPES for kind in KINDS if dtype == torch.float32 or kind not in ("bfloat16", "float16")
]


def seeded(*parts) -> torch.Generator:
    """A generator for these numbers."""
    return torch.Generator().manual_seed(sum(part * 31**place for place, part in enumerate(parts)))


def make_rows(rows, dim, dtype, device="cpu"):
    return torch.randn(rows, dim, generator=seeded(rows, dim)).to(dtype).to(device)


def make_blocks(outputs, dim, kind, seed=0) -> torch.Tensor:
    """Blocks of all bytes, whose scales and minima are ordinary numbers."""
    generator = seeded(outputs, dim, seed, 5)
    shape = (outputs, dim // 32, BLOCK_BYTES[kind])
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    for place in range(0, 4 if kind == "q4_1" else 2, 2):
        halves = 0.01 * torch.randn(*shape[:2], 1, generator=generator)
        blocks[:, :, place : place + 2] = halves.half().view(torch.uint8)
    return blocks.flatten(1)


def make_weight(outputs, dim, dtype, kind, device="cpu"):
    if kind in BLOCK_BYTES:
        return GgufWeight(make_blocks(outputs, dim, kind).to(device), kind)
    weight = torch.randn(outputs, dim, generator=seeded(outputs, dim, 3)) / dim**0.5
    if kind == "int8":
        return quantize_linear(weight).to(device)
    return weight.to(dtype if kind == "plain" else getattr(torch, kind)).to(device)


def elements(weight) -> torch.Tensor:
    """In float64 [outputs, dim]. Of blocks a byte at a time, as the format is written down."""
    if isinstance(weight, QuantizedWeight):
        return weight.values.cpu().double() * weight.scales.cpu().double()[:, None]
    if not isinstance(weight, GgufWeight):
        return weight.cpu().double()
    kind, size = weight.weight_type, BLOCK_BYTES[weight.weight_type]
    rows = []
    for content in weight.blocks.cpu().numpy():
        row = []
        for start in range(0, len(content), size):
            block = content[start : start + size].tobytes()
            (scale,) = struct.unpack_from("<e", block)
            if kind == "q8_0":
                row += [scale * q for q in struct.unpack_from("<32b", block, 2)]
                continue
            least = struct.unpack_from("<e", block, 2)[0] if kind == "q4_1" else -8 * scale
            row += [scale * (byte % 16) + least for byte in block[-16:]]
            row += [scale * (byte // 16) + least for byte in block[-16:]]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def exact(x, weight, bias=None, norm_weight=None, norm_eps=1e-6, activation=None, residual=None) -> torch.Tensor:
    """In float64, by NumPy."""
    y, w = x.cpu().double().numpy(), elements(weight).numpy()
    if norm_weight is not None:
        y = y / np.sqrt((y**2).mean(axis=1, keepdims=True) + norm_eps) * norm_weight.cpu().double().numpy()
    result = np.einsum("rd,od->ro", y, w)
    if bias is not None:
        result += bias.cpu().double().numpy()
    if activation is not None:
        gate, up = np.split(result, 2, axis=1)
        if activation == "swiglu":
            result = gate / (1 + np.exp(-gate)) * up
        else:
            result = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if residual is not None:
        result = result + residual.cpu().double().numpy()
    return torch.from_numpy(result)


def rounds_rows(backend) -> bool:
    """Whether this backend rounds rows to 16 bits before a quantised weight: integer products of a CPU do."""
    module, _ = loader.load()
    return backend in ("cpu", "auto") and module is not None and module.cpu_vnni()


def rounding_bound(
    x, weight, rounded, bias=None, norm_weight=None, norm_eps=1e-6, activation=None, residual=None
) -> float:
    """What the rounding of float32 sums may come to, and, if rows are `rounded` before quantised weights, that: one
    lucky number of PyTorch's must not condemn a right result."""
    y, w = x.cpu().double(), elements(weight)
    if norm_weight is not None:
        scale = 1 / (y.square().mean(dim=1, keepdim=True) + norm_eps).sqrt()
        y = y * scale * norm_weight.cpu().double()
    error = 4 * torch.finfo(torch.float32).eps * (y.abs() @ w.abs().T).max()
    if rounded and isinstance(weight, QuantizedWeight | GgufWeight):
        error += (y.abs().amax(dim=1)[:, None] * w.abs().sum(dim=1)).max() / 65278
    gain = 1 if activation is None else 2 * (y @ w.T).abs().max().clamp_min(1)
    return float(error * gain)


def assert_right(got, x, weight, rounded=False, **options) -> None:
    """As good as plain PyTorch in x's dtype, or as float32 sums of rows that may be `rounded`, and one rounding."""
    expected, plain = exact(x, weight, **options), in_torch(x, weight, **options)
    try:
        assert_as_good_as_torch(got, expected, plain)
    except AssertionError:
        error, one = (got.cpu().double() - expected).abs(), torch.finfo(got.dtype).eps * expected.abs().max()
        if not error.max() <= rounding_bound(x, weight, rounded, **options) + one:
            raise


def in_torch(x, weight, bias=None, norm_weight=None, norm_eps=1e-6, activation=None, residual=None) -> torch.Tensor:
    """As a model is written in PyTorch, in x's dtype."""
    x = x.cpu()
    w = elements(weight).to(x.dtype)
    if norm_weight is not None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
        x = (wide * norm_weight.cpu().float()).to(x.dtype)
    result = torch.nn.functional.linear(x, w)
    if bias is not None:
        result = result + bias.cpu().to(x.dtype)
    if activation is not None:
        gate, up = result.chunk(2, dim=1)
        if activation == "swiglu":
            result = torch.nn.functional.silu(gate) * up
        else:
            result = torch.nn.functional.gelu(gate, approximate="tanh") * up
    return result if residual is None else result + residual.cpu()


def options_of(name, x, outputs, weight_rows):
    """What a test adds to the plain product, by name."""
    rows, dim = x.shape
    generator = seeded(rows, dim, outputs, 7)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(x.device)

    options = {}
    if name == "all":
        options["activation"] = "swiglu"
    if name in ("swiglu", "geglu"):
        options["activation"] = name
    if name in ("bias", "all"):
        options["bias"] = random(weight_rows).to(x.dtype)
    if name in ("float32 bias", "geglu"):
        options["bias"] = random(weight_rows)
    if name in ("norm", "all"):
        options |= {"norm_weight": random(dim).to(x.dtype), "norm_eps": 1e-3}
    if name == "float32 norm":
        options["norm_weight"] = random(dim)
    if name in ("residual", "all"):
        options["residual"] = random(rows, outputs).to(x.dtype)
    return options


OPTIONS = ("bias", "float32 bias", "norm", "float32 norm", "swiglu", "geglu", "residual", "all")
