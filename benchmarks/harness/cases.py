"""What every family's cases are made of: model shapes and trees. Plain data: nothing here needs torch or the package.

The cases themselves and their presets are in the `cases.py` of each family. Bytes and FLOPs are algorithmic: each input
is counted once and each output once, whatever a kernel really moves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int32": 4}


@dataclass(frozen=True)
class Model:
    """The attention geometry of one model."""

    name: str
    heads: int
    kv_heads: int
    dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


LLAMA2_7B = Model("Llama-2-7B", 32, 32, 128)
LLAMA3_8B = Model("Llama-3-8B", 32, 8, 128)
TINYLLAMA = Model("TinyLlama", 32, 4, 64)
DRAFT_68M = Model("68M draft", 12, 12, 64)
MODELS = (LLAMA3_8B, LLAMA2_7B, TINYLLAMA, DRAFT_68M)
LLAMA3_70B = Model("Llama-3-70B", 64, 8, 128)
# Llama-3-8B with another head dimension: what the kernels lose on a dim other than 128.
DIM_SWEEP = tuple(Model(f"32/8 dim {dim}", 32, 8, dim) for dim in (64, 80))


def branching(*widths: int) -> tuple[int, ...]:
    """Parents of the forest in which every node of level i has widths[i] children (level 0: that many roots)."""
    parents: list[int] = []
    level = [-1]
    for width in widths:
        first = len(parents)
        parents += [parent for parent in level for _ in range(width)]
        level = list(range(first, len(parents)))
    return tuple(parents)


def chain(nodes: int) -> tuple[int, ...]:
    return tuple(range(-1, nodes - 1))


def random_tree(nodes: int, seed: int = 0) -> tuple[int, ...]:
    """A random recursive tree: every node's parent is any earlier node."""
    generator = random.Random(seed * 1009 + nodes)
    return (-1, *(generator.randrange(i) for i in range(1, nodes)))


@dataclass(frozen=True)
class TreeShape:
    name: str
    parents: tuple[int, ...] = field(repr=False)

    @property
    def nodes(self) -> int:
        return len(self.parents)


# The published trees at the sizes where there is one, else chains and random trees; every table states which.
TREES = {
    1: TreeShape("root only", chain(1)),
    8: TreeShape("chain", chain(8)),
    16: TreeShape("random", random_tree(16)),
    44: TreeShape("MCSD 4x2x2x1", branching(4, 2, 2, 1)),
    60: TreeShape("MCSD 4x2x2x1x1", branching(4, 2, 2, 1, 1)),
    64: TreeShape("random", random_tree(64)),
    82: TreeShape("improved MCSD 2x4x3x1x1", branching(2, 4, 3, 1, 1)),
    128: TreeShape("random", random_tree(128)),
    256: TreeShape("random", random_tree(256)),
}
CHAIN_64 = TreeShape("chain", chain(64))
RANDOM_32 = TreeShape("random", random_tree(32))


class Case:
    """One cell of the table, before the choice of warm or cold. Each family's cases derive from it.

    bytes and flops: what the algorithm reads and writes, and computes. kv_bytes: what a plain read beside it reads.
    memory: what the inputs take. modes: how the large inputs are found, "warm" (used just before) or "cold" (evicted).
    flex and compiled ask for forms of PyTorch that take seconds to tens of seconds to compile.
    """

    op: str
    model: Model
    batch: int
    tree: TreeShape
    dtype: str
    bytes: int
    label: str

    context = 0
    modes: tuple[str, ...] = ("warm",)
    flops = 0
    flex = False
    ragged = False
    compiled = False

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    @property
    def kv_bytes(self) -> int:
        return self.bytes

    @property
    def memory(self) -> int:
        return self.bytes


class RowsCase(Case):
    """A case whose input is rows, of no tree and no request."""

    rows: int
    batch = 1

    @property
    def nodes(self) -> int:
        return self.rows


def presets(quick, standard, gpu_first, *, full=None, gpu_quick=None, gpu=None) -> dict:
    """The functions that list a family's cases, by the presets of `benchmarks.run`; None: as on CPUs."""
    return {
        "quick": quick,
        "standard": standard,
        "full": full or standard,
        "gpu-quick": gpu_quick or quick,
        "gpu": gpu or standard,
        "gpu-first": gpu_first,
    }
