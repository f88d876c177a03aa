"""The definition of grow_tree in plain PyTorch. It runs on any device and never waits for it."""

import torch

from specdec_ops.status import GrowStatus

_NONE = float("-inf")


def grow_tree(arguments, outputs) -> None:
    """Write a level's candidates, the draft's nodes that they become, and the frontier."""
    a, o = arguments, outputs
    if a.level == 0:
        _blank(o)
    batch, rows, branching = a.top_logprobs.shape
    width = o.frontier_tokens.shape[1]
    parent_nodes = slice(a.first_parent, a.first_parent + rows)
    parents = o.candidates[:, parent_nodes].clone()
    grows = (
        torch.ones_like(parents, dtype=torch.bool) if a.level == 0 else (parents >= 0) & (parents < a.first_candidate)
    )
    if a.active is not None:
        grows &= a.active[:, None]
    above = 0.0 if a.level == 0 else o.scores.gather(1, parents.where(grows, 0).long())[:, :, None]

    # What is no candidate: padding, and what makes no sense, which the status tells of.
    tokens = a.top_tokens
    given = grows[:, :, None] & (tokens != -1)
    impossible = tokens < 0
    if a.draft_to_target is not None:
        impossible |= tokens >= len(a.draft_to_target)
        tokens = a.draft_to_target[tokens.where(~impossible, 0).long()]
    invalid = a.top_logprobs.isnan() | (a.top_logprobs == float("inf"))
    scores = above + a.top_logprobs.clamp(max=0)
    exists = given & ~impossible & ~invalid & (scores > _NONE)
    scores = torch.where(exists, scores, _NONE).flatten(1)
    tokens = torch.where(exists, tokens, -1).flatten(1)
    o.status.bitwise_or_(
        GrowStatus.TOKEN_OUT_OF_RANGE * (given & impossible).any(-1).any(-1).int()
        + GrowStatus.LOGPROB_INVALID * (given & ~impossible & invalid).any(-1).any(-1).int()
    )
    own = slice(a.first_candidate, a.first_candidate + rows * branching)
    o.tokens[:, own] = tokens
    o.scores[:, own] = scores
    o.parents[:, own] = torch.where(exists, parents[:, :, None], -1).flatten(1)
    o.expanded[:, own] = -1

    # The frontier: the best that may be expanded. A stable sort leaves the lower index first among equals.
    ends = torch.zeros_like(exists.flatten(1))
    for token in a.eos:
        ends |= tokens == token
    order = torch.where(ends, _NONE, scores).sort(dim=1, descending=True, stable=True)
    best = order.indices[:, :width]
    found = order.values[:, :width] > _NONE
    missing = width - best.shape[1]  # the level has fewer candidates than there are columns
    best, found = (torch.nn.functional.pad(part, (0, missing)) for part in (best, found))
    row = torch.where(found, best // branching, -1)
    o.frontier_tokens.copy_(torch.where(found, tokens.gather(1, best), -1))
    o.frontier_scores.copy_(torch.where(found, scores.gather(1, best), _NONE))
    o.parent_rows.copy_(row)

    # The nodes of the draft that the frontier becomes.
    new = slice(a.first_node, a.first_node + width)
    node = torch.arange(a.first_node, a.first_node + width, device=best.device)
    places = torch.where(found, a.first_candidate + best, o.tokens.shape[1])
    expanded = torch.nn.functional.pad(o.expanded, (0, 1))  # and a place for what is not there
    o.expanded.copy_(expanded.scatter(1, places, node.int().expand(batch, -1))[:, :-1])
    o.candidates[:, new] = torch.where(found, a.first_candidate + best, -1).int()
    o.node_parents[:, new] = torch.where(found, a.first_parent + row, -1).int()
    o.depths[:, new] = (a.level + 1) * found.int()
    above = o.ancestors[:, parent_nodes]
    words = o.ancestors.shape[2]
    itself = torch.where(node[:, None] // 64 == torch.arange(words, device=node.device), 1 << (node[:, None] % 64), 0)
    seen = above.gather(1, row.clamp(min=0)[:, :, None].expand(-1, -1, words)) | itself
    o.ancestors[:, new] = torch.where(found[:, :, None], seen, 0)
    o.first_child[:, new] = -1

    same = found[:, :, None] & (row[:, :, None] == row[:, None, :]) & (node > node[:, None])
    o.next_sibling[:, new] = _lowest(same, node)
    is_child = row[:, None, :] == torch.arange(rows, device=row.device)[:, None]
    o.first_child[:, parent_nodes] = _lowest(is_child, node)
    count = found.sum(dim=1)
    o.num_nodes.copy_(torch.where(count > 0, a.first_node + count, o.num_nodes))


def _blank(o) -> None:
    """A pool whose draft has its root, and nothing else."""
    for tensor in (o.tokens, o.parents, o.expanded, o.candidates, o.node_parents, o.first_child, o.next_sibling):
        tensor.fill_(-1)
    o.scores.fill_(_NONE)
    o.depths.zero_()
    o.ancestors.zero_()
    o.ancestors[:, 0, 0] = 1
    o.num_nodes.fill_(1)
    o.status.zero_()


def _lowest(condition: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
    """The lowest node for which a condition holds along the last dimension, or -1."""
    if node.shape[0] == 0:
        return condition.new_full(condition.shape[:-1], -1, dtype=torch.int32)
    none = torch.iinfo(torch.int32).max
    found = torch.where(condition, node, none).amin(dim=-1)
    return torch.where(found < none, found, -1).int()
