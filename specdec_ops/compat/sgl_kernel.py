"""sgl-kernel's functions over draft trees: `tree_speculative_sampling_target_only`, `verify_tree_greedy`,
`build_tree_kernel_efficient`. As in sgl-kernel 0.3.21, and as SGLang 0.5.23 has them, which took them over.

Signatures, layouts and habits are sgl-kernel's: results go into tensors of the caller, and entries off the accepted
path keep what they held. Arguments spelled `retrive_...` may also be named `retrieve_...`, as newer versions of it
do. The walk is `greedy_accept`, and links come from `build_topology`. Coins and the final draw of
`tree_speculative_sampling_target_only` are the caller's numbers, which the acceptance ops do not take (theirs are
functions of seed and position), so what each node decides with its coin is computed here by PyTorch: for all nodes at
once, from one probability each, and one row per request for the final draw. To have these from kernels, use
`tree_accept(rule="target_only")`. SGLang's path for CPUs looks for the last two under their names with _cpu at the end.

What is done otherwise than in the original:

- A child that repeats an earlier sibling is skipped. The original counts its probability twice, which biases the
  text.
- A coin must be *less* than the accumulated probability, and a token of probability 0 is never accepted, whatever the
  thresholds. SGLang 0.5.23 does the same; sgl-kernel 0.3.21 accepts at equality, and so a token of probability 0 when
  the coin is 0, which is a value that uniform generators give, or when threshold_single is 0.
- A token below 0 or beyond the vocabulary is never accepted, also where `target_predict` says the same. The original
  reads outside of its tensors.
- If rounding leaves nothing to draw from, or a row holds no positive number (NaN is none), the final token comes from
  the row itself, else it is 0. The original gives the last id of the vocabulary, whatever its probability.
- `draft_probs` is neither read nor written, and may be left out. The original needs it zeroed and leaves rejected
  probabilities in it; one that was not zeroed changes the next result.
- Offsets are 64-bit. The original's wrap around at 2^32 probabilities.
- Sums are taken in float64, so results near a boundary may differ from the original's float32 ones.
- `build_tree_kernel_efficient` makes a node whose parent was not selected (after a NaN among the scores) an orphan:
  no walk comes to it, and it sees itself alone. The original prints a warning and reads out of bounds for its mask.
  So is one with a candidate that `parent_list` has no parent for.
- Bit masks of more than 32 nodes are refused. sgl-kernel 0.3.21's lack the bits.
- `tree_mask` in the bit-packed mode and the three link tensors are written whole, and need not be initialised.
- On a CPU, where looking costs no waiting, slots and lengths that lead out of a tensor are refused.

The final draw inverts the distribution function at one number of the caller. With 24-bit numbers it can't give tokens
less likely than about 2^-24 their due; races, as in the ops, can.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from specdec_ops import build_topology
from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.ops.acceptance.checks import check_fraction

from ._links import follow, siblings, sum_along, write

_MODULE = "compat.sgl_kernel"
_T = TypeVar("_T")
FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING = 0, 1, 2
"""Layouts of build_tree_kernel_efficient's tree_mask."""


def _either_spelling(function: Callable[..., _T]) -> Callable[..., _T]:
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
    A token of probability 0 is never taken. The signature is that of sgl-kernel 0.3.21.

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
        threshold_single: from 0 to 1, rounded to float32.
        threshold_acc: from 0 to 1, rounded to float32; less than 1e-9 counts as that.
        deterministic: no effect; results are always reproducible.

    Raises:
        TypeError: an integer tensor has another dtype, or a threshold is no number.
        ValueError: a shape does not fit, a threshold is not from 0 to 1, or, on a CPU, a slot is outside of predicts.
    """
    op = "tree_speculative_sampling_target_only"
    for name, threshold in (("threshold_single", threshold_single), ("threshold_acc", threshold_acc)):
        check_fraction(f"{_MODULE}.{op}", name, threshold)
    outputs = (predicts, accept_index, accept_token_num)
    links = (retrive_index, retrive_next_token, retrive_next_sibling)
    batch, nodes = _check(op, outputs, candidates, links)
    _check_numbers(op, batch, nodes, target_probs, uniform_samples, uniform_samples_for_final_sampling)

    tokens, vocab, steps = candidates.long(), target_probs.shape[-1], accept_index.shape[1]
    parents, ranks, previous = siblings(retrive_next_token.long(), retrive_next_sibling.long())
    inside = (tokens >= 0) & (tokens < vocab)
    requests, above = torch.arange(batch, device=tokens.device), parents.clamp(min=0)
    mass = target_probs[requests[:, None], above, tokens.clamp(0, vocab - 1)].double()
    first = inside & (mass > 0) & ~_repeated(parents, ranks, tokens, vocab)
    reached = sum_along(torch.where(first, mass, 0.0), previous)
    coins = uniform_samples.gather(1, above).double() * max(_float32(threshold_acc), 1e-9)
    accepted = first & ((coins < reached) | (mass >= _float32(threshold_single)))
    walk = follow(accepted, parents, ranks, steps - 1)
    final = _after(walk, parents, torch.where(inside, tokens, vocab), target_probs, uniform_samples_for_final_sampling)
    write(f"{_MODULE}.{op}", predicts.shape[0], walk, tokens, final, retrive_index.long(), *outputs)


def _after(walk, parents, tokens, target_probs, uniform) -> torch.Tensor:
    """The token after each walk, int64 [batch], of what the children tried there leave. Other tokens are `vocab`."""
    batch, steps = walk.nodes.shape
    end = walk.nodes.long().gather(1, walk.num_accepted.long()[:, None])
    tried = (parents == end) & (walk.num_accepted < steps - 1)[:, None]
    row = target_probs[torch.arange(batch, device=end.device), end[:, 0]].double()
    return _draw(row, torch.where(tried, tokens, row.shape[1]), uniform)


def _float32(number: float) -> float:
    """The number as the original has it: a threshold of .7 must take a probability of .7."""
    return ctypes.c_float(number).value


def _repeated(parents, ranks, tokens, vocab: int) -> torch.Tensor:
    """Whether a node has an earlier sibling with the same token: its neighbour in the order (parent, token, rank)."""
    inside = tokens.clamp(-1, vocab) + 1
    group = (parents + 1) * (vocab + 2) + inside
    order = (group * parents.shape[1] + ranks).argsort(1)
    ordered = group.gather(1, order)
    repeat = torch.cat([torch.zeros_like(order[:, :1], dtype=torch.bool), ordered[:, 1:] == ordered[:, :-1]], dim=1)
    return torch.zeros_like(repeat).scatter(1, order, repeat)


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

    The signature is that of sgl-kernel 0.3.21.

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
        ValueError: a shape does not fit, or, on a CPU, a slot is outside of predicts or of target_predict.
    """
    op = "verify_tree_greedy"
    outputs = (predicts, accept_index, accept_token_num)
    batch, nodes = _check(op, outputs, candidates, (retrive_index, retrive_next_token, retrive_next_sibling))
    _shaped(op, "target_predict", target_predict, (batch, nodes))
    parents, ranks, _ = siblings(retrive_next_token.long(), retrive_next_sibling.long())
    slots, known = retrive_index.long(), target_predict.flatten().long()
    choice = known.take(slots.clamp(0, known.numel() - 1)) if batch else slots  # write() looks at those of the path
    tokens = candidates.long()
    accepted = (tokens >= 0) & (tokens == choice.gather(1, parents.clamp(min=0)))
    walk = follow(accepted, parents, ranks, accept_index.shape[1] - 1)
    end = walk.nodes.long().gather(1, walk.num_accepted.long()[:, None])
    room = min(predicts.shape[0], known.shape[0])
    write(f"{_MODULE}.{op}", room, walk, tokens, choice.gather(1, end)[:, 0], slots, *outputs)


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
    The signature is that of sgl-kernel 0.3.21.

    Args:
        parent_list: int64 [batch, topk * (depth - 1) + 1]; of any width for a depth of 1, where nothing is looked up.
        selected_index: int64 [batch, draft_token_num - 1], ascending, so that parents come first.
        verified_seq_len: int64 [batch]: tokens before node 0.
        tree_mask: written, of any dtype, contiguous: bytes are what counts, and more than are needed may be given.
            FULL_MASK: a byte of 0 or 1 for each entry, for each request draft_token_num rows of verified_seq_len +
            draft_token_num columns, of which the last draft_token_num are written. QLEN_ONLY: the same, only these
            columns. QLEN_ONLY_BITPACKING: for each node 1, 2 or 4 bytes for up to 8, 16 or 32 nodes, lowest bit first.
        positions: int64 [batch * draft_token_num], written.
        retrive_index: int64 [batch, draft_token_num], written: node n of request b is b * draft_token_num + n.
        retrive_next_token: int64 [batch, draft_token_num], written: first children.
        retrive_next_sibling: int64 [batch, draft_token_num], written.
        topk: candidates per expanded node.
        depth: drafted levels.
        draft_token_num: nodes of each tree, node 0 included.
        tree_mask_mode: see tree_mask.

    int32 tensors are taken wherever int64 is named.

    Raises:
        TypeError: topk, depth or draft_token_num is no int.
        ValueError: one of them is below 1, a shape does not fit, the mode is unknown, more than 32 nodes are to be
            packed into bits, or tree_mask is too small (FULL_MASK: on a CPU, where lengths below 0 are refused too).
    """
    links = (retrive_index, retrive_next_token, retrive_next_sibling)
    _check_build(parent_list, selected_index, verified_seq_len, positions, links, topk, depth, draft_token_num)
    lengths = verified_seq_len.long()
    batch, nodes = lengths.shape[0], draft_token_num
    flat = _mask_bytes(tree_mask, tree_mask_mode, lengths, nodes)
    topology = build_topology(_selected_parents(parent_list.long(), selected_index.long(), topk))
    positions.view(batch, nodes).copy_(topology.depths + lengths[:, None])
    retrive_index.copy_(torch.arange(batch * nodes, device=retrive_index.device).view(batch, nodes))
    retrive_next_token.copy_(topology.first_child)
    # Roots are siblings to build_topology; here node 0 has none, and an orphan is in no list.
    retrive_next_sibling.copy_(torch.where(topology.parents < 0, -1, topology.next_sibling))
    _write_mask(topology.ancestors, lengths, flat, tree_mask_mode)


def _check_build(parent_list, selected_index, verified_seq_len, positions, links, topk, depth, nodes) -> None:
    op = "build_tree_kernel_efficient"
    for name, number in (("topk", topk), ("depth", depth), ("draft_token_num", nodes)):
        if not is_int(number):
            raise TypeError(_wrong(op, name, "an int of at least 1", number))
        if number < 1:
            raise ValueError(_wrong(op, name, "at least 1", number))
    batch, width = verified_seq_len.shape[0], topk * (depth - 1) + 1
    _shaped(op, "verified_seq_len", verified_seq_len, (batch,))
    if parent_list.dim() != 2 or parent_list.shape[0] != batch or (depth > 1 and parent_list.shape[1] != width):
        raise ValueError(_wrong(op, "parent_list", f"[{batch}, {width}]", parent_list))
    _shaped(op, "selected_index", selected_index, (batch, nodes - 1))
    _shaped(op, "positions", positions, (batch * nodes,))
    for name, link in zip(("index", "next_token", "next_sibling"), links, strict=True):
        _shaped(op, f"retrive_{name}", link, (batch, nodes))


def _selected_parents(parent_list, selected_index, topk: int) -> torch.Tensor:
    """int32 [batch, nodes]: the parent of each node, -1 for node 0 and for orphans."""
    batch, drafted = selected_index.shape
    group = selected_index // topk
    # One more column, of no candidate: for what parent_list is too narrow for, and so that it has any.
    listed = torch.cat([parent_list, parent_list.new_full((batch, 1), -1)], dim=1)
    candidate = listed.gather(1, group.clamp(0, parent_list.shape[1]))
    same = (candidate[:, :, None] == selected_index[:, None, :]) & (candidate >= 0)[:, :, None]
    found = torch.where(same.any(2), same.int().argmax(2) + 1, -1) if drafted else group
    parents = torch.where(group == 0, 0, torch.where(group > 0, found, -1))
    return torch.cat([parents.new_full((batch, 1), -1), parents], dim=1).int()


def _packed_width(nodes: int) -> int:
    """Bytes of a node's bits."""
    return 1 if nodes <= 8 else 2 if nodes <= 16 else 4


def _mask_bytes(tree_mask, mode: int, lengths, nodes: int) -> torch.Tensor:
    """The mask as uint8 [bytes], after a look at its size. Lengths are looked at on a CPU only: nothing may wait."""
    op = "build_tree_kernel_efficient"
    if mode not in (FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING):
        raise ValueError(_wrong(op, "tree_mask_mode", "0, 1 or 2", mode))
    if mode == QLEN_ONLY_BITPACKING and nodes > 32:
        raise ValueError(_wrong(op, "draft_token_num", "at most 32 for a mask of bits", nodes))
    if not tree_mask.is_contiguous():
        raise ValueError(_wrong(op, "tree_mask", "contiguous", tree_mask))
    flat, batch = tree_mask.view(-1).view(torch.uint8), lengths.shape[0]
    needed = batch * nodes * (_packed_width(nodes) if mode == QLEN_ONLY_BITPACKING else nodes)
    if mode == FULL_MASK and lengths.device.type == "cpu" and batch:
        if int(lengths.min()) < 0:
            raise ValueError(f"specdec_ops.{_MODULE}.{op}: verified_seq_len must be at least 0, got {lengths.min()}")
        needed += int(lengths.sum()) * nodes
    if flat.shape[0] < needed:
        raise ValueError(_wrong(op, "tree_mask", f"of at least {needed} bytes", tree_mask))
    return flat


def _write_mask(ancestors, lengths, flat, mode: int) -> None:
    """Write who sees whom into the bytes."""
    batch, nodes, _ = ancestors.shape
    device = ancestors.device
    if mode == QLEN_ONLY_BITPACKING:
        width = _packed_width(nodes)
        shifts = 8 * torch.arange(width, device=device)
        flat[: batch * nodes * width] = ((ancestors[:, :, :1] >> shifts) & 255).flatten().to(torch.uint8)
        return
    columns = torch.arange(nodes, device=device)
    visible = (ancestors[:, :, columns // 64] >> (columns % 64)) & 1
    width = lengths + nodes if mode == FULL_MASK else torch.full_like(lengths, nodes)
    start = (width * nodes).cumsum(0) - width * nodes
    place = (start + width - nodes)[:, None, None] + width[:, None, None] * columns[:, None] + columns
    flat.scatter_(0, place.flatten(), visible.flatten().to(torch.uint8))


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


def _check_numbers(op: str, batch: int, nodes: int, target_probs, coins, final) -> None:
    if target_probs.dim() != 3 or target_probs.shape[:2] != (batch, nodes) or target_probs.shape[2] < 1:
        raise ValueError(_wrong(op, "target_probs", f"[{batch}, {nodes}, vocab]", target_probs))
    _shaped(op, "uniform_samples", coins, (batch, nodes))
    _shaped(op, "uniform_samples_for_final_sampling", final, (batch,))


def _shaped(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(_wrong(op, name, str(list(shape)), tensor))


def _wrong(op: str, name: str, must: str, value) -> str:
    return argument_error(f"{_MODULE}.{op}", name, must, value)
