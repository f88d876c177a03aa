"""What the tree functions of sgl_kernel share: linked lists to parents, the walk, and results written in place."""

from __future__ import annotations

import torch

from specdec_ops import Acceptance, build_topology, greedy_accept
from specdec_ops._core.checks import INT32_MAX


def siblings(first_child: torch.Tensor, next_sibling: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parent of each node, its rank in its parent's list of children, and the sibling before it.

    Lists may be in any order, as sgl-kernel's are. Ranks are found by doubling: after k steps every node knows the one
    up to 2^k places before it, so a list that leads in a circle ends the search too, at a node without a parent.

    Args:
        first_child: int64 [batch, nodes], -1 for none.
        next_sibling: like first_child.

    Returns:
        Parents int64 [batch, nodes], -1 for a node that no list leads to, ranks int64 [batch, nodes], and previous
        siblings int64 [batch, nodes], -1 for the first of a list.
    """
    nodes = first_child.shape[1]
    ids = torch.arange(nodes, device=first_child.device).expand_as(first_child)
    previous, head_of = (_inverse(links, ids) for links in (next_sibling, first_child))
    rank = (previous >= 0).long()
    earlier = torch.where(previous >= 0, previous, ids)
    for _ in range(_doublings(nodes)):
        rank = rank + rank.gather(1, earlier)
        earlier = earlier.gather(1, earlier)
    return head_of.gather(1, earlier), rank, previous


def sum_along(values: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """For each node the sum over its earlier siblings and itself.

    Sums of different lists never meet, so what is small in one is not lost beside what is large in another, and
    infinities stay where they are.

    Args:
        values: [batch, nodes].
        previous: int64 [batch, nodes], see siblings.
    """
    batch, nodes = values.shape
    end = previous.new_full((batch, 1), nodes)  # what lies before the first of a list, and adds 0
    earlier = torch.cat([torch.where(previous >= 0, previous, nodes), end], dim=1)
    total = torch.cat([values, values.new_zeros(batch, 1)], dim=1)
    for _ in range(_doublings(nodes)):
        total = total + total.gather(1, earlier)
        earlier = earlier.gather(1, earlier)
    return total[:, :nodes]


def _doublings(nodes: int) -> int:
    """Steps after which the longest list of this many nodes has been walked."""
    return max(nodes - 1, 1).bit_length()


def _inverse(links: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """For each node the one that links to it, or -1. Links out of the tree go to a column that is cut off again."""
    batch, nodes = links.shape
    target = torch.where((links >= 0) & (links < nodes), links, nodes)
    return links.new_full((batch, nodes + 1), -1).scatter_(1, target, ids)[:, :nodes]


def follow(accepted: torch.Tensor, parents: torch.Tensor, ranks: torch.Tensor, max_depth: int) -> Acceptance:
    """Walk from node 0 to the first accepted child in its parent's order, and on, with greedy_accept.

    Every node stands for itself as a token, and the target's choice at a node is the child to go to. So equal tokens
    among siblings can't be mistaken for each other, and the order of siblings is the caller's.

    Args:
        accepted: bool [batch, nodes], whether a node is accepted if its parent is.
        parents: int64 [batch, nodes], see siblings.
        ranks: int64 [batch, nodes].
        max_depth: the most nodes to accept.
    """
    batch, nodes = accepted.shape
    ids = torch.arange(nodes, device=accepted.device).expand(batch, nodes)
    accepted = accepted & (parents >= 0)
    row = torch.where(accepted, parents, nodes)  # the others share a column that is not looked at
    first = ranks.new_full((batch, nodes + 1), nodes).scatter_reduce(1, row, ranks, "amin")
    chosen = accepted & (ranks == first.gather(1, row))
    choice = ids.new_full((batch, nodes + 1), -1).scatter(1, torch.where(chosen, parents, nodes), ids)[:, :nodes]
    return greedy_accept(choice.int(), ids.int(), build_topology(parents.int()), max_depth=max_depth)


def write(op: str, room: int, walk: Acceptance, tokens, final, slots, predicts, accept_index, accept_token_num) -> None:
    """Write a walk in sgl-kernel's way: entries off the accepted path keep what they hold.

    Args:
        op: the caller's name.
        room: how many slots there are. On a CPU, where this waits for nothing, slots are looked at before.
        walk: from follow.
        tokens: int64 [batch, nodes], of the nodes.
        final: int64 [batch], the token after the last accepted one.
        slots: int64 [batch, nodes]: where in `predicts` each node's successor goes.
        predicts: int32 [slots], written.
        accept_index: int32 [batch, max_depth + 1], written: the slots of the path.
        accept_token_num: int32 [batch], written.

    Raises:
        ValueError: a slot on the path is outside of the room, on a CPU.
    """
    count = walk.num_accepted.long()[:, None]
    columns = torch.arange(accept_index.shape[1], device=tokens.device)
    path = walk.nodes.long().gather(1, torch.minimum(columns, count))  # past its end the last node, once more
    path_slots = slots.gather(1, path)
    if slots.device.type == "cpu" and not ((path_slots >= 0) & (path_slots < room)).all():
        got = f"{path_slots.min()} to {path_slots.max()}"
        raise ValueError(f"specdec_ops.{op}: retrive_index must be from 0 to {room - 1}, got {got}")
    after = torch.cat([tokens.gather(1, path[:, 1:]), final[:, None]], dim=1)
    after = torch.where(columns < count, after, final[:, None])
    after = after.clamp(-1, INT32_MAX)  # an id that int32 can't hold must not become another token
    predicts.scatter_(0, path_slots.flatten(), after.flatten().to(predicts.dtype))
    accept_index.copy_(torch.where(columns <= count, path_slots, accept_index.long()))
    accept_token_num.copy_(walk.num_accepted)
