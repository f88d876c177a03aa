"""A toy transformer for the tests of LayerCache: once with the cache, once from scratch with a causal mask."""

from __future__ import annotations

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
