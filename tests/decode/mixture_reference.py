"""One row of a draft of Mixture of Attentions, from the paper's equations, in float64 and one head at a time."""

import torch

from specdec_ops.decode.decoder import Decoder
from specdec_ops.train.mixture_of_attentions_net import Block, Net


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(head: torch.Tensor, position: int, base: float) -> torch.Tensor:
    """A head [head_dim] at a position: element p and element p + head_dim / 2 are a pair."""
    pairs = len(head) // 2
    angles = position * base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    a, b = head[:pairs], head[pairs:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()))


def heads_of(x: torch.Tensor, block: Block, head_dim: int) -> list[torch.Tensor]:
    """q, k and v of rows [rows, dim]: [rows, heads, head_dim] each."""
    return (x @ block.qkv.T).unflatten(-1, (-1, head_dim)).split((block.heads, block.kv_heads, block.kv_heads), dim=1)


def attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """One query [heads, head_dim] over keys [kv_heads, head_dim] that are turned already, as [heads * head_dim]."""
    heads, head_dim = q.shape
    if not keys:
        return q.new_zeros(heads * head_dim)
    group, out = heads // keys[0].shape[0], []
    for head in range(heads):
        scores = torch.stack([q[head] @ key[head // group] for key in keys]) / head_dim**0.5
        out.append((scores.softmax(0)[:, None] * torch.stack([value[head // group] for value in values])).sum(0))
    return torch.cat(out)


def after(x: torch.Tensor, attended: torch.Tensor, block: Block, eps: float) -> torch.Tensor:
    """The row after a layer, of the row before it and what its heads have attended to."""
    x = x + block.out @ attended
    gate, value = (block.up @ normed(x, block.mlp_norm, eps)).chunk(2)
    return x + block.down @ (gate / (1 + (-gate).exp()) * value)


def all_turned(heads: torch.Tensor, position: int, base: float) -> torch.Tensor:
    return torch.stack([turned(head, position, base) for head in heads])


class Reference:
    """A draft of one text as it grows: what the target has verified, and tokens.

    Args:
        net: in float64.
        target: in float32; what is wanted of it is computed in float64.
    """

    def __init__(self, net: Net, target: Decoder) -> None:
        self.net, self.target, self.sizes = net, target, net.sizes
        self.keys: list[torch.Tensor] = []  # of the target's states
        self.values: list[torch.Tensor] = []

    def state(self, stacked: torch.Tensor) -> torch.Tensor:
        """[dim]: layer self-attention over [layers, stacked], the mean and the projection."""
        sizes, net = self.sizes, self.net
        rows = stacked.double()
        if sizes.layer_inner:
            block, base = net.layer_attention, sizes.rope_base
            q, k, v = heads_of(normed(rows, block.attention_norm, sizes.norm_eps), block, sizes.layer_head_dim)
            keys = [all_turned(k[layer], layer, base) for layer in range(len(rows))]
            rows = torch.stack(
                [
                    after(row, attend(all_turned(q[layer], layer, base), keys, list(v)), block, sizes.norm_eps)
                    for layer, row in enumerate(rows)
                ]
            )
        return net.join @ rows.mean(0) + net.join_bias

    def verify(self, stacked: torch.Tensor) -> None:
        """The target has run one more token: its keys and values, [layers, stacked]."""
        block, sizes, position = self.net.cross_attention, self.sizes, len(self.keys)
        state = normed(self.state(stacked)[None], block.attention_norm, sizes.norm_eps)
        _, k, v = heads_of(state, block, sizes.head_dim)
        self.keys.append(all_turned(k[0], position, sizes.rope_base))
        self.values.append(v[0])

    def row(self, tokens: list[int], verified: int) -> torch.Tensor:
        """[dim]: what cross-attention makes of the last token, of which the target has run the first `verified`."""
        sizes, block, position = self.sizes, self.net.self_attention, len(tokens) - 1
        x = self.target.embedding[tokens].double()
        q, k, v = heads_of(normed(x, block.attention_norm, sizes.norm_eps), block, sizes.head_dim)
        keys = [all_turned(some, place, sizes.rope_base) for place, some in enumerate(k)]
        query = all_turned(q[-1], position, sizes.rope_base)
        x = after(x[-1], attend(query, keys, list(v)), block, sizes.norm_eps)
        block = self.net.cross_attention
        q = heads_of(normed(x[None], block.attention_norm, sizes.norm_eps), block, sizes.head_dim)[0][0]
        query = all_turned(q, position, sizes.rope_base)
        return after(x, attend(query, self.keys[:verified], self.values[:verified]), block, sizes.norm_eps)
