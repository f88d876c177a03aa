"""`Decoder`: a decoder-only transformer that runs on this package's ops, made from plain weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops._core.dispatch import takes_cpu_kernels
from specdec_ops._core.library import FirstCall
from specdec_ops.ops.linear.linear import MAX_FEW_ROWS, linear
from specdec_ops.ops.linear.rms_norm import rms_norm
from specdec_ops.rope import Rope

from .cache import Cache
from .listing import Replaced, lines_of
from .rows import Output, Rows, Shape
from .text import Tokenizer


@functools.cache
def row_invariant_backend(device: str) -> str:
    """The backend of `linear` whose rows never depend on each other, where there is one and no other is named."""
    return "cpu" if takes_cpu_kernels("linear", device) else "auto"


class Norm(NamedTuple):
    """A norm over the dim of a row: RMSNorm, or LayerNorm where it has a bias.

    RMSNorm goes into the product that follows it. Gemma's weights are those of the checkpoint plus 1.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Of rows [rows, dim]; an RMSNorm also adds a residual."""
        if self.bias is None:
            return rms_norm(x, self.weight, eps=self.eps, residual=residual)
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclasses.dataclass(eq=False)
class Projection:
    """A weight [out, dim], quantised or not, and its bias [out].

    On a CPU always by our kernel, whose rows do not depend on how many there are: PyTorch's product, which `linear`
    would take for many rows, promises no such thing.

    `linear` checks all that it gets. A model calls a projection with rows of one kind over and over, so the first call
    goes through those checks, and later ones whose rows are like its rows run what it came down to.
    """

    weight: object
    bias: torch.Tensor | None = None
    _first: FirstCall = dataclasses.field(default_factory=lambda: FirstCall(("x", "residual")), init=False, repr=False)

    def __call__(
        self,
        x: torch.Tensor,
        norm: Norm | None = None,
        activation: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`norm(x) @ weight.T + bias`, with an activation or a residual of `linear`."""
        rows, dim = x.shape
        is_few = 0 < rows <= MAX_FEW_ROWS
        if not (is_few and x.is_contiguous() and (residual is None or residual.is_contiguous())):
            return self._checked(x, norm, activation, residual)
        key, inputs = (activation, type(x), x.dtype, dim, residual is None), (x, residual)
        outputs = self._first.again(norm, key, inputs)
        if outputs is not None:
            return outputs.out
        with self._first.kept(norm, key, inputs):
            return self._checked(x, norm, activation, residual)

    def _checked(self, x, norm: Norm | None, activation, residual) -> torch.Tensor:
        options = {"activation": activation, "residual": residual}
        if norm is not None and norm.bias is None:
            options.update(norm_weight=norm.weight, norm_eps=norm.eps)
        elif norm is not None:
            x = norm(x)
        return linear(x, self.weight, bias=self.bias, backend=row_invariant_backend(x.device.type), **options)


@dataclasses.dataclass
class Attention:
    """Of one layer: joined projections of q, k and v, and what happens to them.

    qkv is [(heads + 2 * kv_heads) * head_dim, dim]: the heads of q, then those of k, then those of v.
    """

    qkv: Projection
    out: Projection
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None = None
    interleaved: bool = False
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def __call__(
        self, x: torch.Tensor, norm: Norm, index: int, rows: Rows, cache: Cache, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """Rows [rows, dim] of layer `index`, before its norm. `residual` is added last."""
        q = self.remember(x, norm, index, rows, cache)
        attended = cache.attend(index, rows, q, self.scale, self.window, self.softcap, self.sinks)
        attended = attended.view(len(x), self.heads * self.head_dim)
        return self.out(attended, residual=residual)

    def remember(self, x: torch.Tensor, norm: Norm, index: int, rows: Rows, cache: Cache) -> torch.Tensor:
        """Put the rows' keys and values into the cache. Returns their queries, [*rows, heads, head_dim]."""
        qkv = self.qkv(x, norm).view(*rows.tokens.shape, -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        norms = {}
        if self.q_norm is not None:
            norms = {"q_norm_weight": self.q_norm.weight, "k_norm_weight": self.k_norm.weight}
            norms["norm_eps"] = self.q_norm.eps
        cache.append(index, rows, q, k, v, self.rope, self.interleaved, **norms)
        return q


@dataclasses.dataclass
class Mlp:
    """Of one layer. With "swiglu" or "geglu" `up` is gate rows, then up rows; any other activation is a function."""

    up: Projection
    down: Projection
    activation: str | Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor, norm: Norm, residual: torch.Tensor | None) -> torch.Tensor:
        """Rows [rows, dim] before the norm. `residual` is added last."""
        if isinstance(self.activation, str):
            inner = self.up(x, norm, activation=self.activation)
        else:
            inner = self.activation(self.up(x, norm))
        return self.down(inner, residual=residual)


@dataclasses.dataclass
class Layer:
    """One layer. Norms after attention and after the MLP are Gemma's; `parallel` adds both to one input (GPT-NeoX)."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    parallel: bool = False

    def __call__(self, x: torch.Tensor, index: int, rows: Rows, cache: Cache) -> torch.Tensor:
        """Rows [rows, dim], through the layer."""
        attended = self._add(x, self.after_attention, self.attention, self.attention_norm, index, rows, cache)
        if self.parallel:
            return self.mlp(x, self.mlp_norm, attended)
        if self.after_mlp is None:
            return self.mlp(attended, self.mlp_norm, attended)
        return self.after_mlp(self.mlp(attended, self.mlp_norm, None), residual=attended)

    @staticmethod
    def _add(x: torch.Tensor, after: Norm | None, part: Attention, *arguments) -> torch.Tensor:
        return part(x, *arguments, x) if after is None else after(part(x, *arguments, None), residual=x)


@dataclasses.dataclass
class Decoder:
    """A model of the engine, see `Model`. Made by `specdec_ops.integrations.transformers.load`, or by hand.

    Attributes:
        shape: its sizes, the dtype of its rows and its device.
        embedding: [vocab, dim].
        layers: in order.
        norm: the final one.
        head: [vocab, dim].
        embedding_scale: multiplies embeddings (Gemma).
        position_embedding: [positions, dim], added to the embeddings (GPT-2), or None.
        logit_softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), or None.
        tokenizer: for prompts and answers as strings, or None.
        eos: ids that end a text.
        name: what it was loaded from.
        replaced: which modules of the model that it was made from each op stands for; `print` lists them.
        restore: gives that model's parameters memory of their own again, as if it had never been loaded; the decoder
            goes on with what it has. None where it shares none.
    """

    shape: Shape
    embedding: torch.Tensor
    layers: list[Layer]
    norm: Norm
    head: Projection
    embedding_scale: float | None = None
    position_embedding: torch.Tensor | None = None
    logit_softcap: float | None = None
    tokenizer: Tokenizer | None = None
    eos: tuple[int, ...] = ()
    name: str = "decoder"
    replaced: tuple[Replaced, ...] = ()
    restore: Callable[[], None] | None = None

    def first_layers(self, count: int) -> Decoder:
        """Its leading layers under its final norm and head: a draft that needs no weights of its own.

        Args:
            count: how many.

        Raises:
            ValueError: there are not as many.
        """
        if not 1 <= count <= len(self.layers):
            raise ValueError(argument_error("decode.Decoder", "count", f"from 1 to {len(self.layers)}", count))
        return dataclasses.replace(self, shape=self.shape._replace(layers=count), layers=self.layers[:count])

    def embed(self, rows: Rows) -> torch.Tensor:
        """[rows, dim]: what enters layer 0."""
        embedded = torch.nn.functional.embedding(rows.tokens.reshape(-1).clamp(min=0), self.embedding)
        if embedded.dtype != self.shape.dtype:
            embedded = embedded.to(self.shape.dtype)
        if self.embedding_scale is not None:
            embedded = embedded * torch.tensor(self.embedding_scale, dtype=embedded.dtype)
        if self.position_embedding is not None:
            positions = rows.positions().clamp(0, len(self.position_embedding) - 1)
            embedded = embedded + torch.nn.functional.embedding(positions, self.position_embedding)
        return embedded

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] of rows [rows, dim] before the final norm."""
        logits = self.head(hidden, self.norm)
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits

    @torch.inference_mode()
    def forward(
        self,
        rows: Rows,
        cache: Cache,
        *,
        layers: tuple[int, int] | None = None,
        hidden: torch.Tensor | None = None,
        want: torch.Tensor | bool = True,
    ) -> Output:
        """See `Model.forward`."""
        first, last = layers or (0, len(self.layers))
        x = self.embed(rows) if hidden is None else hidden
        for index in range(first, last):
            x = self.layers[index](x, index, rows, cache)
        if isinstance(want, torch.Tensor):
            return Output(self.logits(x.index_select(0, want)), x)
        return Output(self.logits(x) if want else None, x)

    def __repr__(self) -> str:
        shape = self.shape
        return f"<Decoder {self.name}: {shape.layers} layers, dim {shape.dim}, vocabulary {shape.vocab}, {shape.dtype}>"

    def __str__(self) -> str:
        return "\n  ".join([repr(self), *lines_of(self.replaced)])
