"""One small call of each op whose inputs can all change in place: for streams, graphs, several devices and sanitizers.

A new op gets an entry in CASES: `make(seed)` gives its input tensors by name, of the same shapes for every seed, and
`call(tensors, backend)` the tensors of its result.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from specdec_ops import (
    CandidatePool,
    GgufWeight,
    HeadBounds,
    QuantizedHead,
    QuantizedWeight,
    Topology,
    build_topology,
    chain_accept,
    early_exit,
    exit_mlp,
    gather_layer_kv,
    greedy_accept,
    grow_tree,
    kv_commit,
    kv_propagate,
    linear,
    merge_states,
    prune_tree,
    quantize_linear,
    rms_norm,
    sample_children,
    sample_tokens,
    tree_accept,
    tree_attention,
)
from tests.attention.attention_cases import random_tree

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
    return [getattr(accepted, field.name) for field in dataclasses.fields(accepted)]


def call_sampling(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    noise = {name: tensors[name] for name in ("seeds", "positions", "temperature")}
    options = noise | {"top_k": 50, "backend": backend}
    children = sample_children(tensors["draft"][:, :4], 3, **options)
    return [children.tokens, children.status, sample_tokens(tensors["target"][:, 0], **options)]


def make_exits(seed: int, dtype: torch.dtype = torch.bfloat16, rows: int = 9, vocab: int = 40_000) -> Tensors:
    """Rows of which every second one is sure, and a head of more tiles than any GPU has blocks at once."""
    generator, dim = generator_of(seed), 264
    head = torch.randn(vocab, dim, generator=generator)
    hidden = torch.randn(rows, dim, generator=generator)
    hidden[::2] += head[:rows:2]
    return {
        "hidden": hidden.to(dtype),
        "head": head.to(dtype),
        "norm_weight": (torch.rand(dim, generator=generator) * 0.3).to(dtype),
        "temperature": torch.rand(rows, generator=generator) + 0.5,
    }


def make_many_exits(seed: int) -> Tensors:
    """More rows than a block has."""
    return make_exits(seed, torch.float16, 70, 2000)


def make_int8_exits(seed: int) -> Tensors:
    """A quantised head as it may come: what bounds its error is not asked for."""
    tensors = make_exits(seed, vocab=5000)
    head = tensors.pop("head").float()
    scales = head.abs().amax(dim=1) / 127
    return tensors | {"values": (head / scales[:, None]).round().to(torch.int8), "scales": scales}


def call_exits(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    options = {name: tensors[name] for name in ("norm_weight", "temperature")}
    head = tensors.get("head")
    if head is None:
        head = QuantizedHead(tensors["values"], *[tensors["scales"]] * 3, tensors["scales"][:1])
    got = early_exit(tensors["hidden"], head, 0.4, top_k=1, **options, backend=backend)
    confidence = got.confidence
    figures = [confidence.max_prob, confidence.margin, confidence.entropy, confidence.logsumexp]
    return [*figures, confidence.token, confidence.status, got.exited, got.active_rows, got.inverse, got.num_active]


def make_screened_exits(seed: int) -> Tensors:
    """With a copy whose bounds are honest, the last one by far: some rows fall back."""
    tensors = make_exits(seed, vocab=9000)
    head = tensors["head"].double()
    scales = (head.abs().amax(dim=1) / 127).float()
    values = (head / scales[:, None].double()).round().to(torch.int8)
    copy = values.double() * scales[:, None].double()
    norms = {
        "error_norms": (head - copy).norm(dim=1),
        "norms": copy.norm(dim=1),
        "error_gain": (head - copy).norm()[None],
    }
    return tensors | {"values": values, "scales": scales} | {name: 1.001 * norm.float() for name, norm in norms.items()}


def call_screened_exits(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    """What a screen must not change. It may change max_prob and margin by the tolerance."""
    screen = QuantizedHead(*(tensors[name] for name in ("values", "scales", "error_norms", "norms", "error_gain")))
    options = {name: tensors[name] for name in ("norm_weight", "temperature")} | {"screen": screen, "backend": backend}
    got = early_exit(tensors["hidden"], tensors["head"], 0.4, top_k=1, **options)
    confidence = got.confidence
    figures = [confidence.max_prob, confidence.margin, confidence.token, confidence.status & 1]
    return [*figures, got.exited, got.active_rows, got.inverse, got.num_active]


BOUNDED_ENDS = (1000, 2100, 5000, 12_345, 40_000)  # of parts that end inside of a kernel's tiles


def make_bounded_exits(seed: int, rows: int = 9) -> Tensors:
    """A head whose rows become shorter, so that rows are certain after one part, or two, or more, or never."""
    tensors = make_exits(seed, rows=rows)
    decay = torch.linspace(0, -40, BOUNDED_ENDS[-1]).exp()
    head = (tensors["head"].float() * decay[:, None]).bfloat16()
    norms = head.double().norm(dim=1)
    after = [norms[end:].max() if end < len(norms) else norms.new_zeros(()) for end in BOUNDED_ENDS]
    hidden = (tensors["hidden"] * torch.linspace(0.05, 0.6, rows)[:, None]).bfloat16()
    return tensors | {"hidden": hidden, "head": head, "norms_after": 1.001 * torch.stack(after).float()}


def make_many_bounded_exits(seed: int) -> Tensors:
    """More rows than a block has."""
    return make_bounded_exits(seed, 70)


def call_bounded_exits(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    """What bounds must not change, and how far each row has read. Without a norm, rows differ in length."""
    options = {"temperature": tensors["temperature"], "bounds": HeadBounds(BOUNDED_ENDS, tensors["norms_after"])}
    got = early_exit(tensors["hidden"], tensors["head"], 0.4, top_k=2, **options, backend=backend)
    tokens = torch.where(got.exited[:, None], got.confidence.top_tokens, -1)
    return [tokens, got.confidence.status, got.exited, got.active_rows, got.inverse, got.num_active, got.seen]


EXITS = ("hidden", "head", "norm_weight")
INT8_EXITS = ("hidden", "norm_weight")


def make_mlp(seed: int) -> Tensors:
    """A model of three layers, the first in several blocks, and rows of other features for every seed."""
    generator, sizes = generator_of(seed), (384, 320, 96, 1)
    tensors = {"features": torch.randn(21, sizes[0], generator=generator).bfloat16()}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        weight = torch.randn(outputs, inputs, generator=generator) * (2 / inputs) ** 0.5
        tensors |= {f"weight{index}": weight.bfloat16(), f"bias{index}": torch.randn(outputs, generator=generator) / 9}
    return tensors


def call_mlp(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    layers = [(tensors[f"weight{index}"], tensors[f"bias{index}"]) for index in range(3)]
    return list(exit_mlp(tensors["features"], layers, 0.9, backend=backend))


def make_propagation(seed: int) -> Tensors:
    """Rows of three requests over pages in another order for every seed; some rows have no place."""
    generator, layers, rows, dim, width = generator_of(seed), 3, 19, 264, KV_HEADS * DIM
    slots = torch.randperm(BATCH * 2 * PAGE, generator=generator)[:rows].int()  # requests are 32 slots each
    angles = torch.randn(rows, DIM // 2, generator=generator)
    weights = torch.randn(2, layers, width, dim, generator=generator) / dim**0.5
    return {
        "hidden": torch.randn(rows, dim, generator=generator).bfloat16(),
        "norms": 1 + 0.1 * torch.randn(layers, dim, generator=generator),
        "weights": weights.bfloat16(),
        "positions": torch.randperm(rows, generator=generator).int(),
        "requests": slots // (2 * PAGE),
        "slots": torch.where(slots % 7 == 0, -1, slots % (2 * PAGE)),
        "cosines": angles.cos(),
        "sines": angles.sin(),
        "page_table": torch.randperm(BATCH * 2, generator=generator).view(BATCH, 2).int(),
    }


def call_propagation(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    """Into new caches, of which all is the result."""
    hidden, norms, (keys, values) = (tensors[name] for name in ("hidden", "norms", "weights"))
    caches = torch.zeros(2, len(norms), BATCH * 2, PAGE, KV_HEADS, DIM, dtype=hidden.dtype, device=hidden.device)
    kv_propagate(
        hidden,
        list(zip(norms, keys, values, strict=True)),
        tensors["positions"],
        tensors["slots"],
        *map(list, caches),
        rope=(tensors["cosines"], tensors["sines"]),
        requests=tensors["requests"],
        page_table=tensors["page_table"],
        backend=backend,
    )
    return [caches]


def make_layers(seed: int) -> Tensors:
    """Three layers of pages in another order for every seed, paths of three requests, a copy, and slots to gather."""
    generator, layers = generator_of(seed), 3
    pages = torch.randperm(BATCH * 2 + 2, generator=generator).int()
    paths = torch.stack([torch.randperm(9, generator=generator)[:5].sort().values for _ in range(BATCH)]).int()
    rows = 40
    return {
        "caches": torch.randn(2, layers, BATCH * 2 + 2, PAGE, KV_HEADS, DIM, generator=generator).bfloat16(),
        "nodes": torch.where(torch.arange(5) < 2 + torch.arange(BATCH)[:, None], paths, -1),
        "context_lens": torch.randint(0, PAGE, (BATCH,), generator=generator).int(),
        "page_table": pages[: BATCH * 2].view(BATCH, 2),
        "copies": torch.stack([pages[1], pages[-1]])[None],
        "slots": torch.randint(-1, 2 * PAGE + 1, (rows,), generator=generator).int(),
        "requests": torch.randint(0, BATCH, (rows,), generator=generator).int(),
    }


def call_commit(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    """In copies of the caches, of which all is the result."""
    caches = tensors["caches"].clone()
    options = {"page_table": tensors["page_table"], "copies": tensors["copies"]}
    kv_commit(*map(list, caches), tensors["nodes"], tensors["context_lens"], **options, backend=backend)
    return [caches]


def call_gather(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    options = {name: tensors[name] for name in ("requests", "page_table")}
    return [gather_layer_kv(*tensors["caches"], tensors["slots"], **options, backend=backend)]


def make_products(seed: int) -> Tensors:
    """Rows of a gated layer, and its weight in bfloat16, int8 and blocks of four bits."""
    generator, rows, dim, outputs = generator_of(seed), 19, 512, 300
    weight = torch.randn(2 * outputs, dim, generator=generator) / dim**0.5
    blocks = torch.randint(0, 256, (2 * outputs, dim // 32, 20), generator=generator, dtype=torch.uint8)
    blocks[:, :, 0:4:2], blocks[:, :, 1:4:2] = 7, 0x20  # 2**-7 and a little more
    quantised = quantize_linear(weight)
    return {
        "x": torch.randn(rows, dim, generator=generator).bfloat16(),
        "weight": weight.bfloat16(),
        "values": quantised.values,
        "scales": quantised.scales,
        "blocks": blocks.flatten(1),
        "norm_weight": 1 + 0.1 * torch.randn(dim, generator=generator),
        "residual": torch.randn(rows, outputs, generator=generator).bfloat16(),
    }


def call_products(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    kinds = (
        tensors["weight"],
        QuantizedWeight(tensors["values"], tensors["scales"]),
        GgufWeight(tensors["blocks"], "q4_1"),
    )
    options = {"norm_weight": tensors["norm_weight"], "activation": "swiglu", "residual": tensors["residual"]}
    return [linear(tensors["x"], kind, **options, backend=backend) for kind in kinds]


def call_norms(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    x = tensors["x"]
    return [rms_norm(x, tensors["norm_weight"], residual=x, backend=backend)]


LEVELS, WIDTH, BRANCHING = 3, 5, 4


def make_levels(seed: int) -> Tensors:
    """What a draft says level by level, and the roots."""
    generator = generator_of(seed)
    levels = {"roots": torch.randint(100, (BATCH,), generator=generator, dtype=torch.int32)}
    for level in range(LEVELS):
        logits = torch.randn(BATCH, WIDTH if level else 1, 100, generator=generator)
        logprobs, tokens = logits.log_softmax(-1).topk(BRANCHING)
        levels |= {f"logprobs{level}": logprobs, f"tokens{level}": tokens.to(torch.int32)}
    return levels


def call_growing(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    """A round in a pool of its own: every frontier, and all that the pool then holds."""
    pool = CandidatePool.empty(BATCH, levels=LEVELS, width=WIDTH, branching=BRANCHING, device=tensors["roots"].device)
    found = []
    for level in range(LEVELS):
        top = (tensors[f"tokens{level}"], tensors[f"logprobs{level}"])
        frontier = grow_tree(pool, *top, level=level, eos=3, backend=backend)
        found += [frontier.tokens, frontier.parent_rows, frontier.scores]
    return [*found, pool.tokens, pool.scores, pool.parents, pool.expanded, *fields_of(pool.topology)]


def call_pruning(tensors: Tensors, backend: str) -> list[torch.Tensor]:
    pool = CandidatePool.empty(BATCH, levels=1, width=WIDTH, branching=BRANCHING, device=tensors["roots"].device)
    grow_tree(pool, tensors["tokens0"], tensors["logprobs0"], level=0, backend=backend)
    tree = prune_tree(pool, 4, root_tokens=tensors["roots"], backend=backend)
    return [tree.tokens, tree.pool_ids, tree.expanded, *fields_of(tree.topology)]


PRECISE_LOGITS = ("target", "draft")
PRECISE_PROPAGATION = ("hidden", "norms", "weights", "cosines", "sines")
CASES = {
    "accept": {
        rule: DeviceCase(make_acceptance, functools.partial(call_acceptance, rule=rule), PRECISE_LOGITS)
        for rule in ("greedy", "block", "recursive", "traversal")
    },
    "sample": {"": DeviceCase(make_acceptance, call_sampling, PRECISE_LOGITS)},
    "bounded_exit": {
        "": DeviceCase(make_bounded_exits, call_bounded_exits, ("hidden", "head")),
        "many rows": DeviceCase(make_many_bounded_exits, call_bounded_exits, ("hidden", "head")),
    },
    "build_topology": {"": DeviceCase(make_trees, call_build_topology)},
    "exit_confidence": {
        "": DeviceCase(make_exits, call_exits, EXITS),
        "many rows": DeviceCase(make_many_exits, call_exits, EXITS),
        "int8": DeviceCase(make_int8_exits, call_exits, INT8_EXITS),
    },
    "exit_mlp": {"": DeviceCase(make_mlp, call_mlp, ("features", "weight0", "weight1", "weight2"))},
    "gather_layer_kv": {"": DeviceCase(make_layers, call_gather)},
    "kv_commit": {"": DeviceCase(make_layers, call_commit)},
    "kv_propagate": {"": DeviceCase(make_propagation, call_propagation, PRECISE_PROPAGATION)},
    "linear": {"": DeviceCase(make_products, call_products, ("x", "weight", "norm_weight", "residual"))},
    "rms_norm": {"": DeviceCase(make_products, call_norms, ("x", "norm_weight"))},
    "grow_tree": {"": DeviceCase(make_levels, call_growing)},
    "prune_tree": {"": DeviceCase(make_levels, call_pruning)},
    "screened_exit": {"": DeviceCase(make_screened_exits, call_screened_exits, EXITS)},
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
