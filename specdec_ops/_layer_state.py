"""What a `LayerCache` knows besides its tensors, and which call may follow which.

    state   append   run    attend   finish   abandon   crop   commit
    idle    idle     open   -        -        idle      idle   idle
    open    -        -      open     idle     idle      -      -

A `State` is immutable. A method that stands for a call checks it, then returns the state behind it; a call that doesn't
fit raises. The cache writes its tensors first, into slots that the old state doesn't show, and takes the new state in
one assignment. So a call that fails, wherever it does, leaves all that there was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ._core.checks import argument_error, is_int
from ._layer_checks import OP, ascending


class OpenRun(Protocol):
    """What a state reads of a run. It is known again by identity."""

    group: int
    counts: tuple[int, ...]


class State(NamedTuple):
    """The lengths of a cache, its trees, and the run that is open."""

    exits: tuple[int, ...]
    """Layer counts: group g ends with layer `exits[g] - 1`."""
    slots: int
    """Room per request."""
    lengths: tuple[tuple[int, ...], ...]
    """[groups + 1][batch]: slots appended, then slots with K and V in each group. Never ascending."""
    contexts: tuple[int | None, ...]
    """[batch]: where the request's tree starts, if it has one."""
    newest: tuple[int, ...]
    """[batch]: the first slot of the request's latest append, and behind the path after a commit."""
    run: OpenRun | None = None
    """The open run: the state is called idle without one."""
    layer: int = 0
    """The next layer that has to attend, while a run is open."""

    @classmethod
    def empty(cls, exits: tuple[int, ...], slots: int, batch: int) -> State:
        """The state of a new cache."""
        zeros = (0,) * batch
        return cls(exits, slots, (zeros,) * (len(exits) + 1), (None,) * batch, zeros)

    # ---- the calls of an idle cache

    def append(self, counts: Sequence[int], tree: bool) -> State:
        """Add `counts[b]` slots to each request, as a level of its tree or as a chain."""
        self._must_be_idle("append")
        starts, contexts = self.lengths[0], list(self.contexts)
        for request, (start, count) in enumerate(zip(starts, counts, strict=True)):
            if start + count > self.slots:
                must = f"at most {self.slots - start} for request {request} ({self.slots} slots in all)"
                raise ValueError(argument_error(OP, "rows", must, count))
            if not tree and count and contexts[request] is not None:
                raise ValueError(
                    f"specdec_ops.{OP}: parents must be given while request {request} has a tree, got None"
                )
            if tree and count and contexts[request] is None:
                contexts[request] = start
        stops = tuple(start + count for start, count in zip(starts, counts, strict=True))
        return self._replace(lengths=(stops, *self.lengths[1:]), contexts=tuple(contexts), newest=starts)

    def pending(self, group: int, requests: Sequence[bool] | None, most: int | None) -> tuple[list[int], list[int]]:
        """The slots that a run takes: the first of each request, and the one behind its last."""
        self._must_be_idle("run")
        self.check_group("group", group)
        batch = len(self.newest)
        if requests is not None and len(requests) != batch:
            raise ValueError(f"specdec_ops.{OP}: requests must be {batch} bools, got {len(requests)}")
        if most is not None and not is_int(most):
            raise TypeError(argument_error(OP, "most", "an int or None", most))
        if most is not None and most < 1:
            raise ValueError(argument_error(OP, "most", "at least 1", most))
        starts, stops = list(self.lengths[group + 1]), list(self.lengths[group])
        for request in range(batch):
            if requests is not None and not requests[request]:
                stops[request] = starts[request]
            elif most is not None:
                stops[request] = min(stops[request], starts[request] + most)
        return starts, stops

    def open(self, run: OpenRun) -> State:
        """With this run, of rows that are `pending`."""
        return self._replace(run=run, layer=self.layers(run.group).start)

    def crop(self, lengths: Sequence[int]) -> State:
        """Keep `lengths[b]` slots of each request, and no tree."""
        self._must_be_idle("crop")
        if len(lengths) != len(self.newest):
            raise ValueError(f"specdec_ops.{OP}: lengths must be {len(self.newest)} ints or one, got {len(lengths)}")
        for request, length in enumerate(lengths):
            context = self.contexts[request]
            limit = self.lengths[0][request] if context is None else context
            if not 0 <= length <= limit:
                raise ValueError(argument_error(OP, f"lengths[{request}]", f"from 0 to {limit}", length))
        rows = tuple(tuple(map(min, row, lengths)) for row in self.lengths)
        return self._replace(lengths=rows, contexts=(None,) * len(lengths))

    def commit(self, paths: Sequence[Sequence[int]]) -> State:
        """Keep these nodes of each request's tree behind its context, and no tree."""
        self._must_be_idle("commit")
        if len(paths) != len(self.newest):
            must = f"one path for each of {len(self.newest)} requests"
            raise ValueError(f"specdec_ops.{OP}: nodes must be {must}, got {len(paths)}")
        for request, path in enumerate(paths):
            context = self.contexts[request]
            size = 0 if context is None else self.lengths[0][request] - context
            if not ascending(path, least=0) or (path and path[-1] >= size):
                raise ValueError(f"specdec_ops.{OP}: nodes[{request}] must be ascending nodes below {size}, got {path}")
        rows = tuple(
            tuple(
                length if context is None else min(length, context + kept(path, context, length))
                for length, context, path in zip(row, self.contexts, paths, strict=True)
            )
            for row in self.lengths
        )
        newest = (
            old if context is None else length
            for old, context, length in zip(self.newest, self.contexts, rows[0], strict=True)
        )
        return self._replace(lengths=rows, contexts=(None,) * len(paths), newest=tuple(newest))

    def _must_be_idle(self, call: str) -> None:
        if self.run is not None:
            raise RuntimeError(
                f"specdec_ops.{OP}: {call} must be called while no run is open, got an open run of group "
                f"{self.run.group} (end it with finish or abandon)"
            )

    # ---- the calls of an open run

    def attend(self, run: OpenRun, layer: int) -> State:
        """The run's next layer has K and V."""
        self._must_be_open(run)
        if not is_int(layer):
            raise TypeError(argument_error(OP, "layer", "an int", layer))
        if layer != self.layer or layer >= self.exits[run.group]:
            left = range(self.layer, self.exits[run.group])
            must = f"{self.layer}, the next layer of the open run" if left else "left out, as all layers have attended"
            raise ValueError(argument_error(OP, "layer", must, layer))
        return State(*self[:-1], layer + 1)  # as _replace does, in half the time

    def finish(self, run: OpenRun) -> State:
        """The run's rows have K and V in its group."""
        self._must_be_open(run)
        if self.layer < self.exits[run.group]:
            must = f"called after attend of layers {self.layer} to {self.exits[run.group] - 1}"
            raise RuntimeError(f"specdec_ops.{OP}: finish must be {must}, got it before")
        row = tuple(length + count for length, count in zip(self.lengths[run.group + 1], run.counts, strict=True))
        lengths = (*self.lengths[: run.group + 1], row, *self.lengths[run.group + 2 :])
        return self._replace(lengths=lengths, run=None, layer=0)

    def abandon(self) -> State:
        """As if the open run had not been taken."""
        return self._replace(run=None, layer=0)

    def _must_be_open(self, run: OpenRun) -> None:
        if run is not self.run or run is None:
            what = "one that is over, or another cache's" if hasattr(run, "counts") else type(run).__name__
            raise (ValueError if hasattr(run, "counts") else TypeError)(
                f"specdec_ops.{OP}: run must be the cache's open run, got {what}"
            )

    # ---- groups

    def layers(self, group: int) -> range:
        """The layers of a group."""
        return range(0 if group == 0 else self.exits[group - 1], self.exits[group])

    def check_group(self, name: str, group: int) -> None:
        """Raise unless there is such a group."""
        if not is_int(group):
            raise TypeError(argument_error(OP, name, "an int", group))
        if not 0 <= group < len(self.exits):
            raise ValueError(argument_error(OP, name, f"from 0 to {len(self.exits) - 1}", group))


def kept(path: Sequence[int], context: int, length: int) -> int:
    """How many nodes of a path lie below a length. They are its first ones."""
    return sum(context + node < length for node in path)
