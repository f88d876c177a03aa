"""tree_attention: the exact result, and the contestants.

Excluded from every timing: making the mask, packing q for the packed view, copying K and V to another layout, building
FlexAttention's block mask. PyTorch's users pay for some of these on every step; specdec_ops needs none of them. The
ratio is against PyTorch's fastest form over whichever layout of K and V suits it, ours over the layout at hand.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading

import torch
import torch.nn.functional as functional

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import (
    Contestant,
    Expected,
    allowed_error,
    compiled,
    largest_error,
    on_backends,
    unavailable,
)
from benchmarks.harness.machine import native
from benchmarks.harness.reading import reader

from . import flashinfer_peers, xformers_peer
from .inputs import Inputs


def expected(inputs: Inputs) -> Expected:
    """Two (request, KV head) pairs in float64, through the definition; each is one of the two kinds of heads."""
    case, group = inputs.case, inputs.case.model.group
    pairs = sorted({(0, 0), (case.batch - 1, case.model.kv_heads - 1)})

    def take(result: torch.Tensor) -> list[torch.Tensor]:
        return [result[request, :, head * group : (head + 1) * group] for request, head in pairs]

    def reference(request: int, head: int) -> torch.Tensor:
        one, length = slice(request, request + 1), case.contexts[request] + case.nodes
        k, v = (cache[one, :length, head : head + 1].double() for cache in (inputs.k_cache, inputs.v_cache))
        q = inputs.q[one, :, head * group : (head + 1) * group].double()
        lengths = inputs.context_lens[one]
        return specdec_ops.tree_attention(q, k, v, inputs.topology, lengths, backend="torch")[0]

    def bound(request: int, head: int) -> torch.Tensor:
        context, rows = case.contexts[request], slice(head * group, (head + 1) * group)
        k, v = (cache[request, : context + case.nodes, head] for cache in (inputs.k_cache, inputs.v_cache))
        in_context = torch.ones(case.nodes, context, dtype=torch.bool, device=k.device)
        visible = torch.cat([in_context, inputs.tree_mask], 1).repeat_interleave(group, 0)
        q = inputs.q[request, :, rows].flatten(0, 1)
        return rounding.attention(q, k, v, visible, case.model.dim**-0.5, q.dtype).unflatten(0, (case.nodes, group))

    exact = [reference(*pair) for pair in pairs]
    errors = [largest_error(*both) for both in zip(take(eager(inputs)), exact, strict=True)]
    bounds = [bound(*pair) for pair in pairs]
    return Expected(take, exact, [allowed_error(*each) for each in zip(exact, errors, bounds, strict=True)])


# --- ours


def ours(inputs: Inputs, backend: str = "auto", name: str = "specdec_ops") -> Contestant:
    def call():
        i = inputs
        return specdec_ops.tree_attention(i.q, i.k_cache, i.v_cache, i.topology, i.context_lens, backend=backend)

    return Contestant(name, "ours", call, reads=(inputs.k_cache, inputs.v_cache))


def ours_head_major(inputs: Inputs) -> Contestant:
    """The same call over caches that lie head by head, to compare with PyTorch over such caches."""
    k, v = (cache.transpose(1, 2) for cache in inputs.stored_by_head)

    def call():
        return specdec_ops.tree_attention(inputs.q, k, v, inputs.topology, inputs.context_lens)

    return Contestant("specdec_ops head-major", "ours", call, reads=(k, v))


def ours_path_invariant(inputs: Inputs) -> Contestant:
    """The same call with path_invariant: what it costs that every node gets the bits of plain decoding."""

    def call():
        i = inputs
        return specdec_ops.tree_attention(
            i.q, i.k_cache, i.v_cache, i.topology, i.context_lens, path_invariant=True, backend="cpu"
        )

    if reason := specdec_ops.backends("tree_attention")["cpu"]:
        return unavailable("specdec_ops path-invariant", "ours", reason)
    return Contestant("specdec_ops path-invariant", "ours", call, reads=(inputs.k_cache, inputs.v_cache))


def ours_limited(inputs: Inputs, isa: str) -> Contestant:
    """Our CPU kernel held to an older instruction set, while PyTorch keeps the newest."""
    module, name = native(), f"specdec_ops {isa}"
    if module is None or not hasattr(module, "set_cpu_isa"):
        return unavailable(name, "ours", "this build can't limit the instruction set at run time")
    contestant = ours(inputs, "cpu", name)
    contestant.isa = isa
    contestant.before, contestant.after = lambda: module.set_cpu_isa(isa), lambda: module.set_cpu_isa("")
    return contestant


# --- PyTorch


def eager(inputs: Inputs) -> torch.Tensor:
    """Grouped products (K and V aren't repeated per query head), the mask only where the tree is."""
    case, (k, v) = inputs.case, inputs.head_major
    out = torch.empty_like(inputs.q)
    for request, context in enumerate(case.contexts):  # batched products would copy K and V; one request's don't
        length = context + case.nodes
        queries = pack(inputs.q[request], case.model.kv_heads)
        scores = torch.bmm(queries, k[request, :, :length].transpose(1, 2)).mul_(case.model.dim**-0.5)
        by_node = scores.view(case.model.kv_heads, case.nodes, case.model.group, length)
        by_node[..., context:].masked_fill_(~inputs.tree_mask[:, None, :], float("-inf"))
        result = torch.bmm(torch.softmax(scores, dim=-1), v[request, :, :length])
        out[request] = unpack(result, case.model.heads)
    return out


def pack(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[..., nodes, heads, dim] to [..., kv_heads, nodes * group, dim]: the query heads of a KV head become its rows."""
    *lead, nodes, heads, dim = q.shape
    grouped = q.reshape(*lead, nodes, kv_heads, heads // kv_heads, dim).transpose(-4, -3)
    return grouped.reshape(*lead, kv_heads, nodes * (heads // kv_heads), dim)


def unpack(packed: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of pack."""
    *lead, kv_heads, rows, dim = packed.shape
    group = heads // kv_heads
    grouped = packed.reshape(*lead, kv_heads, rows // group, group, dim).transpose(-4, -3)
    return grouped.reshape(*lead, rows // group, heads, dim)


def sdpa(inputs: Inputs, by_head: bool = False) -> Contestant:
    """SDPA as a model calls it. by_head: K and V lie head by head, and the mask is additive already."""
    (k, v), q = inputs.stored_by_head if by_head else inputs.head_major, inputs.q.transpose(1, 2)
    grouped = inputs.case.model.group > 1
    mask = attention_mask(inputs, by_head)

    def call():
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    name = "sdpa head-major" if by_head else "sdpa"
    return Contestant(name, "pytorch", call, lambda out: out.transpose(1, 2), (k, v))


def sdpa_packed(inputs: Inputs, by_head: bool = False) -> Contestant:
    """SDPA on the packed view: with it PyTorch, too, reads K and V once per KV head. by_head: as in sdpa."""
    k, v = inputs.stored_by_head if by_head else inputs.head_major
    q = pack(inputs.q, inputs.case.model.kv_heads).contiguous()
    mask = attention_mask(inputs, by_head or q.is_cuda)
    if mask is not None:
        mask = mask.repeat_interleave(inputs.case.model.group, dim=2)
        mask = aligned(mask) if mask.dtype != torch.bool else mask

    def call():
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    name = "sdpa packed head-major" if by_head else "sdpa packed"
    return Contestant(name, "pytorch", call, lambda out: unpack(out, inputs.case.model.heads), (k, v))


def attention_mask(inputs: Inputs, is_additive: bool) -> torch.Tensor | None:
    """The mask of a call. One node that sees all slots needs none, which is PyTorch's fastest form."""
    if inputs.case.nodes == 1 and not inputs.case.ragged:
        return None
    return additive(inputs.mask, inputs.q.dtype) if is_additive else inputs.mask


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else -inf: what kernels read. PyTorch would make it out of a boolean mask in each call."""
    return aligned(torch.zeros_like(mask, dtype=dtype)).masked_fill_(~mask, float("-inf"))


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """A copy whose rows lie a multiple of 8 elements apart, which spares PyTorch one in each call."""
    *lead, slots = bias.shape
    padded = torch.zeros(*lead, -(-slots // 8) * 8, dtype=bias.dtype, device=bias.device)[..., :slots]
    return padded.copy_(bias)


class OutOfTime(BaseException):
    """No Exception, because the compiler catches those on its way."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raise OutOfTime in the main thread; elsewhere, and without SIGALRM, there is no limit."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise OutOfTime(f"did not compile within {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def flex(inputs: Inputs, seconds: float) -> Contestant:
    """Compiled FlexAttention, compiled here and now."""
    if seconds < 5:
        return unavailable("flex_attention", "pytorch", "no time left to compile it in this preset")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        with time_limit(seconds), torch.no_grad():
            return _compiled_flex(inputs, create_block_mask, flex_attention)
    except (Exception, OutOfTime) as error:  # many CPUs, compilers and shapes are unsupported: say why and go on
        return unavailable("flex_attention", "pytorch", f"not available: {str(error).strip().splitlines()[0][:100]}")


def _compiled_flex(inputs: Inputs, create_block_mask, flex_attention) -> Contestant:
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # in this process, so that the time limit can end it
    if not inputs.q.is_cuda:  # on a GPU earlier copies of the inputs keep what was compiled for them
        torch._dynamo.reset()
    (k, v), q = inputs.head_major, inputs.q.transpose(1, 2)
    case, tree_mask, lengths = inputs.case, inputs.tree_mask, inputs.context_lens
    last = case.nodes - 1

    def visible(request, head, row, slot):
        node = slot - lengths[request]
        in_tree = (node <= last) & tree_mask[row, node.clamp(0, last)]
        return (node < 0) | in_tree

    block_mask = create_block_mask(visible, case.batch, None, case.nodes, case.slots, device=str(q.device))
    flex = compiled(flex_attention)

    def call():
        return flex(q, k, v, block_mask=block_mask, enable_gqa=case.model.group > 1)

    call()
    return Contestant("flex_attention", "pytorch", call, lambda out: out.transpose(1, 2), (k, v))


# --- controls


def one_query(inputs: Inputs) -> Contestant:
    """Plain decoding, one query and no mask, over the same K and V: what PyTorch makes of the bandwidth."""
    (k, v), q = inputs.head_major, inputs.q[:, :1]
    packed = pack(q, inputs.case.model.kv_heads).contiguous()

    def call():
        return functional.scaled_dot_product_attention(packed, k, v)

    return Contestant("sdpa q=1", "control", call, reads=(k, v))


def ours_paged(inputs: Inputs) -> Contestant:
    """The same call over pages of 64 slots in a scattered order, as serving engines keep them."""
    batch = inputs.case.batch
    k, v = (flashinfer_peers.to_pages(cache) for cache in (inputs.k_cache, inputs.v_cache))
    order = torch.randperm(k.shape[0], generator=torch.Generator().manual_seed(5)).to(k.device)
    k, v = (torch.empty_like(pages).index_copy_(0, order, pages) for pages in (k, v))
    table = order.int().view(batch, -1)

    def call():
        return specdec_ops.tree_attention(inputs.q, k, v, inputs.topology, inputs.context_lens, page_table=table)

    return Contestant("specdec_ops paged", "ours", call, reads=(k, v))


def contestants_on_gpu(inputs: Inputs, options) -> list[Contestant]:
    """Everybody who runs on CUDA tensors."""
    first, *others = on_backends(functools.partial(ours, inputs), options)
    listed = [first, ours_paged(inputs), *others]
    listed += [sdpa_packed(inputs), sdpa_packed(inputs, by_head=True)]
    listed.append(Contestant("eager", "pytorch", lambda: eager(inputs), reads=(inputs.k_cache, inputs.v_cache)))
    listed += [*flashinfer_peers.contestants(inputs), *xformers_peer.contestants(inputs)]
    if inputs.case.flex:
        listed.append(flex(inputs, options.flex_seconds))
    return listed


def contestants(inputs: Inputs, options) -> list[Contestant]:
    """Everybody, in the order of the table. `options` is benchmarks.run.Options."""
    if inputs.q.is_cuda:
        return contestants_on_gpu(inputs, options)
    listed = on_backends(functools.partial(ours, inputs), options)
    if inputs.case.path_invariant:
        listed.append(ours_path_invariant(inputs))
    listed += [ours_limited(inputs, isa) for isa in options.isas]
    listed += [sdpa(inputs), sdpa_packed(inputs), ours_head_major(inputs)]
    listed += [sdpa(inputs, by_head=True), sdpa_packed(inputs, by_head=True)]
    listed.append(Contestant("eager", "pytorch", lambda: eager(inputs), reads=(inputs.k_cache, inputs.v_cache)))
    if inputs.case.flex:
        listed.append(flex(inputs, options.flex_seconds))
    listed.append(reader().control(inputs.case.kv_bytes))
    if inputs.case.nodes > 1 and options.preset != "quick":
        listed.append(one_query(inputs))
    return listed
