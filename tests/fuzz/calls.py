"""Random valid calls of every op, from a seed. What a person would not think of: odd sizes, strides, dtypes, options.

`make(name, seed)` gives the same call each time. Slots and rows that no one may look at hold NaN, and pages of nobody
have no number that there is.
"""

import copy
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch

import specdec_ops
from specdec_ops import CandidatePool, Frontier, Topology, Tree, VocabMap, bound_head, quantize_head, quantize_linear
from tests.harness.public_calls import tensors_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


class Case(NamedTuple):
    """A call. `written`: the arguments that it writes to, which each run gets a copy of."""

    function: Callable
    arguments: dict
    written: tuple[str, ...] = ()

    def run(self, **options) -> list[torch.Tensor]:
        """All tensors that it returns or writes."""
        arguments = {name: copied(value) if name in self.written else value for name, value in self.arguments.items()}
        result = self.function(**arguments, **options)
        return tensors_of([result, [arguments[name] for name in self.written]])


def copied(value):
    """A copy with the same strides."""
    if isinstance(value, torch.Tensor):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if value.numel() == 0:
            return value.clone()
        flat = value.as_strided((extent,), (1,)).clone()
        return flat.as_strided(value.shape, value.stride())
    if isinstance(value, list | tuple):
        return type(value)(copied(part) for part in value)
    return copy.deepcopy(value)


class Draws:
    """What a seed decides."""

    def __init__(self, seed: int):
        self._random, self._generator = random.Random(seed), torch.Generator("cpu").manual_seed(seed)

    def of(self, *choices):
        return self._random.choice(choices)

    def int(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def float(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def normal(self, *shape, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float32, device="cpu").to(dtype)

    def ints(self, low: int, high: int, *shape) -> torch.Tensor:
        """int32, from low to high - 1."""
        return torch.randint(low, high, shape, generator=self._generator, dtype=torch.int32, device="cpu")

    def permutation(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator, device="cpu")

    def wide(self, tensor: torch.Tensor) -> torch.Tensor:
        """int32 as that or int64."""
        return tensor.long() if self.chance(0.3) else tensor

    def per_request(self, values: torch.Tensor):
        """One for each request, or one number for all."""
        return self.wide(values) if len(values) == 0 or self.chance(0.6) else int(values[0])

    def strided(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers with other strides; the last dimension stays contiguous."""
        if tensor.dim() < 2 or self.chance(0.5):
            return tensor
        if self.chance(0.5) and tensor.dim() > 2:
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        around = torch.zeros(
            *tensor.shape[:-1], tensor.shape[-1] + self.int(0, 3), dtype=tensor.dtype, device=tensor.device
        )
        inside = around[..., : tensor.shape[-1]]
        return inside.copy_(tensor)


def parents_of(draws: Draws, nodes: int) -> list[int]:
    """A chain, a star, a forest or anything between."""
    kind = draws.of("chain", "star", "any", "forest")
    if kind == "chain":
        return [node - 1 for node in range(nodes)]
    if kind == "star":
        return [-1] + [0] * (nodes - 1) if nodes else []
    lowest = -1 if kind == "forest" else 0
    return [draws.int(lowest, node - 1) if node else -1 for node in range(nodes)]


def topology_of(draws: Draws, batch: int, nodes: int, packed: bool = False) -> Topology:
    """Trees of up to so many nodes, at least one of which has them all; one tree for all, or one each."""
    sizes = [nodes, *(draws.int(0, nodes) for _ in range(batch - 1))]
    if not packed and (batch == 1 or draws.chance(0.2)):
        return Tree(parents_of(draws, nodes)).to("cpu", draws.of(1, batch))
    return Topology.from_trees([Tree(parents_of(draws, size)) for size in sizes[:batch]], packed=packed)


# Acceptance and sampling


def law_of(draws: Draws, batch: int, prefix: str = "") -> dict:
    law = {}
    if draws.chance(0.7):
        law["temperature"] = draws.of(0.0, 0.02, 0.5, 1.0, 3.0, draws.normal(batch).abs())
    if draws.chance(0.4):
        law["top_k"] = draws.of(1, 2, 7, 10_000, draws.ints(0, 9, batch))
    if draws.chance(0.4):
        law["top_p"] = draws.of(0.0, 0.3, 0.9, 1.0, draws.normal(batch).abs().clamp(max=1))
    return {prefix + name: value for name, value in law.items()}


def logits_of(draws: Draws, *shape) -> torch.Tensor:
    logits = draws.normal(*shape) * draws.of(0.0, 0.3, 1.0, 5.0, 30.0)
    if draws.chance(0.3):
        logits[draws.normal(*shape) > 0.7] = -float("inf")
    if draws.chance(0.2):
        logits = logits.round()  # many are equal
    return draws.strided(logits.to(draws.of(*DTYPES)))


def accept_case(draws: Draws, rule: str) -> Case:
    batch, nodes = draws.int(1, 3), draws.int(1, 12)
    vocab = draws.of(1, 2, 5, 33, 100, 700)
    target = logits_of(draws, batch, nodes, vocab)
    tokens = draws.ints(0, vocab, batch, nodes)
    likely = target.float().argmax(-1).int().roll(1, dims=-1)
    tokens = torch.where(draws.normal(batch, nodes) > 0, likely, tokens)
    tokens[draws.normal(batch, nodes) > 2] = draws.of(-1, vocab, -7, 2**31 - 1)
    arguments = {"draft_tokens": draws.wide(tokens), "topology": topology_of(draws, batch, nodes)}
    if draws.chance(0.3):
        arguments["eos"] = draws.of(0, (0, vocab - 1), ())
    if draws.chance(0.3):
        arguments["max_depth"] = draws.int(0, nodes + 2)
    if rule == "greedy":
        by_ids = draws.chance(0.4)
        arguments["target"] = draws.wide(target.float().argmax(-1).int()) if by_ids else target
        return Case(specdec_ops.greedy_accept, arguments)
    arguments |= law_of(draws, batch) | {"target_logits": target}
    arguments |= {
        "seeds": draws.of(3, draws.ints(0, 99, batch).long()),
        "positions": draws.of(5, draws.ints(0, 9, batch)),
    }
    if rule == "match":
        return Case(specdec_ops.match_accept, arguments)
    if rule == "typical":
        return Case(specdec_ops.typical_accept, arguments)
    draft_vocab, vocab_map = vocab, None
    if vocab > 2 and draws.chance(0.3):
        draft_vocab = draws.int(1, vocab)
        vocab_map = VocabMap(draws.permutation(vocab)[:draft_vocab], vocab)
    drafted = {"draft_logits": logits_of(draws, batch, nodes, draft_vocab), "vocab_map": vocab_map}
    drafted |= law_of(draws, batch, "draft_") if draws.chance(0.3) else {}
    if rule == "longest":
        return Case(specdec_ops.longest_path_accept, arguments | {"width": draws.int(1, 4)} | drafted)
    if rule in ("token", "block"):
        arguments.pop("topology")
        arguments.pop("max_depth", None)
        steps = nodes - 1
        arguments["draft_tokens"] = arguments["draft_tokens"][:, :steps]
        drafted["draft_logits"] = drafted["draft_logits"][:, :steps]
        arguments |= drafted if draws.chance(0.7) else {}
        if draws.chance(0.4):
            arguments["num_steps"] = draws.of(draws.int(0, steps), draws.ints(0, steps + 1, batch))
        return Case(specdec_ops.chain_accept, arguments | {"rule": rule})
    arguments["rule"] = rule
    if rule == "kseq" or (rule != "target_only" and draws.chance(0.7)):
        arguments |= drafted
        if rule != "kseq":
            arguments |= {"replacement": draws.chance(0.4), "draft_rows": draws.of("parent", "parent", "child")}
    elif rule == "target_only" and draws.chance(0.5):
        arguments["thresholds"] = (draws.float(0.2, 1), draws.float(0.2, 1))
    return Case(specdec_ops.tree_accept, arguments)


def sample_tokens(draws: Draws) -> Case:
    rows, vocab = draws.int(0, 5), draws.of(1, 2, 5, 64, 1000, 20_000)
    arguments = {"logits": logits_of(draws, rows, vocab), **law_of(draws, rows)}
    arguments |= {
        "seeds": draws.of(2**63, draws.ints(0, 99, rows).long()),
        "positions": draws.of(0, draws.ints(0, 9, rows)),
    }
    if draws.chance(0.5):
        arguments["count"] = draws.int(1, 6)
    return Case(specdec_ops.sample_tokens, arguments)


def sample_children(draws: Draws) -> Case:
    batch, rows, vocab = draws.int(1, 3), draws.int(1, 4), draws.of(1, 3, 64, 1000)
    arguments = {"draft_logits": logits_of(draws, batch, rows, vocab), "count": draws.int(1, 5), **law_of(draws, batch)}
    arguments |= {"seeds": draws.ints(0, 99, batch).long(), "positions": draws.of(7, draws.ints(0, 9, batch))}
    arguments |= {"replacement": draws.chance(0.4)}
    if draws.chance(0.5):
        arguments["parents"] = draws.wide(draws.ints(0, 99, batch, rows))
    else:
        arguments["first_parent"] = draws.int(0, 9)
    if draws.chance(0.3):
        arguments["vocab_map"] = VocabMap(draws.permutation(vocab + 5)[:vocab], vocab + 5)
    return Case(specdec_ops.sample_children, arguments)


# Attention and caches


def pages_of(
    draws: Draws, batch: int, slots: int, dense: list[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Dense caches [batch, slots, ...] as pages in any order, with pages of nobody full of NaN, and their table."""
    page_size = draws.of(1, 3, 4, 16)
    each = -(-slots // page_size)
    pages = batch * each + draws.int(1, 3)
    table = draws.permutation(pages)[: batch * each].view(batch, each).int()
    paged = []
    for cache in dense:
        store = torch.full((pages, page_size, *cache.shape[2:]), NAN).to(cache.dtype)
        for request, index in itertools.product(range(batch), range(each)):
            part = cache[request, index * page_size : (index + 1) * page_size]
            store[table[request, index], : len(part)] = part
        paged.append(store)
    return paged, table


def tree_attention(draws: Draws, path_invariant: bool = False) -> Case:
    batch, nodes = draws.int(1, 3), draws.of(1, 2, 5, 9, 17, 66)
    kv_heads, dim = draws.of(1, 2, 3), draws.of(16, 32, 64, 80, 128, 256)
    heads, dtype = kv_heads * draws.of(1, 2, 4), draws.of(*DTYPES)
    with_tree = draws.chance(0.85)
    packed = with_tree and draws.chance(0.35)
    topology = topology_of(draws, batch, nodes, packed) if with_tree else None
    contexts = draws.ints(0, draws.of(1, 9, 40, 300), batch)
    slots = int(contexts.max()) + nodes + draws.int(0, 3)
    caches = [torch.full((batch, slots, kv_heads, dim), NAN, dtype=dtype) for _ in range(2)]
    for cache, (request, context) in itertools.product(caches, enumerate(contexts.tolist())):
        cache[request, : context + nodes] = draws.normal(context + nodes, kv_heads, dim, dtype=dtype)
    arguments = {
        "topology": topology,
        "context_lens": draws.per_request(contexts) if len(set(contexts.tolist())) == 1 else draws.wide(contexts),
    }
    if draws.chance(0.4):
        caches, arguments["page_table"] = pages_of(draws, batch, slots, caches)
    arguments |= dict(zip(("k_cache", "v_cache"), (draws.strided(cache) for cache in caches), strict=True))
    if packed:
        rows = int(topology.offsets[-1]) + draws.int(0, 3)
        q = draws.normal(rows, heads, dim, dtype=dtype)
    else:
        q = draws.normal(batch, draws.of(1, nodes, nodes + 2), heads, dim, dtype=dtype)
        if draws.chance(0.3):
            arguments["query_start"] = draws.of(draws.int(0, nodes), draws.ints(-2, nodes + 1, batch))
    arguments["q"] = draws.strided(q)
    for name, value in (
        ("scale", draws.float(0.01, 1)),
        ("window", draws.int(1, 40)),
        ("softcap", draws.float(1, 30)),
        ("sinks", draws.normal(heads)),
        ("alibi_slopes", draws.normal(heads).abs() / 9),
        ("k_scale", 0.5),
        ("v_scale", 2.0),
    ):
        if draws.chance(0.15):
            arguments[name] = value
    arguments["return_lse"] = draws.chance(0.5)
    if path_invariant:
        arguments["path_invariant"] = True
    elif draws.chance(0.3):
        arguments["num_splits"] = draws.int(1, 5)
    return Case(specdec_ops.tree_attention, arguments)


def merge_states(draws: Draws) -> Case:
    shape = (*(draws.int(0, 3) for _ in range(draws.int(1, 2))), draws.int(1, 4), draws.int(1, 130))
    dtype, arguments = draws.of(*DTYPES), {}
    for part in "ab":
        lse = draws.normal(*shape[:-1]) * draws.of(1, 20, 100)
        lse[draws.normal(*shape[:-1]) > 1.5] = -float("inf")
        arguments |= {f"out_{part}": draws.normal(*shape, dtype=dtype), f"lse_{part}": lse}
    return Case(specdec_ops.merge_states, arguments)


def kv_append(draws: Draws) -> Case:
    batch, nodes, kv_heads = draws.int(1, 3), draws.int(1, 9), draws.of(1, 2, 3)
    dim, v_dim, dtype = draws.of(2, 8, 20, 64, 128), draws.of(4, 20, 64), draws.of(*DTYPES)
    contexts, slots = draws.ints(0, 20, batch), 40
    packed = draws.chance(0.3)
    topology = topology_of(draws, batch, nodes, packed) if packed or draws.chance(0.7) else None
    leading = (int(topology.offsets[-1]) + draws.int(0, 2),) if packed else (batch, nodes)
    arguments = {"topology": topology, "context_lens": contexts}
    store = draws.of(dtype, dtype, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    caches = [draws.normal(batch, slots, kv_heads, size).to(store) for size in (dim, v_dim)]
    if draws.chance(0.4) and store in DTYPES:
        caches, arguments["page_table"] = pages_of(draws, batch, slots, caches)
    arguments |= dict(zip(("k_cache", "v_cache"), caches, strict=True))
    arguments |= {
        name: draws.strided(draws.normal(*leading, kv_heads, size, dtype=dtype))
        for name, size in (("k", dim), ("v", v_dim))
    }
    if draws.chance(0.6):
        arguments["q"] = draws.strided(draws.normal(*leading, kv_heads * 2, dim, dtype=dtype))
        if draws.chance(0.3):
            arguments["q_norm_weight"] = draws.normal(dim)
    if draws.chance(0.7):
        angles = draws.normal(60, draws.int(0, dim // 2))
        arguments |= {"rope": (angles.cos(), angles.sin()), "interleaved": draws.chance(0.5)}
    if draws.chance(0.3):
        arguments["k_norm_weight"] = draws.normal(dim, dtype=draws.of(dtype, torch.float32))
    if draws.chance(0.3):
        arguments["query_start"] = draws.of(draws.int(0, 3), draws.ints(-2, 5, batch))
    if store == torch.int8 or draws.chance(0.2):
        arguments |= {"k_scale": draws.of(0.02, draws.normal(kv_heads).abs() + 0.01), "v_scale": 0.05}
    return Case(specdec_ops.kv_append, arguments, ("k_cache", "v_cache"))


def layers_of_caches(draws: Draws, batch: int, dim: int, kv_heads: int, dtype) -> dict:
    layers, slots = draws.of(1, 2, 35), 24
    per_layer = [[draws.normal(batch, slots, kv_heads, dim).to(dtype) for _ in range(2)] for _ in range(layers)]
    arguments = {}
    if draws.chance(0.4):
        table = draws.permutation(batch * 6 + 2)[: batch * 6].view(batch, 6).int()
        per_layer = [[draws.normal(batch * 6 + 2, 4, kv_heads, dim).to(dtype) for _ in range(2)] for _ in range(layers)]
        arguments["page_table"] = table
    keys, values = ([layer[part] for layer in per_layer] for part in range(2))
    if draws.chance(0.4):
        keys, values = torch.stack(keys), torch.stack(values)
    return arguments | {"k_caches": keys, "v_caches": values}


def kv_commit(draws: Draws) -> Case:
    batch = draws.int(1, 3)
    arguments = layers_of_caches(draws, batch, draws.of(1, 5, 16), draws.int(1, 2), draws.of(*DTYPES, torch.int8))
    nodes = draws.ints(0, 2, batch, draws.int(1, 6)).cumsum(-1).int() + torch.arange(1, device="cpu").int()
    nodes = torch.where(draws.normal(*nodes.shape) > 1.8, -1, nodes.cumsum(-1).int())
    arguments |= {"nodes": draws.wide(nodes), "context_lens": draws.per_request(draws.ints(-1, 26, batch).clamp(min=0))}
    if "page_table" in arguments and draws.chance(0.4):
        arguments["copies"] = draws.wide(draws.ints(-1, batch * 6 + 2, draws.int(0, 3), 2))
    return Case(specdec_ops.kv_commit, arguments, ("k_caches", "v_caches"))


def gather_layer_kv(draws: Draws) -> Case:
    batch, rows = draws.int(1, 3), draws.int(0, 20)
    arguments = layers_of_caches(draws, batch, draws.of(1, 5, 16), draws.int(1, 2), draws.of(*DTYPES, torch.int8))
    arguments |= {
        "slots": draws.wide(draws.ints(-2, 27, rows)),
        "requests": draws.wide(draws.ints(-1, batch + 1, rows)),
    }
    return Case(specdec_ops.gather_layer_kv, arguments)


def kv_propagate(draws: Draws) -> Case:
    batch, rows, dim, dtype = draws.int(1, 2), draws.int(0, 9), draws.of(1, 16, 40), draws.of(*DTYPES)
    kv_heads, head_dim = draws.int(1, 2), draws.of(2, 6, 16)
    caches = layers_of_caches(draws, batch, head_dim, kv_heads, dtype)
    arguments = {name: list(value) if name != "page_table" else value for name, value in caches.items()}
    with_norm, width = draws.chance(0.5), kv_heads * head_dim
    weights = [draws.normal(2, width, dim, dtype=dtype).unbind() for _ in arguments["k_caches"]]
    arguments["layers"] = [(draws.normal(dim) if with_norm else None, *pair) for pair in weights]
    places = draws.permutation(26)[:rows].int() - 1  # no two rows go to one slot
    arguments |= {
        "hidden": draws.strided(draws.normal(rows, dim, dtype=dtype)),
        "positions": draws.wide(draws.ints(0, 50, rows)),
        "slots": places,
    }
    arguments |= {
        "requests": draws.ints(0, batch, rows),
        "rope": draws.of(None, 10_000.0, 500.0),
        "interleaved": draws.chance(0.5),
    }
    return Case(specdec_ops.kv_propagate, arguments, ("k_caches", "v_caches"))


# Trees


def build_topology(draws: Draws) -> Case:
    batch, nodes = draws.int(0, 4), draws.of(0, 1, 5, 63, 64, 65, 130)
    parents = [parents_of(draws, nodes) for _ in range(batch)]
    arguments = {"parents": draws.wide(torch.tensor(parents, dtype=torch.int32, device="cpu").view(batch, nodes))}
    if draws.chance(0.5):
        arguments["num_nodes"] = draws.wide(draws.ints(0, nodes + 1, batch))
    return Case(specdec_ops.build_topology, arguments)


def grown(pool: CandidatePool, levels: list[dict], nodes: int, root_tokens: torch.Tensor, backend: str = "auto"):
    """All levels, and the tree of them."""
    frontiers = []
    for level, options in enumerate(levels):
        frontier = specdec_ops.grow_tree(pool, level=level, **options, backend=backend)
        frontiers.append(Frontier(*(part.clone() for part in (frontier.tokens, frontier.parent_rows, frontier.scores))))
    return frontiers, specdec_ops.prune_tree(pool, nodes, root_tokens=root_tokens, backend=backend)


def grow_tree(draws: Draws) -> Case:
    batch, levels, width, branching = draws.int(0, 3), draws.int(1, 4), draws.int(1, 5), draws.int(1, 6)
    pool, rounds, rows = CandidatePool.empty(batch, levels=levels, width=width, branching=branching), [], 1
    for level in range(draws.int(1, levels)):
        logprobs = -draws.normal(batch, rows, branching).abs().sort(dim=-1).values
        if draws.chance(0.3):
            logprobs = logprobs.round()  # equal scores
        logprobs[draws.normal(*logprobs.shape) > 2] = draws.of(-float("inf"), NAN, 1.0)
        options = {"top_tokens": draws.wide(draws.ints(-1, 50, batch, rows, branching)), "top_logprobs": logprobs}
        if draws.chance(0.3):
            options["active"] = draws.normal(batch) > -1
        if draws.chance(0.3):
            options["eos"] = draws.int(0, 50)
        if draws.chance(0.3):
            options["vocab_map"] = VocabMap(draws.permutation(60)[:40], 60)
        rounds.append(options)
        rows = width if level + 1 < levels else 0
    arguments = {"pool": pool, "levels": rounds, "nodes": draws.int(1, 40), "root_tokens": draws.ints(0, 50, batch)}
    return Case(grown, arguments, ("pool",))


# Exits and products


def exit_arguments(draws: Draws) -> dict:
    rows, dim, vocab, dtype = draws.int(0, 6), draws.of(1, 8, 33, 64, 200), draws.of(1, 2, 33, 300), draws.of(*DTYPES)
    arguments = {
        "hidden": draws.strided(draws.normal(rows, dim, dtype=dtype)),
        "head": draws.normal(vocab, dim, dtype=dtype),
    }
    if draws.chance(0.4):
        arguments["norm_weight"] = draws.normal(dim, dtype=draws.of(dtype, torch.float32))
    if draws.chance(0.3):
        arguments["bias"] = draws.normal(vocab)
    if draws.chance(0.4):
        arguments["temperature"] = draws.of(0.3, 2.0, draws.normal(rows).abs() + 0.1)
    if draws.chance(0.5):
        arguments["top_k"] = draws.int(0, 16)
    if draws.chance(0.3):
        arguments["vocab_map"] = VocabMap(draws.permutation(vocab + 9)[:vocab], vocab + 9)
    return arguments


def exit_confidence(draws: Draws) -> Case:
    arguments = exit_arguments(draws)
    if draws.chance(0.3):
        arguments["head"] = quantize_head(arguments["head"])
    return Case(specdec_ops.exit_confidence, arguments)


def early_exit(draws: Draws) -> Case:
    arguments = exit_arguments(draws)
    arguments |= {"measure": draws.of("max_prob", "margin", "entropy"), "level": draws.of("row", "any", "all")}
    arguments["threshold"] = draws.of(0.0, 0.4, 1.0, draws.normal(len(arguments["hidden"])).abs())
    return Case(specdec_ops.early_exit, arguments)


def screened_exit(draws: Draws) -> Case:
    arguments = exit_arguments(draws)
    arguments |= {"screen": quantize_head(arguments["head"]), "top_k": draws.int(0, 3)}
    return Case(figures_that_hold, arguments)


def figures_that_hold(top_k: int = 0, **arguments):
    """What a screen leaves as it is: tokens, and what is valid. Entropy and sums are estimates."""
    found = specdec_ops.exit_confidence(top_k=top_k, **arguments)
    return [found.token, found.top_tokens, found.status & 1]


def bounded_exit(draws: Draws) -> Case:
    arguments = exit_arguments(draws)
    vocab = len(arguments["head"])
    ends = sorted({draws.int(1, vocab) for _ in range(draws.int(0, 4))} | {vocab})
    arguments |= {"bounds": bound_head(arguments["head"], tuple(ends)), "level": draws.of("row", "any", "all")}
    arguments |= {"threshold": draws.of(0.0, 0.4, 1.0), "measure": draws.of("max_prob", "margin", "entropy")}
    return Case(decisions, arguments)


def decisions(**arguments):
    """What bounds leave as it is. How much was read, and of what the figures of the others are, depends on tiles."""
    found = specdec_ops.early_exit(**arguments)
    return [torch.where(found.exited, found.confidence.token, -1), found.exited, found.active_rows, found.num_active]


def exit_mlp(draws: Draws) -> Case:
    sizes = [draws.int(1, 90) for _ in range(draws.int(1, 4))] + [1]
    dtype = draws.of(*DTYPES)
    layers = [(draws.normal(o, i, dtype=dtype) / i**0.5, draws.normal(o)) for i, o in itertools.pairwise(sizes)]
    features = draws.strided(draws.normal(draws.int(0, 7), sizes[0], dtype=dtype))
    return Case(specdec_ops.exit_mlp, {"features": features, "layers": layers, "threshold": draws.float(0, 1)})


def linear(draws: Draws) -> Case:
    rows, dim, outputs, dtype = (
        draws.of(0, 1, 2, 5, 16, 40),
        draws.of(1, 8, 32, 100, 256),
        draws.of(1, 7, 32),
        draws.of(*DTYPES),
    )
    activation = draws.of(None, None, "swiglu", "geglu")
    weight = draws.normal(outputs * (2 if activation else 1), dim) / dim**0.5
    arguments = {"x": draws.strided(draws.normal(rows, dim, dtype=dtype)), "activation": activation}
    arguments["weight"] = draws.of(quantize_linear(weight), weight.to(dtype), weight.to(dtype))
    if draws.chance(0.3):
        arguments["bias"] = draws.normal(len(weight), dtype=draws.of(dtype, torch.float32))
    if draws.chance(0.3):
        arguments["norm_weight"] = draws.normal(dim, dtype=draws.of(dtype, torch.float32))
    if draws.chance(0.3):
        arguments["residual"] = draws.strided(draws.normal(rows, outputs, dtype=dtype))
    return Case(specdec_ops.linear, arguments)


def rms_norm(draws: Draws) -> Case:
    rows, dim, dtype = draws.int(0, 9), draws.of(1, 3, 32, 100, 1000), draws.of(*DTYPES)
    arguments = {"x": draws.strided(draws.normal(rows, dim, dtype=dtype) * draws.of(1, 1e-3, 100))}
    arguments["weight"] = draws.normal(dim, dtype=draws.of(dtype, torch.float32))
    if draws.chance(0.4):
        arguments["residual"] = draws.strided(draws.normal(rows, dim, dtype=dtype))
    return Case(specdec_ops.rms_norm, arguments)


RULES = ("greedy", "match", "token", "block", "recursive", "traversal", "target_only", "kseq", "typical", "longest")
MAKERS: dict[str, Callable[[Draws], Case]] = {
    **{f"accept_{rule}": (lambda draws, rule=rule: accept_case(draws, rule)) for rule in RULES},
    "path_attention": lambda draws: tree_attention(draws, path_invariant=True),
    **{
        function.__name__: function
        for function in (
            *(sample_tokens, sample_children, tree_attention, merge_states, kv_append, kv_commit, gather_layer_kv),
            *(kv_propagate, build_topology, grow_tree, exit_confidence, early_exit, screened_exit, bounded_exit),
            *(exit_mlp, linear, rms_norm),
        )
    },
}


def make(name: str, seed: int) -> Case:
    """The call that a seed stands for."""
    return MAKERS[name](Draws(seed))
