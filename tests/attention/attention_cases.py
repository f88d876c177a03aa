"""Inputs for attention tests, and what the answer must be by an independent, naive computation.

`make_case` builds a ragged batch in which everything that must not be read is NaN: slots beyond the tree, pages of
nobody, padding rows of q. `expected` walks parents in Python and builds a boolean mask; it shares no code with the
package's own definition.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch

from specdec_ops import AttentionState, Topology, Tree, tree_attention
from tests.harness.close import assert_as_good_as_torch

NAN = float("nan")
DEFAULT_DTYPE = torch.float32  # conftest.py replaces it for kernels that refuse float32


def chain(nodes: int) -> list[int]:
    """One path."""
    return [node - 1 for node in range(nodes)]


def star(nodes: int) -> list[int]:
    """A root with nodes - 1 children."""
    return [-1] + [0] * (nodes - 1)


def forest(nodes: int, roots: int = 3) -> list[int]:
    """Several roots; node i hangs below node i - roots."""
    return [node - roots if node >= roots else -1 for node in range(nodes)]


def random_tree(nodes: int, seed: int = 0) -> list[int]:
    """Every node hangs below any earlier one."""
    generator = np.random.default_rng(seed)
    return [-1] + [int(generator.integers(0, node)) for node in range(1, nodes)] if nodes else []


def path_to_root(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors, root first."""
    path = []
    while node != -1:
        path.insert(0, node)
        node = parents[node]
    return path


@dataclass
class AttentionCase:
    """Arguments of one call, and the same data per request as a person would write it down."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    topology: Topology | None
    context_lens: torch.Tensor
    options: dict
    trees: list[list[int]] | None  # parents per request; None: no topology
    contexts: list[int]
    first_nodes: list[int]  # the node of each request's row 0
    row_indices: list  # what selects a request's rows in q
    keys: list[torch.Tensor] = field(repr=False)  # [slots, kv_heads, dim] per request, context then tree
    values: list[torch.Tensor] = field(repr=False)

    def run(self, backend: str, **overrides):
        """Call the op; `overrides` replace any keyword argument."""
        arguments = (self.q, self.k_cache, self.v_cache, self.topology, self.context_lens)
        return tree_attention(*arguments, **{**self.options, **overrides}, backend=backend)


def make_case(
    trees: list[list[int]] | None,
    contexts: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    packed: bool = False,
    page_size: int | None = None,
    first_nodes: int | list[int] = 0,
    queries: int | None = None,
    share_tree: bool = False,
    sinks: bool = False,
    alibi: bool = False,
    seed: int = 0,
    **options,
) -> AttentionCase:
    """A ragged batch.

    Args:
        trees: parents per request; None for topology=None (then `queries` says how many rows each request has).
        contexts: context length per request.
        first_nodes: the node of row 0: an int, or one per request (then query_start is a tensor).
        queries: rows per request; by default every node from first_nodes on.
        share_tree: pass one tree for the whole batch.
        sinks, alibi: pass random ones.
        options: further keyword arguments of the op, passed on.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or DEFAULT_DTYPE
    batch = len(contexts)
    starts = [first_nodes] * batch if isinstance(first_nodes, int) else list(first_nodes)
    sizes = [0] * batch if trees is None else [len(parents) for parents in trees]

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    keys = [random(context + size, kv_heads, dim) for context, size in zip(contexts, sizes, strict=True)]
    values = [random(context + size, kv_heads, dim) for context, size in zip(contexts, sizes, strict=True)]
    if page_size is None:
        k_cache, v_cache = _dense(keys, kv_heads, dim, dtype), _dense(values, kv_heads, dim, dtype)
    else:
        k_cache, v_cache, page_table = _paged(keys, values, page_size, seed)
        options["page_table"] = page_table.to(device)

    rows = [queries if queries is not None else size - start for size, start in zip(sizes, starts, strict=True)]
    if packed:
        rows = list(sizes)  # what Topology's own offsets say
    q, row_indices = _queries(rows, heads, dim, dtype, packed, random)
    for index, (start, size) in zip(row_indices, zip(starts, sizes, strict=True), strict=True):
        if trees is not None:
            q[index][max(0, size - start) :] = NAN  # rows of nodes that don't exist

    topology = None
    if trees is not None:
        hosts = [Tree(parents) for parents in (trees[:1] if share_tree else trees)]
        topology = Topology.from_trees(hosts, device, packed=packed)
    if sinks:
        options["sinks"] = torch.randn(heads, generator=generator).to(device)
    if alibi:
        options["alibi_slopes"] = torch.linspace(0.01, 0.4, heads).to(device)
    if not isinstance(first_nodes, int):
        options["query_start"] = torch.tensor(starts, dtype=torch.int32, device=device)
    elif first_nodes:
        options["query_start"] = first_nodes
    return AttentionCase(
        q.to(device),
        k_cache.to(device),
        v_cache.to(device),
        topology,
        torch.tensor(contexts, dtype=torch.int32, device=device),
        options,
        trees,
        list(contexts),
        starts,
        row_indices,
        keys,
        values,
    )


def _dense(slots, kv_heads, dim, dtype):
    capacity = max((len(part) for part in slots), default=0) + 3
    cache = torch.full((len(slots), capacity, kv_heads, dim), NAN, dtype=dtype)
    for request, part in enumerate(slots):
        cache[request, : len(part)] = part
    return cache


def _paged(keys, values, page_size, seed):
    """Pages in random order. Page 0 belongs to nobody, is NaN, and is what unused entries of the table name."""
    generator = torch.Generator().manual_seed(seed)  # its own, so that q is the same with and without pages
    counts = [-(-len(part) // page_size) for part in keys]
    order = (torch.randperm(sum(counts) + 2, generator=generator) + 1).tolist()
    table = torch.zeros(len(keys), max(counts) + 1, dtype=torch.int32)
    k_cache = torch.full((len(order) + 1, page_size, *keys[0].shape[1:]), NAN, dtype=keys[0].dtype)
    v_cache = k_cache.clone()
    for request, count in enumerate(counts):
        for page in range(count):
            table[request, page] = place = order.pop()
            slots = slice(page * page_size, (page + 1) * page_size)
            k_cache[place, : len(keys[request][slots])] = keys[request][slots]
            v_cache[place, : len(values[request][slots])] = values[request][slots]
    return k_cache, v_cache, table


def _queries(rows, heads, dim, dtype, packed, random):
    if packed:
        ends = np.cumsum([0, *rows]).tolist()
        q = torch.full((ends[-1] + 2, heads, dim), NAN, dtype=dtype)  # two rows of nobody at the end
        q[: ends[-1]] = random(ends[-1], heads, dim)
        return q, [slice(start, end) for start, end in itertools.pairwise(ends)]
    q = torch.full((len(rows), max(rows, default=0), heads, dim), NAN, dtype=dtype)
    for request, count in enumerate(rows):
        q[request, :count] = random(count, heads, dim)
    return q, list(range(len(rows)))


def expected(case: AttentionCase, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse by naive attention in `dtype`: float64 for the exact answer, q's dtype for plain PyTorch."""
    out = torch.zeros(case.q.shape, dtype=dtype)
    lse = torch.full(case.q.shape[:-1], -torch.inf, dtype=torch.promote_types(dtype, torch.float32))
    for request, index in enumerate(case.row_indices):
        q = case.q[index].cpu().to(dtype)
        nodes = [case.first_nodes[request] + row for row in range(len(q))]
        real = [row for row, node in enumerate(nodes) if case.trees is None or node < len(case.trees[request])]
        if real:
            visible, distance = _visibility(case, request, [nodes[row] for row in real])
            keys, values = case.keys[request].to(dtype), case.values[request].to(dtype)
            out[index][real], lse[index][real] = _attend(case, q[real], keys, values, visible, distance)
    return out, lse


def _visibility(case, request, nodes):
    """Which slots each node sees, and how far away they are in positions: bool and int [rows, slots]."""
    context = case.contexts[request]
    parents = [] if case.trees is None else case.trees[request]
    depths = [len(path_to_root(parents, node)) - 1 for node in range(len(parents))]
    positions = torch.tensor([*range(context), *(context + depth for depth in depths)], dtype=torch.int64)
    visible = torch.zeros(len(nodes), len(positions), dtype=torch.bool)
    visible[:, :context] = True
    own = torch.full((len(nodes),), context)
    for row, node in enumerate(nodes):
        if case.trees is not None:
            visible[row, [context + ancestor for ancestor in path_to_root(parents, node)]] = True
            own[row] = context + depths[node]
    distance = own[:, None] - positions[None]
    if case.options.get("window"):
        visible &= distance < case.options["window"]
    return visible, distance


def _attend(case, q, keys, values, visible, distance):
    options, (rows, heads, dim), dtype = case.options, q.shape, q.dtype
    used = visible.any(0)
    keys, values, visible, distance = keys[used], values[used], visible[:, used], distance[:, used]
    group = heads // keys.shape[1]
    keys = keys.permute(1, 2, 0).repeat_interleave(group, dim=0)  # [heads, dim, slots]
    values = values.permute(1, 0, 2).repeat_interleave(group, dim=0)  # [heads, slots, dim]
    scale = options.get("scale") if options.get("scale") is not None else dim**-0.5
    scores = torch.matmul(q.transpose(0, 1), keys) * (scale * (options.get("k_scale") or 1.0))
    if options.get("softcap"):
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    if options.get("alibi_slopes") is not None:
        scores = scores - options["alibi_slopes"].cpu().to(scores.dtype)[:, None, None] * distance
    scores = scores.masked_fill(~visible, -torch.inf)
    sinks = options.get("sinks")
    if sinks is not None:
        sink = sinks.cpu().to(scores.dtype)[:, None, None].expand(heads, rows, 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = scores.logsumexp(-1).transpose(0, 1)
    weights = scores.softmax(-1).masked_fill(~visible.any(1)[:, None], 0.0)[..., : len(keys[0, 0])]
    return (torch.matmul(weights.to(dtype), values) * (options.get("v_scale") or 1.0)).transpose(0, 1), lse


def assert_right(case: AttentionCase, backend: str, **overrides) -> AttentionState:
    """Run a case and compare output and lse with the exact answer; return them."""
    got = case.run(backend, return_lse=True, **overrides)
    exact, exact_lse = expected(case, torch.float64)
    plain, plain_lse = expected(case, case.q.dtype)
    assert got.out.dtype == case.q.dtype
    assert got.lse.dtype == torch.float32
    assert_as_good_as_torch(got.out, exact, plain, what="out")
    assert_as_good_as_torch(got.lse, exact_lse, plain_lse, what="lse")
    return got
