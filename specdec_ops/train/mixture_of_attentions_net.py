"""`Net`: the draft of Mixture of Attentions for autograd, with masks that show each row what it sees when it drafts.

Shapes are `[batch, length, dim]`; a batch has texts side by side. It runs in the dtype of its parameters: float32 to
train, float64 to be compared with. Products are in bfloat16 where autocast says so; norms and residuals never are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn import functional

from specdec_ops import drafts
from specdec_ops.decode.decoder import Decoder, Layer
from specdec_ops.drafts.mixture_of_attentions_parts import Parts, Sizes
from specdec_ops.rope import Rope

from .sorted_net import TrainedLayer

RIDGE = 1e-3  # of each square, for `Net.fit`
_SAME = 4.8  # of each element of q and k: scores then are about -8 times the logarithm of the distance
_TOKENS = 128  # whose layers are attended at once, so that their rows stay in the processor's cache


class Masks(NamedTuple):
    """What rows of texts see, bool [batch, length, length]: row i of a matrix sees the positions that are true in it.

    `verified`: the target's states. `drafted`: tokens after those, up to its own. `text`: tokens, of self-attention.
    """

    verified: torch.Tensor
    drafted: torch.Tensor
    text: torch.Tensor


def refresh_starts(length: int, prompt: int, every: int, offset: int = 0) -> torch.Tensor:
    """int64 [length]: the last position before each row whose target state is known in its round; -1: none is.

    All positions of the prompt are refresh points, and behind it those of which `position - offset` is a multiple of
    `every`. A row goes on from the last refresh point before it: the target has run that token and no later one. (In
    the authors' code a row that is a refresh point also sees its own state, which no row does that drafts, and such
    rows count in the loss. Here there are none.)
    """
    position = torch.arange(length)
    is_refresh = (position < prompt) | ((position - offset) % every == 0)
    last = torch.where(is_refresh, position, -1).cummax(0).values
    return functional.pad(last, (1, 0), value=-1)[:-1]


def masks(starts: torch.Tensor, is_staircase: torch.Tensor) -> Masks:
    """What rows see that go on from `starts`.

    Args:
        starts: int64 [batch, length], see `refresh_starts`.
        is_staircase: bool [batch]: texts whose self-attention only sees tokens that are not verified yet. That makes
            cross-attention learn early; when a text is drafted, self-attention sees all of it.
    """
    position = torch.arange(starts.shape[1])
    before_row = position <= position[:, None]
    verified = position <= starts[:, :, None]
    drafted = before_row & ~verified
    return Masks(verified & before_row, drafted, torch.where(is_staircase[:, None, None], drafted, before_row))


class Made(NamedTuple):
    """What the draft makes of a batch, [batch, length, dim] each."""

    crossed: torch.Tensor
    """after cross-attention: the target's last rows after their norm, or what enters its last layers"""
    features: torch.Tensor
    """what the target's head makes logits of"""


class Block(torch.nn.Module):
    """The weights of one layer: attention and a gated MLP, each after an RMSNorm."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, inner: int) -> None:
        super().__init__()

        def start(out: int, columns: int, scale: float = 1.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(scale * torch.randn(out, columns) / columns**0.5)

        self.heads, self.kv_heads = heads, kv_heads
        self.attention_norm, self.mlp_norm = (torch.nn.Parameter(torch.ones(dim)) for _ in range(2))
        self.qkv = start((heads + 2 * kv_heads) * head_dim, dim)
        self.out = start(dim, heads * head_dim, 0.1)
        self.up, self.down = start(2 * inner, dim), start(dim, inner, 0.1)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v, [batch, heads, length, head_dim] each."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return qkv.unflatten(-1, (sum(heads), -1)).transpose(1, 2).split(heads, dim=1)

    @torch.no_grad()
    def look_at_newest(
        self, asking: torch.Tensor, known: torch.Tensor, map_of_known: torch.Tensor, squares: torch.Tensor
    ) -> None:
        """Let heads attend to the newest position, and add there what a map makes of its row.

        A direction in which all rows have nearly the same length gives q and k a part that is the same everywhere.
        Rotations then make scores fall with the logarithm of the distance, in the first head of each group the fastest.

        Args:
            asking: [rows, dim], normed rows that q is of.
            known: [rows, dim], normed rows that k and v are of.
            map_of_known: [dim, dim]; what the values have room for of it is added.
            squares: [dim, dim], of the rows in `known`.
        """
        heads, groups = self.heads, self.kv_heads
        head_dim = self.out.shape[1] // heads
        q, k, v = self.qkv.split((heads * head_dim, groups * head_dim, groups * head_dim))
        pairs = head_dim // 2
        for weight, rows in ((q, asking), (k, known)):
            same, _ = _solved(rows, torch.ones(len(rows), 1, dtype=rows.dtype))
            weight *= 0.3
            weight.unflatten(0, (-1, head_dim))[:, :pairs] += _SAME * same
        for place, head in enumerate(q.unflatten(0, (groups, -1, head_dim)).unbind(1)):
            head *= 0.5**place
        root, turn = _root(squares)
        u, sizes, w = torch.linalg.svd(map_of_known @ root)
        rank = min(groups * head_dim, len(sizes))
        v.zero_()
        v[:rank] = (w[:rank] @ turn) * sizes[:rank, None].sqrt()
        first = torch.zeros(len(u), groups * head_dim)
        first[:, :rank] = u[:, :rank] * sizes[:rank].sqrt()
        self.out.unflatten(1, (groups, -1, head_dim))[:, :, 0] = first.unflatten(1, (groups, head_dim))

    def finish(self, x: torch.Tensor, attended: torch.Tensor, eps: float) -> torch.Tensor:
        """The rows after the layer, of rows before it and what their heads have attended to."""
        x = x + _product(attended.transpose(1, 2).flatten(2), self.out)
        gate, value = _product(_normed(x, self.mlp_norm, eps), self.up).chunk(2, dim=-1)
        return x + _product(functional.silu(gate) * value, self.down)


class Net(torch.nn.Module):
    """Layer self-attention, self-attention and cross-attention, and the target's last layers behind them.

    Args:
        target: whose sizes it has.
        sizes: of the draft.
    """

    def __init__(self, target: Decoder, sizes: Sizes) -> None:
        super().__init__()
        shape, self.sizes = target.shape, sizes
        self._layers = shape.layers
        stacked = sizes.stacked
        if sizes.layer_inner:
            heads = (sizes.layer_heads, sizes.layer_kv_heads, sizes.layer_head_dim)
            self.layer_attention = Block(stacked, *heads, sizes.layer_inner)
        self.join = torch.nn.Parameter(torch.randn(shape.dim, stacked) / stacked**0.5)
        self.join_bias = torch.nn.Parameter(torch.zeros(shape.dim))
        own = (shape.dim, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.inner)
        self.self_attention, self.cross_attention = Block(*own), Block(*own)
        self._rope = sizes.rope(shape.max_positions)
        self._layer_rope = sizes.layer_rope(shape.layers) if sizes.layer_inner else None
        last = target.layers[shape.layers - sizes.target_layers :]
        self._last = torch.nn.ModuleList(map(TargetLayer, last))
        self._norm = target.norm
        self._last.requires_grad_(False)

    @torch.no_grad()
    def fit(self, texts: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Start from the best linear map, as far as the ranks of values allow.

        Columns of K and V get one size, and `join` tells the target's row from their mean over the layers. Heads look
        at the newest position that they see: at the token itself, and at the last verified state. Their values then
        tell the target's next row. Without this, hundreds of steps pass before cross-attention is of any use.

        Args:
            texts: keys and values [length, layers, stacked], embeddings [length, dim] and features [length, dim].
        """
        means, embedded, features, square = [], [], [], 0.0
        for stacked, *others in texts:
            means.append(functional.pad(stacked.float().mean(1), (0, 1), value=1.0))
            square = square + stacked.float().square().mean(1).sum(0)
            for kept, rows in zip((embedded, features), others, strict=True):
                kept.append(rows.float())
        following, features = torch.cat([rows[1:] for rows in features]), torch.cat(features)
        solved, _ = _solved(torch.cat(means), features)
        self.join.copy_(solved[:, :-1])
        self.join_bias.copy_(solved[:, -1])
        if self.sizes.layer_inner:
            square = (square / len(features)).clamp(min=1e-12)
            for norm in (self.layer_attention.attention_norm, self.layer_attention.mlp_norm):
                norm.copy_((square.mean() / square).sqrt())
            for weight in (self.layer_attention.out, self.layer_attention.down):
                weight.zero_()
        eps, ones = self.sizes.norm_eps, self.cross_attention.attention_norm
        states = torch.cat([_normed(functional.linear(mean, solved), ones, eps)[:-1] for mean in means])
        embedded = torch.cat([rows[1:] for rows in embedded])
        tokens = _normed(embedded, ones, eps)
        both, squares = _solved(torch.cat((tokens, states), dim=1), following - embedded)
        of_tokens, of_states = both.chunk(2, dim=1)
        dim = len(ones)
        self.self_attention.look_at_newest(tokens, tokens, of_tokens, squares[:dim, :dim])
        asking = _normed(embedded + tokens @ of_tokens.T, ones, eps)
        self.cross_attention.look_at_newest(asking, states, of_states, squares[dim:, dim:])

    def states(self, stacked: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """[batch, length, dim]: the target's states of tokens, of keys and values of all its layers.

        Args:
            stacked: [batch, length, layers, stacked], as `gather_layer_kv` gives them.
            share: of tokens that layer self-attention learns from. It runs over as many rows as the target has layers
                for each token, and most of a step's time is its.
        """
        batch, length, *_ = stacked.shape
        rows = stacked.flatten(0, 1)
        if self.sizes.layer_inner:
            parts = []
            for part in rows.split(_TOKENS):
                with torch.set_grad_enabled(torch.is_grad_enabled() and (share >= 1 or torch.rand(()).item() < share)):
                    parts.append(self._attend_layers(part.to(self.join.dtype)).mean(1))
            joined = torch.cat(parts)
        else:
            joined = rows.to(self.join.dtype).mean(1)
        return _product(joined, self.join, self.join_bias).unflatten(0, (batch, length))

    def _attend_layers(self, x: torch.Tensor) -> torch.Tensor:
        block, eps = self.layer_attention, self.sizes.norm_eps
        q, k, v = block.split(_product(_normed(x, block.attention_norm, eps), block.qkv))
        q, k = (rotated(some, self._layer_rope) for some in (q, k))
        return block.finish(x, _attended(q, k, v), eps)

    def attend_text(self, embedded: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Self-attention over tokens: rows [batch, length, dim] of embeddings, see `Masks.text`."""
        block, eps = self.self_attention, self.sizes.norm_eps
        q, k, v = block.split(_product(_normed(embedded, block.attention_norm, eps), block.qkv))
        q, k = (rotated(some, self._rope) for some in (q, k))
        return block.finish(embedded, _attended(q, k, v, seen), eps)

    def attend_states(self, x: torch.Tensor, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Cross-attention of rows over the target's states, see `Masks.verified`. A row that sees none gets none."""
        block, eps = self.cross_attention, self.sizes.norm_eps
        queries = block.qkv.shape[0] * block.heads // (block.heads + 2 * block.kv_heads)
        q = _product(_normed(x, block.attention_norm, eps), block.qkv[:queries])
        kv = _product(_normed(states, block.attention_norm, eps), block.qkv[queries:])
        q = q.unflatten(-1, (block.heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2 * block.kv_heads, -1)).transpose(1, 2).chunk(2, dim=1)
        q, k = (rotated(some, self._rope) for some in (q, k))
        return block.finish(x, _attended(q, k, v, seen), eps)

    def forward(
        self, embedded: torch.Tensor, states: torch.Tensor, seen: Masks, stacked: torch.Tensor | None = None
    ) -> Made:
        """The draft's rows over texts.

        Args:
            embedded: [batch, length, dim] of tokens.
            states: like embedded, what `states` has made.
            seen: what rows see.
            stacked: keys and values, for the target's last layers if the draft uses any.
        """
        crossed = self.attend_states(self.attend_text(embedded, seen.text), states, seen.verified)
        x = crossed
        for place, layer in enumerate(self._last):
            x = layer(x, stacked[:, :, self._layers - len(self._last) + place].to(x.dtype), seen)
        return Made(crossed, self.target_norm(x) if self._last else x)

    def target_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The target's final norm."""
        weight, bias, eps = self._norm
        weight = weight.to(x.dtype)
        if bias is None:
            return functional.rms_norm(x, x.shape[-1:], weight, eps)
        return functional.layer_norm(x, x.shape[-1:], weight, bias.to(x.dtype), eps)

    def draft(self, target: Decoder, hot_vocab: torch.Tensor | None, **options) -> drafts.MixtureOfAttentions:
        """What it has learned so far, as a draft."""
        learned = {name: each.detach().float().clone() for name, each in self.named_parameters() if each.requires_grad}
        return drafts.MixtureOfAttentions(Parts.of(learned, self.sizes, target.shape), hot_vocab, **options)


class TargetLayer(TrainedLayer):
    """One of the target's last layers, which is not trained.

    Its rows are the draft's. Of verified tokens they see the target's own keys and values, of later ones theirs.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._stacked = self._seen = None

    def forward(self, x: torch.Tensor, stacked: torch.Tensor, seen: Masks) -> torch.Tensor:
        """[batch, length, dim]; stacked is [batch, length, stacked] of this layer."""
        self._stacked, self._seen = stacked, seen
        try:
            return super().forward(x)
        finally:
            self._stacked = self._seen = None

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        of = self.attention
        qkv = self.parts["qkv"](x).unflatten(-1, (of.heads + 2 * of.kv_heads, of.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((of.heads, of.kv_heads, of.kv_heads), dim=1)
        q, k = (self._rotated(self._then(name, some)) for name, some in (("q_norm", q), ("k_norm", k)))
        known_k, known_v = self._stacked.unflatten(-1, (of.kv_heads, 2, of.head_dim)).transpose(1, 2).unbind(3)
        k, v = (torch.cat((known, own), dim=2) for known, own in ((known_k, k), (known_v, v)))
        seen = torch.cat((self._seen.verified, self._seen.drafted), dim=2)
        if of.window is not None:
            position = torch.arange(x.shape[1])
            near = position[:, None] - position < of.window
            seen = seen & torch.cat((near, near), dim=1)
        k, v = (some.repeat_interleave(of.heads // of.kv_heads, dim=1) for some in (k, v))
        scores = (q @ k.mT).to(x.dtype) * (of.head_dim**-0.5 if of.scale is None else of.scale)
        if of.softcap is not None:
            scores = of.softcap * torch.tanh(scores / of.softcap)
        out = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v.to(x.dtype)
        return self.parts["out"](out.transpose(1, 2).flatten(2))


def _solved(given: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear map [wanted, given] that is nearest to rows, and the mean squares of what is given."""
    squares, products = given.T @ given / len(given), given.T @ wanted / len(given)
    squares += RIDGE * squares.diagonal().clamp(min=1e-6).diag()
    return torch.linalg.solve(squares, products).T, squares


def _root(squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of a positive matrix, and its inverse."""
    sizes, vectors = torch.linalg.eigh(squares)
    sizes = sizes.clamp(min=1e-6 * sizes.max()).sqrt()
    return vectors * sizes @ vectors.T, vectors / sizes @ vectors.T


def rotated(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """[batch, heads, length, head_dim] of positions from 0 on: halves of a head are pairs."""
    cosines, sines = (table[: x.shape[2]].to(x.dtype) for table in (rope.cosines, rope.sines))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosines - b * sines, b * cosines + a * sines), dim=-1)


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """[batch, heads, length, head_dim]; zeros for rows that see nothing.

    Written out: for the few layers of a token PyTorch's fused attention takes eight times as long, most of it backward.
    """
    length, groups = q.shape[2], (k.shape[1], -1)
    with torch.autocast("cpu", enabled=False):
        scores = (q * q.shape[-1] ** -0.5).unflatten(1, groups).flatten(2, 3) @ k.mT
        if seen is None:
            return (scores.softmax(-1) @ v).unflatten(2, (-1, length)).flatten(1, 2)
        sees = seen.any(dim=-1, keepdim=True)
        scores = scores.unflatten(2, (-1, length)).masked_fill(~(seen | ~sees)[:, None, None], -torch.inf)
        return ((scores.softmax(-1) @ v[:, :, None]) * sees[:, None, None]).flatten(1, 2)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In the weight's dtype, whatever autocast multiplies in."""
    return functional.linear(x, weight, bias).to(weight.dtype)
