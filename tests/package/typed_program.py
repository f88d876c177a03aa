"""What a user may write: every public name, for `mypy --strict`, and it runs. Lines that must be errors are marked.

Each `type: ignore` is a mistake that a type checker has to find: strict mode complains of one too many.
"""

from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import assert_type

import specdec_ops
from specdec_ops import (
    Acceptance,
    AcceptStatus,
    AdaptiveThreshold,
    AttentionState,
    CandidatePool,
    Children,
    Confidence,
    Exit,
    ExitStatus,
    Frontier,
    GgufWeight,
    GrowStatus,
    HeadBounds,
    LayerCache,
    Linear,
    LongestPath,
    PrunedTree,
    QuantizedHead,
    QuantizedWeight,
    Rope,
    Topology,
    TopologyStatus,
    Tree,
    VocabMap,
    backends,
    bound_head,
    build_topology,
    chain_accept,
    dlpack,
    early_exit,
    entropy_stop,
    exit_confidence,
    exit_features,
    exit_mlp,
    gather_layer_kv,
    greedy_accept,
    grow_tree,
    kv_append,
    kv_commit,
    kv_propagate,
    linear,
    longest_path_accept,
    match_accept,
    merge_states,
    prune_tree,
    published_trees,
    quantize_head,
    quantize_linear,
    rms_norm,
    sample_children,
    sample_tokens,
    tree_accept,
    tree_attention,
    typical_accept,
)
from specdec_ops.compat import flashinfer, sgl_kernel, vllm

BATCH, VOCAB, DIM = 2, 50, 64


def topologies() -> tuple[Tree, Topology]:
    """Trees on the host and on a device."""
    tree = Tree.from_branching((2, 1), root=True)
    assert_type(tree.parents, NDArray[np.int32])
    assert_type(tree.mask(), NDArray[np.bool_])
    assert_type(tree.paths(), list[tuple[int, ...]])
    assert_type(tree.paths(padded=True), NDArray[np.int32])
    assert_type(published_trees.get("medusa-63", root=True)[:5], Tree)
    topology = tree.to("cpu", BATCH)
    assert_type(
        Topology.from_trees([tree, Tree.chain(3)], torch.device("cpu"), packed=True).offsets, torch.Tensor | None
    )
    built = build_topology(topology.parents, topology.num_nodes)
    assert_type(built[:3].truncate(1).position_ids(7), torch.Tensor)
    assert TopologyStatus(int(built.status[0])) is TopologyStatus(0)
    pool = CandidatePool.empty(BATCH, levels=2, width=3, branching=2)
    assert_type(pool.topology, Topology)
    frontier = grow_tree(pool, torch.randint(9, (BATCH, 1, 2)), -torch.rand(BATCH, 1, 2), level=0, eos=(1, 2))
    assert_type(frontier, Frontier)
    assert_type(frontier.parent_rows, torch.Tensor)
    grown = prune_tree(pool, 3, root_tokens=torch.tensor([1, 2]))
    assert_type(grown, PrunedTree)
    assert_type(grown.draft_path(torch.zeros(BATCH, 2, dtype=torch.int32)), torch.Tensor)
    assert GrowStatus(int(pool.status[0])) == 0
    return tree, topology


def attention(tree: Tree, topology: Topology) -> torch.Tensor:
    """The result's type follows from return_lse."""
    q = torch.randn(BATCH, len(tree), 4, DIM)
    k_cache, v_cache = torch.randn(2, BATCH, 32, 2, DIM)
    out = tree_attention(q, k_cache, v_cache, topology, torch.tensor([9, 20]), window=8)
    assert_type(out, torch.Tensor)
    state = tree_attention(q, k_cache, v_cache, None, 9, return_lse=True)
    assert_type(state, AttentionState)
    merged = merge_states(*state, state.out, state.lse)
    assert_type(merged.lse, torch.Tensor)
    assert_type(specdec_ops.tree_attention(q, k_cache, v_cache, topology, 9), torch.Tensor)
    return out


def acceptance(topology: Topology) -> Acceptance:
    """Every rule; what they return."""
    nodes = topology.nodes
    target, draft = torch.randn(2, BATCH, nodes, VOCAB)
    tokens = torch.randint(VOCAB, (BATCH, nodes))
    greedy_accept(target, tokens, topology, eos=(1, 2))
    match_accept(target, tokens, topology, seeds=1, positions=torch.tensor([3, 4]), temperature=torch.ones(BATCH))
    chain_accept(target, tokens[:, 1:], draft[:, 1:], rule="block", seeds=1, positions=3, num_steps=2)
    typical_accept(target, tokens, topology, seeds=1, positions=3)
    longest = longest_path_accept(target, tokens, topology, draft, width=2, seeds=1, positions=3)
    assert_type(longest, LongestPath)
    assert_type(longest.next_tokens, torch.Tensor)
    children = sample_children(draft[:, :1], 2, seeds=1, positions=3, top_k=5)
    assert_type(children, Children)
    assert_type(sample_tokens(target[:, 0], seeds=1, positions=4, count=3), torch.Tensor)
    accepted = tree_accept(target, tokens, topology, draft, rule="traversal", seeds=1, positions=3)
    assert_type(accepted, Acceptance)
    assert not AcceptStatus(int(accepted.status[0])) & AcceptStatus.TARGET_INVALID
    return accepted


def exits() -> Exit:
    """Heads, confidences and stop rules. `specdec_ops.early_exit` is the function, whatever its module is called."""
    hidden, head = torch.randn(3, DIM), torch.randn(VOCAB, DIM)
    screen, bounds = quantize_head(head), bound_head(head)
    assert_type(screen, QuantizedHead)
    assert_type(bounds, HeadBounds)
    confidence = exit_confidence(hidden, head, top_k=10, screen=screen, vocab_map=VocabMap(range(VOCAB), VOCAB))
    assert_type(confidence, Confidence)
    assert_type(confidence.top_tokens, torch.Tensor | None)
    assert_type(specdec_ops.early_exit(hidden, head, 0.5), Exit)
    decided = early_exit(hidden, head, torch.full((3,), 0.5), measure="margin", level="any", bounds=bounds)
    assert ExitStatus(int(decided.confidence.status[0])) == 0
    score, stop = exit_mlp(exit_features(confidence), [(torch.randn(1, 11), torch.zeros(1))], 0.4)
    assert_type(score, torch.Tensor)
    threshold = AdaptiveThreshold(3, "cpu", start=0.4)
    assert_type(threshold.update(torch.tensor([1, 2, 0]), torch.tensor([3, 3, 3]), 4), torch.Tensor)
    assert_type(entropy_stop(confidence.entropy, threshold.threshold) | stop, torch.Tensor)
    return decided


def caches() -> LayerCache:
    """A step of a cache with two exits, and rows of skipped layers."""
    cache = LayerCache((1, 2), 16, 2, DIM, DIM, batch=1, device="cpu")
    cache.append(torch.randn(3, DIM))
    run = cache.run(0)
    assert_type(run.positions, torch.Tensor)
    rows = torch.randn(3, 2, DIM)
    assert_type(cache.attend(run, 0, rows, rows, rows, scale=0.5), torch.Tensor)
    assert_type(cache.finish(run, run.hidden), torch.Tensor)
    assert_type(cache.lengths, tuple[tuple[int, ...], ...])
    weights = torch.randn(2 * DIM, DIM)
    caches = [torch.zeros(1, 16, 2, DIM)]
    positions = torch.arange(3)
    others = [cache.clone() for cache in caches]
    kv_propagate(torch.randn(3, DIM), [(None, weights, weights)], positions, positions, caches, others, rope=10_000.0)
    kv_commit(caches, others, positions[None], 0)
    assert_type(gather_layer_kv(caches, caches, positions), torch.Tensor)
    new, rope = torch.randn(1, 3, 2, DIM), Rope(10_000.0, DIM // 2, 32, scaling={"rope_type": "linear", "factor": 2.0})
    assert_type(rope.to("cpu"), Rope)
    assert_type(Rope.from_config({"head_dim": DIM, "max_position_embeddings": 32}).pairs, int)
    turned = kv_append(new, new, caches[0], caches[0].clone(), Tree.chain(3).to("cpu"), 4, q=new, rope=rope)
    assert_type(turned, torch.Tensor | None)
    cache.crop([2])
    return cache


def products() -> torch.Tensor:
    """A layer's products, with weights of every kind."""
    x, weight = torch.randn(3, DIM), torch.randn(2 * DIM, DIM)
    quantised = quantize_linear(weight)
    assert_type(quantised, QuantizedWeight)
    assert_type(quantised.to("cpu"), QuantizedWeight)
    blocks = GgufWeight(torch.zeros(DIM, DIM // 32 * 18, dtype=torch.uint8), "q4_0")
    assert_type(blocks.dequantize(torch.tensor([0, 3])), torch.Tensor)
    gated = linear(x, quantised, norm_weight=torch.ones(DIM), activation="swiglu", residual=x)
    assert_type(linear(gated, blocks, bias=torch.zeros(DIM), out=torch.empty(3, DIM)), torch.Tensor)
    module = Linear.from_module(torch.nn.Linear(DIM, DIM), torch.nn.Linear(DIM, 5), quantized=True)
    assert_type(module, Linear)
    return rms_norm(Linear(blocks)(module(x)[:, :DIM].contiguous()), torch.ones(DIM), residual=x)


def others(tree: Tree, topology: Topology) -> None:
    """Other frameworks' arrays and signatures."""
    sampled = dlpack.sample_tokens(np.zeros((1, 5), np.float32), seeds=1, positions=0)
    assert isinstance(sampled, np.ndarray)
    assert_type(backends("tree_attention", torch.device("cpu")), dict[str, str | None])
    assert specdec_ops.__version__.split(".")
    nodes = len(tree)
    probs, tokens = torch.rand(BATCH, nodes, VOCAB).softmax(-1), torch.randint(VOCAB, (BATCH, nodes))
    chain = flashinfer.chain_speculative_sampling(probs[:, 1:], tokens[:, 1:].int(), probs, seed=1, offset=0)
    assert_type(chain, tuple[torch.Tensor, torch.Tensor, torch.Tensor])
    written = (torch.zeros(BATCH * nodes).int(), torch.zeros(BATCH, nodes).int(), torch.zeros(BATCH).int())
    links = (torch.arange(BATCH * nodes).view(BATCH, nodes), topology.first_child.long(), topology.next_sibling.long())
    sgl_kernel.verify_tree_greedy(*written, tokens, *links, probs.argmax(-1))
    uniform = torch.rand(BATCH, nodes)
    sgl_kernel.tree_speculative_sampling_target_only(*written, tokens, *links, uniform, uniform[:, 0], probs)
    built = torch.zeros(3, 1, 2).long()
    where = (
        torch.tensor([[-1, 0]]),
        torch.tensor([[0]]),
        torch.tensor([5]),
        torch.ones(14).bool(),
        torch.zeros(2).long(),
    )
    sgl_kernel.build_tree_kernel_efficient(*where, built[0], built[1], built[2], 1, 1, 2)
    metadata = SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={})
    flat = (tokens[:, 1:].flatten(), [nodes - 1] * BATCH, nodes - 1, torch.tensor([nodes - 1, 2 * (nodes - 1)]))
    ids = vllm.rejection_sample(*flat, None, probs[:, 1:].flatten(0, 1), tokens[:, :1], metadata)
    assert_type(ids, torch.Tensor)


def mistakes(topology: Topology, accepted: Acceptance, cache: LayerCache) -> None:
    """Never called: what must not pass."""
    tree_attention(accepted.tokens, accepted.tokens, accepted.tokens, topology)  # type: ignore[call-overload]
    tree_attention(accepted.tokens, accepted.tokens, accepted.tokens, topology, 3, scal=1.0)  # type: ignore[call-overload]
    print(accepted.token)  # type: ignore[attr-defined]
    accepted.tokens = accepted.nodes  # type: ignore[misc]
    print(specdec_ops.early_exit.Exit)  # type: ignore[attr-defined]
    print(specdec_ops.no_such_op)  # type: ignore[attr-defined]
    sample_tokens(accepted.tokens, seeds="1", positions=0)  # type: ignore[arg-type]
    sample_children(accepted.tokens, 2, positions=0)  # type: ignore[call-arg]
    cache.run("0")  # type: ignore[arg-type]
    quantize_head(None)  # type: ignore[arg-type]
    linear(accepted.tokens, 3)  # type: ignore[arg-type]
    print(AcceptStatus.NONE)  # type: ignore[attr-defined]


def main() -> None:
    """Run all but the mistakes."""
    tree, topology = topologies()
    print(attention(tree, topology).shape, acceptance(topology).tokens.shape, exits().num_active, caches().lengths)
    print(products().shape)
    others(tree, topology)


if __name__ == "__main__":
    main()
