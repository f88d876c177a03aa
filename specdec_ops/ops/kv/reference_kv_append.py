"""The definition of kv_append."""

import torch

from .reference_kv_propagate import places_of, rotate

INT8_MAX = 127


def kv_append(arguments, outputs) -> None:
    """Normalise, rotate and store K, store V, normalise and rotate Q. See specdec_ops.kv_append.

    The arguments and outputs: specdec_ops/ops/kv/contract.py.
    """
    k, v = arguments.k.flatten(0, -3), arguments.v.flatten(0, -3)
    compute = torch.promote_types(k.dtype, torch.float32)
    requests, slots, positions, turned = rows_of(arguments, outputs)

    def normed_and_turned(x, weight):
        x = x.to(compute)
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + arguments.norm_eps) * weight.to(compute)
        if arguments.cosines is None:
            return x
        cosines, sines = (table[positions].to(compute) for table in (arguments.cosines, arguments.sines))
        return rotate(x, cosines, sines, arguments.interleaved)

    stored, places = places_of(requests, slots.where(turned, -1), arguments.page_table, outputs.k_cache)
    keys = normed_and_turned(k, arguments.k_norm_weight)
    for cache, rows, scale, scales in (
        (outputs.k_cache, keys, arguments.k_scale, arguments.k_scales),
        (outputs.v_cache, v.to(compute), arguments.v_scale, arguments.v_scales),
    ):
        scale = scale if scales is None else scales.to(compute)[:, None]
        cache[places] = in_the_dtype_of(cache, rows[stored] / scale)
    if arguments.q is not None:
        queries = normed_and_turned(arguments.q.flatten(0, -3), arguments.q_norm_weight)
        queries = queries.where(turned[:, None, None], 0)
        outputs.q_out.copy_(queries.view(outputs.q_out.shape))


def rows_of(arguments, outputs):
    """Of every row: its request, its slot, its position or 0, and whether it has what its rotation needs.

    int64 and bool [rows]. A slot may be any number, a request that does not exist is -1.
    """
    shape, device = arguments.k.shape[:-2], arguments.k.device
    context_lens, page_table = arguments.context_lens, arguments.page_table
    batch = len(outputs.k_cache) if page_table is None else len(page_table)
    at = torch.arange(shape.numel(), device=device)
    nodes = None
    if len(shape) == 2:
        requests, nodes = at // shape[1], at % shape[1]
    elif arguments.offsets is not None:
        offsets = arguments.offsets.long()
        requests = torch.searchsorted(offsets, at, right=True) - 1
        requests = requests.where(requests < batch, -1)
        nodes = at - offsets[requests]
    else:
        requests = torch.zeros_like(at) if arguments.requests is None else arguments.requests.long()
    known = (requests >= 0) & (requests < batch)
    requests = requests.where(known, -1)
    exists, depths, contexts = torch.ones_like(known), nodes, torch.zeros_like(at)
    if nodes is not None:
        within = nodes
        nodes = nodes + arguments.query_start
        if arguments.query_starts is not None:
            nodes = nodes + per_request(arguments.query_starts, requests)
        exists = known & (nodes >= 0)
        depths = nodes
        if arguments.depths is not None:
            trees = requests.clamp(max=len(arguments.depths) - 1)  # one tree may serve all
            room = arguments.depths.shape[1]
            exists = exists & (nodes < per_request(arguments.num_nodes, trees).clamp(max=room))
            if arguments.offsets is not None:
                exists = exists & (within < room)
            depths = per_request(arguments.depths.flatten(), (trees * room + nodes).where(exists, -1))
    if context_lens is not None:
        contexts = per_request(context_lens, requests)
        exists = exists & known & (contexts >= 0)
    slots = contexts + nodes if arguments.slots is None else arguments.slots.long().flatten()
    if arguments.cosines is None:
        return requests, slots, torch.zeros_like(at), exists
    positions = contexts + depths if arguments.positions is None else arguments.positions.long().flatten()
    turned = exists & (positions >= 0) & (positions < len(arguments.cosines))
    return requests, slots, positions.where(turned, 0), turned


def per_request(values, requests):
    """values[requests] as int64, 0 where a request is -1."""
    if len(values) == 0:
        return torch.zeros_like(requests)
    return values.long()[requests.clamp(min=0)].where(requests >= 0, 0)


def in_the_dtype_of(cache, x):
    """Rounded to nearest, ties to even. In 8 bits what is too large becomes the largest; NaN becomes 0 as an int8."""
    if cache.dtype == torch.int8:
        return x.round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(nan=0.0).to(torch.int8)
    if cache.dtype.itemsize == 1:
        largest = torch.finfo(cache.dtype).max
        x = x.clamp(-largest, largest)
    return x.to(cache.dtype)
