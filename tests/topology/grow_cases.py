"""Rounds of growing trees, and two oracles that share no idea with the kernels: plain loops over Python numbers."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch

from specdec_ops import CandidatePool, Topology, Tree, grow_tree, prune_tree

NONE = -math.inf


class Target(NamedTuple):
    """What tests over all targets get, for those that name one."""

    backend: str
    device: str = "cpu"


CPU, TORCH = Target("cpu"), Target("torch")
POOL_TABLES = ("tokens", "scores", "parents", "expanded", "candidates")
TREE_TABLES = ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes")


@dataclasses.dataclass
class Round:
    """What a draft says, level by level: tokens and logprobs [batch, rows, branching]."""

    levels: list[tuple[torch.Tensor, torch.Tensor]]
    width: int
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.levels[0][0].shape[0]

    @property
    def branching(self) -> int:
        return self.levels[0][0].shape[2]

    def empty(self, device="cpu") -> CandidatePool:
        sizes = {"levels": len(self.levels), "width": self.width, "branching": self.branching}
        return CandidatePool.empty(self.batch, **sizes, device=device)

    def requests(self, chosen) -> "Round":
        return dataclasses.replace(self, levels=[(tokens[chosen], values[chosen]) for tokens, values in self.levels])


def random_round(batch, levels, width, branching, *, vocab=1000, seed=0, **options) -> Round:
    """Log-probabilities of random rows, most likely first, and their tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for level in range(levels):
        logits = torch.randn(batch, 1 if level == 0 else width, vocab, generator=generator)
        values, tokens = logits.log_softmax(-1).topk(branching)
        found.append((tokens.int(), values))
    return Round(found, width, options)


def grown(case: Round, target, pool: CandidatePool | None = None, levels: int | None = None):
    """(the pool, the frontiers) of a round."""
    pool = case.empty(target.device) if pool is None else pool
    frontiers = []
    for level, (tokens, logprobs) in enumerate(case.levels[:levels]):
        frontiers.append(
            grow_tree(
                pool, tokens.to(target.device), logprobs.to(target.device), level=level, **case.options,
                backend=target.backend,
            )
        )  # fmt: skip
    return pool, frontiers


def pruned(pool: CandidatePool, nodes: int, target, first_root: int = 500):
    roots = torch.arange(first_root, first_root + pool.batch, dtype=torch.int32, device=pool.device)
    return prune_tree(pool, nodes, root_tokens=roots, backend=target.backend)


class Node:
    """A candidate of the plain loops below."""

    def __init__(self, token, score, parent, index):
        self.token, self.score, self.parent, self.index = token, score, parent, index
        self.draft_node = -1


def plain_round(case: Round, request: int, eos=(), draft_to_target=None, levels=None):
    """(candidates by their place in the pool, frontiers as lists of candidates) of one request."""
    root = Node(None, np.float32(0), None, -1)
    root.draft_node = 0
    candidates, frontier, frontiers, start = {}, [root], [], 0
    for level, (tokens, logprobs) in enumerate(case.levels[:levels]):
        found = []
        for row, parent in enumerate(frontier):
            for column in range(case.branching):
                token, logprob = int(tokens[request, row, column]), float(logprobs[request, row, column])
                if token < 0 or not logprob < math.inf or logprob == NONE:
                    continue
                if draft_to_target is not None:
                    if token >= len(draft_to_target):
                        continue
                    token = draft_to_target[token]
                with np.errstate(over="ignore"):
                    score = np.float32(parent.score) + np.float32(min(logprob, 0.0))
                if not np.isfinite(score):
                    continue
                found.append(Node(token, score, parent, start + row * case.branching + column))
        candidates.update({node.index: node for node in found})
        start += case.branching * (1 if level == 0 else case.width)
        best = sorted((n for n in found if n.token not in eos), key=lambda n: (-n.score, n.index))
        last = level == len(case.levels) - 1
        frontier = [] if last else best[: case.width]
        for column, node in enumerate(frontier):
            node.draft_node = 1 + level * case.width + column
        frontiers.append(frontier)
    return candidates, frontiers


def plain_tree(candidates: dict, nodes: int):
    """The best candidates in the order of the pool, and the Tree of them behind the root."""
    kept = sorted(candidates.values(), key=lambda node: (-node.score, node.index))[: nodes - 1]
    kept.sort(key=lambda node: node.index)
    place = {None: 0} | {node.index: 1 + i for i, node in enumerate(kept)}
    above = [place[None if node.parent.index < 0 else node.parent.index] for node in kept]
    return kept, Tree([-1, *above])


def expected_pool(case: Round, eos=(), draft_to_target=None, levels=None) -> dict[str, torch.Tensor]:
    """Every tensor of the pool, those of its topology under `topology.NAME`."""
    pool = case.empty()
    tables = {name: getattr(pool, name).clone() for name in POOL_TABLES}
    trees, places = [], []
    for request in range(case.batch):
        candidates, frontiers = plain_round(case, request, eos, draft_to_target, levels)
        for index, node in candidates.items():
            tables["tokens"][request, index] = node.token
            tables["scores"][request, index] = float(node.score)
            tables["parents"][request, index] = node.parent.index
            tables["expanded"][request, index] = node.draft_node
            if node.draft_node > 0:
                tables["candidates"][request, node.draft_node] = index
        drafted = sorted((node for frontier in frontiers for node in frontier), key=lambda node: node.draft_node)
        # A tree without gaps, whose nodes then go to their places.
        place = [0, *(node.draft_node for node in drafted)]
        trees.append(Tree([-1, *(place.index(node.parent.draft_node) for node in drafted)]))
        places.append(torch.tensor(place))
    return tables | {f"topology.{name}": value for name, value in spread(trees, places, case).items()}


def spread(trees: list[Tree], places: list[torch.Tensor], case: Round) -> dict[str, torch.Tensor]:
    """The tables of trees whose node i is at places[i], blank in between."""
    blank = case.empty().topology
    tables = {name: getattr(blank, name).clone() for name in TREE_TABLES}
    for request, (tree, place) in enumerate(zip(trees, places, strict=True)):
        for name in ("parents", "first_child", "next_sibling"):
            links = torch.from_numpy(getattr(tree, name).copy()).long()
            tables[name][request, place] = torch.where(links >= 0, place[links], -1).int()
        tables["depths"][request, place] = torch.from_numpy(tree.depths.copy())
        for node in range(len(tree)):
            seen = [int(place[other]) for other in range(len(tree)) if tree.mask()[node, other]]
            for word in range(tables["ancestors"].shape[2]):
                bits = sum(1 << (other % 64) for other in seen if other // 64 == word)
                tables["ancestors"][request, place[node], word] = bits - (1 << 64) * (bits >> 63)
        tables["num_nodes"][request] = int(place.max()) + 1
    return tables


def tables_of(pool: CandidatePool) -> dict[str, torch.Tensor]:
    """The same of a pool."""
    own = {name: getattr(pool, name).cpu() for name in POOL_TABLES}
    return own | {f"topology.{name}": getattr(pool.topology, name).cpu() for name in TREE_TABLES}


def assert_tables(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, table in expected.items():
        assert got[name].dtype == table.dtype, name
        assert torch.equal(got[name], table), f"{name}\n{got[name]}\n{table}"


def assert_round(case: Round, target, nodes: int, eos=(), draft_to_target=None, levels=None):
    """Grow and prune, and compare everything with the plain loops. Returns the pool and the tree."""
    pool, frontiers = grown(case, target, levels=levels)
    assert_tables(tables_of(pool), expected_pool(case, eos, draft_to_target, levels))
    tree = pruned(pool, nodes, target)
    trees = []
    for request in range(case.batch):
        candidates, plain = plain_round(case, request, eos, draft_to_target, levels)
        for frontier, nodes_of in zip(frontiers, plain, strict=True):
            width = frontier.tokens.shape[1]
            padding = [-1] * (width - len(nodes_of))
            level = plain.index(nodes_of)
            rows = [0 if level == 0 else plain[level - 1].index(node.parent) for node in nodes_of]
            assert frontier.tokens[request].tolist() == [node.token for node in nodes_of] + padding
            assert frontier.parent_rows[request].tolist() == rows + padding
            scores = [float(node.score) for node in nodes_of] + [NONE] * len(padding)
            assert frontier.scores[request].tolist() == scores
        kept, shape = plain_tree(candidates, nodes)
        trees.append(shape)
        padding = [-1] * (nodes - len(shape))
        assert tree.tokens[request].tolist() == [500 + request, *(node.token for node in kept), *padding]
        assert tree.pool_ids[request].tolist() == [-1, *(node.index for node in kept), *padding]
        assert tree.expanded[request].tolist() == [0, *(node.draft_node for node in kept), *padding]
    wanted = Topology.from_trees([*trees, Tree.chain(nodes)])
    for name in (*TREE_TABLES, "status"):
        assert torch.equal(getattr(tree.topology, name).cpu(), getattr(wanted, name)[:-1]), name
    return pool, tree


def eagle_tree(log_probs_of, root, depth, top_k, total):
    """EAGLE's topK_genrate as plain loops: (tokens, parents) of the tree it makes, its root included.

    Its indices, its two top-k and its look-up of parents; the order of torch.topk among equals is left out, as are
    hidden states. `log_probs_of(path)` gives {token: log-probability} of what follows the tokens of a path.
    """
    best = lambda pairs, count: sorted(range(len(pairs)), key=lambda i: -pairs[i])[:count]  # noqa: E731
    tokens, scores, parents = [], [], [0]
    paths, above = [(root,)], [np.float32(0)]
    for step in range(depth + 1):
        new_tokens, new_scores, new_paths = [], [], []
        for path, score in zip(paths, above, strict=True):
            for token, value in sorted(log_probs_of(path).items(), key=lambda item: -item[1])[:top_k]:
                new_tokens.append(token)
                new_scores.append(score + np.float32(value))
                new_paths.append((*path, token))
        tokens += new_tokens
        scores += new_scores
        chosen = best(new_scores, top_k)
        bias = 1 + top_k**2 * max(0, step - 1) + (top_k if step > 0 else 0)
        parents += [index + bias for index in chosen]
        paths, above = [new_paths[index] for index in chosen], [new_scores[index] for index in chosen]
    kept = sorted(best(scores, total))
    draft_parents = [parents[index // top_k] for index in kept]
    place = [int(np.searchsorted(kept, parent - 1)) + 1 if parent else 0 for parent in draft_parents]
    return [root, *(tokens[index] for index in kept)], [-1, *place]
