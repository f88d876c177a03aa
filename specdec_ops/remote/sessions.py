"""What a server knows of each text, and how trees from the wire get into the engine's rounds."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable

import torch

from specdec_ops.decode.batch import Batch
from specdec_ops.decode.cache import Cache
from specdec_ops.decode.model import Model
from specdec_ops.decode.request import Request
from specdec_ops.drafts.base import Draft, Drafted, Proposer
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree

from . import wire
from .connection import Connection
from .host_tree import HostTree


class ClientConnection(Connection):
    """A connection as the server has it.

    Attributes:
        session: that its frames are about.
    """

    session: Session | None = None


class WireDraft(Draft):
    """To the engine: a draft. Its trees have come from clients.

    Args:
        max_nodes: of a tree, its root included.
        wants_hidden: whether clients may ask for the target's rows.
    """

    proposals = "deterministic"

    def __init__(self, max_nodes: int, *, wants_hidden: bool) -> None:
        self.max_nodes, self.wants_hidden = max_nodes, wants_hidden

    def bind(self, target: Model, *, is_coupled: bool, **limits: int) -> WireProposer:
        """See `Draft.bind`."""
        return WireProposer()


class WireProposer(Proposer):
    """Proposes the trees that lie ready, and keeps what the target has made of the requests' tokens.

    Attributes:
        trees: of the next round, by the number of the request.
        requests: those that have joined, by their numbers.
        seen: (number, start, rows) of the last steps.
    """

    def __init__(self) -> None:
        self.trees: dict[int, HostTree] = {}
        self.requests: dict[int, Request] = {}
        self.seen: list[tuple[int, int, torch.Tensor]] = []
        self._cache: Cache | None = None
        self._make_states: Callable[[torch.Tensor], torch.Tensor] | None = None

    def go_on_from_layers(self, cache: Cache, make_states: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Keep what a draft makes of the target's keys and values, instead of the target's last rows.

        Args:
            cache: of the target.
            make_states: see `Draft.states`.
        """
        self._cache, self._make_states = cache, make_states

    def start(self, request: Request) -> None:
        """Know the request."""
        self.requests[request.number] = request

    def see(self, request: Request, start: int, hidden: torch.Tensor) -> None:
        """Keep the rows for who asked for them."""
        rows = hidden
        if self._cache is not None:  # the keys and values of these tokens are in the cache by now
            slots = torch.arange(start, start + len(hidden), dtype=torch.int32, device=self._cache.device)
            table = self._cache.page_table([request.sequence])
            rows = self._make_states(self._cache.layer_kv(slots, torch.zeros_like(slots), table))
        self.seen.append((request.number, start, rows.detach().cpu().clone()))

    def propose(self, batch: Batch) -> Drafted:
        """The trees of the requests; all of them have one."""
        found = [self.trees.pop(request.number) for request in batch.requests]
        trees, sizes = [Tree.from_parents(tree.parents) for tree in found], tuple(len(tree.tokens) for tree in found)
        width, device = max(sizes), batch.context_lens.device
        padded = [tree.tokens + [-1] * (width - len(tree.tokens)) for tree in found]
        return Drafted(
            torch.tensor(padded, dtype=torch.int32).to(device),
            Topology.from_trees(trees, device, packed=len(set(sizes)) > 1),
            sizes=sizes,
            is_chain=all(tree.depth == len(tree) - 1 for tree in trees),
        )


@dataclasses.dataclass(eq=False)
class Session:
    """A text and its client.

    Attributes:
        key: by which the client finds it again.
        length: tokens of the text.
        last: the last of them.
        number: of the engine's request; None before it is submitted, and once the text has ended.
        round: the last one that is done.
        result: what it gave; it is kept until the next is asked for.
        asked: when the tree came that is being verified, else None.
        finish: why the text has ended, or "".
        connection: of its client, if that is there.
        states: (start, rows) that the client may not have yet; None if it wants none.
        states_end: the position after the last of them.
        used: when it was used last.
        timer: that looks whether it still is.
    """

    key: bytes
    length: int
    last: int
    number: int | None = None
    round: int = 0
    result: wire.Result | None = None
    asked: float | None = None
    finish: str = ""
    connection: ClientConnection | None = None
    states: collections.deque[tuple[int, torch.Tensor]] | None = None
    states_end: int = 0
    used: float = 0.0
    timer: asyncio.TimerHandle | None = None

    def keep_states(self, start: int, rows: torch.Tensor, most: int) -> wire.State | None:
        """Take rows of the target, and return what the client has not been sent yet. Only `most` rows are kept."""
        if self.states is None or start + len(rows) <= self.states_end:
            return None
        rows = rows[max(0, self.states_end - start) :]
        start = max(start, self.states_end)
        self.states.append((start, rows))
        self.states_end = start + len(rows)
        while sum(len(some) for _, some in self.states) > most:
            self.states.popleft()
        return wire.State(start, rows)

    def states_since(self, start: int) -> list[wire.State] | None:
        """What a client that has all rows before `start` lacks; None if that is not there any more."""
        if self.states is None or start < 0:
            return []
        first = self.states[0][0] if self.states else self.states_end
        if not first <= start <= self.states_end:
            return None
        kept = [(begin, rows) for begin, rows in self.states if begin + len(rows) > start]
        return [wire.State(max(begin, start), rows[max(0, start - begin) :]) for begin, rows in kept]
