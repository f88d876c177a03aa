"""What is measured of the KV ops: models, layers, contexts and numbers of rows. Plain data."""

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
    RowsCase,
    TreeShape,
    chain,
    presets,
)


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


@dataclass(frozen=True)
class LayersCase(Case):
    """Caches of all layers, `layers` of them: in a list, in one tensor ("one tensor"), or of pages in a list."""

    model: Model
    layers: int
    batch: int
    layout: str
    dtype: str
    context: int = 4096

    @property
    def row_bytes(self) -> int:
        """K and V of a slot, in all layers."""
        return self.layers * 2 * self.model.kv_heads * self.model.dim * ITEM_BYTES[self.dtype]

    @property
    def memory(self) -> int:
        return self.batch * (self.context + SPARE_SLOTS) * self.row_bytes

    @property
    def label(self) -> str:
        return f"{self.op} {self.model.name} {self.dtype} ctx{self.context} b{self.batch} {self.tree.name} {self.nodes}"


SPARE_SLOTS = 64  # behind the context, for the tree


@dataclass(frozen=True)
class CommitCase(LayersCase):
    """One cell of kv_commit: an accepted path of a published tree for each request. All of its rows move."""

    tree_nodes: int = 60

    op = "kv_commit"

    @property
    def path(self) -> list[int]:
        """From the last leaf of the tree up, in ascending order."""
        parents, node, path = TREES[self.tree_nodes].parents, self.tree_nodes - 1, []
        while node >= 0:
            path.append(node)
            node = parents[node]
        return path[::-1]

    @property
    def tree(self) -> TreeShape:
        return TreeShape(self.layout, chain(self.batch * len(self.path)))

    @property
    def bytes(self) -> int:
        """Each row is read and written."""
        return 2 * self.batch * len(self.path) * self.row_bytes


@dataclass(frozen=True)
class GatherCase(LayersCase):
    """One cell of gather_layer_kv: the last `rows` slots of a request."""

    rows: int = 1
    compiled: bool = False

    op = "gather_layer_kv"

    @property
    def tree(self) -> TreeShape:
        return TreeShape(self.layout, chain(self.rows))

    @property
    def bytes(self) -> int:
        """Each row is read and written."""
        return 2 * self.rows * self.row_bytes


# (model, dim, layers that an exit skips)
PROPAGATIONS = ((LLAMA3_8B, 4096, 8), (LLAMA2_7B, 4096, 4), (DRAFT_68M, 768, 1))


EIGHT_LAYERS = (LLAMA3_8B, 8)  # a quarter of Llama-3-8B: filling all would take longer than measuring
WHOLE = ((LLAMA3_8B, 32), (DRAFT_68M, 2))


def quick() -> list[Case]:
    return [
        *(KvCase(*PROPAGATIONS[0], rows, "bf16") for rows in (1, 16)),
        *(CommitCase(*EIGHT_LAYERS, 1, layout, "bf16") for layout in ("list", "one tensor")),
        GatherCase(*EIGHT_LAYERS, 1, "list", "bf16", rows=512),
    ]


def standard() -> list[Case]:
    return [
        *(
            KvCase(*shape, rows, dtype, compiled=True)
            for shape in PROPAGATIONS
            for dtype in ("bf16", "fp32")
            for rows in (1, 4, 8, 16, 60)
        ),
        *(
            CommitCase(*shape, batch, layout, "bf16")
            for shape in WHOLE
            for batch in (1, 4)
            for layout in ("list", "one tensor", "pages")
        ),
        *(
            GatherCase(*shape, 1, layout, "bf16", rows=rows, compiled=layout == "one tensor")
            for shape in WHOLE
            for layout in ("list", "one tensor", "pages")
            for rows in (1, 5, 64, 2048)
        ),
    ]


def gpu_first() -> list[Case]:
    """The layers that an exit skips, and an accepted path."""
    return [KvCase(*PROPAGATIONS[0], 8, "bf16"), CommitCase(*EIGHT_LAYERS, 1, "list", "bf16")]


PRESETS = presets(quick, standard, gpu_first)


def toy(**changes) -> KvCase:
    """A case of a few kilobytes, for tests."""
    return replace(KvCase(Model("toy", 4, 2, 16), 64, 3, 5, "fp32"), **changes)


def toy_commit(**changes) -> CommitCase:
    return replace(CommitCase(Model("toy", 4, 2, 16), 3, 2, "list", "fp32", 9, 44), **changes)


def toy_gather(**changes) -> GatherCase:
    return replace(GatherCase(Model("toy", 4, 2, 16), 3, 1, "list", "fp32", 9, 5), **changes)
