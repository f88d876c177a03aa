"""What is measured of linear and rms_norm: products of a model's layers in turn, numbers of rows. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness.cases import LLAMA3_8B, Model, RowsCase, TreeShape, chain, presets

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Of an element. Rows are bfloat16 before a bfloat16 weight, and else float32."""


@dataclass(frozen=True)
class LinearCase(RowsCase):
    """One cell: rows [rows, dim] times every weight of some layers, one after the other, each with its own dim.

    The weights are more than a cache holds, so they come from memory, as they do when a model runs.
    """

    model: Model
    shapes: tuple[tuple[int, int], ...]
    layers: int
    rows: int
    dtype: str

    op = "linear"

    @property
    def elements(self) -> int:
        return self.layers * sum(outputs * dim for outputs, dim in self.shapes)

    @property
    def tree(self) -> TreeShape:
        return TreeShape(f"{self.layers} layers", chain(self.rows))

    @property
    def bytes(self) -> int:
        return int(self.elements * WEIGHT_BYTES[self.dtype])

    @property
    def memory(self) -> int:
        return self.bytes if self.dtype in ("fp32", "bf16") else self.bytes + 5 * self.elements

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.elements

    @property
    def label(self) -> str:
        return f"{self.op} {self.model.name} {self.layers} layers {self.dtype} rows {self.rows}"


@dataclass(frozen=True)
class RmsNormCase(RowsCase):
    """One cell: the norm of rows [rows, hidden] and a residual behind it, as Gemma has it after attention."""

    model: Model
    hidden: int
    rows: int
    dtype: str

    op = "rms_norm"

    @property
    def tree(self) -> TreeShape:
        return TreeShape(f"{self.hidden} elements", chain(self.rows))

    @property
    def bytes(self) -> int:
        return 3 * self.rows * self.hidden * (4 if self.dtype == "fp32" else 2)

    @property
    def label(self) -> str:
        return f"{self.op} {self.model.name} {self.dtype} rows {self.rows}"


def shapes_of(hidden: int, joined: int, inner: int) -> tuple[tuple[int, int], ...]:
    """[outputs, dim] of a layer: joined q, k and v; the output of attention; joined gate and up; down."""
    return (joined, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)


SMOLLM2 = (Model("SmolLM2-135M", 9, 3, 64), shapes_of(576, 960, 1536), 30)
LLAMA32_1B = (Model("Llama-3.2-1B", 32, 8, 64), shapes_of(2048, 3072, 8192), 4)
PART_OF_8B = (LLAMA3_8B, shapes_of(4096, 6144, 14336), 1)
GEMMA2_2B = (Model("Gemma-2-2B", 8, 4, 256), 2304)
ROWS = (1, 4, 8, 16, 32)


def norms(rows: tuple[int, ...], dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[RmsNormCase]:
    return [RmsNormCase(*GEMMA2_2B, count, dtype) for dtype in dtypes for count in rows]


def quick() -> list[RowsCase]:
    model, shapes, _ = SMOLLM2
    products = [LinearCase(model, shapes, 10, rows, dtype) for rows, dtype in ((8, "fp32"), (1, "bf16"))]
    return [*products, *norms((8,), ("bf16",))]


def standard() -> list[RowsCase]:
    products = [
        LinearCase(*model, rows, dtype) for model in (SMOLLM2, LLAMA32_1B) for dtype in WEIGHT_BYTES for rows in ROWS
    ]
    return [*products, *norms((1, 8, 64))]


def full() -> list[RowsCase]:
    many = [LinearCase(*LLAMA32_1B, rows, dtype) for dtype in ("fp32", "bf16", "int8") for rows in (64, 65, 128, 512)]
    return [*standard(), *(LinearCase(*PART_OF_8B, rows, dtype) for dtype in WEIGHT_BYTES for rows in ROWS), *many]


def gpu_first() -> list[RowsCase]:
    """A few rows through a model."""
    return [LinearCase(*LLAMA32_1B, 8, "bf16"), *norms((8,), ("bf16",))]


PRESETS = presets(quick, standard, gpu_first, full=full)


def toy(**changes) -> LinearCase:
    """A case of a few kilobytes, for tests."""
    return replace(LinearCase(Model("toy", 4, 2, 16), ((48, 64), (64, 96)), 2, 5, "fp32"), **changes)


def toy_norm(**changes) -> RmsNormCase:
    """The same of rms_norm."""
    return replace(RmsNormCase(Model("toy", 4, 2, 16), 64, 5, "fp32"), **changes)
