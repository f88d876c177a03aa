"""`SortedNet`: the first layers of any model of the engine in float32, for autograd, with exits on the way."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from specdec_ops.decode.decoder import Attention, Decoder, Layer, Norm, Projection
from specdec_ops.drafts.weights import dense_weight, make_layer, norms, projections, sizes_of


class _Part(torch.nn.Module):
    """The weight of a projection or a norm, and its bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach().float().clone())
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In the weights' dtype, whatever autocast multiplies in: norms, residuals and losses stay exact."""
        if self.eps is None:
            return functional.linear(x, self.weight, self.bias).to(self.weight.dtype)
        if self.bias is None:
            return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def frozen(self, dtype: torch.dtype) -> Projection | Norm:
        """What the engine runs."""
        weight, bias = (None if some is None else some.detach().clone() for some in (self.weight, self.bias))
        if self.eps is not None:
            return Norm(weight, bias, self.eps)
        return Projection(weight.to(dtype), None if bias is None else bias.to(dtype))


class TrainedLayer(torch.nn.Module):
    """One layer: what `specdec_ops.decode.decoder.Layer` computes, of texts side by side and with gradients."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.attention: Attention = layer.attention
        self.sizes, self._layer = sizes_of(layer), layer
        parts = {name: _Part(dense_weight(part.weight), part.bias) for name, part in projections(layer).items()}
        parts |= {name: _Part(norm.weight, norm.bias, norm.eps) for name, norm in norms(layer).items()}
        self.parts = torch.nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, dim]."""
        attended = self._then("after_attention", self._attend(self.parts["attention_norm"](x)))
        if self._layer.parallel:
            return x + attended + self._mlp(self.parts["mlp_norm"](x))
        x = x + attended
        return x + self._then("after_mlp", self._mlp(self.parts["mlp_norm"](x)))

    def _then(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.parts[name](x) if name in self.parts else x

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        inner, activation = self.parts["up"](x), self._layer.mlp.activation
        if activation == "swiglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = functional.silu(gate) * value
        elif activation == "geglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = functional.gelu(gate, approximate="tanh") * value
        else:
            inner = activation(inner)
        return self.parts["down"](inner)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        of = self.attention
        qkv = self.parts["qkv"](x).unflatten(-1, (of.heads + 2 * of.kv_heads, of.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((of.heads, of.kv_heads, of.kv_heads), dim=1)
        q, k = (self._rotated(self._then(name, some)) for name, some in (("q_norm", q), ("k_norm", k)))
        length = x.shape[1]
        if of.softcap is None and (of.window is None or of.window >= length):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=of.scale, enable_gqa=True)
        else:
            out = self._masked(q, k, v, length)
        return self.parts["out"](out.transpose(1, 2).flatten(2))

    def _masked(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
        """With a window, or a soft cap of the scores."""
        of = self.attention
        k, v = (some.repeat_interleave(of.heads // of.kv_heads, dim=1) for some in (k, v))
        scores = (q @ k.mT).float() * (of.head_dim**-0.5 if of.scale is None else of.scale)
        if of.softcap is not None:
            scores = of.softcap * torch.tanh(scores / of.softcap)
        row = torch.arange(length, device=q.device)
        apart = row[:, None] - row
        seen = (apart >= 0) & (apart < (of.window or length))
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.float()

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, head_dim]: pairs are neighbours if interleaved, else half of what is turned apart."""
        rope = self.attention.rope
        if rope is None:
            return x
        cosines, sines = (table[: x.shape[2]].to(x.device) for table in (rope.cosines, rope.sines))
        pairs, apart = cosines.shape[1], self.attention.interleaved
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        a, b = turned.unflatten(-1, (pairs, 2) if apart else (2, pairs)).unbind(-1 if apart else -2)
        turned = torch.stack((a * cosines - b * sines, b * cosines + a * sines), dim=-1 if apart else -2)
        return torch.cat((turned.flatten(-2), rest), dim=-1)

    def frozen(self, dtype: torch.dtype) -> Layer:
        """What the engine runs."""
        parts = {name: part.frozen(dtype) for name, part in self.parts.items()}
        return make_layer(self.sizes, parts, self.attention.rope)


class SortedNet(torch.nn.Module):
    """A model's first layers and its final norm, which are trained, over its embedding, which is not.

    Args:
        target: any model of the engine. Its weights are where training starts.
        exits: layer counts, ascending: the last one says how many layers there are.
    """

    def __init__(self, target: Decoder, exits: tuple[int, ...]) -> None:
        super().__init__()
        self._target, self.exits = target, exits
        self.layers = torch.nn.ModuleList(TrainedLayer(layer) for layer in target.layers[: exits[-1]])
        self.norm = _Part(target.norm.weight, target.norm.bias, target.norm.eps)

    def forward(self, embedded: torch.Tensor) -> list[torch.Tensor]:
        """Rows after the final norm at each exit, [batch, length, dim], of embeddings [batch, length, dim]."""
        x, found = embedded, []
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if depth in self.exits:
                found.append(self.norm(x))
        return found

    def decoder(self) -> Decoder:
        """The small model: trained layers and norm, embedding and head of the target."""
        target = self._target
        layers = [layer.frozen(target.shape.dtype) for layer in self.layers]
        shape = target.shape._replace(layers=len(layers))
        return dataclasses.replace(target, shape=shape, layers=layers, norm=self.norm.frozen(target.shape.dtype))
