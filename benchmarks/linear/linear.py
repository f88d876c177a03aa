"""linear: inputs, the exact result, and the contestants."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, on_backends
from benchmarks.harness.inputs import fill_random
from benchmarks.harness.reading import reader

from .cases import WEIGHT_BYTES, LinearCase

ROW_BITS = 2 * 32639  # a CPU's integer products round rows to so many steps of the greatest number


@dataclass
class Products:
    """rows by dim [rows, dim]; weights [outputs, dim], plain or quantised, and the plain ones that they are."""

    case: LinearCase
    rows: dict[int, torch.Tensor]
    weights: list
    plain: list[torch.Tensor]

    def dims(self) -> list[int]:
        return [dim for _ in range(self.case.layers) for _, dim in self.case.shapes]


def blocks_of(plain: torch.Tensor, kind: str) -> torch.Tensor:
    """The blocks of a GGUF file for a weight: uint8 [outputs, bytes]."""
    each = plain.unflatten(1, (-1, 32))
    if kind == "q8_0":
        scale = (each.abs().amax(2, keepdim=True) / 127).half()
        quarters = (each / scale.float()).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        scale = (each.abs().amax(2, keepdim=True) / 8).half()
        values = (each / scale.float() + 8).round().clamp(0, 15).to(torch.uint8)
        quarters = values[:, :, :16] | values[:, :, 16:] << 4
    return torch.cat([scale.view(torch.uint8), quarters], dim=2).flatten(1)


def make_weight(outputs: int, dim: int, dtype: str, seed: int, device: str):
    """A weight and its plain form."""
    plain = (fill_random((outputs, dim), torch.float32, seed) * dim**-0.5).to(device)
    if dtype in ("fp32", "bf16"):
        plain = plain.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
        return plain, plain
    weight = (
        specdec_ops.quantize_linear(plain)
        if dtype == "int8"
        else specdec_ops.GgufWeight(blocks_of(plain, dtype).contiguous(), dtype)
    )
    if dtype == "int8":
        return weight, weight.values.float() * weight.scales[:, None]
    return weight, weight.dequantize()


def make_inputs(case: LinearCase, device: str = "cpu") -> Products:
    if case.dtype not in WEIGHT_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(WEIGHT_BYTES)}, got {case.dtype!r}")
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    rows = {dim: fill_random((case.rows, dim), dtype, dim).to(device) for _, dim in case.shapes}
    shapes = [shape for _ in range(case.layers) for shape in case.shapes]
    pairs = [make_weight(*shape, case.dtype, seed, device) for seed, shape in enumerate(shapes)]
    return Products(case, rows, *map(list, zip(*pairs, strict=True)))


def bytes_of(weight) -> torch.Tensor:
    """The large tensor of a weight."""
    if isinstance(weight, torch.Tensor):
        return weight
    return weight.values if isinstance(weight, specdec_ops.QuantizedWeight) else weight.blocks


def ours(inputs: Products, backend: str, name: str) -> Contestant:
    outs = outputs_like(inputs)
    work = [
        (inputs.rows[dim], weight, out) for dim, weight, out in zip(inputs.dims(), inputs.weights, outs, strict=True)
    ]

    def call():
        for x, weight, out in work:
            specdec_ops.linear(x, weight, out=out, backend=backend)
        return outs

    return Contestant(name, "ours", call, reads=[bytes_of(weight) for weight in inputs.weights])


def outputs_like(inputs: Products) -> list[torch.Tensor]:
    return [inputs.rows[weight.shape[1]].new_empty(inputs.case.rows, len(weight)) for weight in inputs.plain]


def in_turn(name: str, role: str, inputs: Products, product, weights, reads) -> Contestant:
    """PyTorch's product(rows, weight) of every weight."""
    work = [(inputs.rows[dim], weight) for dim, weight in zip(inputs.dims(), weights, strict=True)]
    return Contestant(name, role, lambda: [product(*each) for each in work], reads=reads)


def peers(inputs: Products) -> list[Contestant]:
    """PyTorch's product of the plain weights; and those of quantised ones that it has. int8 dynamic rounds the rows to
    8 bits, which is another result, so it is a control.
    """
    product, dtype = torch.nn.functional.linear, inputs.case.dtype
    listed = [in_turn("eager", "pytorch", inputs, product, inputs.plain, inputs.plain)]
    if dtype == "bf16":
        wide = [weight.float() for weight in inputs.plain]
        in_float = lambda rows, weight: product(rows.float(), weight).bfloat16()  # noqa: E731
        listed.append(in_turn("float32", "pytorch", inputs, in_float, wide, wide))
    if dtype == "int8":
        packed = [(weight.values, weight.scales) for weight in inputs.weights]
        int8_rows = lambda rows, weight: torch._weight_int8pack_mm(rows, *weight)  # noqa: E731
        values = [weight.values for weight in inputs.weights]
        listed.append(in_turn("int8pack", "pytorch", inputs, int8_rows, packed, values))
        if inputs.rows[inputs.dims()[0]].device.type == "cpu":
            modules = [dynamic_module(weight) for weight in inputs.plain]
            listed.append(in_turn("int8 dynamic", "control", inputs, lambda rows, m: m(rows), modules, values))
    return listed


def dynamic_module(weight: torch.Tensor):
    """PyTorch's linear layer of 8-bit weights that rounds rows to 8 bits at each call."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
    return torch.ao.nn.quantized.dynamic.Linear.from_float(module)


def expected(inputs: Products) -> Expected:
    """Of the first weights of each shape, and the last."""
    chosen = sorted({*range(len(inputs.case.shapes)), len(inputs.plain) - 1})
    exact, allowed = [], []
    for at in chosen:
        weight = inputs.plain[at].double()
        rows = inputs.rows[weight.shape[1]].double()
        total = rows @ weight.T
        error = rounding.SIGMAS * rounding.spread(weight.shape[1], rounding.lengths(rows, weight), total)
        if inputs.case.dtype not in ("fp32", "bf16"):
            step = rows.abs().amax(1, keepdim=True) / ROW_BITS
            error = error + rounding.SIGMAS * step * weight.norm(dim=1) / 3**0.5
        exact.append(total)
        allowed.append(error + rounding.ROUNDOFF[inputs.rows[weight.shape[1]].dtype] * total.abs())
    return Expected(lambda result: [result[at] for at in chosen], exact, allowed)


def contestants(inputs: Products, options) -> list[Contestant]:
    listed = [*on_backends(functools.partial(ours, inputs), options), *peers(inputs)]
    on_cpu = inputs.rows[inputs.dims()[0]].device.type == "cpu"
    return [*listed, reader().control(inputs.case.bytes)] if on_cpu else listed
