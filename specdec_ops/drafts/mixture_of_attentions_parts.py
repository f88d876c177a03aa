"""The parts of a draft of Mixture of Attentions: `Sizes`, `Parts`, and how its three attentions run on the ops.

A layer of the engine runs over whatever has `append` and `attend`. For layer self-attention that is `_OverLayers`: the
layers of a token are the rows of a text, and all see each other. Cross-attention has queries of one row and keys and
values of another, so it is `Crossing`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from specdec_ops.decode.cache import Cache
from specdec_ops.decode.decoder import Attention, Decoder, Layer, Mlp, Norm, Projection
from specdec_ops.decode.rows import Rows, Shape
from specdec_ops.ops.attention.tree_attention import tree_attention
from specdec_ops.ops.kv.kv_append import kv_append
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight, quantize_linear
from specdec_ops.rope import Rope

BLOCKS = ("layer_attention", "self_attention", "cross_attention")
_PROJECTIONS = ("qkv", "out", "up", "down")
_NORMS = ("attention_norm", "mlp_norm")
_TOKENS = 64  # whose layers are attended at once


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


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A draft's weights, as the engine runs them.

    Attributes:
        sizes: of all.
        layer_attention: over the layers, rows of `stacked` numbers; None if there is none.
        join: [dim, stacked] with a bias: makes a state of the mean over the layers.
        self_attention: over the tokens of a text.
        cross_attention: its q is of rows that have been through self-attention, its k and v of states.
    """

    sizes: Sizes
    layer_attention: Layer | None
    join: Projection
    self_attention: Layer
    cross_attention: Layer

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], sizes: Sizes, shape: Shape) -> Parts:
        """Of tensors by name, for a target of a shape.

        Args:
            tensors: join and join_bias; of each block, such as self_attention, the weights self_attention.qkv, out, up
                and down, the norms attention_norm and mlp_norm, and of those in int8 the scales, qkv.scales and so on.
            sizes: of the draft.
            shape: of the target.
        """

        def projection(name: str, bias: torch.Tensor | None = None) -> Projection:
            weight = tensors[name].detach().to(shape.device)
            if f"{name}.scales" in tensors:
                weight = QuantizedWeight(weight, tensors[f"{name}.scales"].to(shape.device))
            elif shape.dtype != torch.float32:
                weight = weight.to(shape.dtype)
            return Projection(weight, bias)

        def layer(block: str, heads: int, kv_heads: int, head_dim: int, rope: Rope) -> Layer:
            qkv, out, up, down = (projection(f"{block}.{name}") for name in _PROJECTIONS)
            attention_norm, mlp_norm = (
                Norm(tensors[f"{block}.{name}"].detach().to(shape.device, torch.float32), None, sizes.norm_eps)
                for name in _NORMS
            )
            attention = Attention(qkv, out, heads, kv_heads, head_dim, rope.to(shape.device))
            return Layer(attention_norm, attention, mlp_norm, Mlp(up, down, "swiglu"))

        over_layers = None
        if sizes.layer_inner:
            heads = (sizes.layer_heads, sizes.layer_kv_heads, sizes.layer_head_dim)
            over_layers = layer("layer_attention", *heads, sizes.layer_rope(shape.layers))
        own = (sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.rope(shape.max_positions))
        bias = tensors["join_bias"].detach().to(shape.device, shape.dtype)
        return cls(
            sizes, over_layers, projection("join", bias), layer("self_attention", *own), layer("cross_attention", *own)
        )

    def tensors(self, form: str) -> dict[str, torch.Tensor]:
        """By name, as `of` takes them; weights in "int8", "bfloat16" or "float32" unless they are in int8 already."""
        found = {"join_bias": self.join.bias.float()}

        def keep(name: str, weight) -> None:
            if form == "int8" and isinstance(weight, torch.Tensor):
                weight = quantize_linear(weight)
            if isinstance(weight, QuantizedWeight):
                found.update({name: weight.values, f"{name}.scales": weight.scales})
            else:
                found[name] = weight.to(getattr(torch, form))

        keep("join", self.join.weight)
        for block in BLOCKS:
            layer = getattr(self, block)
            if layer is None:
                continue
            projections = (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down)
            for name, projection in zip(_PROJECTIONS, projections, strict=True):
                keep(f"{block}.{name}", projection.weight)
            for name in _NORMS:
                found[f"{block}.{name}"] = getattr(layer, name).weight
        return found

    @property
    def dim(self) -> int:
        """Of the target that they are for."""
        return len(self.self_attention.attention_norm.weight)

    def states(self, stacked: torch.Tensor) -> torch.Tensor:
        """[tokens, dim] of keys and values [tokens, layers, stacked]."""
        if self.layer_attention is None:
            return self.join(_mean_of_layers(stacked))
        parts = stacked.split(_TOKENS)
        return self.join(torch.cat([_mean_of_layers(self._attend_layers(part)) for part in parts]))

    def _attend_layers(self, stacked: torch.Tensor) -> torch.Tensor:
        tokens, layers, width = stacked.shape
        rows = Rows(torch.zeros(tokens, layers, dtype=torch.int32), None, None, None)
        x = stacked.reshape(tokens * layers, width)
        return self.layer_attention(x, 0, rows, _OverLayers()).view(stacked.shape)

    def crossing(self) -> Crossing:
        """Cross-attention, at work."""
        return Crossing(self.cross_attention)


def _mean_of_layers(stacked: torch.Tensor) -> torch.Tensor:
    """[tokens, width] of [tokens, layers, width], added one after another: the same whatever tokens are beside."""
    total = stacked[:, 0].float()
    for layer in range(1, stacked.shape[1]):
        total = total + stacked[:, layer]
    return (total / stacked.shape[1]).to(stacked.dtype)


class _OverLayers:
    """In place of a cache: the layers of each token, which stand at positions from 0 on and see all others."""

    def append(self, index: int, rows: Rows, q, k, v, rope: Rope, interleaved: bool) -> None:
        """Rotate k and q, and keep k and v."""
        self._keys, self._values = (torch.empty_like(some, memory_format=torch.contiguous_format) for some in (k, v))
        kv_append(k, v, self._keys, self._values, None, 0, q=q, q_out=q, rope=rope, interleaved=interleaved)

    def attend(self, index: int, rows: Rows, q, scale, window, softcap, sinks) -> torch.Tensor:
        """[tokens, layers, heads, head_dim]."""
        return tree_attention(q, self._keys, self._values, None, self._keys.shape[1])


class Crossing:
    """Cross-attention: rows ask, and the target's states, whose keys and values are in a cache, answer."""

    def __init__(self, layer: Layer) -> None:
        of = layer.attention
        self._layer, self._heads, self._head_dim, self.rope = layer, of.heads, of.head_dim, of.rope
        rows = of.heads * of.head_dim
        self._queries, self._known = (Projection(weight) for weight in _split(of.qkv.weight, rows))

    def keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, kv_heads, head_dim] each, not rotated, of states [tokens, dim]."""
        return self._known(states, self._layer.attention_norm).unflatten(1, (-1, self._head_dim)).chunk(2, dim=1)

    def __call__(self, x: torch.Tensor, rows: Rows, known: torch.Tensor, cache: Cache, index: int) -> torch.Tensor:
        """Rows [rows, dim], through the layer. Each sees all of `known` [batch] states, wherever it stands itself."""
        layer = self._layer
        q = self._queries(x, layer.attention_norm).view(-1, self._heads, self._head_dim)
        q = _rotated(q, rows.positions(), self.rope).view(*rows.tokens.shape, self._heads, self._head_dim)
        keys, values = cache.k_caches[index], cache.v_caches[index]
        attended = tree_attention(q, keys, values, None, known, page_table=rows.page_table)
        x = layer.attention.out(attended.reshape(len(x), -1), residual=x)
        return layer.mlp(x, layer.mlp_norm, x)


def _rotated(q: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """[rows, heads, head_dim], which have no keys that `kv_append` would write beside them."""
    positions = positions.clamp(0, rope.positions - 1)
    cosines, sines = (table[positions][:, None] for table in (rope.cosines, rope.sines))
    a, b = q.float().chunk(2, dim=-1)
    return torch.cat((a * cosines - b * sines, b * cosines + a * sines), dim=-1).to(q.dtype)


def _split(weight: torch.Tensor | QuantizedWeight, rows: int) -> tuple:
    """The first rows of a weight, and the others."""
    if isinstance(weight, QuantizedWeight):
        values, scales = weight.values, weight.scales
        return QuantizedWeight(values[:rows], scales[:rows]), QuantizedWeight(values[rows:], scales[rows:])
    return weight[:rows], weight[rows:]
