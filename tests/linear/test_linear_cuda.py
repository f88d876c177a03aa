"""The CUDA kernels of linear and rms_norm, emulated: blocks and tiles, bytes, schedules, sanitizers, mutants.

Their values are also tested with all other backends', in test_linear.py, test_linear_rows.py and test_rms_norm.py.
"""

import pytest
import torch

from specdec_ops import linear, rms_norm
from tests.emulator import build, kernels, mutants
from tests.emulator.checks import (
    SANITIZERS,
    assert_order_changes_nothing,
    assert_race,
    assert_sanitizer_finds_nothing,
    reveals,
)
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
    "odd": lambda: launch(2, 77, 5, torch.bfloat16, "plain", "norm", shift=1)[0],
    "rms_norm": lambda: normed(3, 2056, torch.bfloat16),
    "rms_norm odd": lambda: normed(2, 333, torch.float32, shift=1),
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("case", LAUNCHES)
def test_sanitizers_find_nothing(case, sanitizer):
    assert_sanitizer_finds_nothing(LAUNCHES[case](), sanitizer)


@pytest.mark.parametrize("case", LAUNCHES)
def test_every_order_gives_the_same(case):
    assert_order_changes_nothing(LAUNCHES[case](), 2)


# What a line of the kernel is for: (the launch, the file, the line, what becomes of it). ThreadSanitizer finds each.
RACES = {
    "no barrier in front of a tile": (
        "f32",
        "linear.cuh",
        "    block_sync();  // the tile and y are complete, and nobody is still at the tile before\n",
        "",
    ),
    "no barrier between parts of a sum": ("f32", "linear.cuh", "      block_sync();\n    }\n  }\n};", "    }\n  }\n};"),
    "no barrier behind the norms": ("f32", "linear.cuh", "  find_norms(shared, launch, block);\n  block_sync();\n",
                                    "  find_norms(shared, launch, block);\n"),
}  # fmt: skip


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
