"""kv_propagate on the CPU: the products by PyTorch's matrix library, all around them once for all layers.

The products read `2 * layers * kv_heads * head_dim * dim` weights once. With the heads of Llama-3-8B they are nine
tenths of the processor time, for 1 row as for 60, in bfloat16 as in float32: a kernel of our own for the rotation and
the store could win no more than the rest. What layers share (the norm's statistics, the angles, the places in the
cache) is computed once.
"""

import torch


def kv_propagate(
    hidden,
    norm_weights,
    k_weights,
    v_weights,
    norm_eps,
    cosines,
    sines,
    interleaved,
    requests,
    slots,
    page_table,
    k_caches,
    v_caches,
) -> None:
    """See specdec_ops.reference.kv_propagate. Products round to hidden's dtype, the norm and rotation are float32."""
    if norm_weights:
        normed = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[1:], eps=norm_eps)
    stored, places = _places(requests, slots, page_table, k_caches[0])
    if not stored.all():  # padding: its rows cost no product
        kept = stored.nonzero()[:, 0]
        hidden = hidden[kept]
        normed = normed[kept] if norm_weights else None
        cosines, sines = (None, None) if cosines is None else (cosines[kept], sines[kept])
    heads = k_caches[0].shape[2:]
    keys = torch.empty(len(k_caches), len(hidden), *heads, dtype=hidden.dtype)
    values = torch.empty_like(keys)
    for layer in range(len(k_caches)):
        y = (normed * norm_weights[layer].float()).to(hidden.dtype) if norm_weights else hidden
        torch.mm(y, k_weights[layer].T, out=keys[layer].view(len(hidden), -1))
        torch.mm(y, v_weights[layer].T, out=values[layer].view(len(hidden), -1))
    if cosines is not None:
        _rotate(keys, cosines, sines, interleaved)
    for layer, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
        k_cache.index_put_(places, keys[layer])
        v_cache.index_put_(places, values[layer])


def _rotate(keys, cosines, sines, interleaved) -> None:
    """Turn keys [layers, rows, kv_heads, head_dim] in place, in float32."""
    pairs = cosines.shape[1]
    if interleaved:
        first, second = keys[..., 0 : 2 * pairs : 2], keys[..., 1 : 2 * pairs : 2]
    else:
        first, second = keys[..., :pairs], keys[..., pairs : 2 * pairs]
    low, high, cosines, sines = first.float(), second.float(), cosines[:, None], sines[:, None]
    turned = low * cosines - high * sines, high * cosines + low * sines
    first.copy_(turned[0])  # not before both are known: float() of float32 is no copy
    second.copy_(turned[1])


def _places(requests, slots, page_table, cache):
    """As in the reference, where there is one that says what it means."""
    size = cache.shape[1]
    batch, room = cache.shape[:2] if page_table is None else (len(page_table), page_table.shape[1] * size)
    stored = (slots >= 0) & (slots < room)
    if requests is None:
        requests = torch.zeros_like(slots)
    else:
        stored &= (requests >= 0) & (requests < batch)
    if page_table is None:
        return stored, (requests[stored].long(), slots[stored].long())
    safe = slots.where(stored, 0).long()
    pages = page_table[requests.where(stored, 0).long(), safe // size]
    stored &= (pages >= 0) & (pages < len(cache))
    return stored, (pages[stored].long(), (safe % size)[stored])
