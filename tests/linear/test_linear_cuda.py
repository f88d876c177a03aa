"""The CUDA kernels of linear and rms_norm, emulated: blocks and tiles, bytes, schedules, sanitizers, mutants.

Their values are also tested with all other backends', in test_linear.py, test_linear_rows.py and test_rms_norm.py.
"""

import pytest
import torch

from specdec_ops import linear, rms_norm
from tests.emulator import build, kernels, mutants
from tests.emulator.checks import assert_race, launch_tests, reveals
from tests.linear.linear_cases import COMBINATIONS, assert_right, make_rows, make_weight, options_of

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)


def launch(rows, dim, outputs, dtype, kind, options="", shift=0):
    """shift: of x's first element, so that rows lie at no multiple of 16 bytes."""
    halves = 2 if options in ("swiglu", "geglu", "all") else 1
    x = make_rows(rows, dim + 2 * shift, dtype)[:, shift : shift + dim]
    weight = make_weight(halves * outputs, dim, dtype, kind)
    chosen = options_of(options, x, outputs, halves * outputs)
    return kernels.launch_of(lambda: linear(x, weight, backend="cuda", **chosen)), (x, weight, chosen)


# Tiles of 128 columns, of 256 with quantised weights; 32 rows of the weight in a block, and 16, 32 or 64 of x. Tiles
# that are not full, more of them than are under way at once, and less; the last row of a block, and one beyond it.
@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("dim", [128, 256 * 5, 256 * 6 + 32])
@pytest.mark.parametrize("rows", [16, 65])
def test_shapes(rows, dim, dtype, kind):
    case, (x, weight, options) = launch(rows, dim, 33, dtype, kind)
    kernels.run(case)
    assert_right(case.tensors["out"], x, weight, **options)


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_the_weight_is_read_once(dtype, kind, rows):
    """Once for each block of rows: of 64, 32 with a quantised weight, 16 of float32."""
    case, _ = launch(rows, 512, 40, dtype, kind, "norm")
    before = kernels.launches("linear")
    kernels.run(case)
    assert kernels.launches("linear") == before + 1
    of_block = 16 if rows <= 16 or dtype == torch.float32 else 64 if kind == "plain" else 32
    blocks = -(-rows // of_block)
    traffic = kernels.traffic(case)
    assert traffic["weight"].read == blocks * case.tensors["weight"].nbytes
    assert traffic["out"].written == case.tensors["out"].nbytes and traffic["out"].read == 0
    # x: for the norm's statistics and for the product, by each of the two blocks of weight rows.
    assert traffic["x"].read == 2 * 2 * case.tensors["x"].nbytes


@pytest.mark.parametrize("rows", [1, 9, 18, 66])
@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_columns_are_cut_where_outputs_are_few(dtype, kind, rows):
    """The weight is read once all the same, scratch is written and read once, without rows that are padding."""
    columns = 128 if kind in ("plain", "bfloat16", "float16") else 256
    case, (x, weight, options) = launch(rows, 13 * columns, 40, dtype, kind, "norm")
    traffic = kernels.traffic(case)
    assert_right(case.tensors["out"], x, weight, **options)
    of_block = 16 if rows <= 16 or dtype == torch.float32 else 64 if columns == 128 else 32
    assert traffic["weight"].read == -(-rows // of_block) * case.tensors["weight"].nbytes
    sums = 3 * 2 * 32 * rows * 4  # three parts of two blocks of outputs
    assert traffic["scratch"] == (sums, sums)
    assert traffic["out"] == (0, case.tensors["out"].nbytes)


@pytest.mark.parametrize(("dtype", "kind"), COMBINATIONS, ids=str)
def test_cut_or_not_a_row_does_not_depend_on_how_many_there_are(dtype, kind):
    """To the bit, in blocks of both sizes and as the last one."""
    x, weight = make_rows(67, 256 * 9, dtype), make_weight(33, 256 * 9, dtype, kind)

    def first(rows):
        case = kernels.launch_of(lambda: linear(x[67 - rows :], weight, backend="cuda"))
        assert case.tensors["scratch"].numel() > 0
        kernels.run(case)
        return case.tensors["out"][-1]

    wanted = first(1)
    assert all(torch.equal(first(rows), wanted) for rows in (2, 16, 17, 64, 67))


# [outputs, dim], and how many parts: as many blocks as keep a large GPU busy, of at least four tiles.
SHAPES = {
    "SmolLM2-135M, attention's output": (576, 576, 1),
    "SmolLM2-135M, down": (576, 1536, 3),
    "Llama-3.2-1B, down": (2048, 8192, 4),
    "Llama-3-8B, a projection of K": (1024, 4096, 8),
    "Llama-3-8B, attention's output": (4096, 4096, 2),
    "Llama-3-8B, down": (4096, 14336, 2),
    "Llama-3-8B, q, k and v": (6144, 4096, 1),
}


@pytest.mark.parametrize("rows", [1, 16, 60])
@pytest.mark.parametrize("name", SHAPES)
def test_parts_of_layers(name, rows):
    outputs, dim, parts = SHAPES[name]
    x, weight = (torch.empty(size, dim, dtype=torch.bfloat16, device="meta") for size in (rows, outputs))
    scratch, counters = kernels.needs_of(lambda: linear(x, weight, backend="cuda"))
    blocks = outputs // 32
    assert (scratch, counters) == (
        (0, 0) if parts == 1 else (blocks * parts * 32 * (16 if rows <= 16 else 64) * 4, blocks)
    )


def normed(rows, dim, dtype, shift=0):
    x = make_rows(rows, dim + 2 * shift, dtype)[:, shift : shift + dim]
    weight, residual = make_rows(1, dim, dtype)[0], make_rows(rows, dim, dtype).flip(0)
    return kernels.launch_of(lambda: rms_norm(x, weight, residual=residual))


def test_rms_norm_reads_its_rows_twice_and_writes_them_once():
    case = normed(5, 2056, torch.bfloat16)
    traffic, size = kernels.traffic(case), 5 * 2056 * 2
    assert traffic["x"].read == 2 * size and traffic["residual"].read == size
    assert traffic["out"].written == size and traffic["out"].read == 0


LAUNCHES = {
    "bf16": lambda: launch(9, 700, 40, torch.bfloat16, "plain", "all")[0],
    "f16 many rows": lambda: launch(66, 300, 20, torch.float16, "plain", "residual")[0],
    "f32": lambda: launch(17, 200, 33, torch.float32, "plain", "norm")[0],
    "f32 of bf16": lambda: launch(3, 264, 33, torch.float32, "bfloat16", "geglu")[0],
    "int8": lambda: launch(5, 1500, 33, torch.bfloat16, "int8", "bias")[0],
    "q8_0": lambda: launch(18, 1792, 20, torch.bfloat16, "q8_0", "swiglu")[0],
    "q4_0 unaligned": lambda: launch(3, 96, 33, torch.float16, "q4_0", "norm", shift=3)[0],
    "q4_1 f32": lambda: launch(4, 288, 33, torch.float32, "q4_1", "all")[0],
    "bf16 cut": lambda: launch(9, 1540, 40, torch.bfloat16, "plain", "all")[0],
    "f32 cut": lambda: launch(17, 1100, 33, torch.float32, "plain", "norm")[0],
    "q4_1 cut": lambda: launch(18, 256 * 8, 20, torch.float16, "q4_1", "swiglu")[0],
    "odd": lambda: launch(2, 77, 5, torch.bfloat16, "plain", "norm", shift=1)[0],
    "rms_norm": lambda: normed(3, 2056, torch.bfloat16),
    "rms_norm odd": lambda: normed(2, 333, torch.float32, shift=1),
}


test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)


# What a line of the kernel is for: (the launch, the file, the line, what becomes of it). ThreadSanitizer finds each.
RACES = {
    "no barrier in front of a tile": (
        "f32",
        "linear.cuh",
        "    block_sync();  // the tile and y are complete, and nobody is still at the tile before\n",
        "",
    ),
    "no barrier between parts of a sum": (
        "f32",
        "row_tiles.cuh",
        "    block_sync();  // the next part adds to it\n",
        "",
    ),
    "no barrier behind the norms": (
        "f32",
        "linear.cuh",
        "  block_sync();\n  LinearSums<Shape> sums;\n",
        "  LinearSums<Shape> sums;\n",
    ),
}


@pytest.mark.parametrize("name", RACES)
def test_planted_bug_in_shared_work(name):
    case, *change = RACES[name]
    assert_race(LAUNCHES[case](), *change)


# And what changes a result.
MUTANTS = {
    "a tile is awaited too late": (
        "q8_0",
        "cp_async_wait<Shape::kStages - 2>();",
        "cp_async_wait<Shape::kStages - 1>();",
    ),
    "the minimum is forgotten": ("q4_1 f32", "if (has_minimum) to += minimum[r] * of_x;", ""),
    "the halves of a byte are exchanged": ("q4_0 unaligned", "quarter / 2 * 4 : 0", "4 - quarter / 2 * 4 : 0"),
    "gate and up are exchanged": (
        "bf16",
        "? int64_t(p.outputs) + output : output;",
        "? output : int64_t(p.outputs) + output;",
    ),
    "a part of the columns is left out": (
        "bf16 cut",
        "split < launch.splits; ++split",
        "split + 1 < launch.splits; ++split",
    ),
    "parts do not meet": ("bf16 cut", "tiles) * (block.split + 1) /", "tiles) * block.split /"),
    "the residual is subtracted": (
        "bf16",
        "value += to_float(static_cast<const T*>(p.residual)",
        "value -= to_float(static_cast<const T*>(p.residual)",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_in_a_result(name):
    case, old, new = MUTANTS[name]
    assert reveals(LAUNCHES[case](), "linear.cuh", old, new)


def test_rows_beyond_the_weights_end_would_be_found():
    """That no test above sees such a read says something: AddressSanitizer does, if there is one."""
    change = ("linear.cuh", "if (output >= p.outputs) return -1;", "")
    try:
        with pytest.raises(RuntimeError, match="AddressSanitizer: heap-buffer-overflow"):
            mutants.replay(LAUNCHES["bf16"](), "address", *change)
    except build.CannotRun as reason:
        pytest.skip(str(reason))
