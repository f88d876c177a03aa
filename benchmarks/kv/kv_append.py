"""kv_append: inputs, the exact result, and the contestants."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import specdec_ops
from benchmarks.harness import rounding
from benchmarks.harness.contestant import Contestant, Expected, allowed_error, compiled, largest_error, on_backends
from benchmarks.harness.inputs import DTYPES, fill_random
from benchmarks.harness.reading import reader

from .append_cases import AppendCase

THETA = 5e5


@dataclass
class Appended:
    """k, v [1, nodes, kv_heads, dim], q [1, nodes, heads, dim]; positions and slots [nodes], as PyTorch wants them.

    cosines, sines: [1, nodes, dim] in the dtype of the rows, both halves alike: transformers makes them once for all
    layers of a pass, before anybody's clock starts.
    """

    case: AppendCase
    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    topology: specdec_ops.Topology
    context_lens: torch.Tensor
    rope: specdec_ops.Rope
    positions: torch.Tensor
    slots: torch.Tensor
    cosines: torch.Tensor
    sines: torch.Tensor

    def caches(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of K and of V, [1, slots, kv_heads, dim], in which an unwritten element shows."""
        shape = (1, self.case.context + self.case.nodes, *self.k.shape[2:])
        k, v = (torch.full(shape, float("nan"), dtype=dtype or self.k.dtype, device=self.k.device) for _ in range(2))
        return k, v


def make_inputs(case: AppendCase, device: str = "cpu") -> Appended:
    dtype, model, nodes = DTYPES[case.dtype], case.model, case.nodes
    heads = {"k": model.kv_heads, "v": model.kv_heads, "q": model.heads}
    rows = {
        name: fill_random((1, nodes, count, model.dim), dtype, seed).to(device)
        for seed, (name, count) in enumerate(heads.items())
    }
    tree = specdec_ops.Tree.from_parents(case.tree.parents)
    rope = specdec_ops.Rope(THETA, model.dim // 2, case.context + nodes, device=device)
    positions = case.context + torch.from_numpy(tree.depths.copy()).long().to(device)
    tables = (table[positions].to(dtype).repeat(1, 2)[None] for table in (rope.cosines, rope.sines))
    slots = torch.arange(case.context, case.context + nodes, device=device)
    context_lens = torch.tensor([case.context], dtype=torch.int32, device=device)
    return Appended(case, *rows.values(), tree.to(device), context_lens, rope, positions, slots, *tables)


def ours(inputs: Appended, backend: str, name: str) -> Contestant:
    caches = inputs.caches()
    q_out = torch.empty_like(inputs.q)
    new = tuple(cache[:, inputs.case.context :] for cache in caches)

    def call():
        i = inputs
        specdec_ops.kv_append(
            i.k, i.v, *caches, i.topology, i.context_lens, q=i.q, rope=i.rope, q_out=q_out, backend=backend
        )
        return q_out, *new

    return Contestant(name, "ours", call)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotated(inputs: Appended) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V [1, heads, nodes, dim], the code of transformers' models."""
    q, k, v = (rows.transpose(1, 2) for rows in (inputs.q, inputs.k, inputs.v))
    cosines, sines = inputs.cosines[:, None], inputs.sines[:, None]
    return q * cosines + rotate_half(q) * sines, k * cosines + rotate_half(k) * sines, v


def into_static_cache(inputs: Appended, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As transformers' StaticCache does it."""
    q, k, v = rotated(inputs)
    k_cache.index_copy_(2, inputs.slots, k)
    v_cache.index_copy_(2, inputs.slots, v)
    return q, k_cache, v_cache


def put_into_slots(inputs: Appended, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same with index_put_ of the rows of all heads."""
    q, k, v = rotated(inputs)
    k_cache.transpose(1, 2).index_put_((torch.zeros_like(inputs.slots), inputs.slots), k.transpose(1, 2)[0])
    v_cache.transpose(1, 2).index_put_((torch.zeros_like(inputs.slots), inputs.slots), v.transpose(1, 2)[0])
    return q, k_cache, v_cache


def onto_dynamic_cache(inputs: Appended, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As transformers' DynamicCache does it: the context is copied, too."""
    q, k, v = rotated(inputs)
    context = inputs.case.context
    return q, torch.cat((k_cache[:, :, :context], k), dim=2), torch.cat((v_cache[:, :, :context], v), dim=2)


def expected(inputs: Appended) -> Expected:
    """The queries, and the new rows of K and V: [1, nodes, heads, dim]."""
    caches = inputs.caches(torch.float64)
    q = specdec_ops.kv_append(
        inputs.k.double(),
        inputs.v.double(),
        *caches,
        inputs.topology,
        inputs.context_lens,
        q=inputs.q.double(),
        rope=inputs.rope,
        backend="torch",
    )
    exact = [q, *(cache[:, inputs.case.context :] for cache in caches)]
    plain = new_rows(inputs, into_static_cache(inputs, *(c.transpose(1, 2) for c in inputs.caches())))
    errors = [largest_error(*both) for both in zip(plain, exact, strict=True)]
    bounds = [rounding_bound(inputs, inputs.q), rounding_bound(inputs, inputs.k), torch.zeros_like(exact[2])]
    allowed = [allowed_error(*each) for each in zip(exact, errors, bounds, strict=True)]
    return Expected(list, exact, allowed)


def new_rows(inputs: Appended, result: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What PyTorch's forms return, heads before rows, as ours."""
    q, k, v = (part.transpose(1, 2) for part in result)
    return [q, k[:, inputs.case.context :], v[:, inputs.case.context :]]


def rounding_bound(inputs: Appended, rows: torch.Tensor) -> torch.Tensor:
    """One rotation in float32 and one rounding."""
    cosines, sines = (table[inputs.positions][:, None].double() for table in (inputs.rope.cosines, inputs.rope.sines))
    first, second = rows.double().chunk(2, dim=-1)
    nothing = torch.zeros_like(first)
    turned = [
        rounding.rotated(*parts, cosines, sines, nothing, nothing, rows.dtype)
        for parts in ((first, second), (second, first))
    ]
    return torch.cat(turned, dim=-1)


def contestants(inputs: Appended, options) -> list[Contestant]:
    listed = on_backends(functools.partial(ours, inputs), options)
    forms = [("eager", into_static_cache), ("index_put", put_into_slots), ("dynamic", onto_dynamic_cache)]
    if inputs.case.compiled:
        forms.append(("compiled", compiled(into_static_cache)))
    for name, form in forms:
        caches = [cache.transpose(1, 2).contiguous() for cache in inputs.caches()]
        call = lambda form=form, caches=caches: form(inputs, *caches)  # noqa: E731
        listed.append(Contestant(name, "pytorch", call, functools.partial(new_rows, inputs)))
    return [*listed, reader().control(inputs.case.bytes)] if inputs.q.device.type == "cpu" else listed
