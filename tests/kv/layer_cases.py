"""For the tests of LayerCache: a toy transformer with the cache and from scratch, and all that a cache shows."""

from __future__ import annotations

import pytest
import torch

from specdec_ops import LayerCache

VOCAB = 23


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE, rotate-half: x [rows, heads, head_dim], positions [rows]."""
    half = x.shape[-1] // 2
    angles = positions.to(x.dtype)[:, None, None] * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


class Toy:
    """Random weights; grouped heads, so that the caches' kv_heads differ from the queries' heads."""

    def __init__(self, layers: int = 5, dim: int = 24, heads: int = 4, kv_heads: int = 2, head_dim: int = 16):
        generator = torch.Generator().manual_seed(layers * 100 + dim)

        def weight(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self._known: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self.embedding = weight(VOCAB, dim) * dim**0.5
        self.layers = [
            {
                "q": weight(heads * head_dim, dim),
                "k": weight(kv_heads * head_dim, dim),
                "v": weight(kv_heads * head_dim, dim),
                "o": weight(dim, heads * head_dim),
                "mlp": weight(dim, dim),
            }
            for _ in range(layers)
        ]

    def layer(self, index: int, x: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        """One layer on [rows, dim]; `attend(q, k, v)` is the only part that differs between the two forms."""
        w = self.layers[index]
        y = torch.nn.functional.rms_norm(x, x.shape[1:])
        q = rotate((y @ w["q"].T).view(len(x), self.heads, self.head_dim), positions)
        k = rotate((y @ w["k"].T).view(len(x), self.kv_heads, self.head_dim), positions)
        v = (y @ w["v"].T).view(len(x), self.kv_heads, self.head_dim)
        x = x + attend(q, k, v).flatten(1) @ w["o"].T
        return x + torch.tanh(torch.nn.functional.rms_norm(x, x.shape[1:]) @ w["mlp"].T)

    def from_scratch(self, tokens: list[int]) -> list[torch.Tensor]:
        """The last token's hidden row after every layer, by full attention over the whole sequence."""
        known = self._known.get(tuple(tokens))
        if known is None:
            known = self._known[tuple(tokens)] = self._from_scratch(tokens)
        return known

    def _from_scratch(self, tokens: list[int]) -> list[torch.Tensor]:
        def attend(q, k, v):
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            scores = torch.einsum("qhd,shd->hqs", q, k) / self.head_dim**0.5
            future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
            return torch.einsum("hqs,shd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)

        x, positions, rows = self.embedding[tokens], torch.arange(len(tokens)), []
        for index in range(len(self.layers)):
            x = self.layer(index, x, positions, attend)
            rows.append(x[-1])
        return rows

    def cache(self, exits, slots: int, batch: int = 1, **options) -> LayerCache:
        options = {"dtype": torch.float64, "backend": "torch", **options}
        return LayerCache(exits, slots, self.kv_heads, self.head_dim, self.dim, batch=batch, **options)

    def step(self, cache: LayerCache, group: int, **options) -> torch.Tensor:
        """One group of layers over all that is pending at its entry; the newest rows."""
        run = cache.run(group, **options)
        hidden = run.hidden
        for index in cache.layers(group):
            hidden = self.layer(
                index, hidden, run.positions, lambda q, k, v, index=index: cache.attend(run, index, q, k, v)
            )
        return cache.finish(run, hidden)


def shown(cache: LayerCache) -> tuple[tuple, list[torch.Tensor]]:
    """The cache's state, and a copy of all of its memory that the state shows."""
    state, tensors = cache._state, []
    for request in range(cache.batch):
        for group in range(cache.groups):
            tensors.append(cache.pending(group, request)[1])
            layers, length = cache.layers(group), state.lengths[group + 1][request]
            for caches in (cache.k_caches, cache.v_caches):
                tensors.append(caches[layers.start : layers.stop, request, :length])
        if state.contexts[request] is not None:
            tensors.append(cache._tables.parents[request, state.contexts[request] : state.lengths[0][request]])
    if state.run is not None:
        tensors.append(state.run.hidden)
    return state, [tensor.clone() for tensor in tensors]


def assert_shows(cache: LayerCache, before: tuple[tuple, list[torch.Tensor]]) -> None:
    """Nothing that it showed has changed, the open run included."""
    state, tensors = shown(cache)
    assert state == before[0]
    assert all(torch.equal(now, then) for now, then in zip(tensors, before[1], strict=True))
    assert not any(tensor.requires_grad for tensor in (cache._hidden, cache.k_caches, cache.v_caches))


def refused(cache: LayerCache, call, message: str = "") -> None:
    """`call()` raises one sentence of the cache's, and nothing is lost."""
    before = shown(cache)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="^specdec_ops.LayerCache: " + message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1 and not str(caught.value).endswith(".")
    assert_shows(cache, before)
