"""What kv_append is to do, row by row in Python, without any code of the definition."""

from __future__ import annotations

import torch

from specdec_ops import kv_append

POISON = 7.5  # of caches, where nobody may write
EPS = 1e-6
DEPTHS = [[0, 1, 1, 2, 2, 3], [0, 1, 2], [0, 0, 1, 1, 1]]  # the last one is a forest
HEADS, KV_HEADS = 5, 2


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return values.to(device, dtype)


def ids(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def tables(positions, pairs, device="cpu"):
    """Cosines and sines of a base of 100: slow and fast pairs even in small heads."""
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * 100.0 ** (
        -torch.arange(pairs, dtype=torch.float64) / max(pairs, 1)
    )
    return angles.cos().float().to(device), angles.sin().float().to(device)


def head_by_hand(x, position, rope, interleaved, weight, compute):
    """One head [dim] as it is stored: each rotated pair a complex number that is multiplied by another one.

    compute is a complex dtype. As engines do: the norm at least in float32, rounded to the head's dtype before the
    rotation, unless that is float64.
    """
    if weight is not None:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (y / (y.square().mean() + EPS).sqrt() * weight.to(y.dtype)).to(x.dtype)
    if rope is None:
        return x
    cosines, sines = (table[position].to(torch.float64) for table in rope)
    pairs = len(cosines)
    real = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    imaginary = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    turned = torch.complex(x[real].to(compute), x[imaginary].to(compute)) * torch.complex(cosines, sines)
    out = x.clone()
    out[real], out[imaginary] = turned.real.to(x.dtype), turned.imag.to(x.dtype)
    return out


class Append:
    """The arguments of a call with padded rows, and what it must do."""

    def __init__(self, k, v, q, parents_depths, context_lens, *, query_start=(0,), slots=16, **options):
        """parents_depths: for each request the depths of its nodes, or None without trees."""
        self.k, self.v, self.q = k, v, q
        self.depths, self.context_lens, self.query_start = parents_depths, context_lens, query_start
        self.slots, self.options = slots, options

    def places(self):
        """{(request, row): (slot, position)} of the rows that have a node."""
        batch, queries = self.k.shape[:2]
        found = {}
        for request in range(batch):
            start = self.query_start[request % len(self.query_start)]
            for row in range(queries):
                node = start + row
                depths = None if self.depths is None else self.depths[request % len(self.depths)]
                if node < 0 or (depths is not None and node >= len(depths)):
                    continue
                context = self.context_lens[request]
                found[request, row] = context + node, context + (node if depths is None else depths[node])
        return found

    def expected(self, double):
        """K and V by (request, slot), and Q [batch, queries, heads, dim], in float64 or in the dtype of the rows."""
        rope, interleaved = self.options.get("rope"), self.options.get("interleaved", False)
        rows = [rows.cpu().double() if double else rows.cpu() for rows in (self.k, self.v, self.q)]
        rope = None if rope is None else tuple(table.cpu() for table in rope)
        norms = [self.options.get(f"{name}_norm_weight") for name in "kq"]
        norms = [None if weight is None else weight.cpu().double() if double else weight.cpu() for weight in norms]
        k, v, q = {}, {}, torch.zeros_like(rows[2])
        compute = torch.float64 if double else torch.float32
        for (request, row), (slot, position) in self.places().items():
            turn = (position, rope, interleaved)
            heads = [head_by_hand(head, *turn, norms[0], compute) for head in rows[0][request, row]]
            k[request, slot], v[request, slot] = torch.stack(heads), rows[1][request, row]
            for head, values in enumerate(rows[2][request, row]):
                q[request, row, head] = head_by_hand(values, *turn, norms[1], compute)
        return k, v, q


def caches(k, v, batch, slots, dtype=None):
    """Dense, poisoned."""
    return [
        torch.full((batch, slots, *rows.shape[-2:]), POISON, dtype=dtype or k.dtype, device=k.device) for rows in (k, v)
    ]


def trees(depth_lists, device):
    """A Topology that has these depths: each node is a child of the last one that is a step above it."""
    from specdec_ops import Topology, Tree

    made = []
    for depths in depth_lists:
        parents = [max((j for j in range(i) if depths[j] == depth - 1), default=-1) for i, depth in enumerate(depths)]
        made.append(Tree.from_parents(parents))
        assert made[-1].depths.tolist() == list(depths)
    return Topology.from_trees(made, device)


def run(append, target, **changes):
    """Call the op with poisoned caches and q_out: k_cache, v_cache, q_out."""
    k, v, q = append.k, append.v, append.q
    topology = None if append.depths is None else trees(append.depths, k.device)
    start = append.query_start
    pair = caches(k, v, len(k), append.slots)
    out = kv_append(
        k,
        v,
        *pair,
        topology,
        ids(append.context_lens, k.device),
        q=q,
        query_start=start[0] if len(start) == 1 else ids(start, k.device),
        backend=target.backend,
        **append.options,
        **changes,
    )
    return *pair, out


def case(dtype=torch.float32, device="cpu", *, dim=24, v_dim=None, queries=4, batch=3, depths=DEPTHS, **options):
    options.setdefault("context_lens", [9, 0, 4][:batch])
    options.setdefault("query_start", [0, 1, 2][:batch])
    shapes = ((KV_HEADS, dim), (KV_HEADS, v_dim or dim), (HEADS, dim))
    rows = [(2 * normal(batch, queries, *shape, seed=seed)).to(device, dtype) for seed, shape in enumerate(shapes)]
    return Append(*rows, depths, **options)
