"""The ops as torch.library operators, and the rule that decides when a call may skip them.

torch.compile, torch.export, fake tensors and dispatch modes see `torch.ops.specdec_ops.*`: a schema, a fake and an
implementation for CPU and CUDA. A plain eager call goes straight to the same `run_*` functions, since the detour
through PyTorch's dispatcher costs several microseconds of a call that may take ten.

The ops are for inference: they have no backward.
"""

from collections.abc import Callable
from operator import itemgetter

import torch

from . import alloc, dispatch

_LIBRARY = torch.library.Library("specdec_ops", "DEF")
_NAMESPACE = torch.ops.specdec_ops
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))  # a parameter differs in its name alone

# Private names, so a PyTorch that drops one only costs the short cut.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracing = torch._C._get_tracing_state  # torch.jit.trace records operators, and nothing of what they do
_transforms = getattr(torch._C._functorch, "maybe_current_level", lambda: 1)  # vmap and the like hide what a tensor is


def short_cut(*tensors: torch.Tensor | None) -> bool:
    """Whether these tensors are plain and nobody watches, so that an implementation may be called directly."""
    return (
        not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and _transforms() is None
        and _tracing() is None
        and _PLAIN.issuperset(map(type, tensors))
    )


def short_cut_of(schema: str) -> Callable[..., bool]:
    """The same for a call's arguments in the order of a schema, such as "Tensor q, Tensor? offsets, float scale".

    Which of them are tensors the schema says, so that none is overlooked. What follows the arguments are tensors.
    """
    types = (argument.partition(" ")[0] for argument in schema.split(", "))
    tensors = itemgetter(*(place for place, of in enumerate(types) if of in ("Tensor", "Tensor?")))

    def applies(arguments: tuple, *others: torch.Tensor | None) -> bool:
        return not torch.compiler.is_compiling() and short_cut(*tensors(arguments), *others)

    return applies


def define(name: str, arguments: str, results: str, outputs: str, run, run_out, fake, what: str = "") -> None:
    """Register `name(arguments, what) -> results` and `name.out(arguments, *, outputs) -> ()`.

    `what` tells which results to make; the out overload makes those that it is given.

    The out overload returns nothing: a returned alias of an argument is what fake tensors can't follow. The tag keeps
    the compiler from handing over inputs in another layout than the one the checks have accepted.
    """
    for overload, schema, function, fake_function in (
        ("", f"({arguments}{what}) -> {results}", run, fake),
        (".out", f"({arguments}, *, {outputs}) -> ()", run_out, lambda *_, **__: None),
    ):
        _LIBRARY.define(name + overload + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name + overload, function, key)
        torch.library.register_fake(f"specdec_ops::{name}{overload}", fake_function, lib=_LIBRARY)


# build_topology


def build_topology(parents: torch.Tensor, num_nodes: torch.Tensor, backend: str, out=None) -> tuple[torch.Tensor, ...]:
    """Checked arguments in; (parents, depths, ancestors, first_child, next_sibling, num_nodes, status) out."""
    if short_cut(parents, num_nodes, *(out or ())):
        if out is None:
            return _run_build_topology(parents, num_nodes, backend)
        _run_build_topology_out(parents, num_nodes, backend, *out)
    elif out is None:
        return _NAMESPACE.build_topology(parents, num_nodes, backend)
    else:
        names = ("parents_out", "depths", "ancestors", "first_child", "next_sibling", "num_nodes_out", "status")
        _NAMESPACE.build_topology.out(parents, num_nodes, backend, **dict(zip(names, out, strict=True)))
    return tuple(out)


def _topology_like(parents: torch.Tensor, empty) -> tuple[torch.Tensor, ...]:
    batch, nodes = parents.shape
    words = max(1, (nodes + 63) // 64)
    table, row = (batch, nodes), (batch,)
    shapes = (table, table, (batch, nodes, words), table, table, row, row)
    return tuple(
        empty(shape, torch.int64 if index == 2 else torch.int32, parents.device) for index, shape in enumerate(shapes)
    )


def _run_build_topology(parents, num_nodes, backend):
    out = _topology_like(parents, alloc.empty)
    _run_build_topology_out(parents, num_nodes, backend, *out)
    return out


def _run_build_topology_out(
    parents, num_nodes, backend, parents_out, depths, ancestors, first_child, next_sibling, num_nodes_out, status
):
    implementation = dispatch.resolve("build_topology", backend, parents)
    if parents.shape[0]:
        implementation(
            parents, num_nodes, parents_out, depths, ancestors, first_child, next_sibling, num_nodes_out, status
        )


def fake_empty(shape, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)


define(
    "build_topology",
    "Tensor parents, Tensor num_nodes, str backend",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "Tensor(a!) parents_out, Tensor(b!) depths, Tensor(c!) ancestors, Tensor(d!) first_child, "
    "Tensor(e!) next_sibling, Tensor(f!) num_nodes_out, Tensor(g!) status",
    _run_build_topology,
    _run_build_topology_out,
    lambda parents, num_nodes, backend: _topology_like(parents, fake_empty),
)


# merge_states


def merge_states(out_a, lse_a, out_b, lse_b, backend: str, out=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked arguments in; (out, lse) out."""
    if short_cut(out_a, lse_a, out_b, lse_b, *(out or ())):
        if out is None:
            return _run_merge_states(out_a, lse_a, out_b, lse_b, backend)
        _run_merge_states_out(out_a, lse_a, out_b, lse_b, backend, *out)
    elif out is None:
        return _NAMESPACE.merge_states(out_a, lse_a, out_b, lse_b, backend)
    else:
        _NAMESPACE.merge_states.out(out_a, lse_a, out_b, lse_b, backend, out=out[0], lse=out[1])
    return tuple(out)


def _run_merge_states(out_a, lse_a, out_b, lse_b, backend):
    out = alloc.empty(out_a.shape, out_a.dtype, out_a.device)
    lse = alloc.empty(lse_a.shape, lse_a.dtype, lse_a.device)
    _run_merge_states_out(out_a, lse_a, out_b, lse_b, backend, out, lse)
    return out, lse


def _run_merge_states_out(out_a, lse_a, out_b, lse_b, backend, out, lse):
    implementation = dispatch.resolve("merge_states", backend, out_a)
    if out.numel():
        implementation(out_a, lse_a, out_b, lse_b, out, lse)


define(
    "merge_states",
    "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str backend",
    "(Tensor, Tensor)",
    "Tensor(a!) out, Tensor(b!) lse",
    _run_merge_states,
    _run_merge_states_out,
    lambda out_a, lse_a, out_b, lse_b, backend: (
        fake_empty(out_a.shape, out_a.dtype, out_a.device),
        fake_empty(lse_a.shape, lse_a.dtype, lse_a.device),
    ),
)


# tree_attention. `arguments` is everything from q to num_splits, in the order of the schema below.

_TREE_ATTENTION = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor? ancestors, Tensor? depths, Tensor? num_nodes, Tensor? offsets, "
    "Tensor context_lens, Tensor? page_table, Tensor? query_starts, SymInt query_start, float scale, SymInt window, "
    "float softcap, Tensor? sinks, Tensor? alibi_slopes, float out_scale, SymInt num_splits"
)
_attention_short_cut = short_cut_of(_TREE_ATTENTION)


def tree_attention(arguments: tuple, return_lse: bool, backend: str, out=None, lse=None):
    """Checked arguments in; (out, lse) out. Without return_lse, lse is None or an empty tensor."""
    if _attention_short_cut(arguments, out, lse):
        if out is None:
            q, *_ = arguments
            out = alloc.empty(q.shape, q.dtype, q.device)
            lse = alloc.empty(q.shape[:-1], torch.float32, q.device) if return_lse else None
        _run_tree_attention_out(*arguments, backend, out, lse)
    elif out is None:
        return _NAMESPACE.tree_attention(*arguments, backend, return_lse)
    else:
        _NAMESPACE.tree_attention.out(*arguments, backend, out=out, lse=lse)
    return out, lse


def _run_tree_attention(q, *others):
    *arguments, backend, return_lse = others
    out = alloc.empty(q.shape, q.dtype, q.device)
    lse = alloc.empty(q.shape[:-1] if return_lse else (0,), torch.float32, q.device)
    _run_tree_attention_out(q, *arguments, backend, out, lse if return_lse else None)
    return out, lse


def _run_tree_attention_out(
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
    window,
    softcap,
    sinks,
    alibi_slopes,
    out_scale,
    num_splits,
    backend,
    out,
    lse,
):
    implementation = dispatch.resolve("tree_attention", backend, q, (k_cache, v_cache), out)
    if out.numel() == 0:
        return
    max_queries = q.shape[-3]
    if ancestors is not None:
        nodes = ancestors.shape[1]
        if nodes == 0:  # a tree without nodes: every row is padding
            out.zero_()
            if lse is not None:
                lse.fill_(float("-inf"))
            return
        if offsets is not None and nodes < max_queries:
            max_queries = nodes
    implementation(
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
    )


def _fake_tree_attention(q, *others):
    *_, return_lse = others
    lse_shape = q.shape[:-1] if return_lse else (0,)
    return fake_empty(q.shape, q.dtype, q.device), fake_empty(lse_shape, torch.float32, q.device)


define(
    "tree_attention",
    f"{_TREE_ATTENTION}, str backend",
    "(Tensor, Tensor)",
    "Tensor(a!) out, Tensor(b!)? lse",
    _run_tree_attention,
    lambda *arguments, out, lse=None: _run_tree_attention_out(*arguments, out, lse),
    _fake_tree_attention,
    what=", bool return_lse",
)
