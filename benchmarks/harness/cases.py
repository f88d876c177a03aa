"""What is measured: model shapes, trees and presets. Plain data: nothing here needs torch or the package.

Bytes and FLOPs are algorithmic: each input is counted once and each output once, whatever a kernel really moves. K and
V count once per KV head, so a kernel that reads them once per query head shows as slow, not as busy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cached_property

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


@dataclass(frozen=True)
class Case:
    """One cell of the table, before the choice of warm or cold.

    contexts holds one length per request. `modes` says how K and V are found: "warm" (used just before) or "cold"
    (evicted). `flex` asks for compiled FlexAttention too, which takes seconds to tens of seconds to compile.
    """

    op: str
    model: Model
    contexts: tuple[int, ...]
    tree: TreeShape
    dtype: str
    modes: tuple[str, ...] = ("warm",)
    flex: bool = False

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    @property
    def context(self) -> int:
        return max(self.contexts)

    @property
    def ragged(self) -> bool:
        return len(set(self.contexts)) > 1

    @property
    def slots(self) -> int:
        return self.context + self.nodes

    @cached_property
    def kv_bytes(self) -> int:
        """K and V that are visible to somebody, once."""
        visible = sum(context + self.nodes for context in self.contexts)
        return 2 * self.model.kv_heads * self.model.dim * ITEM_BYTES[self.dtype] * visible

    @cached_property
    def bytes(self) -> int:
        rows, item, words = self.batch * self.nodes, ITEM_BYTES[self.dtype], (self.nodes + 63) // 64
        if self.op == "build_topology":  # in: parents; out: five int32 per node and the ancestor words
            return rows * (4 + 4 * 4 + 8 * words)
        row = self.model.heads * (self.model.dim * item)
        if self.op == "merge_states":  # two states in, one out
            return 3 * rows * (row + 4 * self.model.heads)
        return self.kv_bytes + 2 * rows * row + 8 * rows * words

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions of both products; every node is counted against the whole tree."""
        if self.op != "tree_attention":
            return 0
        pairs = sum(self.nodes * (context + self.nodes) for context in self.contexts)
        return 4 * self.model.heads * self.model.dim * pairs

    @property
    def memory(self) -> int:
        """Bytes of the K and V buffers."""
        return 2 * self.batch * self.slots * self.model.kv_heads * self.model.dim * ITEM_BYTES[self.dtype]

    @property
    def label(self) -> str:
        if self.op == "build_topology":
            return f"build_topology b{self.batch} n{self.nodes} ({self.tree.name})"
        context = "-".join(map(str, sorted(set(self.contexts)))) if self.ragged else str(self.context)
        return f"{self.op} {self.model.name} {self.dtype} ctx{context} b{self.batch} n{self.nodes} ({self.tree.name})"


def attention(model: Model, context: int, nodes: int | TreeShape, dtype: str, batch: int = 1, **options) -> Case:
    """A tree_attention case; small trees, which are bound by memory, are measured cold as well as warm."""
    tree = TREES[nodes] if isinstance(nodes, int) else nodes
    options.setdefault("modes", ("cold", "warm") if tree.nodes <= 16 else ("warm",))
    return Case("tree_attention", model, (context,) * batch, tree, dtype, **options)


def ragged(context: int, nodes: int, dtype: str) -> Case:
    """Four requests from a full context down to almost none, as in a serving batch."""
    contexts = (context, context // 2 + 37, context // 8 + 5, 13)
    return Case("tree_attention", LLAMA3_8B, contexts, TREES[nodes], dtype)


def small_ops(batches=(1, 8), trees=(64, 256)) -> list[Case]:
    cases = []
    for batch in batches:
        cases += [Case("merge_states", LLAMA3_8B, (0,) * batch, TREES[64], dtype) for dtype in ("bf16", "fp32")]
        cases += [Case("build_topology", LLAMA3_8B, (0,) * batch, TREES[nodes], "int32") for nodes in trees]
    return cases


def quick() -> list[Case]:
    """Two minutes on two cores: every target has a cell here, few have all of them."""
    cold = {"modes": ("cold",)}
    warm = {"modes": ("warm",)}
    cases = [attention(LLAMA3_8B, 1024, 60, "bf16"), attention(LLAMA3_8B, 4096, 64, "bf16")]  # the first to be seen
    cases += [attention(LLAMA3_8B, context, 1, "bf16", **cold) for context in (1024, 4096, 16384)]
    cases += [attention(LLAMA3_8B, 4096, 1, "bf16", **warm), attention(LLAMA3_8B, 4096, 8, "bf16", **cold)]
    cases += [attention(LLAMA3_8B, 1024, nodes, "bf16", **warm) for nodes in (8, 16, 44, 82, 128, 256)]
    cases += [attention(LLAMA3_8B, 4096, 16, "bf16", **warm)]
    cases += [attention(LLAMA3_8B, 16384, 64, "bf16"), attention(LLAMA2_7B, 1024, 64, "bf16")]
    cases += [attention(model, 1024, 64, "bf16") for model in (TINYLLAMA, DRAFT_68M, *DIM_SWEEP)]
    cases += [attention(LLAMA3_8B, 1024, 64, "bf16", batch=4), ragged(1024, 64, "bf16")]
    cases += [attention(LLAMA3_8B, 4096, 1, "fp32", **cold), attention(LLAMA3_8B, 4096, 16, "fp32", **warm)]
    cases += [attention(LLAMA3_8B, 1024, nodes, "fp32", **warm) for nodes in (16, 60, 128)]
    cases += small_ops(batches=(1,), trees=(64,))
    # Last, because compiling FlexAttention takes what time is left.
    return cases + [attention(LLAMA3_8B, 1024, 64, dtype, flex=True) for dtype in ("bf16", "fp32")]


def standard() -> list[Case]:
    """Every tree and context of Llama-3-8B, and a line through the rest: about a quarter of an hour."""
    cases = []
    for dtype in ("bf16", "fp32"):
        for context in (1024, 4096, 16384):
            cases += [attention(LLAMA3_8B, context, nodes, dtype, flex=nodes in (1, 64)) for nodes in TREES]
        cases += [attention(model, 4096, nodes, dtype) for model in MODELS[1:] for nodes in (1, 16, 64, 128)]
        cases += [attention(model, context, 64, dtype) for model in DIM_SWEEP for context in (1024, 4096)]
        cases += [attention(LLAMA3_8B, 4096, nodes, dtype, batch) for batch in (4, 8) for nodes in (1, 8, 64)]
        cases += [attention(LLAMA3_8B, 4096, CHAIN_64, dtype), ragged(4096, 8, dtype), ragged(4096, 64, dtype)]
    return cases + small_ops()


def full() -> list[Case]:
    """Everything, for hours: each model, context, batch, tree and dtype."""
    cases = [
        attention(model, context, nodes, dtype, batch, flex=batch == 1)
        for dtype in ("bf16", "fp32")
        for model in MODELS
        for context in (1024, 4096, 16384)
        for batch in (1, 4, 8)
        for nodes in TREES
    ]
    extras = [case for case in standard() if case.model in DIM_SWEEP or case.ragged or case.tree is CHAIN_64]
    return cases + extras + small_ops(batches=(1, 4, 8), trees=(8, 64, 128, 256))


def gpu_quick() -> list[Case]:
    """Minutes on a GPU with peers that compile themselves: each goal of targets_gpu.py has cells here."""
    cases = [attention(LLAMA3_8B, 8192, nodes, "bf16", 8) for nodes in (1, 8, 16, RANDOM_32, 64, 256)]
    cases += [attention(LLAMA3_8B, 32768, nodes, "bf16", 8) for nodes in (8, RANDOM_32)]
    cases += [attention(LLAMA3_8B, 8192, nodes, "bf16", 1) for nodes in (1, 8, 64)]
    cases += [attention(LLAMA3_8B, 8192, nodes, "bf16", 8) for nodes in (44, 60, 82)]
    cases += [attention(LLAMA2_7B, 8192, 64, "bf16", 8), attention(LLAMA3_70B, 8192, 64, "bf16", 8)]
    cases += small_ops(batches=(8,), trees=(64,))
    return [*cases, attention(LLAMA3_8B, 8192, 128, "bf16", 8, flex=True)]


def gpu() -> list[Case]:
    """What is asked of a GPU: bound by memory, bound by arithmetic, and the published trees between."""
    published = (44, 60, 64, 82)
    cases = []
    for context in (8192, 32768):
        cases += [attention(LLAMA3_8B, context, nodes, "bf16", 8) for nodes in (1, 8, 16, RANDOM_32)]
        cases += [attention(LLAMA3_8B, context, nodes, "bf16", 1) for nodes in (1, 8, 64)]
    cases += [attention(model, 8192, nodes, "bf16", 8) for model in (LLAMA2_7B, LLAMA3_70B) for nodes in published]
    cases += [attention(LLAMA3_8B, 8192, nodes, "bf16", 8, flex=nodes == 64) for nodes in published]
    cases += [attention(LLAMA3_8B, 8192, nodes, "bf16", 8, flex=nodes == 256) for nodes in (128, 256)]
    cases += [attention(LLAMA3_70B, 8192, nodes, "bf16", 8) for nodes in (128, 256)]
    cases += [attention(LLAMA3_8B, 8192, nodes, "bf16", 32) for nodes in (8, 64, 256)]
    cases += [attention(model, 8192, 64, "bf16", 8) for model in DIM_SWEEP]
    cases += [attention(LLAMA3_8B, 8192, CHAIN_64, "bf16", 8), ragged(32768, 64, "bf16")]
    return cases + small_ops(batches=(1, 8, 32))


PRESETS = {"quick": quick, "standard": standard, "full": full, "gpu-quick": gpu_quick, "gpu": gpu}


def toy(op: str = "tree_attention", **changes) -> Case:
    """A case of a few kilobytes, for tests and for a first look at the harness."""
    model = Model("toy", 4, 2, 32)
    contexts = (0,) if op != "tree_attention" else (48,)
    dtype = "int32" if op == "build_topology" else "fp32"
    return replace(Case(op, model, contexts, TREES[8], dtype), **changes)
