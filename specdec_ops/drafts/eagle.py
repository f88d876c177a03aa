"""`Eagle`: one layer over the target's last rows, and trees that grow where it is sure of itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.cache import Sequence
from specdec_ops.decode.decoder import Attention, Decoder, Layer, Mlp, Norm, Projection
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.linear.gguf_weight import GgufWeight
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight, quantize_linear

from . import checkpoint
from .grown_tree import GrownDraft, GrownTrees, sizes_of_weight
from .model_draft import chains, draft_cache

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.model import Model
    from specdec_ops.decode.request import Request

_OP = "drafts.Eagle"
_CHUNK = 256  # rows of a pass over a prompt
_WEIGHTS = ("fc", "qkv", "out", "up", "down")


class _State(Sequence):
    """The pages of a request, and the features of the tokens that the draft has not run yet.

    `length` rows have been run; feature 0 here belongs to the next one. `rows` are those of the target that no feature
    has been made of: a request that is not drafted for has no use for them.
    """

    __slots__ = ("features", "rows")

    def __init__(self, before_the_text: torch.Tensor) -> None:
        super().__init__()
        self.features = before_the_text
        self.rows: list[torch.Tensor] = []

    def take(self, count: int, norm: Norm) -> torch.Tensor:
        """[count, dim]: features of the next rows."""
        if self.rows:
            self.features = torch.cat((self.features, norm(torch.cat(self.rows))))
            self.rows = []
        features = self.features
        if len(features) < count:
            raise RuntimeError(
                f"specdec_ops.{_OP}: the target's rows of {count} tokens must have been seen, got {len(features)}"
            )
        self.features = features[count:]
        return features[:count]


class Eagle(GrownDraft):
    """EAGLE: a draft of one layer that goes on from the target's last rows, with the trees of EAGLE-2.

    The row of the token at position p is fc over its embedding and the feature of position p - 1, through one
    layer, and predicts the feature of position p. A feature is the target's last row after its final norm, so the
    target's own head makes tokens of it. Where the target has run a text its features are true ones; further on they
    are the draft's. Of accepted tokens the draft's keys and values are made anew from the true features, in the same
    pass as those of the next round's root. (The first token of a text has a feature of zeros; EAGLE leaves it out.)

    Trees grow level by level: of each level the `width` likeliest paths are gone on with, with `branching` tokens each,
    and the best `nodes - 1` of all are judged by the target. On a CPU, an engine that adapts, and so knows what rows
    of a pass cost, gets smaller trees where they give more tokens per second: levels end when what would go on is
    too unlikely, and nodes stay out that are worth less than their rows.

    Made by `Eagle.load` from what `python -m specdec_ops.train.eagle` has trained for a target, or from weights:

    Args:
        fc: [dim, 2 * dim], over the embedding and then the feature.
        layer: of rows [rows, dim]. It may have other heads and another inner size than the target's layers.
        hot_vocab: int32 or int64 [entries]: the ids that it proposes, for which alone the head is multiplied. None: all
            of the target's.
        levels: the most passes of the draft in a round, so also the depth of its trees, 1 to 64.
        width: nodes that a level expands, 1 to 256.
        branching: children of each of them, 1 to 64.
        nodes: the most of a tree that the target judges, its root included, 2 to 1024.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    EAGLE and EAGLE-2 (Li et al., 2024).
    """

    wants_hidden = True

    def __init__(
        self,
        fc: Projection,
        layer: Layer,
        hot_vocab: torch.Tensor | None = None,
        *,
        levels: int = 4,
        width: int = 3,
        branching: int = 4,
        nodes: int = 8,
    ) -> None:
        for name, value, kind in (("fc", fc, Projection), ("layer", layer, Layer)):
            if not isinstance(value, kind):
                raise TypeError(argument_error(_OP, name, f"a {kind.__name__} of specdec_ops.decode.decoder", value))
        super().__init__(_OP, hot_vocab, levels=levels, width=width, branching=branching, nodes=nodes)
        self.fc, self.layer = fc, layer

    @classmethod
    def load(cls, folder: str | os.PathLike, target: Decoder, **options) -> Eagle:
        """The draft in a folder that `save` has written.

        Args:
            folder: with a draft.safetensors and a draft.json.
            target: the model that it was trained for.
            options: levels, width, branching and nodes.

        Raises:
            TypeError, ValueError: it was trained for another target, or there is no such draft in the folder.
            RuntimeError: the package safetensors is not installed.
        """
        checkpoint.check_target(_OP, target)
        tensors, about = checkpoint.load(folder, "eagle", target)
        weights = {name: tensors[name] for name in _WEIGHTS}
        for name in _WEIGHTS:
            if f"{name}.scales" in tensors:
                weights[name] = QuantizedWeight(tensors[name], tensors[f"{name}.scales"])
        fc, layer = parts(weights, tensors, about, target)
        return cls(fc, layer, tensors.get("hot_vocab"), **options)

    def save(
        self, folder: str | os.PathLike, target: Decoder, *, weights: str = "int8", about: dict | None = None
    ) -> None:
        """Write the draft into a folder: draft.safetensors, and a draft.json that says for which target it is.

        Args:
            folder: made if there is none.
            target: the model that it was trained for.
            weights: "int8", with a scale per row, "bfloat16" or "float32". Quantised ones stay as they are.
            about: what else the JSON shall say, such as the command that trained it.

        Raises:
            ValueError: weights is none of these, or the weights are blocks of a GGUF file.
            RuntimeError: the package safetensors is not installed.
        """
        if weights not in ("int8", "bfloat16", "float32"):
            raise ValueError(argument_error(_OP, "weights", "'int8', 'bfloat16' or 'float32'", weights))
        attention, mlp = self.layer.attention, self.layer.mlp
        projections = (self.fc, attention.qkv, attention.out, mlp.up, mlp.down)
        tensors = {"attention_norm": self.layer.attention_norm.weight, "mlp_norm": self.layer.mlp_norm.weight}
        for name, projection in zip(_WEIGHTS, projections, strict=True):
            weight = projection.weight
            if isinstance(weight, GgufWeight):
                raise ValueError(
                    f"specdec_ops.{_OP}: weights must be tensors or int8 rows to be saved, got GGUF blocks"
                )
            if weights == "int8" and isinstance(weight, torch.Tensor):
                weight = quantize_linear(weight)
            if isinstance(weight, QuantizedWeight):
                tensors |= {name: weight.values, f"{name}.scales": weight.scales}
            else:
                tensors[name] = weight.to(getattr(torch, weights))
        if self.hot_vocab is not None:
            tensors["hot_vocab"] = self.hot_vocab.to(torch.int32)
        names = ("heads", "kv_heads", "head_dim", "interleaved")
        sizes = {name: getattr(attention, name) for name in names} | {"norm_eps": self.layer.mlp_norm.eps}
        checkpoint.save(folder, "eagle", tensors, target, sizes | (about or {}))

    def bind(self, target: Model, *, is_coupled: bool, **limits) -> EagleProposer:
        """See `Draft.bind`. Its proposals are the likeliest ones with any rule."""
        return EagleProposer(self, target, **limits)


class EagleProposer(GrownTrees):
    """The layer's cache, and the target's rows that it goes on from."""

    def __init__(self, draft: Eagle, target: Model, **limits) -> None:
        checkpoint.check_target(_OP, target)
        shape, attention = target.shape, draft.layer.attention
        sizes = sizes_of_weight(draft.fc.weight)
        if sizes != (shape.dim, 2 * shape.dim):
            raise ValueError(
                f"specdec_ops.{_OP}: fc must be [{shape.dim}, {2 * shape.dim}] for a target of dim {shape.dim}, "
                f"got {list(sizes)}"
            )
        own = shape._replace(layers=1, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
        cache = draft_cache(own, draft.run_nodes, **limits)
        super().__init__(draft, target, cache, is_int8=isinstance(draft.fc.weight, QuantizedWeight))

    def start(self, request: Request) -> None:
        """An empty cache, and the feature of the first token, which follows nothing."""
        shape = self._target.shape
        request.draft_state = _State(torch.zeros(1, shape.dim, dtype=shape.dtype, device=shape.device))

    def see(self, request: Request, start: int, hidden: torch.Tensor) -> None:
        """Keep the rows: the feature of each belongs to the token after it."""
        request.draft_state.rows.append(hidden)

    def _run_roots(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run what the cache does not have yet, from true features: rows after the last round's root, node 0 included.

        The last round's tree needs no taking back: its nodes lie behind `length`, where this pass writes.

        Returns:
            the draft's row of node 0, [batch, dim], and the page table with room for the tree.
        """
        requests, states = batch.requests, [request.draft_state for request in batch.requests]
        if not all(map(self.reserve, requests)):
            raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        for request, state in zip(requests, states, strict=True):
            while len(request.ids) - state.length > _CHUNK:  # a prompt; chunks are the same whoever is beside it
                self._run_text([request], (_CHUNK,), self.cache.page_table([state]))
        page_table = self.cache.page_table(states)
        sizes = tuple(len(request.ids) - state.length for request, state in zip(requests, states, strict=True))
        ends = torch.tensor(sizes).cumsum(0) - 1
        return self._run_text(requests, sizes, page_table).index_select(0, ends.to(self.cache.device)), page_table

    def _run_text(self, requests: list[Request], sizes: tuple[int, ...], page_table: torch.Tensor) -> torch.Tensor:
        """[rows, dim]: the next rows of each request."""
        device, states = self.cache.device, [request.draft_state for request in requests]
        features = torch.cat([state.take(size, self._target.norm) for state, size in zip(states, sizes, strict=True)])
        tokens = [r.ids[s.length : s.length + size] for r, s, size in zip(requests, states, sizes, strict=True)]
        lengths = torch.tensor([state.length for state in states], dtype=torch.int32).to(device)
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        tokens = torch.tensor(tokens, dtype=torch.int32).to(device)
        hidden = self._run(Rows(tokens, chains(sizes, device), lengths, page_table), features)
        for state, size in zip(states, sizes, strict=True):
            state.length += size
        return hidden

    def _run_nodes(self, rows: Rows, before: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._run(rows, before)

    def _run(self, rows: Rows, features: torch.Tensor) -> torch.Tensor:
        """[rows, dim]: through fc and the layer."""
        return self.draft.layer(
            self.draft.fc(torch.cat((self._target.embed(rows), features), dim=-1)), 0, rows, self.cache
        )


def parts(weights: dict, norms: dict, sizes: dict, target: Decoder) -> tuple[Projection, Layer]:
    """The first product and the layer of a draft for a target.

    Args:
        weights: fc, qkv, out, up and down.
        norms: attention_norm and mlp_norm, [dim].
        sizes: heads, kv_heads, head_dim, interleaved and norm_eps.
        target: whose rotary tables are used.
    """
    shape, of_layer = target.shape, target.layers[-1].attention
    names = ("heads", "kv_heads", "head_dim")

    def on_device(weight):
        weight = weight.to(shape.device)
        return weight.to(shape.dtype) if isinstance(weight, torch.Tensor) and shape.dtype != torch.float32 else weight

    made = {name: Projection(on_device(weight)) for name, weight in weights.items()}
    attention_norm, mlp_norm = (
        Norm(norms[name].to(shape.device, torch.float32), None, sizes["norm_eps"])
        for name in ("attention_norm", "mlp_norm")
    )
    attention = Attention(
        made["qkv"],
        made["out"],
        *(sizes[name] for name in names),
        rope=of_layer.rope,
        interleaved=sizes["interleaved"],
    )
    return made["fc"], Layer(attention_norm, attention, mlp_norm, Mlp(made["up"], made["down"], "swiglu"))
