"""What is measured of attention: models, contexts, trees and batches. Plain data.

K and V count once per KV head, so a kernel that reads them once per query head shows as slow, not as busy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks.harness.cases import (
    CHAIN_64,
    DIM_SWEEP,
    DRAFT_68M,
    ITEM_BYTES,
    LLAMA2_7B,
    LLAMA3_8B,
    LLAMA3_70B,
    MODELS,
    RANDOM_32,
    TINYLLAMA,
    TREES,
    Case,
    Model,
    TreeShape,
    presets,
)

SMOLLM2 = Model("SmolLM2-135M", 9, 3, 64)


@dataclass(frozen=True)
class AttentionCase(Case):
    """A cell of tree_attention or of merge_states.

    contexts holds one length per request; merge_states reads no cache, so its contexts are 0. `modes` says how K and V
    are found. `flex` asks for compiled FlexAttention too, `path_invariant` for the same call with that option.
    """

    op: str
    model: Model
    contexts: tuple[int, ...]
    tree: TreeShape
    dtype: str
    modes: tuple[str, ...] = ("warm",)
    flex: bool = False
    path_invariant: bool = False

    @property
    def batch(self) -> int:
        return len(self.contexts)

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
        context = "-".join(map(str, sorted(set(self.contexts)))) if self.ragged else str(self.context)
        return f"{self.op} {self.model.name} {self.dtype} ctx{context} b{self.batch} n{self.nodes} ({self.tree.name})"


def attention(
    model: Model, context: int, nodes: int | TreeShape, dtype: str, batch: int = 1, **options
) -> AttentionCase:
    """A tree_attention case; small trees, which are bound by memory, are measured cold as well as warm."""
    tree = TREES[nodes] if isinstance(nodes, int) else nodes
    options.setdefault("modes", ("cold", "warm") if tree.nodes <= 16 else ("warm",))
    return AttentionCase("tree_attention", model, (context,) * batch, tree, dtype, **options)


def ragged(context: int, nodes: int, dtype: str) -> AttentionCase:
    """Four requests from a full context down to almost none, as in a serving batch."""
    contexts = (context, context // 2 + 37, context // 8 + 5, 13)
    return AttentionCase("tree_attention", LLAMA3_8B, contexts, TREES[nodes], dtype)


def merges(*batches: int) -> list[AttentionCase]:
    return [
        AttentionCase("merge_states", LLAMA3_8B, (0,) * batch, TREES[64], dtype)
        for batch in batches
        for dtype in ("bf16", "fp32")
    ]


def quick() -> list[AttentionCase]:
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
    cases += [attention(SMOLLM2, 4096, 8, dtype, **warm, path_invariant=True) for dtype in ("bf16", "fp32")]
    cases += merges(1)
    # Last, because compiling FlexAttention takes what time is left.
    return cases + [attention(LLAMA3_8B, 1024, 64, dtype, flex=True) for dtype in ("bf16", "fp32")]


def standard() -> list[AttentionCase]:
    """Every tree and context of Llama-3-8B, and a line through the rest: about a quarter of an hour."""
    cases = []
    for dtype in ("bf16", "fp32"):
        for context in (1024, 4096, 16384):
            cases += [
                attention(LLAMA3_8B, context, nodes, dtype, flex=nodes in (1, 64), path_invariant=context == 4096)
                for nodes in TREES
            ]
        cases += [attention(SMOLLM2, 4096, nodes, dtype, path_invariant=True) for nodes in (1, 8, 16, 60)]
        cases += [attention(model, 4096, nodes, dtype) for model in MODELS[1:] for nodes in (1, 16, 64, 128)]
        cases += [attention(model, context, 64, dtype) for model in DIM_SWEEP for context in (1024, 4096)]
        cases += [attention(LLAMA3_8B, 4096, nodes, dtype, batch) for batch in (4, 8) for nodes in (1, 8, 64)]
        cases += [attention(LLAMA3_8B, 4096, CHAIN_64, dtype), ragged(4096, 8, dtype), ragged(4096, 64, dtype)]
    return cases + merges(1, 8)


def full() -> list[AttentionCase]:
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
    return cases + extras + merges(1, 4, 8)


def gpu_quick() -> list[AttentionCase]:
    """Minutes on a GPU with peers that compile themselves: each goal of targets_gpu.py has cells here."""
    cases = [attention(LLAMA3_8B, 8192, nodes, "bf16", 8) for nodes in (1, 8, 16, RANDOM_32, 64, 256)]
    cases += [attention(LLAMA3_8B, 32768, nodes, "bf16", 8) for nodes in (8, RANDOM_32)]
    cases += [attention(LLAMA3_8B, 8192, nodes, "bf16", 1) for nodes in (1, 8, 64)]
    cases += [attention(LLAMA3_8B, 8192, nodes, "bf16", 8) for nodes in (44, 60, 82)]
    cases += [attention(LLAMA2_7B, 8192, 64, "bf16", 8), attention(LLAMA3_70B, 8192, 64, "bf16", 8)]
    cases += merges(8)
    return [*cases, attention(LLAMA3_8B, 8192, 128, "bf16", 8, flex=True)]


def gpu_first() -> list[AttentionCase]:
    """One minute: from bound by memory to bound by arithmetic."""
    cases = [attention(LLAMA3_8B, 8192, nodes, "bf16", 8) for nodes in (1, 16, RANDOM_32, 64, 256)]
    return [*cases, attention(LLAMA3_8B, 8192, 1, "bf16", 1)]


def gpu() -> list[AttentionCase]:
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
    return cases + merges(1, 8, 32)


PRESETS = presets(quick, standard, gpu_first, full=full, gpu_quick=gpu_quick, gpu=gpu)


def toy(op: str = "tree_attention", **changes) -> AttentionCase:
    """A case of a few kilobytes, for tests and for a first look at the harness."""
    model = Model("toy", 4, 2, 32)
    contexts = (0,) if op != "tree_attention" else (48,)
    return replace(AttentionCase(op, model, contexts, TREES[8], "fp32"), **changes)
