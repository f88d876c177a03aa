"""Logits, drafted tokens and trees of the acceptance rules, and the call of each rule over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import specdec_ops
from benchmarks.harness.inputs import DTYPES, fill_random

from .cases import CHAIN_RULES, UNSAMPLED, AcceptCase

DISTINCT = 8  # requests of their own; larger batches repeat them in memory
LIKELY = 64  # tokens of a row that share most of its probability


class TreeTable(NamedTuple):
    """What the walks look up in a tree. It is made once, like the topology that the ops get."""

    parents: torch.Tensor  # [nodes], 0 of the root
    depths: torch.Tensor  # [nodes]
    children: torch.Tensor  # [nodes, width], padded with -1
    levels: list[torch.Tensor]  # the nodes of every depth
    width: int
    depth: int

    @classmethod
    def of(cls, tree, device) -> TreeTable:
        lists = [[] for _ in range(len(tree))]
        for child, parent in enumerate(tree.parents.tolist()):
            if parent >= 0:
                lists[parent].append(child)
        width, depths = max(1, *map(len, lists)), torch.tensor(tree.depths).to(device, torch.long)
        depth = int(depths.max())
        return cls(
            torch.tensor(tree.parents).to(device, torch.long).clamp(min=0),
            depths,
            torch.tensor([children + [-1] * (width - len(children)) for children in lists], device=device),
            [(depths == level).nonzero()[:, 0] for level in range(depth + 1)],
            width,
            depth,
        )


@dataclass
class Inputs:
    """Logits [batch, nodes, vocab], draft_logits the same or None, tokens int32 [batch, nodes]; node 0's is not read.

    A chain is a tree here, too; only the call of chain_accept takes its rows apart.
    """

    case: AcceptCase
    target: torch.Tensor
    draft: torch.Tensor | None
    tokens: torch.Tensor
    topology: specdec_ops.Topology
    tree: specdec_ops.Tree
    seeds: torch.Tensor
    positions: torch.Tensor

    def __post_init__(self):
        self.table = TreeTable.of(self.tree, self.target.device)

    def exact(self, requests: list[int]) -> Inputs:
        """The same of some requests, in float64."""
        return replace(
            self,
            target=self.target[requests].double(),
            draft=None if self.draft is None else self.draft[requests].double(),
            tokens=self.tokens[requests],
            seeds=self.seeds[requests],
            positions=self.positions[requests],
        )


def make_inputs(case: AcceptCase, device: str = "cpu") -> Inputs:
    """Rows like a language model's: most of the mass is on a few dozen tokens, and the draft is roughly right there.

    Children are drawn from the draft without replacement and with the same top-p, or are its most likely tokens, as the
    rule expects.
    """
    tree = specdec_ops.Tree.from_parents(case.tree.parents)
    distinct, nodes, vocab = min(case.batch, DISTINCT), case.nodes, case.vocab
    generator = torch.Generator().manual_seed(case.vocab + case.nodes)
    likely = torch.randint(vocab, (distinct, nodes, min(LIKELY, vocab)), generator=generator)
    height = torch.rand(likely.shape, generator=generator) * 9 + 5
    rows = []
    for seed, blur in ((1, 0.0), (2, 1.0)):
        row = fill_random((distinct, nodes, vocab), DTYPES[case.dtype], seed)
        off = torch.randn(height.shape, generator=generator) * blur
        rows.append(row.scatter_(2, likely, (height + off).to(row.dtype)))
    seeds, positions = torch.arange(case.batch) * 7919 + 11, torch.arange(case.batch, dtype=torch.int32) * 3 + 100
    noise = {"seeds": seeds[:distinct], "positions": positions[:distinct], "top_p": case.top_p}
    if case.rule in UNSAMPLED:
        noise["temperature"] = 0.0
    tokens = draw_children(tree, rows[1], noise)
    repeat = -(-case.batch // distinct)

    def spread(tensor):
        return tensor.repeat(repeat, *[1] * (tensor.dim() - 1))[: case.batch].to(device)

    inputs = Inputs(
        case,
        spread(rows[0]),
        spread(rows[1]) if case.drafts else None,
        spread(tokens),
        tree.to(device),
        tree,
        seeds.to(device),
        positions.to(device),
    )
    case.must_read[:] = [sum(len(reads) for reads in rows_to_read(inputs)) * case.row_bytes]
    return inputs


def draw_children(tree, draft, noise) -> torch.Tensor:
    tokens = torch.full(draft.shape[:2], -1, dtype=torch.int32)
    for node in range(len(tree)):
        children = [child for child in range(len(tree)) if tree.parents[child] == node]
        if children:
            row = draft[:, node : node + 1]
            drawn = specdec_ops.sample_children(row, len(children), first_parent=node, **noise)
            tokens[:, children] = drawn.tokens[:, 0]
    return tokens


def call(inputs: Inputs, backend: str = "auto"):
    """The op of the case's rule."""
    case, rule = inputs.case, inputs.case.rule
    noise = {"seeds": inputs.seeds, "positions": inputs.positions, "top_p": case.top_p, "backend": backend}
    if rule in CHAIN_RULES:
        draft = None if inputs.draft is None else inputs.draft[:, :-1]
        return specdec_ops.chain_accept(inputs.target, inputs.tokens[:, 1:], draft, rule=rule, **noise)
    tree = (inputs.target, inputs.tokens, inputs.topology)
    if rule == "greedy":
        return specdec_ops.greedy_accept(*tree, backend=backend)
    if rule == "match":
        return specdec_ops.match_accept(*tree, **noise)
    if rule == "typical":
        return specdec_ops.typical_accept(*tree, **noise)
    return specdec_ops.tree_accept(*tree, inputs.draft, rule=rule, **noise)


def rows_to_read(inputs: Inputs) -> list[list[tuple[str, int, int]]]:
    """Of each request the rows (kind, request, node) that the accepted path alone makes necessary."""
    result = call(inputs)
    parents = {int(parent) for parent in inputs.tree.parents}
    needed = []
    for request, path in enumerate(result.nodes.tolist()):
        path = [node for node in path if node >= 0]
        rows = [("target", request, node) for node in path]
        if inputs.draft is not None:
            rows += [("draft", request, node) for node in path if node in parents]
        needed.append(rows)
    return needed
