"""grow_tree and prune_tree against EAGLE's own algorithm, a second oracle, over a draft that scores paths."""

import functools
import math

import pytest
import torch

from specdec_ops import (
    CandidatePool,
    grow_tree,
    prune_tree,
)
from tests.topology.grow_cases import (
    NONE,
    eagle_tree,
)

OP = "grow_tree"


NAN, INF = math.nan, math.inf


def path_model(seed, vocab=40, sharpness=2.0):
    """log_probs_of(path): what a draft says after a path, the same whenever it is asked."""

    @functools.cache
    def log_probs_of(path):
        generator = torch.Generator().manual_seed(hash((seed, *path)) % 2**60)
        values = (sharpness * torch.randn(vocab, generator=generator)).log_softmax(0)
        return dict(enumerate(values.tolist()))

    return log_probs_of


def grow_by_path(models, roots, levels, width, branching, target, **options):
    """The pool of a draft that follows the frontier, as engines do: the paths of each row are told by parent_rows."""
    pool = CandidatePool.empty(len(models), levels=levels, width=width, branching=branching, device=target.device)
    paths = [[(root,)] for root in roots]
    for level in range(levels):
        rows = 1 if level == 0 else width
        tokens = torch.full((len(models), rows, branching), -1, dtype=torch.int32)
        logprobs = torch.full((len(models), rows, branching), NAN)
        for request, model in enumerate(models):
            for row, path in enumerate(paths[request]):
                if path is None:
                    continue
                top = sorted(model(path).items(), key=lambda item: -item[1])[:branching]
                tokens[request, row] = torch.tensor([token for token, _ in top])
                logprobs[request, row] = torch.tensor([value for _, value in top])
        frontier = grow_tree(
            pool, tokens.to(target.device), logprobs.to(target.device), level=level, **options, backend=target.backend
        )
        extended = zip(paths, frontier.tokens.tolist(), frontier.parent_rows.tolist(), strict=True)
        paths = [
            [(*own[row], token) if token >= 0 else None for token, row in zip(new, rows_of, strict=True)]
            for own, new, rows_of in extended
        ]
    assert pool.status.tolist() == [0] * len(models)
    return pool


@pytest.mark.parametrize(("depth", "top_k", "total"), [(5, 8, 59), (7, 10, 59), (3, 4, 30), (2, 2, 5)])
def test_equals_eagles_own_algorithm(depth, top_k, total, target):
    """On drafts without equal scores, for several requests at once."""
    if target.interpreted and depth > 5:
        depth = 4
    models = [path_model(seed) for seed in range(1 if target.interpreted else 3)]
    roots = [7 + seed for seed in range(len(models))]
    pool = grow_by_path(models, roots, depth + 1, top_k, top_k, target)
    tree = prune_tree(pool, total + 1, root_tokens=torch.tensor(roots, device=target.device), backend=target.backend)
    for request, model in enumerate(models):
        tokens, parents = eagle_tree(model, roots[request], depth, top_k, total)
        assert tree.tokens[request].tolist() == tokens
        assert tree.topology.parents[request].tolist() == parents
        scores = pool.scores[request][pool.scores[request] > NONE]
        assert len(scores.unique()) == len(scores)  # so the comparison says something
