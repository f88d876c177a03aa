"""`Eagle`: one layer over the target's last rows, and trees that grow where it is sure of itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.cache import Sequence
from specdec_ops.decode.decoder import Attention, Decoder, Layer, Mlp, Norm, Projection
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.acceptance.sample import sample_children
from specdec_ops.ops.linear.gguf_weight import GgufWeight
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight, quantize_linear
from specdec_ops.ops.topology.candidate_pool import CandidatePool, check_int
from specdec_ops.ops.topology.grow_tree import grow_tree
from specdec_ops.ops.topology.prune_tree import MAX_PRUNED_NODES, prune_tree
from specdec_ops.vocab_map import VocabMap

from . import checkpoint
from .base import Draft, Drafted, Proposer
from .model_draft import chains, draft_cache

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.model import Model
    from specdec_ops.decode.request import Request
    from specdec_ops.ops.acceptance.accept import Acceptance

_OP = "drafts.Eagle"
_CHUNK = 256  # rows of a pass over a prompt
_CHANCE = 0.5  # that the best child of a path is right, to guess before the level has been run
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


class Eagle(Draft):
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

    proposals = "deterministic"
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
        if hot_vocab is not None and not isinstance(hot_vocab, torch.Tensor):
            raise TypeError(argument_error(_OP, "hot_vocab", "int32 or int64 [entries], or None", hot_vocab))
        limits = {"levels": (levels, 1, 64), "width": (width, 1, 256), "branching": (branching, 1, 64)}
        for name, (value, low, high) in (limits | {"nodes": (nodes, 2, MAX_PRUNED_NODES // 2)}).items():
            check_int(_OP, name, value, low, high)
        self.fc, self.layer, self.hot_vocab = fc, layer, hot_vocab
        self.levels, self.width, self.branching = levels, width, branching
        self.max_nodes = min(nodes, 1 + branching * (1 + (levels - 1) * width))
        self.max_depth = levels
        self.run_nodes = 1 + (levels - 1) * width  # nodes of the tree that the draft runs itself

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
        if not isinstance(target, Decoder):
            raise TypeError(argument_error(_OP, "target", "a specdec_ops.decode.Decoder", target))
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


class EagleProposer(Proposer):
    """The layer's cache, and the target's rows that it goes on from."""

    def __init__(self, draft: Eagle, target: Model, **limits) -> None:
        if not isinstance(target, Decoder):
            raise TypeError(argument_error(_OP, "target", "a specdec_ops.decode.Decoder", target))
        shape, attention = target.shape, draft.layer.attention
        sizes = _sizes(draft.fc.weight)
        if sizes != (shape.dim, 2 * shape.dim):
            raise ValueError(
                f"specdec_ops.{_OP}: fc must be [{shape.dim}, {2 * shape.dim}] for a target of dim {shape.dim}, "
                f"got {list(sizes)}"
            )
        self.draft, self._target, self._head, self._vocab_map = draft, target, target.head, None
        if draft.hot_vocab is not None:
            self._vocab_map = VocabMap(draft.hot_vocab.to(shape.device), shape.vocab)
            self._head = _rows_of(target.head, self._vocab_map.draft_to_target)
            if isinstance(draft.fc.weight, QuantizedWeight):  # then the copy need not be more exact than the draft
                self._head = _in_int8(self._head)
        own = shape._replace(layers=1, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
        self.cache = draft_cache(own, draft.run_nodes, **limits)
        self._pools: dict[int, CandidatePool] = {}
        self._chances = _Chances()

    def start(self, request: Request) -> None:
        """An empty cache, and the feature of the first token, which follows nothing."""
        shape = self._target.shape
        request.draft_state = _State(torch.zeros(1, shape.dim, dtype=shape.dtype, device=shape.device))

    def see(self, request: Request, start: int, hidden: torch.Tensor) -> None:
        """Keep the rows: the feature of each belongs to the token after it."""
        request.draft_state.rows.append(hidden)

    def reserve(self, request: Request) -> bool:
        """See `Proposer.reserve`."""
        return self.cache.reserve(request.draft_state, len(request.ids) - 1 + self.draft.run_nodes)

    def drop(self, request: Request) -> None:
        """Give its pages back."""
        if request.draft_state is not None:
            self.cache.drop(request.draft_state)
            request.draft_state = None

    @torch.inference_mode()
    def propose(self, batch: Batch) -> Drafted:
        """A tree for each request, of the paths that the draft thinks most likely."""
        size, device = len(batch), self.cache.device
        pool = self._pools.get(size)
        if pool is None:
            pool = CandidatePool.empty(
                size, levels=self.draft.levels, width=self.draft.width, branching=self.draft.branching, device=device
            )
            self._pools[size] = pool
        began = time.perf_counter()
        seconds = batch.seconds if device.type == "cpu" else None  # elsewhere a look at the pool would wait for it
        hidden, page_table = self._catch_up(batch)
        hidden = hidden[:, None]
        for level in range(self.draft.levels):
            logits = self._logits(hidden.flatten(0, 1)).view(size, hidden.shape[1], -1)
            top = sample_children(
                logits, self.draft.branching, seeds=0, positions=0, temperature=0.0, vocab_map=self._vocab_map
            )
            eos = self._target.eos[:8] or None
            frontier = grow_tree(pool, top.tokens, top.logprobs, level=level, eos=eos)
            if level + 1 == self.draft.levels:
                break
            if seconds is not None:
                spent = time.perf_counter() - began
                chances = self._chances.of(frontier.scores)
                if not _is_worth_a_level(chances, spent / (level + 1), spent + seconds(size)):
                    break
            places = frontier.parent_rows.clamp(min=0).long()[:, :, None].expand(-1, -1, hidden.shape[-1])
            rows = Rows(
                frontier.tokens,
                pool.topology,
                batch.context_lens,
                page_table,
                query_start=pool.query_start(level + 1),
            )
            hidden = self._run(rows, hidden.gather(1, places).flatten(0, 1)).view(size, self.draft.width, -1)
        nodes = self.draft.max_nodes
        if seconds is not None:
            best = pool.scores.topk(min(nodes - 1, pool.scores.shape[1]), dim=1).values
            nodes = _worthwhile(self._chances.of(best).sum(0), size, seconds, time.perf_counter() - began)
            self._chances.expect(best[:, : nodes - 1])
        tree = prune_tree(pool, nodes, root_tokens=batch.last_tokens)
        return Drafted(tree.tokens, tree.topology)

    def observe(self, batch: Batch, drafted: Drafted, acceptance: Acceptance, accepted: list[int]) -> None:
        """See `Proposer.observe`."""
        self._chances.learn(sum(accepted))

    def _catch_up(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
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

    def _run(self, rows: Rows, features: torch.Tensor) -> torch.Tensor:
        """[rows, dim]: through fc and the layer."""
        return self.draft.layer(
            self.draft.fc(torch.cat((self._target.embed(rows), features), dim=-1)), 0, rows, self.cache
        )

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        logits, softcap = self._head(features), self._target.logit_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _Chances:
    """How likely paths are to be accepted: what the draft gives them, times what has been accepted over what it gave.

    A greedy target says what the draft thinks most likely more often than the draft does, one at a high temperature
    less often.
    """

    _FIRST, _MEMORY = 16.0, 0.99  # tokens that are taken for expected and accepted at first; weight of the past

    def __init__(self) -> None:
        self._given = self._accepted = self._FIRST
        self._waiting = 0.0

    def of(self, scores: torch.Tensor) -> torch.Tensor:
        """Like scores, the draft's log-probabilities of paths."""
        return (scores.exp() * (self._accepted / self._given)).clamp(max=1.0)

    def expect(self, scores: torch.Tensor) -> None:
        """These paths are judged now."""
        self._waiting = scores.exp().sum().item()

    def learn(self, accepted: int) -> None:
        """So many of their tokens were accepted."""
        if self._waiting:
            self._given = self._MEMORY * self._given + self._waiting
            self._accepted = self._MEMORY * self._accepted + accepted
            self._waiting = 0.0


def _is_worth_a_level(chances: torch.Tensor, cost: float, spent: float) -> bool:
    """Whether one more level brings more tokens per second than a round that ends here would.

    Args:
        chances: [batch, width] of the paths that would go on.
        cost: seconds of a level.
        spent: seconds of the round without it.
    """
    return _CHANCE * chances.sum().item() * spent > len(chances) * cost


def _worthwhile(chances: torch.Tensor, size: int, seconds: Callable[[int], float], spent: float) -> int:
    """The number of nodes with which trees give most tokens per second, the root included.

    Args:
        chances: [nodes - 1] of each tree's best path, second best and so on, added over the trees.
        size: trees.
        seconds: of a round, by the rows of its pass.
        spent: seconds of the draft.
    """
    tokens = (size + chances.cumsum(0)).tolist()
    rates = [gain / (spent + seconds(size * (2 + place))) for place, gain in enumerate(tokens)]
    return 2 + max(range(len(rates)), key=rates.__getitem__)


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


def _sizes(weight) -> tuple[int, ...]:
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else (weight.outputs, weight.dim)


def _rows_of(head: Projection, ids: torch.Tensor) -> Projection:
    """Some rows of a head, in the form that it has."""
    weight, ids = head.weight, ids.long()
    if isinstance(weight, GgufWeight):
        weight = GgufWeight(weight.blocks.index_select(0, ids), weight.weight_type)
    elif isinstance(weight, QuantizedWeight):
        weight = QuantizedWeight(weight.values.index_select(0, ids), weight.scales.index_select(0, ids))
    else:
        weight = weight.index_select(0, ids)
    return Projection(weight, None if head.bias is None else head.bias.index_select(0, ids))


def _in_int8(head: Projection) -> Projection:
    """The same in int8 with a scale per row, whose products are the fastest."""
    weight = head.weight.dequantize() if isinstance(head.weight, GgufWeight) else head.weight
    return head if isinstance(weight, QuantizedWeight) else Projection(quantize_linear(weight), head.bias)
