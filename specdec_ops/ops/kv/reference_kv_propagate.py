"""The definition of kv_propagate."""

import torch


def kv_propagate(arguments, outputs) -> None:
    """Write the keys and values that each skipped layer would have for these rows, if it were fed `hidden`.

    The arguments and outputs: specdec_ops/ops/kv/contract.py.
    """
    hidden, norm_weights = arguments.hidden, arguments.norm_weights
    compute = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.to(compute)
    if norm_weights:
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + arguments.norm_eps)
    for layer, (k_cache, v_cache) in enumerate(zip(outputs.k_caches, outputs.v_caches, strict=True)):
        y = x * norm_weights[layer].to(compute) if norm_weights else x
        k, v = (y @ weights[layer].to(compute).T for weights in (arguments.k_weights, arguments.v_weights))
        k, v = (rows.unflatten(1, k_cache.shape[2:]) for rows in (k, v))
        if arguments.cosines is not None:
            k = rotate(k, arguments.cosines.to(compute), arguments.sines.to(compute), arguments.interleaved)
        stored, places = places_of(arguments.requests, arguments.slots, arguments.page_table, k_cache)
        k_cache[places] = k[stored].to(k_cache.dtype)
        v_cache[places] = v[stored].to(v_cache.dtype)


def rotate(x, cosines, sines, interleaved):
    """Rotary embedding of x [rows, kv_heads, head_dim] by angles [rows, pairs]; elements beyond the pairs stay."""
    pairs = cosines.shape[1]
    cosines, sines = cosines[:, None], sines[:, None]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    first, second = first * cosines - second * sines, second * cosines + first * sines
    joined = torch.stack([first, second], dim=-1).flatten(-2) if interleaved else torch.cat([first, second], dim=-1)
    return torch.cat([joined, rest], dim=-1)


def places_of(requests, slots, page_table, cache):
    """Which rows have a place in the cache, bool [rows], and the first two indices of those that have."""
    slots = slots.long()
    requests = torch.zeros_like(slots) if requests is None else requests.long()
    batch, room = (len(cache), cache.shape[1]) if page_table is None else page_table.shape
    size = cache.shape[1]
    capacity = room if page_table is None else room * size
    stored = (slots >= 0) & (slots < capacity) & (requests >= 0) & (requests < batch)
    if page_table is None:
        return stored, (requests[stored], slots[stored])
    pages = torch.full_like(slots, -1)
    pages[stored] = page_table.long()[requests[stored], slots[stored] // size]
    stored = stored & (pages >= 0) & (pages < len(cache))
    return stored, (pages[stored], slots[stored] % size)
