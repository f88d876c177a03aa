"""One small valid call of every public function, for tests that change one thing about it and look at what happens.

A new function gets an entry in CALLS. Inputs are made once; a call that writes to one of its arguments copies it.
"""

import copy
import dataclasses
import itertools
import types
from collections.abc import Callable
from typing import NamedTuple

import torch

import specdec_ops
from specdec_ops import (
    AdaptiveThreshold,
    CandidatePool,
    LayerCache,
    Topology,
    Tree,
    VocabMap,
    bound_head,
    dlpack,
    early_exit,
    exit_confidence,
    gather_layer_kv,
    kv_append,
    kv_commit,
    kv_propagate,
    quantize_head,
    tree_attention,
)
from specdec_ops.compat import flashinfer, sgl_kernel, vllm

BATCH, VOCAB, DIM = 2, 96, 32
TREE = Tree.from_branching((2, 1), root=True)
NODES = len(TREE)


class Call(NamedTuple):
    """op: its name in `specdec_ops.backends`, or None: it has no backends."""

    function: Callable
    op: str | None
    arguments: dict


def random(*shape, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _acceptance() -> dict[str, Call]:
    draft = 2 * random(BATCH, NODES, VOCAB)
    target = draft + 0.5 * random(BATCH, NODES, VOCAB, seed=1)
    noise = {"seeds": torch.tensor([7, 2**40]), "positions": int32(3, 70)}
    above = draft[:, TREE.parents.clip(min=0)]
    tokens = (above + random(BATCH, NODES, VOCAB, seed=2)).argmax(dim=-1).int()
    law = {"temperature": torch.tensor([0.7, 1.3]), "top_k": int32(50, 0), "top_p": 0.9}
    tree = {"target_logits": target, "draft_tokens": tokens, "topology": TREE.to("cpu"), "eos": 5, "max_depth": 3}
    drawing = {**tree, **noise, **law}
    drafted = {**drawing, "draft_logits": draft}
    reduced = {"draft_logits": draft[:, :, :64].contiguous(), "vocab_map": VocabMap(torch.arange(20, 84), VOCAB)}
    chain = {name: value for name, value in drafted.items() if name not in ("topology", "max_depth")}
    chain |= {"draft_tokens": tokens[:, 1:], "draft_logits": draft[:, 1:], "num_steps": int32(4, 2)}
    greedy = {"target": target, **{name: tree[name] for name in ("draft_tokens", "topology", "eos", "max_depth")}}
    parents = int32(*[list(range(NODES))] * BATCH)
    return {
        "greedy_accept": Call(specdec_ops.greedy_accept, "accept", greedy),
        "match_accept": Call(specdec_ops.match_accept, "accept", drawing),
        "chain_accept": Call(specdec_ops.chain_accept, "accept", chain),
        "chain_accept block": Call(specdec_ops.chain_accept, "accept", {**chain, "rule": "block"}),
        "tree_accept": Call(specdec_ops.tree_accept, "accept", {**drafted, "draft_top_k": 60}),
        "tree_accept traversal": Call(specdec_ops.tree_accept, "accept", {**drafted, "rule": "traversal", **reduced}),
        "tree_accept target_only": Call(specdec_ops.tree_accept, "accept", {**drawing, "rule": "target_only"}),
        "tree_accept kseq": Call(specdec_ops.tree_accept, "accept", {**drafted, "rule": "kseq"}),
        "typical_accept": Call(specdec_ops.typical_accept, "accept", drawing),
        "longest_path_accept": Call(specdec_ops.longest_path_accept, "accept", {**drafted, "width": 2}),
        "sample_tokens": Call(specdec_ops.sample_tokens, "sample", {"logits": target[:, 0], **noise, **law}),
        "sample_children": Call(
            specdec_ops.sample_children,
            "sample",
            {"draft_logits": draft, "count": 3, "parents": parents, "first_parent": 0, **noise, **law},
        ),
    }


def _attention() -> dict[str, Call]:
    topology = Topology.from_trees([TREE, TREE[:3]])
    caches = random(2, 2 * BATCH * 8, 4, 2, 64)  # pages of 4 slots
    dense = {
        "q": random(BATCH, NODES, 4, 64),
        "k_cache": caches[0].view(2 * BATCH, 32, 2, 64)[:BATCH],
        "v_cache": caches[1].view(2 * BATCH, 32, 2, 64)[:BATCH],
        "topology": topology,
        "context_lens": int32(20, 9),
        "return_lse": True,
    }
    paged = {
        **{**dense, "q": dense["q"][:, :2], "k_cache": caches[0], "v_cache": caches[1]},
        "page_table": torch.randperm(32, generator=torch.Generator().manual_seed(0)).int().view(BATCH, 16),
        **{"query_start": int32(3, 1), "window": 12, "softcap": 9.0, "sinks": random(4), "num_splits": 2},
        **{"alibi_slopes": random(4).abs(), "k_scale": 0.9, "v_scale": 1.1},
    }
    odd = {**dense, **{name: dense[name][..., :40] for name in ("q", "k_cache", "v_cache")}}
    state = [random(3, 4, 64), random(3, 4), random(3, 4, 64, seed=1), random(3, 4, seed=1)]
    parents = int32(TREE.parents.tolist(), [-1, 0, 1, 0, 3])
    return {
        "tree_attention": Call(tree_attention, "tree_attention", dense),
        "tree_attention paged": Call(tree_attention, "tree_attention", paged),
        "tree_attention odd": Call(tree_attention, None, odd),  # a dim that kernels don't have: the definition runs
        "merge_states": Call(
            specdec_ops.merge_states,
            "merge_states",
            dict(zip(("out_a", "lse_a", "out_b", "lse_b"), state)),  # noqa: B905
        ),
        "build_topology": Call(
            specdec_ops.build_topology, "build_topology", {"parents": parents, "num_nodes": int32(5, 4)}
        ),
    }


def _growing() -> dict[str, Call]:
    """A pool with one level in it, and what a draft says of the next."""
    logprobs, tokens = (-random(BATCH, 3, 4).abs()).sort(descending=True)
    pool = CandidatePool.empty(BATCH, levels=3, width=3, branching=4)
    specdec_ops.grow_tree(pool, tokens[:, :1], logprobs[:, :1], level=0, backend="torch")
    grow = {"pool": pool, "top_tokens": tokens.int(), "top_logprobs": logprobs, "level": 1, "width": 2, "eos": 3}
    grow |= {"vocab_map": VocabMap([4, 1, 7, 3], 9), "active": torch.tensor([True, True])}
    return {
        "CandidatePool.empty": Call(_pool_tensors, None, {"batch": BATCH, "levels": 3, "width": 3, "branching": 4}),
        "grow_tree": Call(_grown, "grow_tree", grow),
        "prune_tree": Call(
            specdec_ops.prune_tree, "prune_tree", {"pool": pool, "nodes": 4, "root_tokens": int32(5, 9)}
        ),
    }


def _pool_tensors(batch, **sizes):
    return tensors_of(CandidatePool.empty(batch, **sizes))


def _grown(pool, **options):
    """grow_tree into a copy of the pool."""
    pool = copy.deepcopy(pool)
    return [*tensors_of(specdec_ops.grow_tree(pool, **options)), *tensors_of(pool)]


def _exits() -> dict[str, Call]:
    hidden, head = random(6, DIM), random(VOCAB, DIM)
    options = {
        "norm_weight": random(DIM).abs(),
        "bias": random(VOCAB),
        "temperature": torch.linspace(0.5, 1.5, 6),
        "top_k": 3,
    }
    arguments = {"hidden": hidden, "head": head, **options}
    quantised, bounds = quantize_head(head), bound_head(head, [20, VOCAB])
    sizes = (DIM, 24, 1)
    layers = [(random(o, i), random(o)) for i, o in itertools.pairwise(sizes)]
    weights = [(random(DIM).abs(), random(128, DIM), random(128, DIM, seed=1)) for _ in range(2)]
    propagate = {"hidden": hidden, "layers": weights, "positions": int32(*range(6)), "slots": int32(*range(6))}
    caches = [torch.zeros(BATCH * 4, 4, 2, 64) for _ in range(2)]
    propagate |= {"k_caches": caches, "v_caches": caches, "rope": 10_000.0, "requests": int32(0, 1, 0, 1, 1, 0)}
    propagate |= {"page_table": torch.arange(8, dtype=torch.int32).view(BATCH, 4)}
    stored = {name: random(2, BATCH * 4, 4, 2, 8, seed=seed) for seed, name in enumerate(("k_caches", "v_caches"))}
    commit = {**stored, "nodes": int32([0, 2, 3], [1, 2, -1]), "context_lens": int32(5, 7)}
    commit |= {"page_table": propagate["page_table"], "copies": int32([1, 3], [-1, 0])}
    gather = {**stored, "slots": int32(3, 15, -1), "requests": int32(0, 1, 0), "page_table": propagate["page_table"]}
    integers = {"x": hidden, "weight": specdec_ops.quantize_linear(head), "bias": random(VOCAB)}
    gates = {"x": hidden, "weight": random(128, DIM), "norm_weight": random(DIM).abs(), "norm_eps": 1e-5}
    gates |= {"bias": random(128), "activation": "swiglu", "residual": random(6, 64)}
    return {
        "linear": Call(specdec_ops.linear, "linear", gates),
        "linear int8": Call(specdec_ops.linear, "linear", integers),
        "rms_norm": Call(
            specdec_ops.rms_norm, "rms_norm", {"x": hidden, "weight": random(DIM), "residual": random(6, DIM, seed=1)}
        ),
        "exit_confidence": Call(exit_confidence, "exit_confidence", arguments),
        "exit_confidence int8": Call(exit_confidence, "exit_confidence", {**arguments, "head": quantised}),
        "exit_confidence screen": Call(exit_confidence, "screened_exit", {**arguments, "screen": quantised}),
        "early_exit": Call(
            early_exit, "exit_confidence", {**arguments, "threshold": 0.2, "measure": "margin", "level": "any"}
        ),
        "early_exit bounds": Call(early_exit, "bounded_exit", {**arguments, "threshold": 0.2, "bounds": bounds}),
        "exit_mlp": Call(specdec_ops.exit_mlp, "exit_mlp", {"features": hidden, "layers": layers}),
        "gather_layer_kv": Call(gather_layer_kv, "gather_layer_kv", gather),
        "kv_commit": Call(_committed, "kv_commit", commit),
        "kv_propagate": Call(_propagated, "kv_propagate", propagate),
    }


def _committed(k_caches, v_caches, *arguments, **options):
    """kv_commit in copies of the caches."""
    both = k_caches, v_caches
    copies = [caches.clone() if isinstance(caches, torch.Tensor) else copy.deepcopy(caches) for caches in both]
    kv_commit(*copies, *arguments, **options)
    return copies


def _appends() -> dict[str, Call]:
    """Padded rows of trees; and packed ones with places of their own, into pages of 8 bits."""
    angles = torch.arange(40, dtype=torch.float32, device="cpu")[:, None] * random(32).abs()
    k, v, q, caches = random(BATCH, NODES, 2, 64), random(BATCH, NODES, 2, 64, seed=1), random(BATCH, NODES, 4, 64), {}
    for name in ("k_cache", "v_cache"):
        caches[name] = torch.zeros(BATCH, 32, 2, 64, dtype=torch.float32, device="cpu")
    padded = {"k": k, "v": v, **caches, "topology": Topology.from_trees([TREE, TREE[:3]]), "context_lens": int32(20, 9)}
    padded |= {"q": q, "rope": (angles.cos(), angles.sin()), "q_norm_weight": random(64), "k_norm_weight": random(64)}
    packed = {"k": k.flatten(0, 1), "v": v.flatten(0, 1), "topology": None, "context_lens": None, "interleaved": True}
    packed |= {name: cache.view(16, 4, 2, 64).to(torch.int8) for name, cache in caches.items()}
    packed |= {"q": q.flatten(0, 1), "rope": (angles.cos()[:, :8].contiguous(), angles.sin()[:, :8].contiguous())}
    packed |= {"requests": int32(*[0, 1] * NODES), "slots": int32(*range(10)), "positions": int32(*range(10))}
    packed |= {"page_table": torch.arange(16, dtype=torch.int32, device="cpu").view(BATCH, 8).flip(1)}
    packed |= {"k_scale": random(2).abs(), "v_scale": 0.03}
    level = {**padded, "k": k[:, :2], "v": v[:, :2], "q": q[:, :2], "query_start": int32(1, 3)}
    return {
        "kv_append": Call(_appended, "kv_append", padded),
        "kv_append level": Call(_appended, "kv_append", level),
        "kv_append packed": Call(_appended, "kv_append", packed),
    }


def _appended(k, v, k_cache, v_cache, topology, context_lens, **options):
    """kv_append into copies of the caches, unless a test marks one."""
    copies = [copy.deepcopy(cache) if type(cache) is torch.Tensor else cache for cache in (k_cache, v_cache)]
    return [kv_append(k, v, *copies, topology, context_lens, **options), *copies]


def _propagated(hidden, layers, positions, slots, k_caches, v_caches, **options):
    """kv_propagate into copies of the caches."""
    copies = [copy.deepcopy(caches) for caches in (k_caches, v_caches)]
    kv_propagate(hidden, layers, positions, slots, *copies, **options)
    return copies


def _others() -> dict[str, Call]:
    """What makes, moves and keeps tensors: none of it is to take its device or dtype from the surroundings."""
    head = random(VOCAB, DIM)
    confidence = exit_confidence(random(6, DIM), head, top_k=10)
    topology = Topology.from_trees([TREE, TREE[:3]])
    arrays = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in _attention()["tree_attention"].arguments.items()
    }
    first = arrays.pop("q")
    blocks = specdec_ops.GgufWeight(torch.full((9, 34), 3, dtype=torch.uint8, device="cpu"), "q8_0")
    return {
        "quantize_head": Call(quantize_head, None, {"head": head}),
        "quantize_linear": Call(specdec_ops.quantize_linear, None, {"weight": head}),
        "Linear": Call(_projected, None, {"x": random(2, 3, DIM), "weight": head, "bias": random(VOCAB)}),
        "GgufWeight.dequantize": Call(blocks.dequantize, None, {"rows": torch.tensor([4, 1], device="cpu")}),
        "bound_head": Call(bound_head, None, {"head": head, "ends": [20, VOCAB]}),
        "VocabMap": Call(VocabMap, None, {"draft_to_target": [4, 1, 7], "vocab": 9}),
        "entropy_stop": Call(
            specdec_ops.entropy_stop, None, {"entropy": confidence.entropy, "threshold": 0.4, "gamma": 0.2}
        ),
        "exit_features": Call(specdec_ops.exit_features, None, {"confidence": confidence}),
        "AdaptiveThreshold": Call(
            _adapted,
            None,
            {"requests": 3, "num_accepted": int32(1, 2, 0), "num_drafted": int32(3, 2, 0), "max_drafted": 3},
        ),
        "Tree.to": Call(TREE.to, None, {"device": "cpu", "batch": 2}),
        "Topology.position_ids": Call(topology.position_ids, None, {"context_lens": 7}),
        "Topology.truncate": Call(topology.truncate, None, {"depth": 1}),
        "Topology[:n]": Call(lambda stop: topology[:stop], None, {"stop": 2}),
        "Tree.position_ids": Call(
            lambda context_len: torch.from_numpy(TREE.position_ids(context_len)), None, {"context_len": 7}
        ),
        "LayerCache": Call(_decoded, None, {"slots": 16, "kv_heads": 2, "head_dim": 64, "dim": 128, "batch": 2}),
        "dlpack.tree_attention": Call(
            lambda **options: list(map(torch.from_numpy, dlpack.tree_attention(first, **options))), None, arrays
        ),
    }


def _compat() -> dict[str, Call]:
    """Other frameworks' functions, whose arithmetic is PyTorch's."""
    draft, target = (random(BATCH, NODES, VOCAB, seed=seed).softmax(-1) for seed in (3, 4))
    tokens = draft.argmax(-1)
    topology = TREE.to("cpu", BATCH)
    links = {
        "candidates": tokens,
        "retrive_index": torch.arange(BATCH * NODES).view(BATCH, NODES),
        "retrive_next_token": topology.first_child.long(),
        "retrive_next_sibling": topology.next_sibling.long(),
    }
    coins = {
        "uniform_samples": random(BATCH, NODES).sigmoid(),
        "uniform_samples_for_final_sampling": random(BATCH).sigmoid(),
        "target_probs": target,
    }
    chain = {"draft_probs": draft[:, 1:], "draft_token_ids": tokens[:, 1:].int(), "target_probs": target, "seed": 3}
    flat = {"target_probs": target[:, 1:].flatten(0, 1), "draft_probs": draft[:, 1:].flatten(0, 1)}
    flat |= {"draft_token_ids": tokens[:, 1:].flatten().int(), "num_draft_tokens": [4, 4], "max_spec_len": 4}
    flat |= {"cu_num_draft_tokens": int32(4, 8), "bonus_token_ids": int32(1, 2)[:, None]}
    return {
        "sgl_kernel.tree_speculative_sampling_target_only": Call(
            _written(sgl_kernel.tree_speculative_sampling_target_only), None, {**links, **coins}
        ),
        "sgl_kernel.verify_tree_greedy": Call(
            _written(sgl_kernel.verify_tree_greedy), None, {**links, "target_predict": target.argmax(-1)}
        ),
        "flashinfer.chain_speculative_sampling": Call(
            flashinfer.chain_speculative_sampling, None, {**chain, "offset": 2}
        ),
        "vllm.rejection_sample": Call(_rejected, None, flat),
    }


def _written(function):
    """What one of sgl-kernel's functions writes."""

    def call(**arguments):
        outputs = [
            torch.full(shape, -1, dtype=torch.int32, device="cpu") for shape in ((BATCH * NODES,), (BATCH, 4), (2,))
        ]
        function(*outputs, **arguments)
        return outputs

    return call


def _rejected(**arguments):
    """vLLM's function, whose seeds come from generators."""
    generators = {request: torch.Generator("cpu").manual_seed(request) for request in range(BATCH)}
    metadata = types.SimpleNamespace(all_greedy=False, all_random=True, temperature=None, generators=generators)
    return vllm.rejection_sample(**arguments, sampling_metadata=metadata)


def _projected(x, weight, bias):
    """A module of a weight, and of its int8 copy."""
    return [specdec_ops.Linear(kind, bias)(x) for kind in (weight, specdec_ops.quantize_linear(weight))]


def _adapted(requests, num_accepted, num_drafted, max_drafted):
    rule = AdaptiveThreshold(requests)
    rule.update(num_accepted, num_drafted, max_drafted)
    return rule.update(num_accepted, num_drafted, max_drafted), rule.accepted_share


def _decoded(slots, kv_heads, head_dim, dim, batch, dtype=torch.float32, backend="auto"):
    """Two tokens of each request, a tree behind them, of which a path stays."""
    cache = LayerCache((1, 2), slots, kv_heads, head_dim, dim, batch=batch, dtype=dtype, backend=backend)
    results = []
    for count, parents, groups in ((2, None, 2), (1, None, 1), (3, int32(*[-1, 0, 0] * batch), 2)):
        cache.append(random(count * batch, dim).to(dtype), parents)
        for group in range(groups):
            run = cache.run(group)
            rows = run.hidden.view(-1, kv_heads, head_dim)
            out = cache.attend(run, group, rows, rows, rows)
            results += [cache.finish(run, out.flatten(1)), run.positions]
    cache.commit(int32(*[[0, 2, -1]] * batch))
    cache.crop(3)
    return [*results, cache.pending(1)[1].clone(), torch.tensor(cache.lengths, device="cpu")]


CALLS = {**_acceptance(), **_attention(), **_growing(), **_exits(), **_appends(), **_others(), **_compat()}


def run(name: str, **changes) -> list[torch.Tensor]:
    """The tensors of the result of a call with these arguments changed."""
    call = CALLS[name]
    return tensors_of(call.function(**{**call.arguments, **changes}))


def tensors_of(result) -> list[torch.Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
    if isinstance(result, list | tuple):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []
