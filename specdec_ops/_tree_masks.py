"""Masks in which other libraries say what a tree's nodes see, as parents. Behind `Topology.from_mask`."""

from __future__ import annotations

import torch

from ._core.checks import argument_error, device_error

_OP = "Topology.from_mask"
_FORMS = "bool [batch, nodes, nodes], int32 or int64 bits [batch, nodes, words], or flat bool or uint8 bits"
_BITS = {torch.uint8: 8, torch.int32: 32, torch.int64: 64}


def parents_of_mask(
    mask: torch.Tensor, num_nodes: torch.Tensor | None, context_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents int32 [batch, nodes] and num_nodes int32 [batch] of a mask in any of its forms.

    Raises:
        TypeError, ValueError: as `Topology.from_mask` says.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(argument_error(_OP, "mask", _FORMS, mask))
    if mask.dim() == 1 and mask.dtype in (torch.bool, torch.uint8):
        seen, num_nodes = _unpack_flat(mask, num_nodes, context_lens)
    else:
        if context_lens is not None:
            raise ValueError(argument_error(_OP, "context_lens", "None, but for a flat mask", context_lens))
        seen = _unpack_rows(mask)
        num_nodes = _counts("num_nodes", num_nodes, seen, seen.shape[1])
    nodes = seen.shape[1]
    place = torch.arange(nodes, device=seen.device)
    exists = place < num_nodes[:, None]
    seen = seen & exists[:, :, None] & exists[:, None, :]
    earlier = torch.where(seen & (place < place[:, None]), place, -1)
    parents = earlier.amax(-1) if nodes else num_nodes.new_empty(seen.shape[:2])
    # What a node sees must be itself and what its parent sees; by induction this makes every set that of the ancestors.
    of_parent = seen.gather(1, parents.clamp(min=0)[:, :, None].expand(-1, -1, nodes))
    expected = (of_parent & (parents >= 0)[:, :, None]) | torch.eye(nodes, dtype=torch.bool, device=seen.device)
    wrong = (seen != expected).any(-1) & exists
    if wrong.any():
        request, node = (int(found) for found in wrong.nonzero()[0])
        raise ValueError(_refusal(request, node, seen[request].cpu(), int(parents[request, node])))
    return parents.to(torch.int32), num_nodes


def _unpack_rows(mask: torch.Tensor) -> torch.Tensor:
    """What nodes see, bool [batch, nodes, nodes], of a mask with a row for each node."""
    if mask.dim() not in (2, 3) or mask.dtype not in (torch.bool, torch.int32, torch.int64):
        wrong = TypeError if mask.dtype not in (torch.bool, torch.int32, torch.int64) else ValueError
        raise wrong(argument_error(_OP, "mask", _FORMS, mask))
    mask = mask if mask.dim() == 3 else mask[None]
    nodes = mask.shape[1]
    if mask.dtype == torch.bool:
        if mask.shape[2] != nodes:
            raise ValueError(argument_error(_OP, "mask", f"bool [batch, {nodes}, {nodes}]", mask))
        return mask
    bits = _BITS[mask.dtype]
    if mask.shape[2] * bits < nodes:
        raise ValueError(argument_error(_OP, "mask", f"of at least {-(-nodes // bits)} words a node", mask))
    # Bits behind the last node are looked at by nobody: libraries leave what they like there.
    return _bits(mask)[:, :, :nodes]


def _bits(words: torch.Tensor) -> torch.Tensor:
    """The bits of each row, lowest first: bool [..., words * bits]."""
    bits = _BITS[words.dtype]
    shifts = torch.arange(bits, device=words.device, dtype=words.dtype)
    return ((words[..., None] >> shifts) & 1).bool().flatten(-2)


def _counts(name: str, counts: torch.Tensor | None, seen: torch.Tensor, most: int) -> torch.Tensor:
    """int32 [batch] of counts from 0 to `most`, on the mask's device."""
    batch = seen.shape[0]
    if counts is None:
        return torch.full((batch,), most, dtype=torch.int32, device=seen.device)
    must = f"int32 or int64 [{batch}] from 0 to {most}"
    if not isinstance(counts, torch.Tensor) or counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(argument_error(_OP, name, must, counts))
    if counts.device != seen.device:
        raise ValueError(device_error(_OP, name, "mask", seen.device, counts))
    if counts.shape != (batch,) or bool(((counts < 0) | (counts > most)).any()):
        raise ValueError(argument_error(_OP, name, must, counts))
    return counts.to(torch.int32)


def _unpack_flat(
    mask: torch.Tensor, num_nodes: torch.Tensor | None, context_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What nodes see and how many they are, of masks one behind the other with the context's columns first."""
    sizes = []
    for name, counts in (("num_nodes", num_nodes), ("context_lens", context_lens)):
        if not isinstance(counts, torch.Tensor) or counts.dtype not in (torch.int32, torch.int64):
            raise TypeError(argument_error(_OP, name, "int32 or int64 [batch] with a flat mask", counts))
        if counts.dim() != 1 or bool((counts < 0).any()):
            raise ValueError(argument_error(_OP, name, "int32 or int64 [batch] of 0 or more", counts))
        sizes.append(counts.tolist())
    if len(sizes[0]) != len(sizes[1]):
        raise ValueError(argument_error(_OP, "context_lens", f"int32 or int64 [{len(sizes[0])}]", context_lens))
    unit = 1 if mask.dtype == torch.bool else 8
    needed = sum(-(-nodes * (context + nodes) // unit) for nodes, context in zip(*sizes, strict=True))
    if mask.shape[0] != needed:
        kind = "bool" if unit == 1 else "uint8 bits"
        raise ValueError(argument_error(_OP, "mask", f"flat {kind} [{needed}] for these counts", mask))
    most = max(sizes[0], default=0)
    seen = torch.zeros(len(sizes[0]), most, most, dtype=torch.bool, device=mask.device)
    start = 0
    for request, (nodes, context) in enumerate(zip(*sizes, strict=True)):
        entries = nodes * (context + nodes)
        length = -(-entries // unit)
        part = mask[start : start + length]
        start += length
        rows = (part if unit == 1 else _bits(part)[:entries]).view(nodes, context + nodes)
        hidden = ~rows[:, :context].all(-1)
        if hidden.any():
            raise ValueError(
                f"specdec_ops.{_OP}: mask must show the whole context to every node, but node "
                f"{int(hidden.nonzero()[0])} of request {request} does not see all of it"
            )
        seen[request, :nodes, :nodes] = rows[:, context:]
    return seen, torch.tensor(sizes[0], dtype=torch.int32, device=mask.device)


def _refusal(request: int, node: int, seen: torch.Tensor, parent: int) -> str:
    """Why what a node sees is not a path to a root."""
    start = (
        f"specdec_ops.{_OP}: mask must be that of a forest whose parents come before their children, but node {node} "
    )
    start += f"of request {request} "
    row = seen[node]
    if not row[node]:
        return start + "does not see itself"
    later = row[node + 1 :].nonzero()
    if len(later):
        return start + f"sees node {node + 1 + int(later[0])}, which comes after it"
    extra = (row & ~seen[parent]).nonzero().flatten().tolist()
    extra = [other for other in extra if other != node]
    if extra:
        return start + f"sees nodes {parent} and {extra[0]}, and node {parent} does not see node {extra[0]}"
    missing = int((seen[parent] & ~row).nonzero()[0])
    return start + f"sees node {parent} and not node {missing}, which node {parent} sees"
