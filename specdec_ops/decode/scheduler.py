"""`Scheduler`: which requests run, which wait for pages, and who gives pages up for whom."""

from __future__ import annotations

import collections
from collections.abc import Callable

from specdec_ops.drafts.base import Draft, Proposer

from .cache import Cache
from .request import Request, State


class Scheduler:
    """The queue of an engine, and the pages of its requests.

    Requests get pages for their text in their order, of those that hold its beginning already if there are any. When
    pages run out, paused requests give theirs up, and then the newest: it waits, before all others, and what it has
    said so far is run again as a part of its text.

    Args:
        cache: of the target.
        draft: None decodes plainly.
        proposer: of the draft.
        max_batch: the most requests that run at once.
        nodes: the most of a tree.

    Attributes:
        running: requests that have pages.
        on_release: called with a request before its pages are given back.
    """

    def __init__(
        self, cache: Cache, draft: Draft | None, proposer: Proposer | None, *, max_batch: int, nodes: int
    ) -> None:
        self._cache, self._draft, self._proposer = cache, draft, proposer
        self._max_batch, self._nodes = max_batch, nodes
        self._waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self.on_release: Callable[[Request], None] | None = None

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for its turn. One that is paused and has no pages is in no queue."""
        return bool(self._waiting)

    def drafts_for(self, request: Request) -> bool:
        """Whether the draft is used for a request."""
        return self._draft is not None and request.sampling.speculate

    def add(self, request: Request) -> None:
        """Let a request wait for its turn, behind the others."""
        self._waiting.append(request)

    def resume(self, request: Request) -> None:
        """Let a paused request go on; without pages it waits, behind the others."""
        request.is_paused = False
        if request.state is State.WAITING and request not in self._waiting:
            self._waiting.append(request)

    def admit(self) -> None:
        """Waiting requests get pages for their text, in their order, while there are any."""
        while self._waiting:
            request = self._waiting[0]
            if request.state is State.WAITING:
                if self._find_room(request):
                    self._join(request)
                elif not request.is_paused:
                    return
            self._waiting.popleft()  # one that is paused and found no room comes back when it resumes

    def with_pages(self, group: list[Request], nodes: int) -> list[Request]:
        """Those of the group that have room for their trees; paused and new requests give pages up for the others."""
        for request in group:
            while request.state is State.RUNNING and not self._has_room(request, nodes):
                if len(self.running) == 1:
                    raise RuntimeError("specdec_ops.Engine: there are too few pages for a request that fitted")
                self.send_back(max(self.running, key=lambda running: (running.is_paused, running.number)))
        return [request for request in group if request.state is State.RUNNING]

    def send_back(self, request: Request) -> None:
        """A running request waits again, before all others; its text so far becomes a part of what is run first.

        One that is paused is in no queue until it resumes.
        """
        self.release(request)
        request.state = State.WAITING
        if not request.is_paused:
            self._waiting.appendleft(request)

    def release(self, request: Request) -> None:
        """A running request gives its pages back; what they hold stays known."""
        if self.on_release is not None:
            self.on_release(request)
        self.running.remove(request)
        self._cache.pool.register(request.ids[: request.sequence.length], request.sequence.pages)
        self._cache.drop(request.sequence)
        if self.drafts_for(request):
            self._proposer.drop(request)

    def _find_room(self, request: Request) -> bool:
        """Pages for the text of a waiting request and a tree, of those that hold the beginning of it already if any."""
        sequence, pool = request.sequence, self._cache.pool
        while len(self.running) >= self._max_batch:
            if not self._push_out_paused(request):
                return False
        shares = not (self.drafts_for(request) and self._draft.wants_hidden)
        sequence.pages = pool.find_prefix(request.ids[:-1]) if shares else []
        sequence.length = len(sequence.pages) * pool.page_size
        while not self._cache.reserve(sequence, request.tree_start + self._nodes):
            if not self._push_out_paused(request):
                self._cache.drop(sequence)
                if not self.running:
                    raise RuntimeError("specdec_ops.Engine: the cache has too few pages for a request that fitted")
                return False
        return True

    def _push_out_paused(self, request: Request) -> bool:
        """The newest paused request gives its pages up for one that is not paused. Returns whether there was any."""
        paused = [running for running in self.running if running.is_paused]
        if request.is_paused or not paused:
            return False
        self.send_back(max(paused, key=lambda running: running.number))
        return True

    def _join(self, request: Request) -> None:
        if request.stats.target_calls == 0:
            request.stats.cached_prompt_tokens = request.sequence.length
        request.state = State.RUNNING
        self.running.append(request)
        if self.drafts_for(request):
            self._proposer.start(request)

    def _has_room(self, request: Request, nodes: int) -> bool:
        """Take what pages the next round of a request needs, of the target's cache and of the draft's."""
        if not self._cache.reserve(request.sequence, request.tree_start + nodes):
            return False
        return not self.drafts_for(request) or self._proposer.reserve(request)
