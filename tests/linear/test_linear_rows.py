"""A row's result never depends on how many rows go with it, nor on the number of threads: to the last bit."""

import pytest
import torch

from specdec_ops import linear
from tests.linear.linear_cases import COMBINATIONS, DTYPES, make_rows, make_weight, options_of

OP = "linear"
ISAS = ("generic", "avx2", "avx512 without vnni", "avx512", "avx512_bf16")
MANY = 64
SOME = (1, 2, 3, 5, 8, 9, 16, 17, 33, 63)


def same(got, expected):
    """Equal bits: NaN or a zero of the other sign is another result."""
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    return torch.equal(got.contiguous().view(kind), expected.contiguous().view(kind))


def call(x, weight, options, rows, backend):
    """Of some of the rows."""
    given = {**options}
    if "residual" in given:
        given["residual"] = given["residual"][rows]
    return linear(x[rows], weight, backend=backend, **given)


@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_every_number_of_rows(dtype, kind, isa):
    """1 to 64 rows from the first, and each row alone: on every instruction set."""
    outputs, dim = 70, 352
    x, weight = make_rows(MANY, dim, dtype), make_weight(outputs, dim, dtype, kind)
    expected = linear(x, weight, backend="cpu")
    for count in range(1, MANY):
        assert same(linear(x[:count], weight, backend="cpu"), expected[:count]), count
    for row in range(MANY):
        assert same(linear(x[row : row + 1], weight, backend="cpu"), expected[row : row + 1]), row


@pytest.mark.parametrize("dim", [32, 1056, 8224])
@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_dims_that_are_cut_otherwise(dtype, kind, dim, isa):
    """Short rows, and rows that are longer than what a kernel keeps in a cache at a time."""
    x, weight = make_rows(MANY, dim, dtype), make_weight(9, dim, dtype, kind)
    expected = linear(x, weight, backend="cpu")
    for count in SOME:
        assert same(linear(x[:count], weight, backend="cpu"), expected[:count]), count
        assert same(linear(x[-count:], weight, backend="cpu"), expected[-count:]), count


@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_dims(dtype, kind, isa):
    for dim in (1, 7, 77, 1003):
        x, weight = make_rows(MANY, dim, dtype), make_weight(67, dim, dtype, kind)
        expected = linear(x, weight, backend="cpu")
        for count in SOME:
            assert same(linear(x[-count:], weight, backend="cpu"), expected[-count:]), (dim, count)


@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_every_number_of_rows_with_options(dtype, kind, isa):
    outputs, dim = 37, 160
    x, weight = make_rows(MANY, dim, dtype), make_weight(2 * outputs, dim, dtype, kind)
    options = options_of("all", x, outputs, 2 * outputs)
    expected = linear(x, weight, backend="cpu", **options)
    for count in range(1, MANY):
        rows = slice(MANY - count, None)
        assert same(call(x, weight, options, rows, "cpu"), expected[rows]), count


@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_any_number_of_threads(dtype, kind, isa, threads):
    """Also more than there are cores, and with outputs that no number of threads divides."""
    outputs, dim = 515, 288
    x, weight = make_rows(9, dim, dtype), make_weight(outputs, dim, dtype, kind)
    halves = make_weight(2 * outputs, dim, dtype, kind)
    options = options_of("all", x, outputs, 2 * outputs)
    threads(1)
    expected = linear(x, weight, backend="cpu"), linear(x, halves, backend="cpu", **options)
    for count in (2, 3, 5, 8):
        threads(count)
        for rows in (1, 4, 9):
            assert same(linear(x[:rows], weight, backend="cpu"), expected[0][:rows]), (count, rows)
            assert same(call(x, halves, options, slice(rows), "cpu"), expected[1][:rows]), (count, rows)


@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_on_every_backend(dtype, kind, target):
    if target.backend == "torch":
        pytest.skip("PyTorch's product promises no such thing, and linear says so")
    outputs, dim = 19, 160
    x, weight = make_rows(MANY, dim, dtype, target.device), make_weight(2 * outputs, dim, dtype, kind, target.device)
    options = options_of("all", x, outputs, 2 * outputs)
    expected = linear(x, weight, backend=target.backend, **options)
    for count in (1, 5, 17) if target.interpreted else SOME:
        rows = slice(MANY - count, None)
        assert same(call(x, weight, options, rows, target.backend), expected[rows]), count
        assert same(call(x, weight, options, slice(count), target.backend), expected[:count]), count


def test_more_rows_than_are_few(target):
    """A named backend keeps the promise with any number of rows."""
    if target.backend == "torch":
        pytest.skip("PyTorch's product promises no such thing, and linear says so")
    x = make_rows(131, 96, torch.bfloat16, target.device)
    weight = make_weight(20, 96, torch.bfloat16, "plain", target.device)
    expected = linear(x, weight, backend=target.backend)
    for rows in (slice(1), slice(60, 70), slice(64, 131), slice(130, 131)):
        assert same(linear(x[rows], weight, backend=target.backend), expected[rows]), rows


def test_auto_is_one_backend_for_few_rows():
    """So a decode loop that leaves the backend to `linear` has the promise, up to 64 rows."""
    x, weight = make_rows(MANY, 352, torch.float32), make_weight(70, 352, torch.float32, "plain")
    expected = linear(x, weight)
    for count in SOME:
        assert same(linear(x[:count], weight), expected[:count]), count
