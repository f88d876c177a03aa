"""Attention of tree queries over a cache."""

from typing import Literal, NamedTuple, overload

import torch

from specdec_ops._core.checks import (
    FLOAT_MAX,
    INT32_MAX,
    KERNEL_DTYPES,
    argument_error,
    as_int32,
    device_error,
    grad_error,
    is_int,
    is_number,
    strides_error,
    wrong_batch,
    wrong_topology,
)
from specdec_ops.topology import Topology

from . import contract

MAX_SPLITS = 256
_BEYOND_ALL_NODES = 2**30  # a first node from which on there are none, and to which kernels may add a row
QUERY_DTYPES = (*KERNEL_DTYPES, torch.float64)


class AttentionState(NamedTuple):
    """An attention result with what is needed to merge it with another one.

    Attributes:
        out: the output, of q's dtype, `[batch, queries, heads, dim]` or packed `[tokens, heads, dim]`.
        lse: float32 `[batch, queries, heads]` or `[tokens, heads]`: the natural log of the softmax denominator; -inf
            where a row saw nothing.
    """

    out: torch.Tensor
    lse: torch.Tensor


@overload
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    topology: Topology | None,
    context_lens: torch.Tensor | int,
    *,
    page_table: torch.Tensor | None = None,
    query_start: torch.Tensor | int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    return_lse: Literal[False] = False,
    num_splits: int | None = None,
    path_invariant: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    topology: Topology | None,
    context_lens: torch.Tensor | int,
    *,
    page_table: torch.Tensor | None = None,
    query_start: torch.Tensor | int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    return_lse: Literal[True],
    num_splits: int | None = None,
    path_invariant: bool = False,
    out: AttentionState | None = None,
    backend: str = "auto",
) -> AttentionState: ...


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    topology: Topology | None,
    context_lens: torch.Tensor | int,
    *,
    page_table: torch.Tensor | None = None,
    query_start: torch.Tensor | int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    path_invariant: bool = False,
    out: torch.Tensor | AttentionState | None = None,
    backend: str = "auto",
) -> torch.Tensor | AttentionState:
    """Attention of draft-tree nodes over a key/value cache: each node sees the context, its ancestors and itself.

    Node i of request b has its key and value in slot `context_lens[b] + i` of that request and stands at position
    `context_lens[b] + depth(i)`. Row r of request b in `q` is node `query_start + r`. A row sees every context slot and
    the tree slots of its node's ancestors and of the node itself. A row whose node does not exist is padding: its
    output is 0 and its log-sum-exp -inf, as for a row that sees nothing and for packed rows of no request. Slots that
    no row of a request sees may hold anything, NaN included, and so may the page-table entries of pages that no row
    sees.

    Nothing waits for the device and no mask is built: lengths, tree and page table are read by the kernel. A request's
    result depends on that request alone, not on its neighbours in the batch. For inference: there is no backward.

    Args:
        q: float32, bfloat16 or float16 `[batch, queries, heads, dim]`; or `[tokens, heads, dim]`, the rows of all
            requests one after another, when `topology.offsets` says where each request starts. Any strides with a
            contiguous last dimension, here and for the caches and `out`. float64 runs with the torch backend.
        k_cache: same dtype as q, or float8_e4m3fn; `[batch, slots, kv_heads, dim]`; or
            `[pages, page_size, kv_heads, dim]` with `page_table`. heads must be a multiple of kv_heads; query head h
            reads kv head `h // (heads / kv_heads)`.
        v_cache: of the same shape and dtype as k_cache.
        topology: the trees, with batch 1 for one tree shared by all requests. None: no tree, every row sees exactly the
            context (cross-attention) and stands at position `context_lens[b]`.
        context_lens: int32 or int64 `[batch]`, the slots in use before the tree; or an int for all requests. At most
            2^30 with the tree, however large the cache is.
        page_table: int32 or int64 `[batch, max_pages]`: slot j of request b is in page `page_table[b, j // page_size]`.
        query_start: the node of row 0: an int, or int32 or int64 `[batch]`. For a draft that grows level by level,
            where only the newest nodes ask. Rows before node 0 and after the last node are padding; so are packed rows
            of a request beyond the number of nodes that the topology has room for.
        scale: multiplies q . k; `dim ** -0.5` by default.
        window: a row sees positions p with `0 <= its own position - p < window`. Counted by depth, so that siblings see
            the same context.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: float32 `[heads]`: one more logit per head, without a value, in each softmax.
        alibi_slopes: float32 `[heads]`: scores lose `slope * (position of the row - position of the slot)`.
        k_scale: scale of a quantised cache: multiplies the keys.
        v_scale: the same for the values.
        return_lse: also return the natural log of each softmax denominator (sinks included).
        num_splits: into how many parts to cut the slots, 1 to 256; a fixed number gives a fixed order of reduction. By
            default a function of the request's own length and number of rows.
        path_invariant: whether a row's result depends on its path alone, to the last bit: on its query and on the keys
            and values at the positions that it sees (context, ancestors by depth, itself). Not on the call's other
            rows, on the slots in which its ancestors lie, on where the context ends and the tree begins, on pages,
            strides, batch or threads. So a node of a draft tree gets, bit for bit, what plain decoding of its path, a
            row at a time, gives on the same processor. The cpu backend alone has it; num_splits must be None.
        out: where to write: a tensor like q, or an AttentionState with `return_lse`. Its lse must be contiguous.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends`. A named backend never falls
            back. "auto" takes the torch definition for float64 and for a dim that kernels don't have (they have the
            multiples of 16 up to 256). The CUDA kernel takes bfloat16 and float16, and fp8 caches up to a dim of 128;
            its rows start at multiples of 16 bytes. "auto" takes Triton's for others, and the definition for fp8.

    Returns:
        The output like q; with `return_lse` an AttentionState(out, lse float32 `[batch, queries, heads]` or
        `[tokens, heads]`). With `out`, that same object.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout. With the backends cpu and torch also a context length
            below 0 or beyond the cache, a page that a row sees and that does not exist, and offsets that do not rise.
            Kernels on a GPU can't report those: there a length below 0 counts as 0, slots beyond the cache are
            invisible, slots of a page that does not exist hold zeros, and offsets are clamped.
        RuntimeError: the named backend is not available or doesn't have path_invariant, or an input requires grad.

    The tree mask is that of SpecInfer (Miao et al., 2024); counting window and ALiBi by depth follows from the position
    ids of a tree, where siblings share a position.
    """
    batch, heads, dim, packed = _check_queries(q, topology)
    _check_caches(q, k_cache, v_cache, page_table, batch, heads, dim)
    if page_table is not None:
        page_table = _check_page_table(page_table, batch, q)
    check_no_grad("tree_attention", q, k_cache, v_cache)
    if topology is None:
        ancestors = depths = num_nodes = offsets = None
    else:
        ancestors, depths, num_nodes = _topology_tensors(topology, batch, q)
        offsets = topology.offsets if packed else None
    context_lens = _per_request("context_lens", context_lens, batch, q)
    if q.shape[-3] * heads > INT32_MAX:
        raise ValueError(argument_error("tree_attention", "q", "of fewer than 2**31 queries times heads", q))
    if isinstance(query_start, torch.Tensor):
        query_start, query_starts = 0, _per_request("query_start", query_start, batch, q)
    else:
        query_starts = None
        if not is_int(query_start) or query_start < 0:
            raise _argument_error("query_start", "an int of at least 0, or int32 or int64 [batch]", query_start, is_int)
        query_start = min(query_start, _BEYOND_ALL_NODES)
    if window is not None and (not is_int(window) or window < 1):
        raise _argument_error("window", "None or an int of at least 1", window, is_int)
    if num_splits is not None and (not is_int(num_splits) or not 1 <= num_splits <= MAX_SPLITS):
        raise _argument_error("num_splits", f"None or an int from 1 to {MAX_SPLITS}", num_splits, is_int)
    if not isinstance(return_lse, bool):
        raise TypeError(argument_error("tree_attention", "return_lse", "a bool", return_lse))
    if not isinstance(path_invariant, bool):
        raise TypeError(argument_error("tree_attention", "path_invariant", "a bool", path_invariant))
    if path_invariant and num_splits is not None:
        raise ValueError(argument_error("tree_attention", "num_splits", "None with path_invariant", num_splits))
    if softcap is not None and (not is_number(softcap) or not 0 < softcap <= FLOAT_MAX):
        raise _argument_error("softcap", "None or a finite number above 0", softcap, is_number)
    if sinks is not None:
        _check_per_head("sinks", sinks, heads, q)
    if alibi_slopes is not None:
        _check_per_head("alibi_slopes", alibi_slopes, heads, q)
    scale, out_scale = _scales(dim, scale, k_scale, v_scale)
    into = None if out is None else contract.TreeAttentionOutputs(*_check_out(out, q, return_lse))

    arguments = contract.TreeAttentionArguments(
        q,
        k_cache,
        v_cache,
        ancestors,
        depths,
        num_nodes,
        offsets,
        context_lens,
        page_table,
        query_starts,
        query_start,
        scale,
        min(window or 0, INT32_MAX),
        float(softcap or 0.0),
        sinks,
        alibi_slopes,
        out_scale,
        num_splits or 0,
        path_invariant,
    )
    result = contract.tree_attention(arguments, backend, into, return_lse=return_lse)
    if out is not None:
        return out
    return AttentionState(result.out, result.lse) if return_lse else result.out


def _argument_error(name: str, must: str, value, is_right_type) -> Exception:
    """A ValueError for a value out of range, a TypeError for anything of another type."""
    kind = ValueError if is_right_type(value) else TypeError
    return kind(argument_error("tree_attention", name, must, value))


def _check_queries(q, topology) -> tuple[int, int, int, bool]:
    """Check q and the type of topology; return batch, heads, dim and whether q is packed."""
    must = "float32, bfloat16 or float16 [batch, queries, heads, dim]"
    if not isinstance(q, torch.Tensor) or q.dtype not in QUERY_DTYPES:
        raise TypeError(argument_error("tree_attention", "q", must, q))
    if topology is not None and not isinstance(topology, Topology):
        raise TypeError(wrong_topology("tree_attention", "a specdec_ops.Topology or None", topology))
    if q.dim() == 4:
        batch, rows, heads, dim = q.shape
        packed = False
    elif q.dim() == 3 and topology is not None and topology.offsets is not None:
        rows, heads, dim = q.shape
        batch, packed = topology.offsets.shape[0] - 1, True
    else:
        must += ", or [tokens, heads, dim] with topology.offsets"
        raise ValueError(argument_error("tree_attention", "q", must, q))
    if dim == 0:
        raise ValueError(argument_error("tree_attention", "q", "of a dim of at least 1", q))
    if rows > INT32_MAX or batch > INT32_MAX or heads > INT32_MAX:
        raise ValueError(argument_error("tree_attention", "q", "of sizes below 2**31", q))
    if q.stride()[-1] != 1 and dim != 1:
        raise ValueError(strides_error("tree_attention", "q", "contiguous in its last dimension", q))
    return batch, heads, dim, packed


def _check_caches(q, k_cache, v_cache, page_table, batch: int, heads: int, dim: int) -> None:
    op = "tree_attention"
    layout = "[batch, slots, kv_heads, dim]" if page_table is None else "[pages, page_size, kv_heads, dim]"
    dtype, device = q.dtype, q.device
    if isinstance(k_cache, torch.Tensor) and k_cache.dtype == torch.float8_e4m3fn and dtype != torch.float64:
        dtype = torch.float8_e4m3fn
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(cache, torch.Tensor) or cache.dtype != dtype:
            like = "k_cache" if dtype != q.dtype else "q"
            raise TypeError(argument_error(op, name, f"{_dtype_name(dtype)} {layout} like {like}", cache))
        if cache.dim() != 4:
            raise ValueError(argument_error(op, name, layout, cache))
        if cache.stride()[-1] != 1 and dim != 1:
            raise ValueError(strides_error(op, name, "contiguous in its last dimension", cache))
        if cache.device != device:
            raise ValueError(device_error(op, name, device, cache))
    if v_cache.shape != k_cache.shape:
        raise ValueError(argument_error(op, "v_cache", f"of k_cache's shape {list(k_cache.shape)}", v_cache))
    requests, page_size, kv_heads, cache_dim = k_cache.shape
    if cache_dim != dim:
        raise ValueError(argument_error(op, "k_cache", f"{layout} with q's dim of {dim}", k_cache))
    if kv_heads == 0 or heads % kv_heads != 0:
        must = f"of a number of kv_heads that divides the {heads} heads of q"
        raise ValueError(argument_error(op, "k_cache", must, k_cache) + _head_major(q, k_cache, layout))
    if page_table is None:
        if requests != batch:
            sentence = argument_error(op, "k_cache", f"{layout} with a batch of {batch} like q", k_cache)
            raise ValueError(f"{sentence}; a cache of pages takes a page_table")
    elif page_size == 0:
        raise ValueError(argument_error(op, "k_cache", f"{layout} with a page_size above 0", k_cache))


def _head_major(q, k_cache, layout: str) -> str:
    """What to try where heads stand before rows and slots, as PyTorch's own attention has them."""
    _, second, third, _ = k_cache.shape
    queries, heads = q.shape[-3:-1]
    if (second and (heads % second == 0 or queries % second == 0)) or (third and queries % third == 0):
        return f"; the layout is {layout}, to which .transpose(1, 2) brings heads that come before slots or queries"
    return ""


def _check_page_table(page_table, batch: int, q) -> torch.Tensor:
    page_table = _check_int32("page_table", page_table, "[batch, max_pages]", q)
    if page_table.dim() != 2 or page_table.shape[0] != batch:
        raise ValueError(
            argument_error("tree_attention", "page_table", f"int32 or int64 [{batch}, max_pages]", page_table)
        )
    if page_table.stride()[1] != 1 and page_table.shape[1] > 1:
        raise ValueError(strides_error("tree_attention", "page_table", "contiguous in its last dimension", page_table))
    return page_table


def _check_int32(name: str, value, layout: str, q) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int32:
        value = as_int32("tree_attention", name, layout, value)
    if value.device != q.device:
        raise ValueError(device_error("tree_attention", name, q.device, value))
    return value


def _per_request(name: str, value, batch: int, q) -> torch.Tensor:
    """An int32 [batch] argument as a tensor; an int counts for every request."""
    if is_int(value):
        if not 0 <= value <= INT32_MAX:
            raise ValueError(argument_error("tree_attention", name, "from 0 to 2**31 - 1", value))
        return torch.full((batch,), value, dtype=torch.int32, device=q.device)
    value = _check_int32(name, value, "[batch] or an int", q)
    if value.dim() != 1 or value.shape[0] != batch:
        if value.dim() != 0:
            raise ValueError(argument_error("tree_attention", name, f"int32 or int64 [{batch}] or an int", value))
        value = value.expand(batch).contiguous()
    if not value.is_contiguous():
        raise ValueError(strides_error("tree_attention", name, "contiguous", value))
    return value


def _topology_tensors(topology: Topology, batch: int, q) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The topology's ancestors, depths and num_nodes, contiguous and of one batch size."""
    ancestors, depths, num_nodes = topology.ancestors, topology.depths, topology.num_nodes
    trees, counts = ancestors.shape[0], num_nodes.shape[0]
    if (trees != batch and trees != 1) or (counts != batch and counts != 1):
        raise ValueError(wrong_batch("tree_attention", batch, max(trees, counts)))
    if ancestors.device != q.device:
        raise ValueError(device_error("tree_attention", "topology", q.device, ancestors))
    if trees != counts:  # one shared tree, cut to another size for every request
        ancestors, depths = ancestors.expand(batch, -1, -1), depths.expand(batch, -1)
        num_nodes = num_nodes.expand(batch).contiguous()
    if not ancestors.is_contiguous():
        ancestors = ancestors.contiguous()
    if not depths.is_contiguous():
        depths = depths.contiguous()
    return ancestors, depths, num_nodes


def _check_per_head(name: str, value, heads: int, q) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        raise TypeError(argument_error("tree_attention", name, f"float32 [{heads}]", value))
    if value.dim() != 1 or value.shape[0] != heads:
        raise ValueError(argument_error("tree_attention", name, f"float32 [{heads}]", value))
    if not value.is_contiguous():
        raise ValueError(strides_error("tree_attention", name, "contiguous", value))
    if value.device != q.device:
        raise ValueError(device_error("tree_attention", name, q.device, value))
    check_no_grad("tree_attention", value)


def _scales(dim: int, scale, k_scale, v_scale) -> tuple[float, float]:
    """What to multiply the scores and the output with."""
    if scale is None and k_scale is None and v_scale is None:
        return dim**-0.5, 1.0
    for name, value in (("scale", scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if value is not None and not is_number(value):
            raise TypeError(argument_error("tree_attention", name, "a number or None", value))
        if value is not None and not -FLOAT_MAX <= value <= FLOAT_MAX:
            raise ValueError(argument_error("tree_attention", name, "a finite number or None", value))
    scores = dim**-0.5 if scale is None else float(scale)
    return scores if k_scale is None else scores * k_scale, 1.0 if v_scale is None else float(v_scale)


def _check_out(out, q, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not return_lse:
        check_like("tree_attention", "out", out, q, q.shape, contiguous=False)
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(argument_error("tree_attention", "out", "an AttentionState(out, lse) with return_lse", out))
    check_like("tree_attention", "out.out", out[0], q, q.shape, contiguous=False)
    check_like("tree_attention", "out.lse", out[1], q, q.shape[:-1], torch.float32)
    return out


def check_like(op: str, name: str, value, like, shape, dtype=None, contiguous: bool = True) -> None:
    """Check for a tensor of this shape and dtype on the device of `like`."""
    dtype = dtype or like.dtype
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        raise TypeError(argument_error(op, name, f"{_dtype_name(dtype)} {list(shape)}", value))
    if value.shape != shape:
        raise ValueError(argument_error(op, name, f"{_dtype_name(dtype)} {list(shape)}", value))
    if value.device != like.device:
        raise ValueError(device_error(op, name, like.device, value))
    if contiguous:
        if not value.is_contiguous():
            raise ValueError(strides_error(op, name, "contiguous", value))
    elif (value.stride(-1) != 1 and shape[-1] > 1) or any(
        [stride == 0 and size > 1 for stride, size in zip(value.stride(), shape, strict=True)]
    ):
        raise ValueError(strides_error(op, name, "contiguous in its last dimension, and not expanded", value))


def check_no_grad(op: str, *inputs: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in inputs]):
        raise RuntimeError(grad_error(op))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
