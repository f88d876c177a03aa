"""Calls while another thread overwrites what they index by. Run as a program: `racing_writers.py OP CALLS`.

A caller must not do this, and gets nonsense if it does; the process must live on. Each number is read once, so that
what was checked is what is used.
"""

import contextlib
import dataclasses
import sys
import threading

import torch

from specdec_ops import (
    CandidatePool,
    Tree,
    VocabMap,
    build_topology,
    gather_layer_kv,
    greedy_accept,
    grow_tree,
    kv_append,
    kv_commit,
    kv_propagate,
    longest_path_accept,
    match_accept,
    prune_tree,
    sample_children,
    tree_accept,
    tree_attention,
    typical_accept,
)

WILD = torch.tensor([-(2**31), -(2**30), -7, -2, -1, 0, 1, 2, 3, 5, 40, 1000, 2**20, 2**30, 2**31 - 1])
GENERATOR = torch.Generator().manual_seed(0)


def wild(tensor: torch.Tensor) -> torch.Tensor:
    """What the other thread writes: numbers of all sizes, sound ones among them."""
    return WILD[torch.randint(len(WILD), tensor.shape, generator=GENERATOR)].to(tensor.dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def accept(rule):
    tree = Tree.from_branching((3, 2, 2), root=True)
    topology = dataclasses.replace(tree.to("cpu", batch=4))
    nodes, vocab, entries = len(tree), 997, 600
    vocab_map = VocabMap(torch.randperm(vocab, generator=GENERATOR)[:entries], vocab)
    tokens = torch.randint(0, vocab, (4, nodes), generator=GENERATOR, dtype=torch.int32)
    logits, draft = torch.randn(4, nodes, vocab), torch.randn(4, nodes, entries)
    written = [tokens, topology.first_child, topology.next_sibling, topology.num_nodes]
    if rule == "greedy":
        return written, lambda: greedy_accept(logits, tokens, topology)
    if rule == "match":
        return written, lambda: match_accept(logits, tokens, topology, seeds=1, positions=2, top_k=20)
    if rule == "typical":
        return written, lambda: typical_accept(logits, tokens, topology, seeds=1, positions=2)
    if rule == "target_only":
        return written, lambda: tree_accept(logits, tokens, topology, seeds=1, positions=2, rule=rule)
    options = {"seeds": 1, "positions": 2, "vocab_map": vocab_map}
    if rule == "longest":
        options["draft_logits"] = draft
        return written, lambda: longest_path_accept(logits, tokens, topology, width=2, **options)
    options |= {"rule": "traversal", "draft_rows": "child"} if rule == "child_rows" else {"rule": rule}
    return [*written, vocab_map.target_to_draft], lambda: tree_accept(logits, tokens, topology, draft, **options)


def attention(path_invariant):
    tree = Tree.from_branching((3, 2, 2), root=True).to("cpu", batch=2)
    q, cache = torch.randn(2, tree.nodes, 4, 64), torch.randn(40, 4, 2, 64)
    pages, lengths = torch.arange(40, dtype=torch.int32).view(2, 20).clone(), int32(30, 41)
    written = [pages, tree.ancestors, tree.depths, tree.num_nodes]
    options = {"page_table": pages, "path_invariant": path_invariant, "window": 20}
    return written, lambda: tree_attention(q, cache, cache, tree, lengths, **options)


def append():
    k, cache = torch.randn(2, 6, 2, 64), torch.zeros(40, 4, 2, 64)
    pages, slots, positions = torch.arange(40, dtype=torch.int32).view(2, 20).clone(), int32(*[[3] * 6] * 2), None
    positions = slots.clone()
    rope = (torch.ones(50, 32), torch.zeros(50, 32))
    options = {"slots": slots, "positions": positions, "page_table": pages, "q": k, "rope": rope}
    other = torch.zeros_like(cache)
    return [pages, slots, positions], lambda: kv_append(k, k, cache, other, None, None, **options)


def commit():
    caches, pages = (
        [torch.zeros(40, 4, 2, 64) for _ in range(3)],
        torch.arange(40, dtype=torch.int32).view(2, 20).clone(),
    )
    nodes, copies, lengths = int32([0, 2, 5, -1], [0, 1, 3, 7]), int32([1, 2], [-1, -1]), int32(20, 30)
    options = {"page_table": pages, "copies": copies}
    others = [torch.zeros_like(cache) for cache in caches]
    return [pages, nodes, copies, lengths], lambda: kv_commit(caches, others, nodes, lengths, **options)


def gather():
    caches, pages = (
        [torch.zeros(40, 4, 2, 64) for _ in range(3)],
        torch.arange(40, dtype=torch.int32).view(2, 20).clone(),
    )
    slots, requests = torch.arange(30, dtype=torch.int32), torch.zeros(30, dtype=torch.int32)
    options = {"page_table": pages, "requests": requests}
    return [pages, slots, requests], lambda: gather_layer_kv(caches, caches, slots, **options)


def propagate():
    hidden, weight = torch.randn(6, 64), torch.randn(64, 64)
    caches, pages = (
        [torch.zeros(40, 4, 1, 64) for _ in range(3)],
        torch.arange(40, dtype=torch.int32).view(2, 20).clone(),
    )
    slots, requests = torch.arange(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    options = {"page_table": pages, "requests": requests, "rope": None}
    written, others = [pages, slots, requests], [torch.zeros_like(cache) for cache in caches]
    return written, lambda: kv_propagate(hidden, [(None, weight, weight)] * 3, slots, slots, caches, others, **options)


def topology():
    parents, counts = int32([-1, 0, 0, 1, 1, 2], [-1, 0, 1, 2, 3, 4]), int32(6, 5)
    return [parents, counts], lambda: build_topology(parents, counts)


def growth():
    pool = CandidatePool.empty(2, levels=3, width=3, branching=4)
    vocab_map = VocabMap(torch.arange(50), 60)
    first, later = (torch.randint(0, 50, (2, rows, 4), dtype=torch.int32) for rows in (1, 3))
    logprobs = [torch.rand(2, rows, 4).log() for rows in (1, 3)]
    roots = int32(1, 2)

    def call():
        grow_tree(pool, first, logprobs[0], level=0, vocab_map=vocab_map)
        grow_tree(pool, later, logprobs[1], level=1, vocab_map=vocab_map)
        grow_tree(pool, later, logprobs[1], level=2, vocab_map=vocab_map)
        prune_tree(pool, 8, root_tokens=roots)

    written = [first, later, vocab_map.draft_to_target, pool.parents, pool.expanded, pool.candidates]
    return [*written, pool.topology.parents, pool.topology.num_nodes], call


def children():
    logits, parents = torch.randn(2, 3, 50), int32([0, 1, 2], [3, 4, 5])
    vocab_map = VocabMap(torch.arange(50), 60)
    options = {"seeds": 1, "positions": 0, "vocab_map": vocab_map}
    return [parents, vocab_map.draft_to_target], lambda: sample_children(logits, 4, parents=parents, **options)


RULES = ("greedy", "match", "recursive", "traversal", "kseq", "child_rows", "target_only", "longest", "typical")
OPS = {
    **{f"accept_{rule}": (accept, rule) for rule in RULES},
    "attention": (attention, False),
    "path_attention": (attention, True),
    **{function.__name__: (function,) for function in (append, commit, gather, propagate, topology, growth, children)},
}


def main(op: str, calls: int) -> None:
    function, *arguments = OPS[op]
    written, call = function(*arguments)
    sound = [tensor.clone() for tensor in written]
    noise = [[wild(tensor) for tensor in written] for _ in range(64)]
    ended = threading.Event()

    def write():
        place = 0
        while not ended.is_set():
            for tensor, values, before in zip(written, noise[place % 64], sound, strict=True):
                tensor.copy_(values if place % 3 else before)
            place += 1

    writer = threading.Thread(target=write)
    call()  # a sound call is answered
    writer.start()
    try:
        for _ in range(calls):
            with contextlib.suppress(ValueError):  # a kernel may see that a number is out of range, and say so
                call()
    finally:
        ended.set()
        writer.join()
    print(f"{op}: {calls} calls")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
