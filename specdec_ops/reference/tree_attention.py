"""The definition of tree_attention."""

import torch

MINUS_INFINITY = float("-inf")


def tree_attention(
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
    max_queries,
    scale,
    window,
    softcap,
    sinks,
    alibi_slopes,
    out_scale,
    num_splits,
    out,
    lse,
) -> None:
    """Write `out`, and `lse` unless it is None, one request after another. See specdec_ops.tree_attention.

    `max_queries` and `num_splits` say how to cut the work; a definition needs neither. Rows that belong to no node keep
    an output of 0 and a log-sum-exp of -inf.
    """
    out.zero_()
    if lse is not None:
        lse.fill_(MINUS_INFINITY)
    compute = torch.promote_types(q.dtype, torch.float32)

    for request in range(context_lens.shape[0]):
        # A tree given once serves every request.
        context, tree_size, tree_depths, tree_ancestors = int(context_lens[request]), 0, None, None
        if ancestors is not None:
            tree = request if len(ancestors) > 1 else 0
            tree_size, tree_depths, tree_ancestors = int(num_nodes[tree]), depths[tree], ancestors[tree]
        check_length(request, context, tree_size, k_cache, page_table)

        rows = request if offsets is None else slice(int(offsets[request]), int(offsets[request + 1]))
        q_rows, out_rows = q[rows], out[rows]
        first_node = query_start + (0 if query_starts is None else int(query_starts[request]))
        nodes = first_node + torch.arange(len(q_rows), device=q.device)
        real = torch.ones_like(nodes, dtype=torch.bool) if ancestors is None else (nodes >= 0) & (nodes < tree_size)
        visible, distance = visibility(nodes[real], context, tree_size, tree_depths, tree_ancestors, window)

        keys = read_slots(k_cache, page_table, request, context + tree_size).to(compute)
        values = read_slots(v_cache, page_table, request, context + tree_size).to(compute)
        # A slot that no row sees may hold anything, even NaN: a node that is not drafted yet has no K and V.
        values = values.masked_fill(~visible.any(dim=0)[:, None, None], 0.0)

        result, result_lse = attend(
            q_rows[real].to(compute), keys, values, visible, distance, scale, softcap, alibi_slopes, sinks
        )
        out_rows[real] = (out_scale * result).to(out.dtype)
        if lse is not None:
            lse[rows][real] = result_lse.to(lse.dtype)


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
    return torch.einsum("hrs,shd->rhd", weights, values), torch.logsumexp(logits, dim=-1).transpose(0, 1)


def unpack_bits(words, count: int):
    """int64 [rows, words] to bool [rows, count]: bit j % 64 of word j // 64 is column j."""
    columns = torch.arange(count, device=words.device)
    return (words[:, columns // 64] >> (columns % 64)) & 1 == 1


def check_length(request: int, context: int, tree_size: int, cache, page_table) -> None:
    """Refuse a length that the cache can't hold."""
    capacity = cache.shape[1] if page_table is None else page_table.shape[1] * cache.shape[1]
    if context < 0 or context + tree_size > capacity:
        raise ValueError(
            f"specdec_ops.tree_attention: context_lens[{request}] must be between 0 and {capacity - tree_size} "
            f"({capacity} slots, {tree_size} of them for the tree), got {context}"
        )


def read_slots(cache, page_table, request: int, count: int):
    """The first `count` slots of a request: [slots, kv_heads, dim]."""
    if page_table is None:
        return cache[request, :count]
    page_size = cache.shape[1]
    slots = torch.arange(count, device=cache.device)
    pages = page_table[request, slots // page_size].long()
    if count > 0 and (int(pages.min()) < 0 or int(pages.max()) >= len(cache)):
        raise ValueError(
            f"specdec_ops.tree_attention: page_table[{request}] must name pages between 0 and {len(cache) - 1}, "
            f"got {int(pages.min())} to {int(pages.max())}"
        )
    return cache[pages, slots % page_size]
