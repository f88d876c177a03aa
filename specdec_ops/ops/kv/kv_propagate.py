"""Keys and values that no attention has computed: those of layers which an early exit has skipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec_ops._core.checks import (
    FLOAT_MAX,
    INT32_MAX,
    KERNEL_DTYPES,
    argument_error,
    grad_error,
    is_number,
    strides_error,
)
from specdec_ops.rope import Rope

from . import contract
from .checks import check_ids, check_page_table, check_tensor, is_rope, rope_tables

_OP = "kv_propagate"
_DTYPES = (*KERNEL_DTYPES, torch.float64)


def kv_propagate(
    hidden: torch.Tensor,
    layers: Sequence[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    *,
    rope: Rope | tuple[torch.Tensor, torch.Tensor] | float | None,
    interleaved: bool = False,
    norm_eps: float = 1e-6,
    requests: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Fill the caches of skipped layers from the row at which a token has left: norm, W_k and W_v, rotation, store.

    Each skipped layer is fed the exit's hidden row, as if the layers before it had changed nothing. That is an
    approximation (CALM, Schuster et al., 2022), **for drafts only**: it changes what later tokens see. It reads the K
    and V weights of a layer instead of all of them (one twenty-sixth in Llama-3-8B). `LayerCache` keeps the exact rows
    and catches up instead.

    On CUDA tensors one launch serves up to 32 layers, and reads their weights once for up to 64 rows. The torch backend
    waits for the device there, to find the rows to store; nothing else does.

    Args:
        hidden: float32, bfloat16 or float16 `[rows, dim]`, before any norm, with a contiguous last dimension.
        layers: per skipped layer `(norm_weight, k_weight, v_weight)`: the RMSNorm before its attention `[dim]` in
            hidden's dtype or float32, and the projections `[kv_heads * head_dim, dim]` in hidden's dtype, contiguous.
            norm_weight is None in all layers or in none: None means no norm.
        positions: int32 or int64 `[rows]`, for the rotation.
        slots: int32 or int64 `[rows]`: where each row goes in its request's cache, no two rows of a request to the same
            one. A row with a slot of -1 is padding. Rows whose slot, request, page or (with tables) position does not
            exist are not stored either: values on the device are not checked.
        k_caches: per skipped layer, in hidden's dtype, `[batch, slots, kv_heads, head_dim]`, or
            `[pages, page_size, kv_heads, head_dim]` with `page_table`. All of one shape. Any strides with a contiguous
            last dimension.
        v_caches: like k_caches.
        rope: a `Rope`; or `(cos, sin)` tables, float32 (float64 with float64 rows) `[positions, pairs]`; or theta, the
            base, for `head_dim / 2` pairs of angle `position * theta ** (-2 i / head_dim)`, in float64 and at any
            position; or None: keys are not rotated. The first `2 * pairs` elements of each head are rotated (partial
            rotary), the rest is left.
        interleaved: which elements form pair i: `2 i` and `2 i + 1` (GPT-J, Llama's original code), or, by default, `i`
            and `pairs + i` (rotate-half: Hugging Face, GPT-NeoX).
        norm_eps: added to the mean square.
        requests: int32 or int64 `[rows]`: the request of each row, ragged as it may be. None: all are of request 0.
        page_table: int32 or int64 `[batch, max_pages]`: slot j of request b is in page `page_table[b, j // page_size]`.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("kv_propagate")`. float64 runs
            with torch.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.
    """
    check_tensor(_OP, "hidden", hidden, "[rows, dim]", 2, _DTYPES, hidden)
    if hidden.stride(1) != 1 and hidden.shape[1] > 1:
        raise ValueError(strides_error(_OP, "hidden", "contiguous in its last dimension", hidden))
    rows = hidden.shape[0]
    page_table = check_page_table(_OP, page_table, hidden)
    _check_caches(hidden, k_caches, v_caches, page_table)
    norms, keys, values = _layers(hidden, layers, k_caches)
    positions = check_ids(_OP, "positions", positions, (rows,), hidden)
    slots = check_ids(_OP, "slots", slots, (rows,), hidden)
    if requests is not None:
        requests = check_ids(_OP, "requests", requests, (rows,), hidden)
    elif page_table is None and len(k_caches[0]) != 1:
        raise ValueError(f"specdec_ops.{_OP}: requests must be given with a batch of {len(k_caches[0])}, got None")
    if not is_number(norm_eps) or not 0 <= norm_eps <= FLOAT_MAX:
        raise ValueError(argument_error(_OP, "norm_eps", "a finite number of at least 0", norm_eps))
    if not isinstance(interleaved, bool):
        raise TypeError(argument_error(_OP, "interleaved", "a bool", interleaved))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *norms, *keys, *values)):
        raise RuntimeError(grad_error(_OP))
    cosines, sines, slots = _angles(hidden, rope, positions, slots, k_caches[0].shape[3])
    arguments = contract.KvPropagateArguments(
        hidden,
        norms,
        keys,
        values,
        float(norm_eps),
        cosines,
        sines,
        interleaved,
        requests,
        slots.contiguous(),
        page_table,
    )
    contract.kv_propagate(arguments, backend, contract.KvPropagateOutputs(list(k_caches), list(v_caches)))


def _angles(hidden, rope, positions, slots, head_dim: int):
    """The cosines and sines of each row, and its slot, which is -1 for a position that the tables don't have."""
    if rope is None:
        return None, None, slots
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if is_number(rope):
        if not 0 < rope <= FLOAT_MAX:
            raise ValueError(argument_error(_OP, "rope", "a finite base above 0", rope))
        if head_dim % 2:
            raise ValueError(argument_error(_OP, "rope", f"tables or None with an odd head_dim of {head_dim}", rope))
        # In float64: far into a context a float32 angle has lost its last digits.
        pairs = torch.arange(head_dim // 2, dtype=torch.float64, device=hidden.device)
        angles = positions.double()[:, None] * float(rope) ** (-2 * pairs / head_dim)
        return angles.cos().to(compute), angles.sin().to(compute), slots
    if not is_rope(rope):
        raise TypeError(argument_error(_OP, "rope", "a Rope, (cos, sin), a number or None", rope))
    cosines, sines = rope_tables(_OP, rope, head_dim, hidden)
    known = (positions >= 0) & (positions < len(cosines))
    rows = positions.where(known, 0)
    return cosines.index_select(0, rows), sines.index_select(0, rows), slots.where(known, -1)


def _check_caches(hidden, k_caches, v_caches, page_table) -> None:
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        stacked = isinstance(caches, torch.Tensor) and caches.dim() > 0
        if not stacked and not isinstance(caches, list | tuple | Sequence):
            raise TypeError(argument_error(_OP, name, "a sequence of tensors", caches))
    if len(k_caches) == 0 or len(v_caches) != len(k_caches):
        must = "of one length of at least 1"
        raise ValueError(
            f"specdec_ops.{_OP}: k_caches and v_caches must be {must}, got {len(k_caches)}, {len(v_caches)}"
        )
    layout = "[batch, slots, kv_heads, head_dim]" if page_table is None else "[pages, page_size, kv_heads, head_dim]"
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        for index, cache in enumerate(caches):
            check_tensor(_OP, f"{name}[{index}]", cache, layout, 4, (hidden.dtype,), hidden)
            if cache.shape != k_caches[0].shape or 0 in cache.shape[2:]:
                must = f"{layout} with heads, of the same shape in all layers"
                raise ValueError(argument_error(_OP, f"{name}[{index}]", must, cache))
            if cache.stride(3) != 1 and cache.shape[3] > 1:
                raise ValueError(strides_error(_OP, f"{name}[{index}]", "contiguous in its last dimension", cache))
    if max(*hidden.shape, *k_caches[0].shape, *(() if page_table is None else page_table.shape)) > INT32_MAX:
        _refuse_sizes(hidden, k_caches[0], page_table)


def _refuse_sizes(hidden, cache, page_table) -> None:
    for name, tensor in (("hidden", hidden), ("k_caches[0]", cache), ("page_table", page_table)):
        if tensor is not None and max(tensor.shape) > INT32_MAX:
            raise ValueError(argument_error(_OP, name, "of sizes below 2**31", tensor))


def _layers(hidden, layers, caches) -> tuple[list, list, list]:
    """The norms (none, or one per layer) and projections of the layers."""
    if not isinstance(layers, list | tuple | Sequence):
        raise TypeError(argument_error(_OP, "layers", "a sequence of (norm_weight, k_weight, v_weight)", layers))
    if len(layers) != len(caches):
        raise ValueError(f"specdec_ops.{_OP}: layers must be {len(caches)}, one per cache, got {len(layers)}")
    dim, width = hidden.shape[1], caches[0].shape[2] * caches[0].shape[3]
    for index, layer in enumerate(layers):
        if not isinstance(layer, list | tuple | Sequence):
            raise TypeError(argument_error(_OP, f"layers[{index}]", "(norm_weight, k_weight, v_weight)", layer))
        if len(layer) != 3:
            must = "(norm_weight, k_weight, v_weight)"
            raise ValueError(f"specdec_ops.{_OP}: layers[{index}] must be {must}, got {len(layer)} entries")
        for part, shape in enumerate(((dim,), (width, dim), (width, dim))):
            weight, name = layer[part], f"layers[{index}][{part}]"
            if part == 0 and (weight is None) != (layers[0][0] is None):
                raise ValueError(argument_error(_OP, name, "None in all layers or in none", weight))
            if weight is None and part == 0:
                continue
            dtypes = (hidden.dtype, torch.float32) if part == 0 else (hidden.dtype,)
            check_tensor(_OP, name, weight, str(list(shape)), len(shape), dtypes, hidden)
            if weight.shape != shape:
                _, slots, _, head_dim = caches[0].shape
                how = (
                    "; caches are [..., slots, kv_heads, head_dim], to which .transpose(1, 2) brings heads before slots"
                )
                sentence = argument_error(_OP, name, str(list(shape)), weight)
                raise ValueError(sentence + how if weight.shape[0] == slots * head_dim else sentence)
            if not weight.is_contiguous():
                raise ValueError(strides_error(_OP, name, "contiguous", weight))
    norms, keys, values = (list(parts) for parts in zip(*layers, strict=True))
    return [] if norms[0] is None else norms, keys, values
