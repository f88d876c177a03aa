"""Large calls in a process that may take no more memory. Run as a program: `low_memory.py OP`.

Prints "answered", or the sentence of the error. Nothing else may happen: no abort, no hang.
"""

import re
import resource
import sys
from pathlib import Path

import torch

from specdec_ops import (
    Tree,
    exit_confidence,
    kv_propagate,
    linear,
    quantize_linear,
    sample_tokens,
    tree_accept,
    tree_attention,
)

ROOM = 1 << 18  # bytes that the call may still take
SMALL, LARGE = 1, 0  # what makes the calls before, which start the threads, and the one that counts


def attention(small, **options):
    nodes, slots, dim = (4, 32, 64) if small else (256, 4096, 256)
    tree = Tree.chain(nodes).to("cpu")
    q, cache = torch.zeros(1, nodes, 16, dim), torch.zeros(1, slots, 16, dim)
    lengths, out = torch.tensor([slots - nodes], dtype=torch.int32), torch.empty_like(q)
    return lambda: tree_attention(q, cache, cache, tree, lengths, out=out, backend="cpu", **options)


def acceptance(small):
    batch, vocab = 8, (1000 if small else 200_000)
    tree = Tree.from_branching((2, 2), root=True).to("cpu", batch=batch)
    tokens = torch.randint(0, vocab, (batch, tree.nodes), dtype=torch.int32)
    target, draft = (torch.zeros(1, 1, vocab).expand(batch, tree.nodes, vocab) for _ in range(2))
    return lambda: tree_accept(
        target, tokens, tree, draft, rule="traversal", seeds=1, positions=0, top_k=50, top_p=0.9, backend="cpu"
    )


def sampling(small):
    logits = torch.zeros(1, 1000 if small else 200_000).expand(8, -1)
    return lambda: sample_tokens(logits, seeds=1, positions=0, top_k=50, top_p=0.9, backend="cpu")


def products(small):
    rows, dim = (1, 64) if small else (64, 32_768)
    x, weight = torch.zeros(rows, dim), quantize_linear(torch.ones(64, dim))
    out = torch.empty(rows, 64)
    return lambda: linear(x, weight, out=out, backend="cpu")


def confidence(small):
    rows, dim, vocab = (1, 64, 500) if small else (64, 8192, 2000)
    hidden, head = torch.zeros(rows, dim), torch.zeros(vocab, dim)
    return lambda: exit_confidence(hidden, head, top_k=16, backend="cpu")


def propagation(small):
    rows, dim = (1, 64) if small else (64, 4096)
    hidden, weight = torch.zeros(rows, dim), torch.zeros(64, dim)
    layers = [(None, weight, weight)] * 2
    caches, slots = torch.zeros(2, 2, 1, 64, 1, 64), torch.arange(rows, dtype=torch.int32)
    return lambda: kv_propagate(hidden, layers, slots, slots, *caches, rope=None, backend="cpu")


OPS = {
    "attention": attention,
    "path_attention": lambda small: attention(small, path_invariant=True),
    **{function.__name__: function for function in (acceptance, sampling, products, confidence, propagation)},
}


def address_space() -> int:
    """Bytes that this process has mapped."""
    return 1024 * int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(op: str) -> None:
    OPS[op](SMALL)()
    call = OPS[op](LARGE)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + ROOM, resource.RLIM_INFINITY))
    try:
        call()
        answer = "answered"
    except (MemoryError, RuntimeError) as error:
        answer = f"{type(error).__name__}: {error}".splitlines()[0]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(answer)


if __name__ == "__main__":
    main(sys.argv[1])
