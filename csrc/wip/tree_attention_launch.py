def tree_attention_launch(
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
):
    given = dict(locals())
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    own = {name: given[name] for name in ("query_start", "scale", "window", "softcap", "out_scale", "num_splits")}
    for name, tensor in (("q", q), ("out", out), ("k", k_cache), ("v", v_cache)):
        strides = tensor.stride()[:-1] if tensor.dim() == 4 else (0, *tensor.stride()[:-1])
        middle = "row" if name in ("q", "out") else "slot"
        own |= dict(zip((f"{name}_stride_{axis}" for axis in ("batch", middle, "head")), strides, strict=True))
    sizes = {"batch": context_lens.shape[0], "queries": q.shape[-3], "heads": q.shape[-2], "dim": q.shape[-1]}
    sizes |= {"kv_heads": k_cache.shape[2], "slots": k_cache.shape[1], "topology_batch": 1, "dtype": DTYPES[q.dtype]}
    if page_table is not None:
        pages, page_size = k_cache.shape[:2]
        sizes |= {"slots": page_table.shape[1] * page_size, "pages": pages, "page_size": page_size}
        sizes["page_table_stride"] = page_table.stride(0)
    if ancestors is not None:
        sizes |= dict(zip(("topology_batch", "nodes", "words"), ancestors.shape, strict=True))
    return Launch("tree_attention", tensors, {**own, **sizes})


