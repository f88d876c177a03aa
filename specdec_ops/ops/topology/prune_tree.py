"""prune_tree: which candidates of a grown tree the target is to judge (EAGLE-2)."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core.checks import argument_error, as_int32, device_error
from specdec_ops.topology import Topology

from . import contract
from .candidate_pool import CandidatePool, check_int

MAX_PRUNED_NODES = 2048


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PrunedTree:
    """The drafted tree that the target is to judge, on the pool's device. Node 0 is the root, the last committed token.

    Attributes:
        tokens: int32 `[batch, nodes]`: target ids, as `tree_accept` takes them; -1 from num_nodes on.
        topology: of these nodes, in level order; `topology.num_nodes` says how many each request has. Its status is
            not 0 where a candidate stayed whose parent did not, which `grow_tree` never leaves: it became a root.
        pool_ids: int32 `[batch, nodes]`: the candidate in the pool that each node is; -1 for the root and where there
            is no node.
        expanded: int32 `[batch, nodes]`: the draft's node that each node is, which says where its K and V lie in the
            draft's cache; 0 for the root; -1 where the draft has not run it, or there is no node.
    """

    tokens: torch.Tensor
    topology: Topology
    pool_ids: torch.Tensor
    expanded: torch.Tensor

    def draft_path(self, nodes: torch.Tensor) -> torch.Tensor:
        """An accepted path as nodes of the draft, for `kv_commit` of the draft's cache.

        Only the last node of a path can be one that the draft has not run: what follows a node is known because the
        draft has run it. So the draft's cache has the whole path, or is one row short.

        Args:
            nodes: int32 or int64 `[batch, depth + 1]`: `Acceptance.nodes`, padded with -1.

        Returns:
            int32 like nodes: ascending nodes of `CandidatePool.topology`, then -1.
        """
        path = self.expanded.gather(1, nodes.clamp(0, self.expanded.shape[1] - 1).long())
        return torch.where((nodes >= 0) & (nodes < self.expanded.shape[1]), path, -1)


def prune_tree(pool: CandidatePool, nodes: int, *, root_tokens: torch.Tensor, backend: str = "auto") -> PrunedTree:
    """Keep the root and the best `nodes - 1` candidates of a round: the tree that the target judges. One launch.

    Best by (score falling, index rising), and in the order of the pool, so parents come first and levels lie one after
    the other. They are a tree, because a score is at most its parent's (logprobs are at most 0, and a float32 sum is
    rounded without changing that order) and a parent's index is lower: whatever is kept, its parent was before it in
    the order, and is kept too. EAGLE's code takes the unordered top-k, which may drop the parent of a child of
    probability 1, and then looks the parent up by bisection and silently finds another.

    Its `tokens` and `topology` are what `greedy_accept` and `tree_accept` (without draft_logits) take, and of the
    accepted path `draft_path` makes what commits the draft's cache:

        accepted = greedy_accept(target_logits, tree.tokens, tree.topology)
        kv_commit(target_k_caches, target_v_caches, accepted.nodes, context_lens)
        kv_commit(draft_k_caches, draft_v_caches, tree.draft_path(accepted.nodes), context_lens)

    Args:
        pool: as `grow_tree` has left it.
        nodes: of every tree, the root included, 1 to 2048. A request with fewer candidates gets fewer nodes:
            `topology.num_nodes` says how many. Among equals a tree keeps those of the lower index.
        root_tokens: int32 or int64 `[batch]`: the last committed tokens.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("prune_tree")`.

    Returns:
        The PrunedTree. Nothing waits for the device.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range or device.
        RuntimeError: the named backend is not available.

    EAGLE-2's reranking (Li et al., 2024).
    """
    op = "prune_tree"
    if not isinstance(pool, CandidatePool):
        raise TypeError(argument_error(op, "pool", "a specdec_ops.CandidatePool", pool))
    check_int(op, "nodes", nodes, 1, MAX_PRUNED_NODES)
    batch, device = pool.tokens.shape[0], pool.tokens.device
    if not isinstance(root_tokens, torch.Tensor) or root_tokens.dtype != torch.int32:
        root_tokens = as_int32(op, "root_tokens", f"[{batch}]", root_tokens)
    if root_tokens.shape != (batch,):
        raise ValueError(argument_error(op, "root_tokens", f"int32 or int64 [{batch}]", root_tokens))
    if root_tokens.device != device:
        raise ValueError(device_error(op, "root_tokens", device, root_tokens))
    arguments = contract.PruneTreeArguments(
        pool.scores, pool.tokens, pool.parents, pool.expanded, root_tokens.contiguous(), nodes
    )
    tokens, pool_ids, expanded, *topology = contract.prune_tree(arguments, backend)
    return PrunedTree(tokens, Topology(*topology), pool_ids, expanded)
