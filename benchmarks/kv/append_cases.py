"""What is measured of kv_append: models, trees behind a context, dtypes. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness.cases import (
    DRAFT_68M,
    ITEM_BYTES,
    LLAMA2_7B,
    LLAMA3_8B,
    TREES,
    Case,
    Model,
    TreeShape,
    chain,
    presets,
)


@dataclass(frozen=True)
class AppendCase(Case):
    """One cell: the rows of one tree, behind a context, in one layer."""

    model: Model
    tree: TreeShape
    dtype: str
    context: int = 4096
    compiled: bool = False

    op = "kv_append"
    batch = 1

    @property
    def bytes(self) -> int:
        """K, V and Q, read and written."""
        heads = self.model.heads + 2 * self.model.kv_heads
        return 2 * heads * self.model.dim * self.nodes * ITEM_BYTES[self.dtype]

    @property
    def label(self) -> str:
        return f"{self.op} {self.model.name} {self.dtype} ctx{self.context} n{self.nodes}"


PROMPT = TreeShape("chain", chain(512))  # a chunk of one


def quick() -> list[AppendCase]:
    return [AppendCase(LLAMA3_8B, TREES[nodes], "bf16") for nodes in (8, 60)]


def standard() -> list[AppendCase]:
    return [
        AppendCase(model, tree, dtype, compiled=True)
        for model in (LLAMA3_8B, LLAMA2_7B, DRAFT_68M)
        for dtype in ("bf16", "fp32")
        for tree in (TREES[1], TREES[8], TREES[60], PROMPT)
    ]


def gpu_first() -> list[AppendCase]:
    """A published tree."""
    return [AppendCase(LLAMA3_8B, TREES[60], "bf16")]


PRESETS = presets(quick, standard, gpu_first)


def toy(**changes) -> AppendCase:
    """A case of a few kilobytes, for tests."""
    return replace(AppendCase(Model("toy", 4, 2, 16), TREES[8], "fp32", 24), **changes)
