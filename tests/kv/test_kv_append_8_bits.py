"""kv_append into caches of 8 bits: every code, every tie, numbers that are none, scales."""

import pytest
import torch

from specdec_ops import kv_append
from tests.kv.append_cases import DEPTHS, KV_HEADS, caches, case, ids, tables, trees

OP = "kv_append"


ISAS = ("generic", "avx2", "avx512")


SHORT = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def codes_of(backend, values, dtype, scale, device="cpu"):
    """What a cache of this dtype holds of values [1, 1, 1, dim]."""
    values = values.to(device)
    pair = [torch.zeros(values.shape, device=device).to(dtype) for _ in range(2)]
    kv_append(values, values, *pair, None, 0, k_scale=scale, v_scale=scale, backend=backend)
    assert torch.equal(*(cache.view(torch.uint8) for cache in pair))
    return pair[0].flatten().cpu()


def nearest_codes(values, dtype):
    """By trying all 256: the nearest finite number, of two equally near ones the one with the even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(dtype).double()
    if dtype == torch.int8:
        numbers[128] = float("nan")  # -128 is not used
    usable = numbers.isfinite()
    codes, numbers = codes[usable], numbers[usable]
    distances = (values.double()[:, None] - numbers).abs()
    nearest = distances == distances.min(dim=1, keepdim=True).values
    # Of two, the even code; of two zeros, the one of the value's sign.
    wrong_zero = (numbers == 0) & ((codes == 128) != values.signbit()[:, None])
    return codes[torch.where(nearest, (codes % 2 + wrong_zero).double(), float("inf")).argmin(dim=1)]


def test_every_instruction_set_rounds_alike(isa):
    values = torch.linspace(-500, 500, 4001)
    codes = codes_of("cpu", values[None, None, None], torch.float8_e4m3fn, 1.0)
    assert torch.equal(codes.view(torch.uint8), nearest_codes(values, torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_code_and_every_tie(target, dtype):
    """All codes, what is half-way between neighbours and just beside it, and what is too large."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, away)) for away in (-1e9, 1e9)]
    huge = torch.tensor([1e6, -1e6, 448.0, 464.0, 465.0, 480.0, 57344.0, 61440.0, 127.5, -128.0, 1e-30, -0.0])
    values = torch.cat([numbers, middles, *beside, huge])
    got = codes_of(target.backend, values[None, None, None], dtype, 1.0, target.device)
    want = nearest_codes(values, dtype)
    assert torch.equal(got.view(dtype).double(), want.view(dtype).double())


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_numbers_that_are_none(target, dtype):
    """An infinity is the largest number; NaN stays in fp8, and is 0 as an int8."""
    values = torch.tensor([float("inf"), -3e38, float("nan"), -float("nan"), 2.0])
    got = codes_of(target.backend, values[None, None, None], dtype, 1.0, target.device).double()
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    assert got[:2].tolist() == [largest, -largest] and got[4] == 2
    assert (got[2:4] == 0).all() if dtype == torch.int8 else got[2:4].isnan().all()


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_scales(target, dtype):
    """A number, one for each head, and one without dimensions; turned keys are as near as the codes allow."""
    device = target.device
    append = case(torch.bfloat16, device, rope=tables(20, 12, device))
    exact_k, exact_v, _ = append.expected(double=True)
    per_head = torch.tensor([0.08, 0.11], device=device)
    for k_scale, v_scale in ((0.09, per_head), (per_head, torch.tensor(0.1, device=device))):
        pair = [torch.zeros(3, 16, KV_HEADS, 24, device=device).to(dtype) for _ in range(2)]
        topology, lengths = trees(DEPTHS, device), ids(append.context_lens, device)
        scales = {"k_scale": k_scale, "v_scale": v_scale, "query_start": ids(append.query_start, device)}
        kv_append(
            append.k, append.v, *pair, topology, lengths, rope=append.options["rope"], **scales, backend=target.backend
        )
        for cache, scale, exact in zip(pair, (k_scale, v_scale), (exact_k, exact_v), strict=True):
            scale = torch.as_tensor(scale, dtype=torch.float64).cpu().expand(KV_HEADS)[:, None]
            for place, want in exact.items():
                got = cache[place].cpu().double() * scale
                relative = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 0}[dtype]
                step = scale * {torch.float8_e4m3fn: 2**-10, torch.float8_e5m2: 2**-17, torch.int8: 0.5}[dtype]
                assert ((got - want).abs() <= 1.0001 * (want.abs() * relative + step) + 1e-6).all()
    plain = caches(append.k, append.v, 3, 16)
    kv_append(append.k, append.v, *plain, None, 0, v_scale=0.5, backend=target.backend)
    assert torch.equal(plain[1][:, :4], append.v * 2) and torch.equal(plain[0][:, :4], append.k)
