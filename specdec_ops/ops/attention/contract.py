"""The contracts of tree_attention and merge_states: what their implementations take and write."""

from typing import NamedTuple

import torch

from specdec_ops._core.library import Operator


class TreeAttentionArguments(NamedTuple):
    """Queries, caches, a topology and options. Whatever the numbers on the device are, nothing else may be read.

    Every tensor's last dimension is contiguous; those of int32 and int64 are so altogether, page_table's rows aside.
    """

    q: torch.Tensor
    """[batch, queries, heads, dim], or packed [tokens, heads, dim] with offsets"""
    k_cache: torch.Tensor
    """[batch, slots, kv_heads, dim], or [pages, page_size, kv_heads, dim] with page_table"""
    v_cache: torch.Tensor
    """like k_cache"""
    ancestors: torch.Tensor | None
    """int64 [batch or 1, nodes, words]; None: no tree, a row sees exactly the context"""
    depths: torch.Tensor | None
    """int32 [batch or 1, nodes]"""
    num_nodes: torch.Tensor | None
    """int32 [batch or 1]"""
    offsets: torch.Tensor | None
    """int32 [batch + 1]: the first row of each request in a packed q"""
    context_lens: torch.Tensor
    """int32 [batch]"""
    page_table: torch.Tensor | None
    """int32 [batch, max_pages]"""
    query_starts: torch.Tensor | None
    """int32 [batch]: a request's first row is node query_start + query_starts[request]"""
    query_start: int
    scale: float
    window: int
    """0: none"""
    softcap: float
    """0: none"""
    sinks: torch.Tensor | None
    """float32 [heads]"""
    alibi_slopes: torch.Tensor | None
    """float32 [heads]"""
    out_scale: float
    """multiplies the output"""
    num_splits: int
    """parts per request; 0 lets each request's context length decide"""
    path_invariant: bool
    """a row's bits depend on its path alone; then num_splits is 0"""


class TreeAttentionOutputs(NamedTuple):
    """An attention state. Rows without a node are 0, with an lse of -inf."""

    out: torch.Tensor
    """like q"""
    lse: torch.Tensor | None
    """float32, like q without dim, contiguous"""


def _make_attention(arguments: TreeAttentionArguments, empty, *, return_lse: bool) -> TreeAttentionOutputs:
    q = arguments.q
    lse = empty(q.shape[:-1], torch.float32, q.device) if return_lse else None
    return TreeAttentionOutputs(empty(q.shape, q.dtype, q.device), lse)


def _answers_attention(arguments: TreeAttentionArguments, outputs: TreeAttentionOutputs) -> bool:
    """Of no rows, and of rows that are padding because no request or no tree has a node."""
    if arguments.q.numel() == 0:
        return True
    ancestors = arguments.ancestors
    if arguments.context_lens.shape[0] > 0 and (ancestors is None or ancestors.shape[1] > 0):
        return False
    outputs.out.zero_()
    if outputs.lse is not None:
        outputs.lse.fill_(float("-inf"))
    return True


tree_attention = Operator(
    "tree_attention",
    TreeAttentionArguments,
    TreeAttentionOutputs,
    _make_attention,
    decided_by=lambda arguments, outputs: (
        arguments.q,
        (arguments.k_cache, arguments.v_cache),
        outputs.out,
        arguments.path_invariant,
    ),
    answers=_answers_attention,
    may_be={"out": ("q",)},
)


class MergeStatesArguments(NamedTuple):
    """Two partial attentions over disjoint slots, all contiguous."""

    out_a: torch.Tensor
    """[..., heads, dim]"""
    lse_a: torch.Tensor
    """float32 [..., heads]"""
    out_b: torch.Tensor
    lse_b: torch.Tensor


class MergeStatesOutputs(NamedTuple):
    """The attention over both. It may be one of the inputs."""

    out: torch.Tensor
    """like out_a"""
    lse: torch.Tensor
    """like lse_a"""


def _make_merged(arguments: MergeStatesArguments, empty) -> MergeStatesOutputs:
    out, lse = arguments.out_a, arguments.lse_a
    return MergeStatesOutputs(empty(out.shape, out.dtype, out.device), empty(lse.shape, lse.dtype, lse.device))


merge_states = Operator(
    "merge_states",
    MergeStatesArguments,
    MergeStatesOutputs,
    _make_merged,
    answers=lambda arguments, outputs: outputs.out.numel() == 0,
    may_be={"out": ("out_a", "out_b"), "lse": ("lse_a", "lse_b")},
)
