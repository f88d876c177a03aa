"""grow_tree: a whole round of growing, prune_tree at its end, and the contestants."""

from __future__ import annotations

import torch

import specdec_ops
from benchmarks.harness.contestant import Contestant, Expected, compiled, on_backends

from .inputs import Levels, draft_mask, expand, make_inputs, parts, prune, prune_by_loops

__all__ = ["contestants", "expected", "make_inputs"]


def grow(levels: Levels, pool: specdec_ops.CandidatePool, backend: str) -> list[torch.Tensor]:
    """One launch a level, one at the end: the frontiers, and the tree."""
    frontiers = levels.grow(pool, backend)
    return [*frontiers, specdec_ops.prune_tree(pool, levels.case.nodes, root_tokens=levels.roots, backend=backend)]


def expected(levels: Levels) -> Expected:
    pool = levels.pool()
    *frontiers, tree = grow(levels, pool, "torch")
    exact = [*frontiers[:-1], draft_mask(pool), *parts(tree)]
    return Expected(lambda result: result, exact, [0.0] * len(exact))


def contestants(levels: Levels, options) -> list[Contestant]:
    def ours(backend: str, name: str) -> Contestant:
        pool = levels.pool()

        def to_result(result) -> list[torch.Tensor]:
            *frontiers, tree = result
            return [*frontiers[:-1], draft_mask(pool), *parts(tree)]

        return Contestant(name, "ours", lambda: grow(levels, pool, backend), to_result)

    def eagle(expanding, pruning) -> list[torch.Tensor]:
        grown = expanding(levels)
        return [*grown.frontiers, grown.mask, *pruning(levels, grown)]

    listed = [*on_backends(ours, options), Contestant("eager", "pytorch", lambda: eagle(expand, prune))]
    if levels.case.batch == 1:
        listed.append(Contestant("eagle", "pytorch", lambda: eagle(expand, prune_by_loops), graph=False))
    if levels.case.compiled:
        forms = compiled(expand), compiled(prune)
        listed.append(Contestant("compiled", "pytorch", lambda: eagle(*forms)))
    return listed
