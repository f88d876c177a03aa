"""Inputs of grow_tree and prune_tree, and EAGLE's algorithm as PyTorch does it best: batched, without a host loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import specdec_ops

from .cases import GrowCase

VOCAB = 1000


@dataclass
class Levels:
    """What a draft says: logprobs [batch, rows, branching] of each level, and tokens, int32 and as PyTorch's are."""

    case: GrowCase
    tokens: list[torch.Tensor]
    long_tokens: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    roots: torch.Tensor

    def pool(self) -> specdec_ops.CandidatePool:
        case = self.case
        sizes = {"levels": case.levels, "width": case.width, "branching": case.branching}
        return specdec_ops.CandidatePool.empty(case.batch, **sizes, device=self.roots.device)

    def grow(self, pool: specdec_ops.CandidatePool, backend: str) -> list[torch.Tensor]:
        """The tokens of every frontier."""
        return [
            specdec_ops.grow_tree(pool, tokens, logprobs, level=level, backend=backend).tokens
            for level, (tokens, logprobs) in enumerate(zip(self.tokens, self.logprobs, strict=True))
        ]


def make_inputs(case: GrowCase, device: str = "cpu") -> Levels:
    generator = torch.Generator().manual_seed(0)
    found = []
    for level in range(case.levels):
        logits = 2 * torch.randn(case.batch, case.width if level else 1, VOCAB, generator=generator)
        found.append(logits.log_softmax(-1).topk(case.branching))
    roots = torch.arange(case.batch, dtype=torch.int32, device=device)
    tokens = [top.indices.to(device) for top in found]
    return Levels(case, [ids.int() for ids in tokens], tokens, [top.values.to(device) for top in found], roots)


@dataclass
class Grown:
    """What EAGLE's expansion leaves: tokens and scores [batch, candidates], parents, and the draft's last mask."""

    tokens: torch.Tensor
    scores: torch.Tensor
    parents: torch.Tensor
    mask: torch.Tensor
    frontiers: list[torch.Tensor]


def expand(levels: Levels) -> Grown:
    """EAGLE's topK_genrate up to its last top-k, for a batch: scores, frontiers, and the mask of the draft's tree.

    Parents are places in the pool, 0 for the root and else 1 + the parent's, one for each row of candidates.
    """
    case, batch = levels.case, levels.case.batch
    width, branching, device = case.width, case.branching, levels.roots.device
    eye = torch.eye(width, device=device).expand(batch, width, width)
    scores = levels.logprobs[0][:, 0]
    all_scores, all_tokens = [scores], [levels.long_tokens[0][:, 0]]
    parents = [torch.zeros(batch, 1, dtype=torch.long, device=device)]
    best = scores.topk(min(width, branching), dim=1)
    mask, frontiers, first = eye, [all_tokens[0].gather(1, best.indices)], 1
    for tokens, logprobs in zip(levels.long_tokens[1:], levels.logprobs[1:], strict=True):
        parents.append(best.indices + first)
        cumulated = (logprobs + best.values[:, :, None]).flatten(1)
        first = 1 + sum(part.shape[1] for part in all_scores)
        all_scores.append(cumulated)
        all_tokens.append(tokens.flatten(1))
        if len(all_scores) == case.levels:
            break
        best = cumulated.topk(width, dim=1)
        rows = best.indices // branching
        frontiers.append(all_tokens[-1].gather(1, best.indices))
        mask = torch.cat((mask.gather(1, rows[:, :, None].expand(-1, -1, mask.shape[2])), eye), dim=2)
    return Grown(torch.cat(all_tokens, 1), torch.cat(all_scores, 1), torch.cat(parents, 1), mask, frontiers)


def select(levels: Levels, grown: Grown) -> tuple[torch.Tensor, torch.Tensor]:
    """EAGLE's end: the best of the pool in its order, and each node's parent by bisection, the root's being -1."""
    case = levels.case
    kept = grown.scores.topk(case.nodes - 1, dim=1, sorted=False).indices.sort(dim=1).values
    tokens = torch.cat((levels.roots.long()[:, None], grown.tokens.gather(1, kept)), dim=1)
    above = grown.parents.gather(1, kept // case.branching)
    nodes = torch.searchsorted(kept, above - 1)
    parents = torch.where(above == 0, -1, nodes) + 1
    return tokens, torch.nn.functional.pad(parents, (1, 0), value=-1)


def tree_mask(parents: torch.Tensor, depth: int) -> torch.Tensor:
    """Which nodes each node sees [batch, nodes, nodes], by doubling: no loop over nodes."""
    nodes = parents.shape[1]
    reach = torch.eye(nodes, device=parents.device).repeat(parents.shape[0], 1, 1)
    reach[:, 1:].scatter_(2, parents[:, 1:, None], 1.0)
    for _ in range(depth.bit_length()):
        reach = torch.bmm(reach, reach).clamp_(max=1.0)
    return reach > 0


def prune(levels: Levels, grown: Grown) -> tuple[torch.Tensor, ...]:
    """Tokens, parents, mask and depths of the tree that the target judges."""
    tokens, parents = select(levels, grown)
    mask = tree_mask(parents, levels.case.levels)
    return tokens, parents, mask, mask.sum(dim=2) - 1


def prune_by_loops(levels: Levels, grown: Grown) -> tuple[torch.Tensor, ...]:
    """The same as EAGLE's code has it, for one request: the mask node by node."""
    tokens, parents = select(levels, grown)
    mask = torch.eye(levels.case.nodes, device=parents.device).bool()
    mask[:, 0] = True
    for node, parent in enumerate(parents[0, 1:].tolist()):
        mask[node + 1].add_(mask[parent])
    return tokens, parents, mask[None], (mask.sum(dim=1) - 1)[None]


def parts(tree: specdec_ops.PrunedTree) -> list[torch.Tensor]:
    """What PyTorch's forms give, of our tree."""
    topology = tree.topology
    nodes = torch.arange(topology.nodes, device=topology.device)
    mask = (topology.ancestors[..., nodes // 64] >> (nodes % 64)) & 1
    return [tree.tokens, topology.parents, mask, topology.depths]


def draft_mask(pool: specdec_ops.CandidatePool) -> torch.Tensor:
    """Of the draft's tree without its root: what the last level's rows see, as EAGLE's mask has it."""
    topology = pool.topology
    nodes = torch.arange(1, topology.nodes, device=topology.device)
    return ((topology.ancestors[:, -pool.width :, nodes // 64] >> (nodes % 64)) & 1).float()
