"""What plain decoding gives a node of a tree: its path laid out by positions, one row asking.

`wrong_nodes` compares that with what a call over whole trees gives, bit for bit. It takes any attention, so that wrong
ones show that it can fail: `model` is path-invariant attention in Python, right or wrong in a way that is asked for.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch

from specdec_ops import AttentionState, Topology, Tree, tree_attention
from tests.attention.attention_cases import NAN, AttentionCase, path_to_root

attention = functools.partial(tree_attention, path_invariant=True, return_lse=True, backend="cpu")


def run(case: AttentionCase, attend: Callable = attention) -> AttentionState:
    """The whole case in one call."""
    return attend(case.q, case.k_cache, case.v_cache, case.topology, case.context_lens, **case.options)


def state_of(case: AttentionCase, whole: AttentionState, request: int, node: int) -> AttentionState:
    """One node's part of the result: out [heads, dim], lse [heads]."""
    rows, row = case.row_indices[request], node - case.first_nodes[request]
    return AttentionState(whole.out[rows][row], whole.lse[rows][row])


def decoded(
    case: AttentionCase, request: int, node: int, tree_rows: int, page_size: int | None, attend: Callable = attention
) -> AttentionState:
    """The same node by decoding. Of its path the last `tree_rows` positions are a tree, the others context.

    K and V lie elsewhere than in the case: by position, in one dense cache or in pages in descending order, with NaN
    behind the path. Without rows of a tree the whole path is context, and there is no topology.
    """
    context, path = case.contexts[request], path_to_root(case.trees[request], node)
    slots = torch.tensor([*range(context), *(context + ancestor for ancestor in path)])
    tree_rows = min(tree_rows, len(path))
    size = page_size or len(slots) + 5
    pages = -(-len(slots) // size)
    places = [[page * size, min((page + 1) * size, len(slots)), pages - page] for page in range(pages)]
    caches = []
    for values in (case.keys[request], case.values[request]):
        cache = torch.full((pages + 1, size, *values.shape[1:]), NAN, dtype=values.dtype)
        for begin, end, page in places:
            cache[page, : end - begin] = values[slots[begin:end]]
        caches.append(cache if page_size else cache[1:])
    options = {name: value for name, value in case.options.items() if name not in ("page_table", "query_start")}
    if page_size:
        options["page_table"] = torch.tensor([[page for _, _, page in places]], dtype=torch.int32)
    q = case.q[case.row_indices[request]][node - case.first_nodes[request]]
    topology, start = None, 0
    if tree_rows:
        topology, start = Tree.chain(tree_rows).to("cpu"), tree_rows - 1
    length = torch.tensor([len(slots) - tree_rows], dtype=torch.int32)
    state = attend(q[None, None], *caches, topology, length, query_start=start, **options)
    return AttentionState(state.out[0, 0], state.lse[0, 0])


def same_bits(a: AttentionState, b: AttentionState) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


def wrong_nodes(case: AttentionCase, attend: Callable = attention, least_tree_rows: int = 0) -> list[tuple[int, int]]:
    """The (request, node) whose bits are not those of decoding. Paths are divided and laid out in several ways."""
    whole, wrong = run(case, attend), []
    for request, parents in enumerate(case.trees):
        for node in range(case.first_nodes[request], len(parents)):
            division = max(least_tree_rows, (node + request) % 4), (None, 7, 64)[node % 3]
            if not same_bits(decoded(case, request, node, *division, attend), state_of(case, whole, request, node)):
                wrong.append((request, node))
    return wrong


def with_siblings_moved(case: AttentionCase, seed: int) -> tuple[AttentionCase, list[list[int]]]:
    """The same trees with their nodes in another order, parents first; and where each node went.

    Dense padded cases with all their nodes.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k_cache, v_cache = case.q.clone(), case.k_cache.clone(), case.v_cache.clone()
    moved, trees = [], []
    for request, parents in enumerate(case.trees):
        order, waiting = [], {node for node, parent in enumerate(parents) if parent == -1}
        while waiting:
            ready = sorted(waiting)
            node = ready[int(torch.randint(len(ready), (), generator=generator))]
            order.append(node)
            waiting = waiting - {node} | {child for child, parent in enumerate(parents) if parent == node}
        place = [order.index(node) for node in range(len(parents))]
        trees.append([-1 if parents[node] == -1 else place[parents[node]] for node in order])
        context, size = case.contexts[request], len(parents)
        q[request, :size] = case.q[request, order]
        for cache, old in ((k_cache, case.k_cache), (v_cache, case.v_cache)):
            cache[request, context : context + size] = old[request, [context + node for node in order]]
        moved.append(place)
    topology = Topology.from_trees([Tree(tree) for tree in trees])
    return dataclasses.replace(case, q=q, k_cache=k_cache, v_cache=v_cache, topology=topology), moved


CHUNK = 8


def model(
    q, k_cache, v_cache, topology, context_lens, *, scale, query_start=0, page_table=None, wrong: str = ""
) -> AttentionState:
    """Chunks of 8 positions, a state for each, merged in order; with a scale that is a power of 2.

    wrong: "chunks by slot"; "one maximum", that of all rows; "lanes by slot": sums of even and of odd slots.
    """
    out, lse = torch.zeros(q.shape), torch.zeros(q.shape[:-1])
    group = q.shape[2] // k_cache.shape[2]
    for request, context in enumerate(context_lens.tolist()):
        rows = []
        for row in range(q.shape[1]):
            node = query_start + row
            if topology is not None and node >= int(topology.num_nodes[request]):
                continue
            slots = list(range(context))
            if topology is not None:
                words = topology.ancestors[request, node].tolist()
                slots += [context + n for n in range(node + 1) if words[n // 64] >> n % 64 & 1]
            rows.append((row, slots))
        for head in range(q.shape[2]):
            _attend_head(
                scale * q[request, :, head], k_cache, v_cache, request, head // group, page_table, rows, wrong,
                out[request, :, head], lse[request, :, head],
            )  # fmt: skip
    return AttentionState(out, lse)


def _attend_head(q, k_cache, v_cache, request, kv_head, page_table, rows, wrong, out, lse):
    def read(cache, slot):
        if page_table is None:
            return cache[request, slot, kv_head]
        return cache[page_table[request, slot // cache.shape[1]], slot % cache.shape[1], kv_head]

    scores = {row: [float((q[row] * read(k_cache, slot)).sum()) for slot in slots] for row, slots in rows}
    highest = max(map(max, scores.values()))
    for row, slots in rows:
        chunks = {}
        for position, slot in enumerate(slots):
            place = slot if wrong == "chunks by slot" else position
            chunks.setdefault(place // CHUNK, []).append((scores[row][position], slot, place))
        state = None
        for chunk in chunks.values():
            top = torch.tensor(highest if wrong == "one maximum" else max(score for score, _, _ in chunk))
            total, lanes = torch.tensor(0.0), torch.zeros(2, len(q[row]))
            for score, slot, place in chunk:
                weight = torch.exp(torch.tensor(score) - top)
                total = total + weight
                lane = slot % 2 if wrong == "lanes by slot" else place % 2
                lanes[lane] += weight * read(v_cache, slot)
            part = top, total, lanes[0] + lanes[1]
            state = part if state is None else _merge(state, part)
        top, total, summed = state
        out[row], lse[row] = summed / total, top + torch.log(total)


def _merge(a, b):
    top = torch.maximum(a[0], b[0])
    weight_a, weight_b = torch.exp(a[0] - top), torch.exp(b[0] - top)
    return top, a[1] * weight_a + b[1] * weight_b, a[2] * weight_a + b[2] * weight_b
