"""One small call of each op whose inputs can all change in place: for streams, graphs, several devices and sanitizers.

A new op gets an entry in CASES: `make(seed)` gives its input tensors by name, of the same shapes for every seed, and
`call(tensors, backend)` the tensors of its result.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from attention_cases import random_tree
from specdec_ops import (
    QuantizedHead,
    Topology,
    build_topology,
    chain_accept,
    early_exit,
    exit_mlp,
    greedy_accept,
    kv_propagate,
    merge_states,
    quantize_head,
    sample_children,
    sample_tokens,
    tree_accept,
    tree_attention,
)

BATCH, NODES, HEADS, KV_HEADS, DIM, PAGE, PAGES = 3, 45, 8, 2, 64, 16, 12  # pages of each request
QKV = ("q", "caches")
Tensors = dict[str, torch.Tensor]


class DeviceCase(NamedTuple):
    """How to make the inputs on the CPU, and how to call the op with them.

    precise: the inputs that are float64 for the exact result.
    """

    make: Callable[[int], Tensors]
    call: Callable[[Tensors, str], list[torch.Tensor]]
    precise: tuple[str, ...] = ()


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_trees(seed: int) -> Tensors:
    """Trees of other shapes and sizes for every seed, padded to NODES."""
    sizes = torch.randint(1, NODES + 1, (BATCH,), generator=generator_of(seed), dtype=torch.int32)
    parents = torch.tensor([random_tree(NODES, seed=BATCH * seed + request) for request in range(BATCH)])
    return {"parents": parents.to(torch.int32), "num_nodes": sizes}


def call_build_topology(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    topology = build_topology(tensors["parents"], tensors["num_nodes"], backend=backend)
    return fields_of(topology)


def fields_of(topology: Topology) -> list[torch.Tensor]:
    names = ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes", "status")
    return [getattr(topology, name) for name in names]


def make_attention(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A paged cache with its pages in another order for every seed, and contexts of other lengths."""
    generator = generator_of(seed)
    most = PAGE * PAGES - NODES
    return {
        **make_trees(seed),
        "q": torch.randn(BATCH, NODES, HEADS, DIM, generator=generator).to(dtype),
        "caches": torch.randn(2, BATCH * PAGES, PAGE, KV_HEADS, DIM, generator=generator).to(dtype),
        "page_table": torch.randperm(BATCH * PAGES, generator=generator).view(BATCH, PAGES).to(torch.int32),
        "context_lens": torch.randint(0, most + 1, (BATCH,), generator=generator, dtype=torch.int32),
    }


def make_attention_float32(seed: int) -> Tensors:
    return make_attention(seed, torch.float32)


def call_paged_attention(tensors: Tensors, backend: str, **options) -> list[torch.Tensor]:
    topology = build_topology(tensors["parents"], tensors["num_nodes"], backend=backend)
    lengths, table = tensors["context_lens"], tensors["page_table"]
    options = {"page_table": table, "return_lse": True, "backend": backend} | options
    return list(tree_attention(tensors["q"], *tensors["caches"], topology, lengths, **options))


def call_attention_in_parts(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    """Three parts and their merge, with every feature."""
    features = {"window": 30, "softcap": 5.0, "num_splits": 3}
    return call_paged_attention(tensors, backend, **features)


def call_dense_attention(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    """The same numbers as one cache per request."""
    k, v = tensors["caches"].view(2, BATCH, PAGES * PAGE, KV_HEADS, DIM)
    return call_paged_attention(tensors | {"caches": (k, v)}, backend, page_table=None)


def make_states(seed: int) -> Tensors:
    generator = generator_of(seed)
    shape = (BATCH, NODES, HEADS, DIM)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name in ("out_a", "out_b")}
    return tensors | {name: torch.randn(shape[:-1], generator=generator) for name in ("lse_a", "lse_b")}


def call_merge_states(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    names = ("out_a", "lse_a", "out_b", "lse_b")
    return list(merge_states(*(tensors[name] for name in names), backend=backend))


def make_acceptance(seed: int) -> Tensors:
    """Other trees, logits, tokens, seeds, positions and temperatures for every seed; one request is greedy.

    Of 16,411 tokens the kernels read rows in parts. Tokens are likely, or the likeliest, so that paths are long.
    """
    generator, vocab, trees = generator_of(seed), 16_411, make_trees(seed)
    logits = torch.randn(BATCH, NODES, vocab, generator=generator)
    logits[..., :8] += 9
    likely = torch.randint(8, (BATCH, NODES), generator=generator)
    likeliest = logits.argmax(-1).gather(1, trees["parents"].clamp(min=0).long())
    chosen = torch.rand(BATCH, NODES, generator=generator) < 0.7
    return {
        **trees,
        "target": logits,
        "draft": logits + 0.3 * torch.randn(BATCH, NODES, vocab, generator=generator),
        "tokens": torch.where(chosen, likeliest, likely).int(),
        "seeds": torch.randint(2**62, (BATCH,), generator=generator),
        "positions": torch.randint(9999, (BATCH,), generator=generator, dtype=torch.int32),
        "temperature": torch.tensor([1.0, 0.0, 0.7]),
    }


def call_acceptance(tensors: Tensors, backend: str, rule: str) -> list[torch.Tensor]:
    topology = build_topology(tensors["parents"], tensors["num_nodes"], backend=backend)
    target, tokens, draft = tensors["target"], tensors["tokens"], tensors["draft"]
    options = {name: tensors[name] for name in ("seeds", "positions", "temperature")} | {"backend": backend}
    if rule == "greedy":
        accepted = greedy_accept(target, tokens, topology, backend=backend)
    elif rule == "block":
        accepted = chain_accept(target, tokens[:, 1:], draft[:, :-1], rule=rule, **options)
    else:
        accepted = tree_accept(target, tokens, topology, draft, rule=rule, replacement=True, top_p=0.95, **options)
    return [accepted.tokens, accepted.nodes, accepted.num_accepted, accepted.next_token, accepted.status]


def call_sampling(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    noise = {name: tensors[name] for name in ("seeds", "positions", "temperature")}
    options = noise | {"top_k": 50, "backend": backend}
    children = sample_children(tensors["draft"][:, :4], 3, **options)
    return [children.tokens, children.status, sample_tokens(tensors["target"][:, 0], **options)]


SCREEN = ("values", "scales", "error_norms", "norms", "error_gain")


def make_exit(seed: int, rows: int) -> Tensors:
    """A head of several tiles, its int8 copy, and rows of which some are sure; head and copy are always the same."""
    generator, fixed, (vocab, dim) = generator_of(seed), generator_of(0), (5_003, DIM)
    head = torch.randn(vocab, dim, generator=fixed).bfloat16()
    chosen = head[torch.randint(vocab, (rows,), generator=generator)].float()
    sureness = torch.linspace(0.02, 0.4, rows)[torch.randperm(rows, generator=generator)][:, None]
    screen = quantize_head(head)
    return {
        "hidden": (sureness * chosen + 0.01 * torch.randn(rows, dim, generator=generator)).bfloat16(),
        "head": head,
        "thresholds": torch.rand(rows, generator=generator),
        **{name: getattr(screen, name) for name in SCREEN},
    }


def call_exit(tensors: Tensors, backend: str, level: str = "row") -> list[torch.Tensor]:
    found = early_exit(tensors["hidden"], tensors["head"], tensors["thresholds"], level=level, top_k=3, backend=backend)
    figures = [getattr(found.confidence, name) for name in ("max_prob", "margin", "entropy", "logsumexp", "status")]
    return [*figures, found.exited, found.active_rows, found.inverse, found.num_active]


def call_screened_exit(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    screen = QuantizedHead(*(tensors[name] for name in SCREEN))
    hidden, head, thresholds = (tensors[name] for name in ("hidden", "head", "thresholds"))
    found = early_exit(hidden, head, thresholds, screen=screen, backend=backend)
    return [found.confidence.max_prob, found.exited, found.active_rows, found.inverse, found.num_active]


def make_mlp(seed: int, sizes: tuple[int, ...]) -> Tensors:
    generator = generator_of(seed)
    tensors = {"features": torch.randn(20, sizes[0], generator=generator).bfloat16()}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        weight = torch.randn(outputs, inputs, generator=generator) * (2 / inputs) ** 0.5
        tensors |= {f"weight{index}": weight.bfloat16(), f"bias{index}": torch.randn(outputs, generator=generator) / 9}
    return tensors


def call_mlp(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    layers = [(tensors[f"weight{i}"], tensors[f"bias{i}"]) for i in range(len(tensors) // 2)]
    return list(exit_mlp(tensors["features"], layers, 0.99, backend=backend))


def make_propagation(seed: int) -> Tensors:
    """Two layers; a row in seven is padding."""
    generator, rows, width = generator_of(seed), 21, KV_HEADS * DIM
    slots = torch.randperm(32, generator=generator)[:rows].to(torch.int32)
    return {
        "hidden": torch.randn(rows, 96, generator=generator).bfloat16(),
        "norms": torch.rand(2, 96, generator=generator).bfloat16(),
        "weights": (torch.randn(2, 2, width, 96, generator=generator) / 10).bfloat16(),
        "slots": torch.where(torch.arange(rows) % 7 == 3, -1, slots),
        "positions": torch.randint(900, (rows,), generator=generator, dtype=torch.int32),
    }


def call_propagation(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    hidden, weights = tensors["hidden"], tensors["weights"]
    caches = torch.zeros(2, 2, 1, 32, KV_HEADS, DIM, dtype=hidden.dtype, device=hidden.device)
    layers = [(tensors["norms"][layer], *weights[layer]) for layer in range(2)]
    places = tensors["positions"], tensors["slots"]
    kv_propagate(hidden, layers, *places, *map(list, caches), rope=1e4, backend=backend)
    return [caches]


PRECISE_LOGITS = ("target", "draft")
CASES = {
    "accept": {
        rule: DeviceCase(make_acceptance, functools.partial(call_acceptance, rule=rule), PRECISE_LOGITS)
        for rule in ("greedy", "block", "recursive", "traversal")
    },
    "sample": {"": DeviceCase(make_acceptance, call_sampling, PRECISE_LOGITS)},
    "exit_confidence": {
        "": DeviceCase(functools.partial(make_exit, rows=5), call_exit, ("hidden", "head")),
        "any": DeviceCase(
            functools.partial(make_exit, rows=70), functools.partial(call_exit, level="any"), ("hidden", "head")
        ),
    },
    "screened_exit": {
        "": DeviceCase(functools.partial(make_exit, rows=5), call_screened_exit, ("hidden", "head")),
        "many rows": DeviceCase(functools.partial(make_exit, rows=70), call_screened_exit, ("hidden", "head")),
    },
    "exit_mlp": {
        "small": DeviceCase(
            functools.partial(make_mlp, sizes=(11, 44, 1)), call_mlp, ("features", "weight0", "weight1")
        ),
        "large": DeviceCase(
            functools.partial(make_mlp, sizes=(300, 200, 70, 1)),
            call_mlp,
            ("features", "weight0", "weight1", "weight2"),
        ),
    },
    "kv_propagate": {"": DeviceCase(make_propagation, call_propagation, ("hidden", "norms", "weights"))},
    "build_topology": {"": DeviceCase(make_trees, call_build_topology)},
    "merge_states": {"": DeviceCase(make_states, call_merge_states, ("out_a", "out_b"))},
    "tree_attention": {
        "paged": DeviceCase(make_attention, call_paged_attention, QKV),
        "dense": DeviceCase(make_attention, call_dense_attention, QKV),
        "parts": DeviceCase(make_attention, call_attention_in_parts, QKV),
        "float32": DeviceCase(make_attention_float32, call_paged_attention, QKV),
    },
}


def to(tensors: Tensors, device) -> Tensors:
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


def overwrite(tensors: Tensors, others: Tensors) -> None:
    """Put the contents of `others` where `tensors` lie."""
    for name, tensor in tensors.items():
        tensor.copy_(others[name], non_blocking=True)
