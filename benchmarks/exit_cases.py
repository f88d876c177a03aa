"""What is measured of early exit: heads and numbers of rows. Plain data, like benchmarks/cases.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .cases import ITEM_BYTES, Model, TreeShape, chain

LLAMA2_HEAD = (32_000, 4096)
LLAMA3_HEAD = (128_256, 4096)
SMALL_HEAD = (32_000, 768)  # of the 68M draft


@dataclass(frozen=True)
class ExitCase:
    """One cell: hidden rows through a head [vocab, dim]. It has the interface of benchmarks.cases.Case.

    The job is the token, its probability and the log-sum-exp of every row. `top_k` adds the most likely tokens.
    """

    vocab: int
    dim: int
    rows: int
    dtype: str
    top_k: int = 0
    compiled: bool = False
    modes: tuple[str, ...] = ("warm",)

    op = "exit_confidence"
    flex = False
    ragged = False
    context = 0
    batch = 1

    @property
    def model(self) -> Model:
        return Model(f"head {self.vocab} x {self.dim}", 0, 0, self.dim)

    @property
    def tree(self) -> TreeShape:
        return TreeShape(f"top {self.top_k}" if self.top_k else "rows", chain(self.rows))

    @property
    def nodes(self) -> int:
        return self.rows

    @property
    def bytes(self) -> int:
        return self.vocab * self.dim * ITEM_BYTES[self.dtype]

    kv_bytes = bytes  # what a plain read reads
    memory = bytes

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.vocab * self.dim

    @property
    def label(self) -> str:
        top_k = f" top {self.top_k}" if self.top_k else ""
        return f"{self.op} {self.vocab} x {self.dim} {self.dtype} rows {self.rows}{top_k}"


def quick() -> list[ExitCase]:
    cases = [ExitCase(*LLAMA2_HEAD, rows, "bf16", compiled=rows == 8) for rows in (1, 4, 8, 16, 60)]
    cases += [ExitCase(*LLAMA3_HEAD, rows, "bf16") for rows in (1, 8)]
    return [*cases, ExitCase(*SMALL_HEAD, 1, "bf16", top_k=10), *(ExitCase(*LLAMA2_HEAD, n, "fp32") for n in (1, 60))]


def standard() -> list[ExitCase]:
    return [
        ExitCase(*head, rows, dtype, top_k, compiled=top_k == 0)
        for head in (LLAMA2_HEAD, LLAMA3_HEAD, SMALL_HEAD)
        for dtype in ("bf16", "fp32")
        for rows in (1, 4, 8, 16, 60)
        for top_k in ((0, 10) if rows in (1, 60) else (0,))
    ]


PRESETS = {"quick": quick, "standard": standard, "full": standard, "gpu-quick": quick, "gpu": standard}


def toy(**changes) -> ExitCase:
    """A case of a few kilobytes, for tests."""
    return replace(ExitCase(201, 48, 3, "fp32"), **changes)
