"""What is measured of build_topology: trees and batches. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness.cases import LLAMA3_8B, TREES, Case, Model, TreeShape


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


def cells(batches: tuple[int, ...], trees: tuple[int, ...]) -> list[TopologyCase]:
    return [TopologyCase(TREES[nodes], batch) for batch in batches for nodes in trees]


def quick() -> list[TopologyCase]:
    return cells((1,), (64,))


def standard() -> list[TopologyCase]:
    return cells((1, 8), (64, 256))


def full() -> list[TopologyCase]:
    return cells((1, 4, 8), (8, 64, 128, 256))


def gpu_quick() -> list[TopologyCase]:
    return cells((8,), (64,))


def gpu() -> list[TopologyCase]:
    return cells((1, 8, 32), (64, 256))


PRESETS = {"quick": quick, "standard": standard, "full": full, "gpu-quick": gpu_quick, "gpu": gpu}


def toy(**changes) -> TopologyCase:
    """A case of a few kilobytes, for tests."""
    return replace(TopologyCase(TREES[8], 1), **changes)
