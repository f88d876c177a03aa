"""`Drafter`: a draft at work at the client, for one text, without the target.

A draft of the engine needs no more than a request's tokens (and, where it says so, rows of the target), so any of them
works here as it is. A draft that goes on from the target's states gets them by `take_states`, from State frames. While
one that goes on from the last row lacks that it drafts nothing. One that looks at the states that there are, as Mixture
of Attentions does, goes on alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from specdec_ops.decode.batch import Batch, Law
from specdec_ops.decode.cache import Sequence
from specdec_ops.decode.model import Model
from specdec_ops.decode.request import Request
from specdec_ops.decode.rows import Shape
from specdec_ops.decode.sampling import Sampling
from specdec_ops.decode.text import Tokenizer
from specdec_ops.drafts.base import Draft, Drafted
from specdec_ops.ops.acceptance.accept import Acceptance

from . import wire
from .host_tree import HostTree


class FarTarget:
    """What a client knows of the target: enough for drafts that only need to know its vocabulary."""

    def __init__(self, hello: wire.Hello, tokenizer: Tokenizer | None) -> None:
        self.eos, self.tokenizer = hello.eos, tokenizer
        self.shape = Shape(0, 0, 0, 0, hello.vocab, hello.max_length, torch.float32, torch.device("cpu"))

    def forward(self, *_, **__):
        """It is not here."""
        raise RuntimeError("specdec_ops.remote: the target is at the server; give the client its own as target")


class _NoCache:
    """In place of the target's cache, which is at the server."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def page_table(self, sequences: list[Sequence]) -> torch.Tensor:
        return torch.full((len(sequences), 1), -1, dtype=torch.int32, device=self.device)

    def layer_kv(self, *_) -> None:
        return None


class Drafter:
    """Drafts for one text, which may also lose tokens again.

    Args:
        draft: of the engine.
        target: as far as it is here: what `draft.bind` needs of it.
        sampling: of the text's request, whose noise the draft draws with, as the rule "match" has it.
        max_length: the most tokens of the text.

    Raises:
        ValueError: the draft does not fit the target.
    """

    def __init__(self, draft: Draft, target: Model, sampling: Sampling, max_length: int) -> None:
        self.draft, self._max_length = draft, max_length
        slots = max_length + draft.max_nodes
        limits = {"max_batch": 1, "max_length": slots, "max_slots": slots}
        self._proposer = draft.bind(target, **limits, is_coupled=True)
        self._request = Request([], sampling, (), None)
        model = getattr(draft, "model", target)
        self._device = model.shape.device
        self._law = Law.of([self._request], self._device)
        self._pending: tuple[Batch, Drafted, HostTree] | None = None
        self._has_started = False
        self.states = 0  # positions whose states it has

    @property
    def wants_states(self) -> bool:
        """Whether it drafts from the target's rows, so that it has to wait for them."""
        return self.draft.wants_hidden or self.draft.wants_layers

    @property
    def goes_on_alone(self) -> bool:
        """Whether it can draft after tokens that the target has not run: a tree after another, and ahead of results."""
        return not self.draft.wants_hidden

    @property
    def max_levels(self) -> int:
        """The most levels of a tree below its root."""
        return self.draft.max_depth or self.draft.max_nodes - 1

    def take_states(self, start: int, rows: torch.Tensor) -> None:
        """Rows of the target, [tokens, dim]: those that follow the ones that are here already."""
        rows = rows[max(0, self.states - start) :]
        if not self.wants_states or not len(rows):
            return
        self._start()
        begin, self.states = self.states, self.states + len(rows)
        self._proposer.see(self._request, begin, rows.to(self._device))

    def propose(
        self, ids: list[int], levels: int | None = None, seconds: Callable[[int], float] | None = None
    ) -> HostTree:
        """A tree after a text; of the text's last token alone where nothing can be said.

        Args:
            ids: the text. It may differ from that of the last call from some token on.
            levels: the most levels of the tree, for drafts that each level costs time.
            seconds: how long a round takes by the nodes of its tree, for drafts that weigh them; None: not known.
        """
        if len(ids) >= self._max_length or (not self.goes_on_alone and self.states != len(ids) - 1):
            return HostTree.chain(ids[-1:])
        self._start()
        self._settle(ids)
        self._proposer.levels = levels
        self._request.sequence.length = len(ids) - 1
        if not self._proposer.reserve(self._request):
            raise RuntimeError("specdec_ops.remote: the draft's cache is full, which must not happen")
        batch = Batch([self._request], _NoCache(self._device), self._law, seconds)
        drafted = self._proposer.propose(batch)
        self._pending = (batch, drafted, HostTree.of(drafted))
        return self._pending[2]

    def _start(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._proposer.start(self._request)

    def _settle(self, ids: list[int]) -> None:
        """Tell the draft what has become of its last tree, and of the text."""
        known, pending = self._request.ids, self._pending
        common = next((place for place, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), None)
        common = min(len(known), len(ids)) if common is None else common
        self._pending = None
        if common < len(known):
            kept = min(common, len(ids) - 1)  # the last token is run again: it is the next tree's root
            self._request.ids = known[:kept]
            self._proposer.retract(self._request, kept)
        self._request.ids = list(ids)
        if common == len(known) and pending is not None:
            batch, drafted, tree = pending
            path = tree.walk(ids[len(known) :])
            self._proposer.observe(batch, drafted, _acceptance(path, ids, drafted), [len(path) - 1])

    def close(self) -> None:
        """Give its memory back."""
        if self._has_started:
            self._proposer.drop(self._request)


def _acceptance(path: list[int], ids: list[int], drafted: Drafted) -> Acceptance:
    """What the target would have said of a tree of which this path was accepted."""
    tokens, device = drafted.tokens, drafted.tokens.device
    nodes = torch.full_like(tokens, -1)
    nodes[0, : len(path)] = torch.tensor(path, dtype=nodes.dtype)
    accepted = torch.full_like(tokens, -1)
    accepted[0, : len(path) - 1] = tokens[0, path[1:]]
    count = torch.tensor([len(path) - 1], dtype=torch.int32, device=device)
    next_token = torch.tensor([ids[-1]], dtype=torch.int32, device=device)
    return Acceptance(accepted, nodes, count, next_token, count * 0, count < 0)
