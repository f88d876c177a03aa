"""sgl-kernel's functions over draft trees: `tree_speculative_sampling_target_only`, `verify_tree_greedy`,
`build_tree_kernel_efficient`.

Signatures, layouts and habits are sgl-kernel's: results go into tensors of the caller, and entries off the accepted
path keep what they held. Arguments spelled `retrive_...` may also be named `retrieve_...`, as newer versions of it
do. The walk is `greedy_accept`, and links come from `build_topology`. Coins and the final draw of
`tree_speculative_sampling_target_only` are the caller's numbers, which the acceptance ops do not take (theirs are
functions of seed and position), so what each node decides with its coin is computed here by PyTorch: for all nodes at
once, from one probability each, and one row per request for the final draw. To have these from kernels, use
`tree_accept(rule="coin")`.

What is done otherwise than in the original:

- A child that repeats an earlier sibling is skipped. The original counts its probability twice, which biases the
  text.
- A coin must be *less* than the accumulated probability. The original accepts at equality, and so a token of
  probability 0 when the coin is 0, which is a value that uniform generators give.
- If rounding leaves nothing to draw from, or a row holds no positive number (NaN is none), the final token comes from
  the row itself, else it is 0. The original gives the last id of the vocabulary, whatever its probability.
- `draft_probs` is neither read nor written, and may be left out. The original needs it zeroed and leaves rejected
  probabilities in it; one that was not zeroed changes the next result.
- Offsets are 64-bit. The original's wrap around at 2^32 probabilities.
- Sums are taken in float64, so results near a boundary may differ from the original's float32 ones.
- `build_tree_kernel_efficient` makes a node whose parent was not selected (after a NaN among the scores) an orphan:
  no walk comes to it, and it sees itself alone. The original prints a warning and reads out of bounds for its mask.
- Bit masks of more than 32 nodes are refused. The original's lack the bits.
- `tree_mask` in the bit-packed mode and the three link tensors are written whole, and need not be initialised.

The final draw inverts the distribution function at one number of the caller. With 24-bit numbers it can't give tokens
less likely than about 2^-24 their due; races, as in the ops, can.
"""

from __future__ import annotations

import functools

import torch

from specdec_ops import build_topology
from specdec_ops._checks import wrong

from ._links import follow, siblings, write

FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING = 0, 1, 2
"""Layouts of build_tree_kernel_efficient's tree_mask."""


def _either_spelling(function):
    """Let arguments named retrive_... be given as retrieve_... too."""

    @functools.wraps(function)
    def called(*arguments, **named):
        return function(*arguments, **{name.replace("retrieve_", "retrive_"): value for name, value in named.items()})

    return called


@_either_spelling
def tree_speculative_sampling_target_only(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None = None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Accept a path through each tree with one coin per level, against the target's probabilities alone.

    At an accepted node the first child is taken that is itself at least as likely as threshold_single, or up to which
    the children's probabilities, together, exceed coin * threshold_acc. With both thresholds 1 this is lossless for
    children that are a function of the text before them, such as the draft's most likely tokens; below 1 it is not.

    Args:
        predicts: int32 [slots], written: at the slot of each accepted node the token after it.
        accept_index: int32 [batch, steps], written: slots of the accepted nodes, node 0 first. At most steps - 1 draft
            tokens are accepted.
        accept_token_num: int32 [batch], written: accepted draft tokens.
        candidates: int64 [batch, nodes]: tokens; node 0 is the last committed one.
        retrive_index: int64 [batch, nodes]: the slot of each node.
        retrive_next_token: int64 [batch, nodes]: first children, -1 for none. A child has a higher number than its
            parent.
        retrive_next_sibling: int64 [batch, nodes]: next siblings, in any order, -1 for none.
        uniform_samples: float32 [batch, nodes] in [0, 1): the coin of the level below each node.
        uniform_samples_for_final_sampling: float32 [batch] in [0, 1): for the token after the last accepted one.
        target_probs: float32 [batch, nodes, vocab]: row n is what follows node n. Not normalised here.
        draft_probs: neither read nor written.
        threshold_single: from 0 to 1.
        threshold_acc: from 0 to 1; less than 1e-9 counts as that.
        deterministic: no effect; results are always reproducible.

    Raises:
        TypeError: an integer tensor has another dtype.
        ValueError: a shape does not fit.
    """
    op = "tree_speculative_sampling_target_only"
    outputs = (predicts, accept_index, accept_token_num)
    links = (retrive_index, retrive_next_token, retrive_next_sibling)
    batch, nodes = _check(op, outputs, candidates, links)
    _shaped(op, "target_probs", target_probs, (batch, nodes, target_probs.shape[-1]))
    _shaped(op, "uniform_samples", uniform_samples, (batch, nodes))
    _shaped(op, "uniform_samples_for_final_sampling", uniform_samples_for_final_sampling, (batch,))

    tokens, vocab, steps = candidates.long(), target_probs.shape[-1], accept_index.shape[1]
    parents, ranks = siblings(retrive_next_token.long(), retrive_next_sibling.long())
    possible = (tokens >= 0) & (tokens < vocab)
    requests, above = torch.arange(batch, device=tokens.device), parents.clamp(min=0)
    mass = target_probs[requests[:, None], above, tokens.clamp(0, vocab - 1)].double()
    mass = torch.where(possible & (mass > 0), mass, 0.0)
    first = possible & ~_repeated(parents, ranks, tokens, vocab)
    reached = _running_sum(torch.where(first, mass, 0.0), parents, ranks)
    coins = uniform_samples.gather(1, above).double() * max(threshold_acc, 1e-9)
    walk = follow(first & ((coins < reached) | (mass >= threshold_single)), parents, ranks, steps - 1)

    end = walk.nodes.long().gather(1, walk.num_accepted.long()[:, None])
    tried = (parents == end) & possible & (walk.num_accepted < steps - 1)[:, None]
    row = target_probs[requests, end[:, 0]].double()
    final = _draw(row, torch.where(tried, tokens, vocab), uniform_samples_for_final_sampling)
    write(walk, tokens, final, retrive_index.long(), *outputs)


def _repeated(parents, ranks, tokens, vocab: int) -> torch.Tensor:
    """Whether a node has an earlier sibling with the same token: its neighbour in the order (parent, token, rank)."""
    inside = tokens.clamp(-1, vocab) + 1
    group = (parents + 1) * (vocab + 2) + inside
    order = (group * parents.shape[1] + ranks).argsort(1)
    ordered = group.gather(1, order)
    repeat = torch.cat([torch.zeros_like(order[:, :1], dtype=torch.bool), ordered[:, 1:] == ordered[:, :-1]], dim=1)
    return torch.zeros_like(repeat).scatter(1, order, repeat)


def _running_sum(mass, parents, ranks) -> torch.Tensor:
    """The sum over each node's earlier siblings and itself, float64: as a difference, to 1e-16 for each node."""
    order = (parents * parents.shape[1] + ranks).argsort(1)
    ordered, above = mass.gather(1, order), parents.gather(1, order)
    total = ordered.cumsum(1)
    starts = torch.cat([torch.ones_like(above[:, :1], dtype=torch.bool), above[:, 1:] != above[:, :-1]], dim=1)
    before = torch.where(starts, total - ordered, 0.0).cummax(1).values  # totals ascend: the latest start's is greatest
    return torch.zeros_like(mass).scatter(1, order, total - before)


def _draw(row, tried, uniform) -> torch.Tensor:
    """One token of each row [batch, vocab] without the tried ones (`vocab` for none), by inversion at `uniform`."""
    batch, vocab = row.shape
    row = torch.where((row > 0) & row.isfinite(), row, 0.0)
    left = torch.cat([row, row.new_zeros(batch, 1)], dim=1).scatter(1, tried, 0.0)[:, :vocab]
    left = torch.where((left > 0).any(1, keepdim=True), left, row)
    below = left.cumsum(1)
    total = below[:, -1:].contiguous()
    wanted = uniform[:, None].double().clamp(min=0) * total
    last = torch.searchsorted(below, total)  # the last token with any probability
    return torch.minimum(torch.searchsorted(below, wanted, right=True), last)[:, 0]


@_either_spelling
def verify_tree_greedy(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Accept the path of the target's own choices, to the first child in order that says the same.

    Args:
        predicts: int32 [slots], written: at the slot of each accepted node the token after it.
        accept_index: int32 [batch, steps], written: slots of the accepted nodes, node 0 first. At most steps - 1 draft
            tokens are accepted.
        accept_token_num: int32 [batch], written: accepted draft tokens.
        candidates: int64 [batch, nodes]: tokens; node 0 is the last committed one.
        retrive_index: int64 [batch, nodes]: the slot of each node.
        retrive_next_token: int64 [batch, nodes]: first children, -1 for none.
        retrive_next_sibling: int64 [batch, nodes]: next siblings, in any order, -1 for none.
        target_predict: int64 [batch, nodes]: the target's choices, those of all requests together indexed by slot.

    Raises:
        TypeError: an integer tensor has another dtype.
        ValueError: a shape does not fit.
    """
    op = "verify_tree_greedy"
    outputs = (predicts, accept_index, accept_token_num)
    batch, nodes = _check(op, outputs, candidates, (retrive_index, retrive_next_token, retrive_next_sibling))
    _shaped(op, "target_predict", target_predict, (batch, nodes))
    parents, ranks = siblings(retrive_next_token.long(), retrive_next_sibling.long())
    choice = target_predict.flatten().take(retrive_index.long()).long()
    tokens = candidates.long()
    walk = follow(tokens == choice.gather(1, parents.clamp(min=0)), parents, ranks, accept_index.shape[1] - 1)
    end = walk.nodes.long().gather(1, walk.num_accepted.long()[:, None])
    write(walk, tokens, choice.gather(1, end)[:, 0], retrive_index.long(), *outputs)


@_either_spelling
def build_tree_kernel_efficient(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int = FULL_MASK,
) -> None:
    """Build links, positions and an attention mask of the trees that EAGLE-2 selected.

    Candidates are numbered through: the first topk have node 0 as their parent, and candidate i's parent is otherwise
    candidate `parent_list[i // topk]`. Node 0 is the last verified token, and node n + 1 candidate `selected_index[n]`.

    Args:
        parent_list: int64 [batch, topk * (depth - 1) + 1].
        selected_index: int64 [batch, draft_token_num - 1], ascending, so that parents come first.
        verified_seq_len: int64 [batch]: tokens before node 0.
        tree_mask: written, flat. FULL_MASK: bool, for each request draft_token_num rows of verified_seq_len +
            draft_token_num columns, of which the last draft_token_num are written. QLEN_ONLY: bool, only these columns.
            QLEN_ONLY_BITPACKING: uint8, for each node 1, 2 or 4 bytes for up to 8, 16 or 32 nodes, lowest bit first.
        positions: int64 [batch * draft_token_num], written.
        retrive_index: int64 [batch, draft_token_num], written: node n of request b is b * draft_token_num + n.
        retrive_next_token: int64 [batch, draft_token_num], written: first children.
        retrive_next_sibling: int64 [batch, draft_token_num], written.
        topk: candidates per expanded node.
        depth: drafted levels.
        draft_token_num: nodes of each tree, node 0 included.
        tree_mask_mode: see tree_mask.

    Raises:
        ValueError: a shape does not fit, an unknown mode, or more than 32 nodes to be packed into bits.
    """
    op, nodes = "build_tree_kernel_efficient", draft_token_num
    batch = parent_list.shape[0]
    _shaped(op, "selected_index", selected_index, (batch, nodes - 1))
    _shaped(op, "verified_seq_len", verified_seq_len, (batch,))
    for name, links in (("index", retrive_index), ("next_token", retrive_next_token)):
        _shaped(op, f"retrive_{name}", links, (batch, nodes))
    _shaped(op, "retrive_next_sibling", retrive_next_sibling, (batch, nodes))
    if tree_mask_mode not in (FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING):
        raise ValueError(_wrong(op, "tree_mask_mode", "0, 1 or 2", tree_mask_mode))
    if tree_mask_mode == QLEN_ONLY_BITPACKING and nodes > 32:
        raise ValueError(_wrong(op, "draft_token_num", "at most 32 for a mask of bits", nodes))

    topology = build_topology(_selected_parents(parent_list.long(), selected_index.long(), topk))
    lengths = verified_seq_len.long()
    positions.view(batch, nodes).copy_(topology.depths + lengths[:, None])
    retrive_index.copy_(torch.arange(batch * nodes, device=retrive_index.device).view(batch, nodes))
    retrive_next_token.copy_(topology.first_child)
    # Roots are siblings to build_topology; here node 0 has none, and an orphan is in no list.
    retrive_next_sibling.copy_(torch.where(topology.parents < 0, -1, topology.next_sibling))
    _write_mask(topology.ancestors, lengths, tree_mask, tree_mask_mode)


def _selected_parents(parent_list, selected_index, topk: int) -> torch.Tensor:
    """int32 [batch, nodes]: the parent of each node, -1 for node 0 and for orphans."""
    batch, drafted = selected_index.shape
    group = selected_index // topk
    candidate = parent_list.gather(1, group.clamp(0, parent_list.shape[1] - 1))
    same = candidate[:, :, None] == selected_index[:, None, :]
    found = torch.where(same.any(2), same.int().argmax(2) + 1, -1) if drafted else group
    parents = torch.where(group == 0, 0, found)
    return torch.cat([parents.new_full((batch, 1), -1), parents], dim=1).int()


def _write_mask(ancestors, lengths, tree_mask, mode: int) -> None:
    batch, nodes, _ = ancestors.shape
    device, flat = ancestors.device, tree_mask.view(-1)
    if mode == QLEN_ONLY_BITPACKING:
        width = 1 if nodes <= 8 else 2 if nodes <= 16 else 4
        shifts = 8 * torch.arange(width, device=device)
        flat[: batch * nodes * width] = ((ancestors[:, :, :1] >> shifts) & 255).flatten().to(tree_mask.dtype)
        return
    columns = torch.arange(nodes, device=device)
    visible = (ancestors[:, :, columns // 64] >> (columns % 64)) & 1
    width = lengths + nodes if mode == FULL_MASK else torch.full_like(lengths, nodes)
    start = (width * nodes).cumsum(0) - width * nodes
    place = (start + width - nodes)[:, None, None] + width[:, None, None] * columns[:, None] + columns
    flat.scatter_(0, place.flatten(), visible.flatten().to(tree_mask.dtype))


def _check(op: str, outputs, candidates, links) -> tuple[int, int]:
    predicts, accept_index, accept_token_num = outputs
    if candidates.dim() != 2 or candidates.shape[1] < 1:
        raise ValueError(_wrong(op, "candidates", "[batch, nodes] with at least one node", candidates))
    batch, nodes = candidates.shape
    for name, tensor in (("index", links[0]), ("next_token", links[1]), ("next_sibling", links[2])):
        _shaped(op, f"retrive_{name}", tensor, (batch, nodes))
    named = {"predicts": predicts, "accept_index": accept_index, "accept_token_num": accept_token_num}
    for name, tensor in named.items():
        if tensor.dtype != torch.int32:
            raise TypeError(_wrong(op, name, "an int32 tensor", tensor))
    if accept_index.dim() != 2 or accept_index.shape[0] != batch or accept_index.shape[1] < 1:
        raise ValueError(_wrong(op, "accept_index", f"[{batch}, steps] with at least one step", accept_index))
    if predicts.dim() != 1:
        raise ValueError(_wrong(op, "predicts", "one-dimensional", predicts))
    _shaped(op, "accept_token_num", accept_token_num, (batch,))
    return batch, nodes


def _shaped(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(_wrong(op, name, str(list(shape)), tensor))


def _wrong(op: str, name: str, must: str, value) -> str:
    return wrong(f"compat.sgl_kernel.{op}", name, must, value)
