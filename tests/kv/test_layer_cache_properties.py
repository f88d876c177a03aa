"""LayerCache under random calls, right and wrong ones, against lists of Python that say what it should hold."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specdec_ops import LayerCache
from tests.kv.layer_cases import refused

EXITS, SLOTS, DIM = (1, 3), 9, 2
GROUPS = len(EXITS)


@dataclasses.dataclass
class Entry:
    """What one slot should hold. All values are numbers that were given out once."""

    parent: int
    row: int
    """The pending hidden row, at the boundary of group `done`."""
    done: int = 0
    """Through how many groups it has gone."""
    kv: dict[int, int] = dataclasses.field(default_factory=dict)
    """By layer."""


@dataclasses.dataclass
class Request:
    """What one request should hold."""

    entries: list[Entry] = dataclasses.field(default_factory=list)
    context: int | None = None
    newest: int = 0

    def length(self, boundary: int) -> int:
        return sum(entry.done >= boundary for entry in self.entries)

    def ancestry(self, slot: int) -> list[int]:
        """The slots that this one sees."""
        return [] if slot < 0 else [*self.ancestry(self.entries[slot].parent), slot]


def filled(numbers: list[int], *shape: int) -> torch.Tensor:
    """A tensor [numbers, *shape] with one number in each row."""
    return torch.tensor(numbers, dtype=torch.float64).view(-1, *(1 for _ in shape)).expand(-1, *shape)


class Calls(RuleBasedStateMachine):
    """Every rule is a call; after each the cache and the lists are compared."""

    @initialize(batch=st.sampled_from((1, 2)))
    def make(self, batch):
        self.cache = self.new(batch)
        self.requests = [Request() for _ in range(batch)]
        self.numbers = itertools.count(1)
        self.taken: list[range] | None = None  # the slots of the open run
        self.layer = 0  # the next that attends
        other = self.new(batch)
        other.append(filled([1] * batch, DIM))
        self.strangers = [other.run(0)]  # runs that are another cache's, or over

    def new(self, batch):
        return LayerCache(EXITS, SLOTS, 1, 2, DIM, batch=batch, dtype=torch.float64, backend="torch")

    def draw_numbers(self, count):
        return [next(self.numbers) for _ in range(count)]

    def idle(self):
        return self.taken is None

    def open(self):
        return self.taken is not None

    # ---- calls of an idle cache

    @precondition(idle)
    @rule(data=st.data())
    def append(self, data):
        """A chain, or a level of a tree wherever one has begun."""
        room = [SLOTS - len(request.entries) for request in self.requests]
        counts = [data.draw(st.integers(0, min(3, free))) for free in room]
        has_tree = any(request.context is not None and n for request, n in zip(self.requests, counts, strict=True))
        tree, parents = has_tree or data.draw(st.booleans()), []
        numbers = self.draw_numbers(sum(counts))
        given = iter(numbers)
        for request, count in zip(self.requests, counts, strict=True):
            request.newest = start = len(request.entries)
            if tree and count and request.context is None:
                request.context = start
            for slot in range(start, start + count):
                parent = slot - 1
                if tree:
                    node = data.draw(st.integers(-2, slot - request.context + 1))
                    parents.append(node)
                    parent = request.context + (node if 0 <= node < start - request.context else -1)
                    if start - request.context <= node < slot - request.context:  # its own level, before it
                        parent = request.context + node
                request.entries.append(Entry(parent, next(given)))
        level = torch.tensor(parents, dtype=torch.int32) if tree else None
        self.cache.append(filled(numbers, DIM), level, counts=counts)

    @precondition(idle)
    @rule(data=st.data(), group=st.integers(0, GROUPS - 1), most=st.sampled_from((None, None, 1, 2)))
    def run(self, data, group, most):
        active = [data.draw(st.integers(0, 3)) > 0 for _ in self.requests]
        self.taken = []
        for request, wanted in zip(self.requests, active, strict=True):
            start, stop = request.length(group + 1), request.length(group)
            stop = min(stop, start + (most or SLOTS)) if wanted else start
            self.taken.append(range(start, stop))
        run = self.cache.run(group, requests=active, most=most)
        self.layer = self.cache.layers(group).start
        assert self.cache.open_run is run and run.group == group
        assert run.counts == tuple(map(len, self.taken))
        entries = self.taken_entries()
        assert torch.equal(run.hidden, filled([entry.row for entry in entries], DIM))
        assert run.positions.tolist() == [
            len(request.ancestry(slot)) - 1
            for request, slots in zip(self.requests, self.taken, strict=True)
            for slot in slots
        ]

    @precondition(idle)
    @rule(data=st.data())
    def crop(self, data):
        limits = [r.context if r.context is not None else len(r.entries) for r in self.requests]
        lengths = [data.draw(st.integers(max(0, limit - 3), limit)) for limit in limits]
        for request, length in zip(self.requests, lengths, strict=True):
            del request.entries[length:]
            request.context = None
        self.cache.crop(lengths if len(set(lengths)) > 1 else lengths[0])

    @precondition(idle)
    @rule(data=st.data(), padded=st.booleans())
    def commit(self, data, padded):
        paths = []
        for request in self.requests:
            path = []
            if request.context is not None:
                slot = data.draw(st.integers(request.context - 1, len(request.entries) - 1))
                path = [s - request.context for s in request.ancestry(slot) if s >= request.context]
                accepted = [request.entries[request.context + node] for node in path]
                del request.entries[request.context :]
                for entry in accepted:
                    entry.parent = len(request.entries) - 1
                    request.entries.append(entry)
                request.context, request.newest = None, len(request.entries)
            paths.append(path)
        deepest = max(map(len, paths)) + 1
        self.cache.commit(torch.tensor([path + [-1] * (deepest - len(path)) for path in paths]) if padded else paths)

    # ---- calls of an open run

    def taken_entries(self):
        return [
            request.entries[slot] for request, slots in zip(self.requests, self.taken, strict=True) for slot in slots
        ]

    @precondition(lambda self: self.open() and self.layer < EXITS[self.cache.open_run.group])
    @rule()
    def attend(self):
        """With queries of 0 each row gets the mean of the values that it sees."""
        entries = self.taken_entries()
        numbers = self.draw_numbers(len(entries))
        for entry, number in zip(entries, numbers, strict=True):
            entry.kv[self.layer] = number
        kv = filled(numbers, 1, 2)
        out = self.cache.attend(
            self.cache.open_run, self.layer, torch.zeros(len(kv), 2, 2, dtype=torch.float64), kv, -kv
        )
        means = []
        for request, slots in zip(self.requests, self.taken, strict=True):
            for slot in slots:
                seen = [request.entries[s].kv[self.layer] for s in request.ancestry(slot)]
                means.append(-sum(seen) / len(seen))
        torch.testing.assert_close(out, filled(means, 2, 2), rtol=1e-12, atol=0)
        self.layer += 1

    @precondition(lambda self: self.open() and self.layer == EXITS[self.cache.open_run.group])
    @rule()
    def finish(self):
        run, entries = self.cache.open_run, self.taken_entries()
        for entry, number in zip(entries, self.draw_numbers(len(entries)), strict=True):
            entry.row, entry.done = number, entry.done + 1
        newest = self.cache.finish(run, filled([entry.row for entry in entries], DIM))
        wanted = [
            request.entries[slot].row
            for request, slots in zip(self.requests, self.taken, strict=True)
            for slot in slots
            if slot >= request.newest
        ]
        assert torch.equal(newest, filled(wanted, DIM))
        self.strangers.append(run)
        self.taken = None

    @precondition(open)
    @rule()
    def abandon(self):
        self.strangers.append(self.cache.open_run)
        self.cache.abandon()
        for entry in self.taken_entries():
            entry.kv = {layer: number for layer, number in entry.kv.items() if layer < ([0, *EXITS][entry.done])}
        self.taken = None

    @precondition(idle)
    @rule(data=st.data(), group=st.integers(0, GROUPS - 1))
    def step(self, data, group):
        """A whole run at once, so that deeper groups have rows more often."""
        self.run(data, group, None)
        for _ in self.cache.layers(group):
            self.attend()
        self.finish()

    # ---- at any time

    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled):
        old = self.cache
        self.cache = pickle.loads(pickle.dumps(old)) if pickled else copy.deepcopy(old)
        for tensor in (old.k_caches, old.v_caches, old._hidden, old._tables.parents):
            tensor.fill_(-77)
        if old.open_run is not None:
            self.strangers.append(old.open_run)

    @rule(data=st.data())
    def misuse(self, data):
        del self.strangers[:-2]
        calls = self.misuses_while_idle() if self.idle() else self.misuses_while_open()
        for call in data.draw(st.lists(st.sampled_from(calls), min_size=1, max_size=8)):
            refused(self.cache, call)

    def misuses_while_idle(self):
        cache, batch = self.cache, len(self.requests)
        one = filled([5] * batch, DIM)
        level = torch.full((batch,), -1, dtype=torch.int32)
        calls = [
            lambda: cache.append(one.float()),
            lambda: cache.append(one, level.float()),
            lambda: cache.append(one.clone().requires_grad_()),
            lambda: cache.append(one, counts=[batch + 1, -1][:batch]),
            lambda: cache.append(filled([5] * (SLOTS + 1) * batch, DIM), level.repeat(SLOTS + 1)),
            lambda: cache.run(GROUPS),
            lambda: cache.run(0, most=0),
            lambda: cache.run(0, requests=[True] * (batch + 1)),
            lambda: cache.crop([SLOTS + 1] * batch),
            lambda: cache.crop(-1),
            lambda: cache.commit([[SLOTS]] * batch),
            lambda: cache.commit([[1, 0]] * batch),
            lambda: cache.commit([[]] * (batch + 1)),
        ]
        calls += [lambda run=run: cache.finish(run, run.hidden) for run in self.strangers]
        calls += [lambda run=run: cache.attend(run, 0, *[filled([1], 1, 2)] * 3) for run in self.strangers]
        for at, request in enumerate(self.requests):
            if request.context is None:
                continue
            nodes = len(request.entries) - request.context
            calls.append(lambda at=at, r=request: cache.crop([r.context + 1 if i == at else 0 for i in range(batch)]))
            if request.context + nodes < SLOTS:
                calls.append(lambda at=at: cache.append(one[:1], counts=[int(i == at) for i in range(batch)]))
            for low, high in itertools.combinations(range(nodes), 2):
                if request.entries[request.context + high].parent != request.context + low:
                    path = [low, high]
                    calls.append(lambda at=at, path=path: cache.commit([path if i == at else [] for i in range(batch)]))
        return calls

    def misuses_while_open(self):
        cache, run, batch = self.cache, self.cache.open_run, len(self.requests)
        one, rows = filled([5] * batch, DIM), len(run.hidden)
        kv, wrong = filled([1] * rows, 1, 2), filled([1] * (rows + 1), 1, 2)
        calls = [
            lambda: cache.append(one),
            lambda: cache.append(one[:0]),
            lambda: cache.run(0),
            lambda: cache.run(run.group),
            lambda: cache.crop(0),
            lambda: cache.commit([[]] * batch),
            lambda: cache.finish(run, filled([1] * (rows + 1), DIM)),
            lambda: cache.finish(run, filled([1] * rows, DIM).float()),
            lambda: cache.attend(run, self.layer, wrong, wrong, wrong),
            lambda: cache.attend(run, self.layer, kv, kv, kv.float()),
            lambda: cache.attend(run, self.layer, kv, kv.clone().requires_grad_(), kv),
            lambda: cache.attend(run, self.layer, kv, kv, kv, query_start=0),
        ]
        if self.layer < EXITS[run.group]:
            calls.append(lambda: cache.finish(run, run.hidden))
        layers = [layer for layer in range(-1, EXITS[-1] + 1) if layer != self.layer or layer >= EXITS[run.group]]
        calls += [lambda layer=layer: cache.attend(run, layer, kv, kv, kv) for layer in layers]
        calls += [lambda other=other: cache.finish(other, other.hidden) for other in self.strangers]
        calls += [lambda other=other: cache.attend(other, self.layer, kv, kv, kv) for other in self.strangers]
        return calls

    @invariant()
    def the_cache_holds_what_it_should(self):
        if not hasattr(self, "cache"):
            return
        boundaries = range(GROUPS + 1)
        assert self.cache.lengths == tuple(tuple(r.length(boundary) for r in self.requests) for boundary in boundaries)
        assert (self.cache.open_run is None) == self.idle()
        for at, request in enumerate(self.requests):
            for group in range(GROUPS):
                start, rows = self.cache.pending(group, at)
                wanted = [entry.row for entry in request.entries if entry.done == group]
                assert start == request.length(group + 1)
                assert torch.equal(rows, filled(wanted, DIM))
                for layer in self.cache.layers(group):
                    numbers = [entry.kv[layer] for entry in request.entries if entry.done > group]
                    k, v = (caches[layer, at, : len(numbers)] for caches in (self.cache.k_caches, self.cache.v_caches))
                    assert torch.equal(k, filled(numbers, 1, 2)) and torch.equal(v, -k)


Calls.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestCalls = Calls.TestCase
