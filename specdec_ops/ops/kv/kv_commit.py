"""The rows of accepted nodes, moved to where the context ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec_ops._core.checks import INT32_MAX, argument_error, is_int

from . import contract
from .cache_layers import check_int32, check_layers

_OP = "kv_commit"


def kv_commit(
    k_caches: Sequence[torch.Tensor] | torch.Tensor,
    v_caches: Sequence[torch.Tensor] | torch.Tensor,
    nodes: torch.Tensor | None,
    context_lens: torch.Tensor | int | None,
    *,
    page_table: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    copies: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Move the K and V rows of accepted nodes to the end of the context, in place, in all layers.

    A tree's node n lies in slot `context_lens[b] + n`. Of an accepted path `nodes[b] = [0, 2, 5, -1]` the rows 0, 2 and
    5 behind the context become its next three slots: row `context_lens[b] + nodes[b, i]` moves to
    `context_lens[b] + i`. What is there already is not touched, and neither is the rest of the cache. The context is
    then `num_accepted + 1` longer, which the caller counts; the last token of an acceptance, `next_token`, has no row.

    On CUDA tensors one launch serves up to 32 layers, with `copies` two. The torch backend waits for the device there;
    nothing else does.

    Args:
        k_caches: the layers' caches, each `[batch, slots, kv_heads, dim]`, or `[pages, page_size, kv_heads, dim]` with
            a page table; or one tensor `[layers, ...]` of them, which is the faster call. Layers may differ in all
            sizes but the batch, and in strides; the last dimension is contiguous. Any dtype of 1, 2, 4 or 8 bytes:
            bits are moved.
        v_caches: like k_caches. V may have another dim and dtype than K.
        nodes: int32 or int64 `[batch, steps]`, the accepted path of each request: `Acceptance.nodes`. A path ascends.
            It ends at the first entry that does not (-1, say), or, in the layers where that is so, whose row is beyond
            the cache or in a page that does not exist: this one and what follows stays. None: only `copies` are made.
        context_lens: int32 or int64 `[batch]`, or one int for all: slots before node 0. Of a negative one nothing
            moves. May be None if nodes is.
        page_table: int32 or int64 `[batch, max_pages]`: slot j of request b is in page
            `page_table[b, j // page_size]`. Or a sequence with one for each layer, None for those that are dense:
            layers with windows of their own have tables of their own. A ring of a sliding window is a table whose pages
            repeat; it must have room for the window and the tree. No page in which rows move may belong to two
            requests: see copies.
        copies: int32 or int64 `[count, 2]`, pages `(source, target)`: before anything moves, pair by pair in this
            order, all of the source becomes the target's, in all layers that have a page table (or in all, where
            neither nodes nor page_table is given). Pairs of which one is no page, -1 say, are skipped. A page that
            others share is never to be written: whoever counts references gives the request a page of its own in its
            table, and has its content copied here.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("kv_commit")`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or a cache requires grad.

    Moving a path in place needs no staging, because ascending nodes are never behind their rank. SGLang's
    move_kv_cache and TensorRT-LLM's updateKVCacheDraftTokenLocationBatched do the same for caches of one shape.
    """
    alone = nodes is None
    layers = check_layers(_OP, k_caches, v_caches, page_table, are_pages=alone)
    device = layers.k_caches[0].device
    if copies is not None:
        copies = check_int32(_OP, "copies", "[count, 2]", copies, device, 2)
        if copies.shape[1] != 2:
            raise ValueError(argument_error(_OP, "copies", "int32 or int64 [count, 2]", copies))
        if max(layers.table_of) < 0:
            raise ValueError(argument_error(_OP, "copies", "None with dense caches: they have no pages", copies))
    if alone:
        if copies is None:
            raise TypeError(argument_error(_OP, "nodes", "int32 or int64 [batch, steps], or None with copies", nodes))
        nodes = torch.empty((0, 0), dtype=torch.int32, device=device)
        context_lens = torch.empty((0,), dtype=torch.int32, device=device)
    else:
        nodes = check_int32(_OP, "nodes", "[batch, steps]", nodes, device, 2)
        if nodes.shape[0] != layers.batch:
            raise ValueError(argument_error(_OP, "nodes", f"int32 or int64 [{layers.batch}, steps]", nodes))
        context_lens = _check_lengths(context_lens, layers.batch, device)
    arguments = contract.KvCommitArguments(nodes, context_lens, layers.page_tables, layers.table_of, copies)
    contract.kv_commit(arguments, backend, contract.KvCommitOutputs(layers.k_caches, layers.v_caches))


def _check_lengths(value, batch: int, device) -> torch.Tensor:
    """One for each request, int32 [batch]."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:
            value = value.expand(batch)
    elif is_int(value):
        if not 0 <= value <= INT32_MAX:
            raise ValueError(argument_error(_OP, "context_lens", "from 0 to 2**31 - 1", value))
        return torch.full((batch,), value, dtype=torch.int32, device=device)
    value = check_int32(_OP, "context_lens", "[batch] or an int", value, device, 1)
    if value.shape[0] != batch:
        raise ValueError(argument_error(_OP, "context_lens", f"int32 or int64 [{batch}] or an int", value))
    return value
