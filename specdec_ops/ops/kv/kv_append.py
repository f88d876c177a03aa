"""The keys and values of new rows: normalised, rotated and stored in the cache, with their queries in the same pass."""

from __future__ import annotations

import torch

from specdec_ops._core import alloc
from specdec_ops._core.checks import (
    FLOAT_MAX,
    INT32_MAX,
    KERNEL_DTYPES,
    argument_error,
    as_int32,
    describe_dtype,
    device_error,
    grad_error,
    is_int,
    is_number,
    strides_error,
    wrong_batch,
    wrong_topology,
)
from specdec_ops.rope import Rope
from specdec_ops.topology import Topology

from . import contract
from .checks import check_ids, check_page_table, is_int32, is_rope, rope_tables

_OP = "kv_append"
_DTYPES = (*KERNEL_DTYPES, torch.float64)
_SHORT_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_ROWS = "float32, bfloat16 or float16 [batch, queries, kv_heads, dim] or packed [tokens, kv_heads, dim]"
_BEYOND_ALL_NODES = 2**30  # a first node from which on there are none, and to which kernels may add a row


def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    topology: Topology | None,
    context_lens: torch.Tensor | int | None,
    *,
    q: torch.Tensor | None = None,
    rope: Rope | tuple[torch.Tensor, torch.Tensor] | None = None,
    interleaved: bool = False,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    page_table: torch.Tensor | None = None,
    query_start: torch.Tensor | int = 0,
    requests: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    q_out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | None:
    """Put the keys and values of new rows into a cache, rotated, and rotate their queries: one pass over all three.

    What an engine does between its projections and `tree_attention`: the norms of queries and keys that some models
    have, RoPE, the choice of slots, the conversion of 8-bit caches, and the copy. Row r of request b is node
    `query_start + r` of its tree; its key and value go to slot `context_lens[b] + node` and its angle is that of
    position `context_lens[b] + depth(node)`: siblings share a position, not a slot. All arithmetic is in float32, and
    each result is rounded once.

    Nothing waits for the device (but the torch backend, on a GPU), and values on it are not checked. A row whose node
    does not exist (padding) is not stored; nor is one whose slot, request or page does not exist, whose position is not
    in the tables, or whose request has a context length below 0. Slots of the cache that no row goes to are neither
    read nor written, and their pages may not exist.

    Args:
        k: float32, bfloat16 or float16 `[batch, queries, kv_heads, dim]`; or packed `[tokens, kv_heads, dim]`, the rows
            of all requests, when `topology.offsets` says where each request starts, or with `slots`. Any strides with
            a contiguous last dimension, here and for v, q, the caches and q_out: they may be parts of one joined
            projection. float64 runs with the torch backend.
        v: like k. Its dim may be another one.
        k_cache: `[batch, slots, kv_heads, dim]`, or `[pages, page_size, kv_heads, dim]` with `page_table`. In k's
            dtype, or float8_e4m3fn, float8_e5m2 or int8: then each number is divided by the scale and rounded to the
            nearest code, at most to the largest finite one (127 for int8). NaN stays NaN in fp8, and is 0 in int8.
        v_cache: the same with v's dim, of k_cache's dtype.
        topology: the trees, with batch 1 for one tree shared by all requests. None: rows follow one another, as in a
            prompt: node and depth are `query_start + r`.
        context_lens: int32 or int64 `[batch]`, the slots in use before the tree; or an int for all requests. May be
            None with `slots`, and with `positions` if there is a rope.
        q: queries like k, with any number of heads. They are normalised and rotated as the keys are, and not stored.
        rope: a `Rope`, or `(cos, sin)` tables, float32 `[positions, pairs]`, contiguous (float64 with float64 rows).
            The first `2 * pairs` elements of each head are rotated (partial rotary), the rest is left. None: nothing
            is rotated.
        interleaved: which elements form pair i: `2 i` and `2 i + 1` (GPT-J, Llama's original code), or, by default, `i`
            and `pairs + i` (rotate-half: Hugging Face, GPT-NeoX).
        q_norm_weight: `[dim]`, in k's dtype or float32, contiguous: an RMSNorm over each head of q before the rotation
            (Qwen3, Gemma 3; of Gemma, whose weights are differences from 1, pass `1 + weight`). None: no norm.
        k_norm_weight: the same for k.
        norm_eps: added to the mean square.
        page_table: int32 or int64 `[batch, max_pages]`: slot j of request b is in page `page_table[b, j // page_size]`.
        query_start: the node of row 0: an int, or int32 or int64 `[batch]`. For a draft that grows level by level.
        requests: int32 or int64 `[tokens]`: the request of each packed row, without a topology. None: all are of
            request 0. An engine's flat slot numbers are `slots` of request 0, with the cache's pages viewed as one.
        slots: int32 or int64 `[batch, queries]` or `[tokens]`: where each row goes in its request's cache, in place of
            `context_lens + node`, no two rows of a request to the same one. -1 is skipped.
        positions: the same for the positions, in place of `context_lens + depth`.
        k_scale: what the numbers in the cache are multiplied with to get keys: a number above 0, or a float32 tensor
            `[kv_heads]` or without dimensions. int8 caches need one; of others None is 1.
        v_scale: the same for the values.
        q_out: where to write the rotated queries: a tensor like q. It may be q.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("kv_append")`. float64 runs with
            torch.

    Returns:
        The rotated queries (`q_out` where given), or None without q. A row that has no node or no position is 0; one
        that has both and only can't be stored is rotated.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout, or an argument that has no meaning beside another.
        RuntimeError: the named backend is not available, or an input requires grad.
    """
    if not isinstance(k, torch.Tensor) or k.dtype not in _DTYPES:
        raise TypeError(argument_error(_OP, "k", _ROWS, k))
    like = k.dtype, k.device
    shape = _check_rows("k", k, like, None)
    v_shape = _check_rows("v", v, like, shape)
    packed = len(shape) == 3
    by_offsets = packed and topology is not None
    paged = page_table is not None
    page_table = check_page_table(_OP, page_table, k)
    cache_batch = _check_caches(like, k_cache, v_cache, shape, v_shape, paged)
    if paged:
        cache_batch = page_table.shape[0]
    batch = cache_batch if packed else shape[0]

    depths = num_nodes = offsets = None
    if topology is not None:
        if not isinstance(topology, Topology):
            raise TypeError(wrong_topology(_OP, "a specdec_ops.Topology or None", topology))
        if packed:
            offsets = topology.offsets
            if offsets is None:
                raise ValueError(f"specdec_ops.{_OP}: topology must have offsets with packed rows, got None")
            batch = offsets.shape[0] - 1
        depths, num_nodes = _trees(topology, batch, k)
    elif packed and slots is None:
        raise ValueError(
            argument_error(_OP, "k", "[batch, queries, kv_heads, dim], or packed with topology.offsets or slots", k)
        )
    if cache_batch != batch:
        name, layout = ("page_table", f"[{batch}, max_pages]") if paged else ("k_cache", f"of a batch of {batch}")
        raise ValueError(argument_error(_OP, name, layout, page_table if paged else k_cache))
    if requests is not None and (not packed or by_offsets):
        raise ValueError(f"specdec_ops.{_OP}: requests must be None, but for packed rows without a topology")

    rows = shape[:-2]
    slots = None if slots is None else check_ids(_OP, "slots", slots, rows, k)
    positions = None if positions is None else check_ids(_OP, "positions", positions, rows, k)
    requests = None if requests is None else check_ids(_OP, "requests", requests, rows, k)
    if packed and not by_offsets:
        if context_lens is not None:
            must = "None for packed rows without a topology"
            raise ValueError(argument_error(_OP, "context_lens", must, context_lens))
        if is_int(query_start) and query_start != 0:
            raise ValueError(argument_error(_OP, "query_start", "0 for packed rows without a topology", query_start))
    elif context_lens is not None:
        context_lens = _per_request("context_lens", context_lens, batch, k)
    elif slots is None:
        raise TypeError(argument_error(_OP, "context_lens", "int32 or int64 [batch] or an int without slots", None))
    if isinstance(query_start, torch.Tensor):
        query_start, query_starts = 0, _per_request("query_start", query_start, batch, k)
    elif is_int(query_start) and query_start >= 0:
        query_start, query_starts = min(query_start, _BEYOND_ALL_NODES), None
    else:
        kind = ValueError if is_int(query_start) else TypeError
        raise kind(argument_error(_OP, "query_start", "an int of at least 0, or int32 or int64 [batch]", query_start))

    cosines = sines = None
    if rope is not None:
        if not is_rope(rope):
            raise TypeError(argument_error(_OP, "rope", "a Rope, (cos, sin) or None", rope))
        cosines, sines = rope_tables(_OP, rope, shape[-1], k)
        if not (cosines.is_contiguous() and sines.is_contiguous()):
            table = sines if cosines.is_contiguous() else cosines
            raise ValueError(strides_error(_OP, "rope", "of contiguous tables", table))
        if context_lens is None and positions is None:
            must = "int32 or int64 of k's rows with a rope and no context_lens"
            raise TypeError(argument_error(_OP, "positions", must, None))
        if cosines.shape[1] == 0:  # no pair turns, and its tables have no addresses
            cosines = sines = None
    if not isinstance(interleaved, bool):
        raise TypeError(argument_error(_OP, "interleaved", "a bool", interleaved))
    if not is_number(norm_eps) or not 0 <= norm_eps <= FLOAT_MAX:
        raise ValueError(argument_error(_OP, "norm_eps", "a finite number of at least 0", norm_eps))
    if k_norm_weight is not None:
        _check_norm("k_norm_weight", k_norm_weight, k)
    if q is not None:
        q_out = _check_queries(q, q_out, q_norm_weight, k, like, shape)
    elif q_out is not None or q_norm_weight is not None:
        name = "q_norm_weight" if q_out is None else "q_out"
        raise ValueError(f"specdec_ops.{_OP}: {name} must be None without q")
    k_scales = v_scales = None
    if k_scale is None and v_scale is None and k_cache.dtype is not torch.int8:
        k_scale = v_scale = 1.0
    else:
        k_scale, k_scales = _scale("k_scale", k_scale, k_cache, k)
        v_scale, v_scales = _scale("v_scale", v_scale, v_cache, k)
    if torch.is_grad_enabled():
        others = (q_norm_weight, k_norm_weight, cosines, sines, k_scales, v_scales)
        if (
            k.requires_grad
            or v.requires_grad
            or (q is not None and q.requires_grad)
            or any([t is not None and t.requires_grad for t in others])
        ):
            raise RuntimeError(grad_error(_OP))
    arguments = contract.KvAppendArguments(
        k,
        v,
        q,
        depths,
        num_nodes,
        offsets,
        context_lens,
        query_starts,
        query_start,
        requests,
        slots,
        positions,
        page_table,
        cosines,
        sines,
        interleaved,
        q_norm_weight,
        k_norm_weight,
        float(norm_eps),
        k_scale,
        k_scales,
        v_scale,
        v_scales,
    )
    contract.kv_append(arguments, backend, contract.KvAppendOutputs(k_cache, v_cache, q_out))
    return q_out


def _check_rows(name: str, rows, like: tuple[torch.dtype, torch.device], k_shape) -> tuple[int, ...]:
    """Check k (whose own shape is yet None), or v or q, tensors like it but for heads and dim. Return the shape."""
    dtype, device = like
    if not isinstance(rows, torch.Tensor):
        raise TypeError(argument_error(_OP, name, _ROWS, rows))
    shape = tuple(rows.shape)
    if len(shape) != 4 and len(shape) != 3:
        must = "[batch, queries, kv_heads, dim] or packed [tokens, kv_heads, dim]"
        raise ValueError(argument_error(_OP, name, must, rows))
    if shape[-1] == 0 or (rows.numel() > INT32_MAX and max(shape) > INT32_MAX):
        raise ValueError(argument_error(_OP, name, "of sizes below 2**31 and a dim of at least 1", rows))
    if k_shape is None:
        if shape[-2] == 0:
            raise ValueError(argument_error(_OP, name, "of at least one kv head", rows))
    else:
        if rows.dtype != dtype:
            raise TypeError(argument_error(_OP, name, f"{describe_dtype(dtype)} like k", rows))
        if shape[:-2] != k_shape[:-2] or (name == "v" and shape[-2] != k_shape[-2]):
            must = ", ".join(map(str, (*k_shape[:-2], k_shape[-2] if name == "v" else "heads", "dim")))
            raise ValueError(argument_error(_OP, name, f"[{must}] like k", rows))
        if rows.device != device:
            raise ValueError(device_error(_OP, name, device, rows))
    if rows.stride()[-1] != 1 and shape[-1] > 1:
        raise ValueError(strides_error(_OP, name, "contiguous in its last dimension", rows))
    return shape


def _check_caches(like, k_cache, v_cache, shape: tuple[int, ...], v_shape: tuple[int, ...], paged: bool) -> int:
    """Check the caches for rows of these shapes; return their first size."""
    leading = _check_cache("k_cache", k_cache, like, shape, paged)
    v_leading = _check_cache("v_cache", v_cache, like, v_shape, paged)
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(argument_error(_OP, "v_cache", f"{describe_dtype(k_cache.dtype)} like k_cache", v_cache))
    if v_leading != leading:
        raise ValueError(argument_error(_OP, "v_cache", f"of k_cache's first two sizes {list(leading)}", v_cache))
    if paged and leading[1] == 0:
        raise ValueError(argument_error(_OP, "k_cache", f"{_layout(paged)} with a page_size above 0", k_cache))
    return leading[0]


def _layout(paged: bool) -> str:
    return "[pages, page_size, kv_heads, dim]" if paged else "[batch, slots, kv_heads, dim]"


def _check_cache(name: str, cache, like, rows: tuple[int, ...], paged: bool) -> tuple[int, ...]:
    """Check a cache for rows of this shape; return its first two sizes."""
    dtype, device = like
    if not isinstance(cache, torch.Tensor) or (
        cache.dtype != dtype and (cache.dtype not in _SHORT_DTYPES or dtype == torch.float64)
    ):
        must = f"{describe_dtype(dtype)}, float8_e4m3fn, float8_e5m2 or int8 {_layout(paged)}"
        raise TypeError(argument_error(_OP, name, must, cache))
    shape = tuple(cache.shape)
    if len(shape) != 4 or shape[2:] != rows[-2:]:
        heads, dim = rows[-2:]
        must = _layout(paged).replace("kv_heads, dim", f"{heads}, {dim}")
        sentence = argument_error(_OP, name, f"{must} like {name[0]}", cache)
        if len(shape) == 4 and shape[1] == heads and shape[3] == dim:
            how = "to which .transpose(1, 2) brings heads that come before slots"
            sentence += f"; the layout is {_layout(paged)}, {how}"
        raise ValueError(sentence)
    if shape[0] > INT32_MAX or shape[1] > INT32_MAX:
        raise ValueError(argument_error(_OP, name, "of sizes below 2**31", cache))
    if cache.device != device:
        raise ValueError(device_error(_OP, name, device, cache))
    if cache.stride()[-1] != 1 and shape[3] > 1:
        raise ValueError(strides_error(_OP, name, "contiguous in its last dimension", cache))
    return shape[:2]


def _trees(topology: Topology, batch: int, k) -> tuple[torch.Tensor, torch.Tensor]:
    """The topology's depths and num_nodes, contiguous and of one batch size."""
    depths, num_nodes = topology.depths, topology.num_nodes
    trees, counts = depths.shape[0], num_nodes.shape[0]
    if (trees != batch and trees != 1) or (counts != batch and counts != 1):
        raise ValueError(wrong_batch(_OP, batch, max(trees, counts)))
    if depths.device != k.device:
        raise ValueError(device_error(_OP, "topology", k.device, depths))
    if trees != counts:  # one shared tree, cut to another size for every request
        depths, num_nodes = depths.expand(batch, -1), num_nodes.expand(batch)
    return depths.contiguous(), num_nodes.contiguous()


def _per_request(name: str, value, batch: int, k) -> torch.Tensor:
    """An int32 [batch] argument as a tensor; an int counts for every request."""
    if is_int(value):
        if not 0 <= value <= INT32_MAX:
            raise ValueError(argument_error(_OP, name, "from 0 to 2**31 - 1", value))
        return torch.full((batch,), value, dtype=torch.int32, device=k.device)
    value = value if is_int32(value) else as_int32(_OP, name, "[batch] or an int", value)
    if value.device != k.device:
        raise ValueError(device_error(_OP, name, k.device, value))
    if value.dim() == 0:
        value = value.expand(batch)
    if value.shape != (batch,):
        raise ValueError(argument_error(_OP, name, f"int32 or int64 [{batch}] or an int", value))
    return value.contiguous()


def _check_norm(name: str, weight, k) -> None:
    dim, dtypes = k.shape[-1], dict.fromkeys((k.dtype, torch.float32))
    must = f"{' or '.join(map(describe_dtype, dtypes))} [{dim}]"
    if not isinstance(weight, torch.Tensor) or weight.dtype not in dtypes:
        raise TypeError(argument_error(_OP, name, must, weight))
    if weight.shape != (dim,):
        raise ValueError(argument_error(_OP, name, must, weight))
    if weight.device != k.device:
        raise ValueError(device_error(_OP, name, k.device, weight))
    if not weight.is_contiguous():
        raise ValueError(strides_error(_OP, name, "contiguous", weight))


def _check_queries(q, q_out, q_norm_weight, k, like, k_shape: tuple[int, ...]) -> torch.Tensor:
    """Check what belongs to the queries; return where they go."""
    shape = _check_rows("q", q, like, k_shape)
    if shape[-1] != k_shape[-1]:
        raise ValueError(argument_error(_OP, "q", f"of k's dim of {k_shape[-1]}", q))
    if q_norm_weight is not None:
        _check_norm("q_norm_weight", q_norm_weight, k)
    if q_out is None:
        return alloc.empty(shape, *like)
    if q_out is q:
        return q
    dtype, device = like
    if not isinstance(q_out, torch.Tensor) or q_out.dtype != dtype:
        raise TypeError(argument_error(_OP, "q_out", f"{describe_dtype(dtype)} {list(shape)} like q", q_out))
    if q_out.shape != shape:
        raise ValueError(argument_error(_OP, "q_out", f"{describe_dtype(dtype)} {list(shape)} like q", q_out))
    if q_out.device != device:
        raise ValueError(device_error(_OP, "q_out", device, q_out))
    if q_out.stride()[-1] != 1 and shape[-1] > 1:
        raise ValueError(strides_error(_OP, "q_out", "contiguous in its last dimension", q_out))
    return q_out


def _scale(name: str, value, cache, k) -> tuple[float, torch.Tensor | None]:
    """A scale as a number for all heads, and as a tensor [kv_heads] that counts in its place."""
    must = f"a number or float32 [{k.shape[-2]}]"
    if value is None:
        if cache.dtype == torch.int8:
            raise TypeError(argument_error(_OP, name, f"{must} with an int8 cache", None))
        return 1.0, None
    if is_number(value):
        if not 0 < value <= FLOAT_MAX:
            raise ValueError(argument_error(_OP, name, "a finite number above 0", value))
        return float(value), None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        raise TypeError(argument_error(_OP, name, must, value))
    if value.dim() != 0 and value.shape != k.shape[-2:-1]:
        raise ValueError(argument_error(_OP, name, f"{must} or without dimensions", value))
    if value.device != k.device:
        raise ValueError(device_error(_OP, name, k.device, value))
    return 1.0, value.expand(k.shape[-2]).contiguous()
