"""What is measured of build_topology, grow_tree and prune_tree: trees, rounds and batches. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness.cases import LLAMA3_8B, TREES, Case, Model, TreeShape, chain, presets


@dataclass(frozen=True)
class TopologyCase(Case):
    """A cell of build_topology. The op knows no model: the CSV's column has had the same one from the beginning."""

    tree: TreeShape
    batch: int
    model: Model = LLAMA3_8B
    dtype = "int32"
    op = "build_topology"

    @property
    def bytes(self) -> int:
        """In: parents; out: four int32 per node and the ancestor words."""
        return self.batch * self.nodes * (4 + 4 * 4 + 8 * ((self.nodes + 63) // 64))

    @property
    def label(self) -> str:
        return f"{self.op} b{self.batch} n{self.nodes} ({self.tree.name})"


@dataclass(frozen=True)
class GrowCase(Case):
    """A cell of grow_tree, which is a whole round with its end, or of prune_tree, which is the end alone."""

    op: str
    levels: int
    width: int
    branching: int
    kept: int
    batch: int
    compiled: bool = False
    model: Model = LLAMA3_8B
    dtype = "fp32"

    @property
    def tree(self) -> TreeShape:
        return TreeShape(f"{self.levels} levels of {self.width} x {self.branching}", chain(self.kept))

    @property
    def bytes(self) -> int:
        """Of a round: what the draft says is read, candidates and the draft's nodes are written. Of its end: the pool
        is read once, the kept nodes are read and written.
        """
        drafted = 1 + (self.levels - 1) * self.width
        candidates = self.branching * drafted
        tables = 4 * 4 + 8 * ((self.kept + 63) // 64)
        end = candidates * 4 + self.kept * (3 * 4 + 3 * 4 + tables)
        growth = candidates * (8 + 16) + drafted * (4 + 3 * 4 + 4 * 4 + 8 * ((drafted + 63) // 64))
        return self.batch * (end + (growth if self.op == "grow_tree" else 0))

    @property
    def label(self) -> str:
        return f"{self.op} b{self.batch} n{self.kept} ({self.tree.name})"


# (levels, width, branching, nodes that stay): Mixture of Attentions' and EAGLE's own.
ROUNDS = ((6, 8, 8, 60), (8, 10, 10, 60))


def rounds(batches: tuple[int, ...], shapes: tuple = ROUNDS, compiled: bool = False) -> list[GrowCase]:
    return [
        GrowCase(op, *shape, batch, compiled)
        for op in ("grow_tree", "prune_tree")
        for shape in shapes
        for batch in batches
    ]


def cells(batches: tuple[int, ...], trees: tuple[int, ...]) -> list[TopologyCase]:
    return [TopologyCase(TREES[nodes], batch) for batch in batches for nodes in trees]


def quick() -> list[TopologyCase | GrowCase]:
    return [*cells((1,), (64,)), *rounds((1,))[:2], rounds((1,))[-1]]


def standard() -> list[TopologyCase | GrowCase]:
    return [*cells((1, 8), (64, 256)), *rounds((1, 8), compiled=True)]


def full() -> list[TopologyCase | GrowCase]:
    return [*cells((1, 4, 8), (8, 64, 128, 256)), *rounds((1, 4, 8, 32), compiled=True)]


def gpu_quick() -> list[TopologyCase | GrowCase]:
    return [*cells((8,), (64,)), *rounds((8,), ROUNDS[1:])]


def gpu() -> list[TopologyCase | GrowCase]:
    return [*cells((1, 8, 32), (64, 256)), *rounds((1, 8, 32))]


PRESETS = presets(quick, standard, gpu_quick, full=full, gpu_quick=gpu_quick, gpu=gpu)


def toy(**changes) -> TopologyCase:
    """A case of a few kilobytes, for tests."""
    return replace(TopologyCase(TREES[8], 1), **changes)


def toy_round(op: str = "grow_tree", **changes) -> GrowCase:
    """Likewise of a round."""
    return replace(GrowCase(op, 3, 3, 4, 12, 1), **changes)
