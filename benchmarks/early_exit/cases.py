"""What is measured of early exit: heads and numbers of rows. Plain data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from benchmarks.harness.cases import ITEM_BYTES, Model, RowsCase, TreeShape, chain, presets

LLAMA2_HEAD = (32_000, 4096)
LLAMA3_HEAD = (128_256, 4096)
SMALL_HEAD = (32_000, 768)  # of the 68M draft


@dataclass(frozen=True)
class ExitCase(RowsCase):
    """One cell: hidden rows through a head [vocab, dim].

    The job is the token, its probability and the log-sum-exp of every row. `top_k` adds the most likely tokens. With a
    screen the job is the token and its probability, and ours reads an int8 copy of the head first. With bounds the job
    is which rows exit, and ours reads until that is certain: in a head whose rows are about as long ("even"), or one
    sorted by lengths that fall 41-fold ("falling").
    """

    vocab: int
    dim: int
    rows: int
    dtype: str
    top_k: int = 0
    compiled: bool = False
    screened: bool = False
    bounds: str = ""

    @property
    def modes(self) -> tuple[str, ...]:
        """Both ways where a last-level cache keeps a part of the head, and reading it is most of the work."""
        return ("cold", "warm") if (self.vocab, self.dim) == SMALL_HEAD and self.rows <= 4 else ("warm",)

    @property
    def op(self) -> str:
        return "bounded_exit" if self.bounds else "screened_exit" if self.screened else "exit_confidence"

    @property
    def model(self) -> Model:
        return Model(f"head {self.vocab} x {self.dim}", 0, 0, self.dim)

    @property
    def tree(self) -> TreeShape:
        return TreeShape(f"top {self.top_k}" if self.top_k else self.bounds or "rows", chain(self.rows))

    @property
    def bytes(self) -> int:
        return self.vocab * self.dim * (1 if self.screened else ITEM_BYTES[self.dtype])

    @property
    def memory(self) -> int:
        return self.vocab * self.dim * (ITEM_BYTES[self.dtype] + self.screened)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.vocab * self.dim

    @property
    def label(self) -> str:
        top_k = f" top {self.top_k}" if self.top_k else ""
        bounds = f" {self.bounds}" if self.bounds else ""
        return f"{self.op} {self.vocab} x {self.dim} {self.dtype} rows {self.rows}{top_k}{bounds}"


@dataclass(frozen=True)
class MlpCase(RowsCase):
    """One cell: rows through a decision model."""

    sizes: tuple[int, ...]
    rows: int
    dtype: str
    compiled: bool = False

    op = "exit_mlp"

    @property
    def model(self) -> Model:
        return Model("-".join(map(str, self.sizes)), 0, 0, self.sizes[0])

    @property
    def tree(self) -> TreeShape:
        return TreeShape("rows", chain(self.rows))

    @property
    def weights(self) -> int:
        return sum(inputs * outputs for inputs, outputs in itertools.pairwise(self.sizes))

    @property
    def bytes(self) -> int:
        return self.weights * ITEM_BYTES[self.dtype]

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.weights

    @property
    def label(self) -> str:
        return f"{self.op} {self.model.name} {self.dtype} rows {self.rows}"


DECISION_MODELS = ((11, 44, 1), (768, 512, 256, 1), (2048, 1024, 512, 1))


def quick() -> list[ExitCase | MlpCase]:
    cases = [ExitCase(*LLAMA2_HEAD, rows, "bf16", compiled=rows == 8) for rows in (1, 4, 8, 16, 60)]
    cases += [ExitCase(*LLAMA3_HEAD, rows, "bf16") for rows in (1, 8)]
    cases += [ExitCase(*SMALL_HEAD, 1, "bf16", top_k=10), *(ExitCase(*LLAMA2_HEAD, n, "fp32") for n in (1, 60))]
    # Quantising a head of 4,096 columns would take a tenth of the time.
    cases += [ExitCase(*SMALL_HEAD, rows, "bf16", screened=True) for rows in (1, 4)]
    cases += [ExitCase(*SMALL_HEAD, 4, "bf16", bounds=bounds) for bounds in ("even", "falling")]
    return [*cases, MlpCase(DECISION_MODELS[0], 4, "fp32"), MlpCase(DECISION_MODELS[2], 4, "bf16")]


def standard() -> list[ExitCase | MlpCase]:
    cases: list = [
        ExitCase(*head, rows, dtype, top_k, compiled=top_k == 0)
        for head in (LLAMA2_HEAD, LLAMA3_HEAD, SMALL_HEAD)
        for dtype in ("bf16", "fp32")
        for rows in (1, 4, 8, 16, 60)
        for top_k in ((0, 10) if rows in (1, 60) else (0,))
    ]
    cases += [
        ExitCase(*head, rows, "bf16", compiled=True, screened=True)
        for head in (LLAMA2_HEAD, LLAMA3_HEAD, SMALL_HEAD)
        for rows in (1, 4)
    ]
    cases += [
        ExitCase(*head, rows, "bf16", compiled=True, bounds=bounds)
        for head in (LLAMA2_HEAD, LLAMA3_HEAD, SMALL_HEAD)
        for rows in (1, 4)
        for bounds in ("even", "falling")
    ]
    cases += [
        MlpCase(sizes, rows, dtype, compiled=True)
        for sizes in DECISION_MODELS
        for dtype in ("bf16", "fp32")
        for rows in (1, 4, 60)
    ]
    return cases


def gpu_first() -> list[ExitCase | MlpCase]:
    """The head that is read most."""
    return [ExitCase(*LLAMA3_HEAD, rows, "bf16") for rows in (1, 8)]


PRESETS = presets(quick, standard, gpu_first)


def toy(**changes) -> ExitCase:
    """A case of a few kilobytes, for tests."""
    return replace(ExitCase(201, 48, 3, "fp32"), **changes)


def toy_model(**changes) -> MlpCase:
    return replace(MlpCase((24, 16, 1), 3, "fp32"), **changes)
