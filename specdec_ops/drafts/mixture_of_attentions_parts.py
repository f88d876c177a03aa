"""`Sizes`: what a draft of Mixture of Attentions is besides its weights."""

from __future__ import annotations

import math
from typing import NamedTuple

from specdec_ops.decode.decoder import Decoder
from specdec_ops.rope import Rope


class Sizes(NamedTuple):
    """Of the draft of a target. Its rotations have the target's base, no scaling, and halves of a head as pairs."""

    stacked: int
    """K and V of a token in one layer of the target"""
    heads: int
    """of self-attention and cross-attention"""
    kv_heads: int
    head_dim: int
    inner: int
    """of the MLPs of self-attention and cross-attention"""
    layer_heads: int
    """of layer self-attention"""
    layer_kv_heads: int
    layer_head_dim: int
    layer_inner: int
    """of its MLP; 0: there is no layer self-attention, and K and V are averaged as they are"""
    target_layers: int
    """how many of the target's last layers end a step of the draft"""
    rope_base: float
    norm_eps: float = 1e-5

    @classmethod
    def of(cls, target: Decoder, *, inner: int, layer_inner: int | None = None, target_layers: int = 0) -> Sizes:
        """For a target: its own heads, and in layer self-attention heads of 64 where K and V have room for them.

        Args:
            target: the model that verifies.
            inner: of the MLPs of self-attention and cross-attention.
            layer_inner: of that of layer self-attention, 0 to have none. None: 3/2 of its rows, as in the paper.
            target_layers: how many of the target's last layers end a step of the draft.
        """
        attention = target.layers[-1].attention
        stacked = 2 * attention.kv_heads * attention.head_dim
        head_dim = math.gcd(stacked, 64)
        heads = stacked // head_dim
        kv_heads = next(count for count in range(max(1, heads // 3), 0, -1) if heads % count == 0)  # 8 of 32 there
        return cls(
            stacked,
            attention.heads,
            attention.kv_heads,
            attention.head_dim,
            inner,
            heads,
            kv_heads,
            head_dim,
            stacked * 3 // 2 if layer_inner is None else layer_inner,
            target_layers,
            base_of(attention.rope),
        )

    def rope(self, positions: int) -> Rope:
        """Over the text."""
        return Rope(self.rope_base, self.head_dim // 2, positions)

    def layer_rope(self, layers: int) -> Rope:
        """Over the layers."""
        return Rope(self.rope_base, self.layer_head_dim // 2, layers)


def base_of(rope: Rope | None) -> float:
    """The base of a rotation without its scaling; 10,000 where it can't be told."""
    if rope is None or rope.pairs < 2 or rope.positions < 2:
        return 1e4
    first, second = (math.atan2(rope.sines[1, pair].item(), rope.cosines[1, pair].item()) for pair in (0, 1))
    return float(f"{(first / second) ** rope.pairs:.4g}")
