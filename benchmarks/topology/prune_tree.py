"""prune_tree: the end of a round alone, over a pool that is grown, and the contestants."""

from __future__ import annotations

import specdec_ops
from benchmarks.harness.contestant import Contestant, Expected, compiled, on_backends

from .inputs import Levels, expand, make_inputs, parts, prune, prune_by_loops

__all__ = ["contestants", "expected", "make_inputs"]


def expected(levels: Levels) -> Expected:
    pool = levels.pool()
    levels.grow(pool, "torch")
    tree = specdec_ops.prune_tree(pool, levels.case.nodes, root_tokens=levels.roots, backend="torch")
    exact = parts(tree)
    return Expected(list, exact, [0.0] * len(exact))


def contestants(levels: Levels, options) -> list[Contestant]:
    grown = expand(levels)

    def ours(backend: str, name: str) -> Contestant:
        pool = levels.pool()
        levels.grow(pool, backend)
        nodes, roots = levels.case.nodes, levels.roots
        call = lambda: specdec_ops.prune_tree(pool, nodes, root_tokens=roots, backend=backend)  # noqa: E731
        return Contestant(name, "ours", call, parts)

    listed = [*on_backends(ours, options), Contestant("eager", "pytorch", lambda: prune(levels, grown))]
    if levels.case.batch == 1:
        listed.append(Contestant("eagle", "pytorch", lambda: prune_by_loops(levels, grown), graph=False))
    if levels.case.compiled:
        form = compiled(prune)
        listed.append(Contestant("compiled", "pytorch", lambda: form(levels, grown)))
    return listed
