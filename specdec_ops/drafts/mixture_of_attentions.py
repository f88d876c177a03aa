"""`MixtureOfAttentions`: a draft that looks at the target's own keys and values, of all layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.cache import Sequence
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.kv.kv_append import kv_append
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight
from specdec_ops.rope import Rope

from . import checkpoint
from .grown_tree import GrownDraft, GrownTrees
from .mixture_of_attentions_parts import Parts, Sizes
from .model_draft import chains, draft_cache

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.model import Model
    from specdec_ops.decode.request import Request

_OP = "drafts.MixtureOfAttentions"
_CHUNK = 256  # tokens of a pass over a prompt
_TEXT, _STATES, _TARGET = 0, 1, 2  # layers of the draft's cache; behind those are copies of the target's last layers


class _State(Sequence):
    """The pages of a request.

    Of the text, `length` tokens are in self-attention's keys and values, and of the first `verified` the target's
    states are in those of cross-attention.
    """

    __slots__ = ("verified",)

    def __init__(self) -> None:
        super().__init__()
        self.verified = 0


class MixtureOfAttentions(GrownDraft):
    """Mixture of Attentions: a small draft with cross-attention over what the target knows of the text.

    Of each token that the target has run, layer self-attention takes the keys and values of all layers, each layer a
    row; the mean of the rows, projected to the target's width, is the token's state. It is made once. In each step of
    the draft, self-attention over the text's tokens is followed by cross-attention over the states, and, if the draft
    is made so, by the target's own last layers and final norm. The result is what the target's head makes logits of.

    The states are only those of verified tokens, so the draft need not have them all: where they stop coming, as at a
    client that has lost its server, it goes on from those that it has.

    Trees grow as those of `Eagle`, which also says what levels, width, branching and nodes are.

    Made by `MixtureOfAttentions.load` from what `python -m specdec_ops.train.mixture_of_attentions` has trained for a
    target, or from weights:

    Args:
        parts: its projections and layers.
        hot_vocab: see `Eagle`, as levels, width, branching and nodes.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Mixture of Attentions for Speculative Decoding (Zimmer et al., 2025).
    """

    wants_layers = True

    def __init__(
        self,
        parts: Parts,
        hot_vocab: torch.Tensor | None = None,
        *,
        levels: int = 4,
        width: int = 3,
        branching: int = 4,
        nodes: int = 8,
    ) -> None:
        if not isinstance(parts, Parts):
            must = "a Parts of specdec_ops.drafts.mixture_of_attentions_parts"
            raise TypeError(argument_error(_OP, "parts", must, parts))
        super().__init__(_OP, hot_vocab, levels=levels, width=width, branching=branching, nodes=nodes)
        self.parts, self.sizes = parts, parts.sizes

    @classmethod
    def load(cls, folder: str | os.PathLike, target: Decoder, **options) -> MixtureOfAttentions:
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
        tensors, about = checkpoint.load(folder, "mixture_of_attentions", target)
        sizes = Sizes(**about["sizes"])
        return cls(Parts.of(tensors, sizes, target.shape), tensors.get("hot_vocab"), **options)

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
            ValueError: weights is none of these.
            RuntimeError: the package safetensors is not installed.
        """
        if weights not in ("int8", "bfloat16", "float32"):
            raise ValueError(argument_error(_OP, "weights", "'int8', 'bfloat16' or 'float32'", weights))
        tensors = self.parts.tensors(weights)
        if self.hot_vocab is not None:
            tensors["hot_vocab"] = self.hot_vocab.to(torch.int32)
        said = {"sizes": self.sizes._asdict(), **(about or {})}
        checkpoint.save(folder, "mixture_of_attentions", tensors, target, said)

    @torch.inference_mode()
    def states(self, stacked: torch.Tensor) -> torch.Tensor:
        """What the target's tokens come to, and what a server sends of them.

        Args:
            stacked: [tokens, layers, stacked], as `gather_layer_kv` gives them.

        Returns:
            [tokens, dim + target_layers * stacked]: the projected means, then K and V of the target's last layers.
        """
        kept = stacked[:, stacked.shape[1] - self.sizes.target_layers :].flatten(1)
        return torch.cat((self.parts.states(stacked), kept), dim=1)

    def bind(self, target: Model, *, is_coupled: bool, **limits) -> MixtureProposer:
        """See `Draft.bind`. Its proposals are the likeliest ones with any rule."""
        return MixtureProposer(self, target, **limits)


class MixtureProposer(GrownTrees):
    """Keys and values of tokens and states, in one cache whose slots are positions."""

    def __init__(self, draft: MixtureOfAttentions, target: Model, **limits) -> None:
        checkpoint.check_target(_OP, target)
        shape, sizes = target.shape, draft.sizes
        stacked = 2 * shape.kv_heads * shape.head_dim
        if (sizes.stacked, sizes.kv_heads, sizes.head_dim) != (stacked, shape.kv_heads, shape.head_dim):
            raise ValueError(
                f"specdec_ops.{_OP}: sizes must be those for a target of {shape.kv_heads} heads of {shape.head_dim} in "
                f"its cache, got {sizes.kv_heads} of {sizes.head_dim}"
            )
        if draft.parts.dim != shape.dim or sizes.target_layers >= shape.layers:
            raise ValueError(
                f"specdec_ops.{_OP}: parts must be those for a target of dim {shape.dim} and {shape.layers} layers, "
                f"got dim {draft.parts.dim} and {sizes.target_layers} of its last layers"
            )
        cache = draft_cache(shape._replace(layers=_TARGET + sizes.target_layers), draft.run_nodes, **limits)
        super().__init__(draft, target, cache, is_int8=isinstance(draft.parts.join.weight, QuantizedWeight))
        self._last = target.layers[shape.layers - sizes.target_layers :]
        self._crossing = draft.parts.crossing()

    def start(self, request: Request) -> None:
        """Nothing is known yet."""
        request.draft_state = _State()

    def retract(self, request: Request, length: int) -> None:
        """What is verified stays known: the target never takes a token back."""
        state = request.draft_state
        state.length = min(state.length, length)

    def see(self, request: Request, start: int, hidden: torch.Tensor) -> None:
        """Keep the states of tokens that a target elsewhere has run, as `Draft.states` has made them."""
        state = request.draft_state
        if start != state.verified:
            raise RuntimeError(f"specdec_ops.{_OP}: states must follow one another, got {start} after {state.verified}")
        if not self.cache.reserve(state, start + len(hidden)):
            raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        self._keep([state], (len(hidden),), hidden.to(self.cache.device))

    @torch.inference_mode()
    def _keep(self, states: list[_State], sizes: tuple[int, ...], rows: torch.Tensor) -> None:
        """Write the keys and values of cross-attention, and copies of the target's own, for the next tokens."""
        dim, target = self._target.shape.dim, self._target.shape
        lengths = torch.tensor([state.verified for state in states], dtype=torch.int32).to(self.cache.device)
        topology, table = chains(sizes, self.cache.device), self.cache.page_table(states)
        is_even = len(set(sizes)) == 1
        lead = sizes[:1] if is_even else ()  # padded rows, or packed ones

        def write(layer: int, k: torch.Tensor, v: torch.Tensor, rope: Rope | None) -> None:
            k, v = (some.unflatten(0, (-1, *lead)) for some in (k, v))
            caches = self.cache.k_caches[layer], self.cache.v_caches[layer]
            kv_append(k, v, *caches, topology, lengths, rope=rope, page_table=table)

        k, v = self._crossing.keys_and_values(rows[:, :dim].to(target.dtype).contiguous())
        write(_STATES, k, v, self._crossing.rope)
        for number in range(len(self._last)):
            width = self.draft.sizes.stacked
            own = rows[:, dim + number * width :][:, :width].to(target.dtype).unflatten(1, (target.kv_heads, 2, -1))
            write(_TARGET + number, own[:, :, 0], own[:, :, 1], None)
        for state, size in zip(states, sizes, strict=True):
            state.verified += size

    def _run_roots(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the states of what the target has run since, and the tokens before node 0; then run node 0."""
        requests, states = batch.requests, [request.draft_state for request in batch.requests]
        if not all(map(self.reserve, requests)):
            raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        self._take_states(batch)
        self._run_to(requests, [min(len(r.ids) - 1, r.draft_state.verified) for r in requests], self._remember)
        # What the target has not run is a client's own guess. Its target layers have only the draft's rows of that.
        self._run_to(requests, [len(r.ids) - 1 for r in requests], self._run if self._last else self._remember)
        table = self.cache.page_table(states)
        rows = Rows(
            batch.last_tokens[:, None], chains((1,) * len(requests), self.cache.device), self._lengths(requests), table
        )
        return self._run_nodes(rows, None, batch), table

    def _lengths(self, requests: list[Request]) -> torch.Tensor:
        return torch.tensor([r.draft_state.length for r in requests], dtype=torch.int32).to(self.cache.device)

    def _take_states(self, batch: Batch) -> None:
        """Make states of the target's keys and values that are new in its cache, if that is here."""
        device = self.cache.device
        missing = [
            (place, request.draft_state, request.sequence.length - request.draft_state.verified)
            for place, request in enumerate(batch.requests)
        ]
        missing = [(place, state, count) for place, state, count in missing if count > 0]
        parts = [[one] for one in missing] if sum(count for *_, count in missing) > _CHUNK else [missing]
        for part in filter(None, parts):
            done = 0
            while done < max(count for *_, count in part):
                sizes = tuple(min(count - done, _CHUNK) for *_, count in part)
                slots = torch.cat(
                    [torch.arange(s.verified, s.verified + n) for (_, s, _), n in zip(part, sizes, strict=True)]
                )
                places = torch.tensor([place for place, *_ in part]).repeat_interleave(torch.tensor(sizes))
                stacked = batch.layer_kv(slots.to(device), places.to(device))
                if stacked is None:
                    return
                self._keep([state for _, state, _ in part], sizes, self.draft.states(stacked))
                done += _CHUNK

    def _run_to(self, requests: list[Request], ends: list[int], run: Callable[[Rows, list[Request]], object]) -> None:
        """Run the tokens of texts that are missing before these ends."""
        missing = [(r, end - r.draft_state.length) for r, end in zip(requests, ends, strict=True)]
        behind = [(request, count) for request, count in missing if count > 0]
        for request, count in behind:
            for _ in range((count - 1) // _CHUNK):  # a prompt; chunks are the same whoever is beside it
                self._run_text([request], (_CHUNK,), run)
        if behind:
            self._run_text([r for r, _ in behind], tuple((count - 1) % _CHUNK + 1 for _, count in behind), run)

    def _run_text(self, requests: list[Request], sizes: tuple[int, ...], run) -> None:
        states = [request.draft_state for request in requests]
        tokens = [r.ids[s.length : s.length + size] for r, s, size in zip(requests, states, sizes, strict=True)]
        if len(set(sizes)) > 1:
            tokens = [token for some in tokens for token in some]
        tokens = torch.tensor(tokens, dtype=torch.int32).to(self.cache.device)
        rows = Rows(tokens, chains(sizes, self.cache.device), self._lengths(requests), self.cache.page_table(states))
        run(rows, requests)
        for state, size in zip(states, sizes, strict=True):
            state.length += size

    def _remember(self, rows: Rows, requests: list[Request]) -> None:
        """Self-attention's keys and values, of tokens whose rows nobody will look at."""
        layer = self.draft.parts.self_attention
        layer.attention.remember(self._target.embed(rows), layer.attention_norm, _TEXT, rows, self.cache)

    def _run_nodes(self, rows: Rows, before: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        return self._run(rows, batch.requests)

    def _run(self, rows: Rows, requests: list[Request]) -> torch.Tensor:
        """[rows, dim]: self-attention, cross-attention, the target's last layers and norm."""
        parts, cache = self.draft.parts, self.cache
        x = parts.self_attention(self._target.embed(rows), _TEXT, rows, cache)
        verified = [request.draft_state.verified for request in requests]
        x = self._crossing(x, rows, torch.tensor(verified, dtype=torch.int32).to(cache.device), cache, _STATES)
        for number, layer in enumerate(self._last):
            x = layer(x, _TARGET + number, rows, cache)
        return self._target.norm(x) if self._last else x
