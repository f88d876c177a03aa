"""The definition of tree_attention."""

import itertools

import torch

MINUS_INFINITY = float("-inf")
MAX_SLOTS = 2**30  # of a request: kernels count slots in 32 bits


def tree_attention(arguments, outputs) -> None:
    """Write `out`, and `lse` unless it is None, one request after another. See specdec_ops.tree_attention.

    `num_splits` says how to cut the work; a definition does not need it. Rows that belong to no node keep an output of
    0 and a log-sum-exp of -inf.
    """
    q, offsets, page_table, query_starts = arguments.q, arguments.offsets, arguments.page_table, arguments.query_starts
    out, lse = outputs
    out.zero_()
    if lse is not None:
        lse.fill_(MINUS_INFINITY)
    compute = torch.promote_types(q.dtype, torch.float32)

    if offsets is not None:
        check_offsets(offsets, len(q))
    for request, context in enumerate(arguments.context_lens.tolist()):
        tree = tree_of(request, arguments.ancestors, arguments.depths, arguments.num_nodes)
        tree_size, tree_depths, tree_ancestors = tree
        rows = request if offsets is None else slice(int(offsets[request]), int(offsets[request + 1]))
        q_rows, out_rows = q[rows], out[rows]
        first_node = arguments.query_start + (0 if query_starts is None else int(query_starts[request]))
        nodes = first_node + torch.arange(len(q_rows), device=q.device)
        real = rows_with_nodes(nodes, tree_size, tree_depths, packed=offsets is not None)
        last_node = int(nodes[real][-1]) if tree_ancestors is not None and real.any() else -1
        check_length(request, context, last_node + 1, arguments.k_cache, page_table)
        visible, distance = visibility(nodes[real], context, tree_size, tree_depths, tree_ancestors, arguments.window)

        # A slot that no row sees may hold anything, and so may its page's number: it is not read.
        seen = visible.any(dim=0).nonzero()[:, 0]
        visible, distance = visible[:, seen], distance[:, seen]
        keys = read_slots(arguments.k_cache, page_table, request, seen).to(compute)
        values = read_slots(arguments.v_cache, page_table, request, seen).to(compute)

        result, result_lse = attend(
            q_rows[real].to(compute), keys, values, visible, distance, arguments.scale, arguments.softcap,
            arguments.alibi_slopes, arguments.sinks,
        )  # fmt: skip
        out_rows[real] = (arguments.out_scale * result).to(out.dtype)
        if lse is not None:
            lse[rows][real] = result_lse.to(lse.dtype)


def tree_of(request: int, ancestors, depths, num_nodes):
    """How many nodes a request's tree has, their depths and ancestor words. A tree given once serves every request."""
    if ancestors is None:
        return 0, None, None
    tree = request if len(ancestors) > 1 else 0
    return min(max(int(num_nodes[tree]), 0), depths.shape[1]), depths[tree], ancestors[tree]


def rows_with_nodes(nodes, tree_size: int, depths, packed: bool):
    """Which of a request's rows have a node, bool [rows]. Packed rows beyond the room for nodes are padding."""
    if depths is None:
        return torch.ones_like(nodes, dtype=torch.bool)
    inside = torch.arange(len(nodes), device=nodes.device) < len(depths)
    return (nodes >= 0) & (nodes < tree_size) & (inside | (not packed))


def visibility(nodes, context: int, tree_size: int, depths, ancestors, window: int):
    """Which slots each node sees, and how many positions ahead of each slot it is: bool and int64 [rows, slots].

    Without a tree (`ancestors` None) every row stands right behind the context and sees exactly the context.
    """
    device = nodes.device
    slot_positions = torch.arange(context, device=device)
    visible = torch.ones(len(nodes), context, dtype=torch.bool, device=device)
    if ancestors is None:
        row_positions = torch.full_like(nodes, context)
    else:
        tree_positions = context + depths[:tree_size].long()
        row_positions = tree_positions[nodes]
        slot_positions = torch.cat([slot_positions, tree_positions])
        visible = torch.cat([visible, unpack_bits(ancestors[nodes], tree_size)], dim=1)
    distance = row_positions[:, None] - slot_positions[None, :]
    if window > 0:
        visible = visible & (distance >= 0) & (distance < window)
    return visible, distance


def attend(queries, keys, values, visible, distance, scale, softcap, alibi_slopes, sinks):
    """Softmax attention of one request, in the dtype of its arguments.

    queries [rows, heads, dim], keys and values [slots, kv_heads, dim], visible and distance [rows, slots].
    Returns the output [rows, heads, dim] and the natural log of the softmax denominator [rows, heads].
    """
    heads, kv_heads = queries.shape[1], keys.shape[1]
    keys = keys.repeat_interleave(heads // kv_heads, dim=1)  # query head h reads kv head h // (heads / kv_heads)
    values = values.repeat_interleave(heads // kv_heads, dim=1)

    scores = scale * torch.einsum("rhd,shd->hrs", queries, keys)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance.to(scores.dtype)
    scores = scores.masked_fill(~visible, MINUS_INFINITY)

    logits = scores
    if sinks is not None:  # a logit without a value: it takes its share of the softmax and gives nothing
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        logits = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : scores.shape[-1]]
    weights = weights.masked_fill(~visible, 0.0)  # the softmax of a row that sees nothing is NaN
    return weigh(weights, values, visible), torch.logsumexp(logits, dim=-1).transpose(0, 1)


def weigh(weights, values, visible):
    """Sums of values [slots, heads, dim] with weights [heads, rows, slots], over the slots that each row sees.

    Where a value is not finite, a weight of 0 doesn't leave it out (0 * NaN is NaN): then every row adds its own slots.
    """
    if visible.all() or values.isfinite().all():
        return torch.einsum("hrs,shd->rhd", weights, values)
    return torch.stack(
        [torch.einsum("hs,shd->hd", weights[:, row, own], values[own]) for row, own in enumerate(visible)]
    )


def unpack_bits(words, count: int):
    """int64 [rows, words] to bool [rows, count]: bit j % 64 of word j // 64 is column j."""
    columns = torch.arange(count, device=words.device)
    return (words[:, columns // 64] >> (columns % 64)) & 1 == 1


def check_offsets(offsets, tokens: int) -> None:
    """Refuse offsets of packed rows that go beyond them or back."""
    ends = offsets.tolist()
    for request, (begin, end) in enumerate(itertools.pairwise(ends)):
        if not 0 <= begin <= end <= tokens:
            raise ValueError(
                f"specdec_ops.tree_attention: topology.offsets must rise from at least 0 to at most {tokens} rows, "
                f"got {begin} and {end} at [{request}]"
            )


def check_length(request: int, context: int, nodes: int, cache, page_table) -> None:
    """Refuse a context that, with the nodes up to the last row's, the cache can't hold."""
    capacity = cache.shape[1] if page_table is None else page_table.shape[1] * cache.shape[1]
    capacity = min(capacity, MAX_SLOTS)
    which = f"specdec_ops.tree_attention: context_lens[{request}]"
    if context < 0:
        raise ValueError(f"{which} must not be negative, got {context}")
    if context + nodes > capacity:
        raise ValueError(
            f"{which} is {context} and with its tree it needs {context + nodes} slots, but the cache has {capacity}"
        )


def read_slots(cache, page_table, request: int, slots):
    """These slots of a request: [slots, kv_heads, dim]."""
    if page_table is None:
        return cache[request, slots]
    page_size = cache.shape[1]
    numbers = slots // page_size
    pages = page_table[request, numbers].long()
    missing = ((pages < 0) | (pages >= len(cache))).nonzero()[:, 0]
    if len(missing) > 0:
        raise ValueError(
            f"specdec_ops.tree_attention: page_table[{request}, {int(numbers[missing[0]])}] must be a page below "
            f"{len(cache)}, got {int(pages[missing[0]])}"
        )
    return cache[pages, slots % page_size]
