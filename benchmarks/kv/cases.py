"""What is measured of kv_propagate: models, layers that an exit skips, and numbers of rows. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness.cases import DRAFT_68M, ITEM_BYTES, LLAMA2_7B, LLAMA3_8B, Model, RowsCase, TreeShape, chain


@dataclass(frozen=True)
class KvCase(RowsCase):
    """One cell: K and V of skipped layers for rows [rows, hidden]."""

    model: Model
    hidden: int
    layers: int
    rows: int
    dtype: str
    compiled: bool = False

    op = "kv_propagate"

    @property
    def width(self) -> int:
        return self.model.kv_heads * self.model.dim

    @property
    def tree(self) -> TreeShape:
        return TreeShape(f"{self.layers} layers", chain(self.rows))

    @property
    def bytes(self) -> int:
        return self.layers * 2 * self.width * self.hidden * ITEM_BYTES[self.dtype]

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.layers * 2 * self.width * self.hidden

    @property
    def label(self) -> str:
        return f"{self.op} {self.model.name} {self.layers} layers {self.dtype} rows {self.rows}"


# (model, dim, layers that an exit skips)
PROPAGATIONS = ((LLAMA3_8B, 4096, 8), (LLAMA2_7B, 4096, 4), (DRAFT_68M, 768, 1))


def quick() -> list[KvCase]:
    return [KvCase(*PROPAGATIONS[0], rows, "bf16") for rows in (1, 16)]


def standard() -> list[KvCase]:
    return [
        KvCase(*shape, rows, dtype, compiled=True)
        for shape in PROPAGATIONS
        for dtype in ("bf16", "fp32")
        for rows in (1, 4, 8, 16, 60)
    ]


PRESETS = {"quick": quick, "standard": standard, "full": standard, "gpu-quick": quick, "gpu": standard}


def toy(**changes) -> KvCase:
    """A case of a few kilobytes, for tests."""
    return replace(KvCase(Model("toy", 4, 2, 16), 64, 3, 5, "fp32"), **changes)
