"""A line between client and server as it is in the world: slow, jittery, lossy, and cut now and then.

`Link.connect` makes pairs of streams in memory; `proxy` puts the same line between real sockets. All waiting is done
by the event loop's clock, and all chance comes from a seed, so on the loop of `clock.run` a line behaves the same
every time, and nobody waits.

Bytes go in segments of 1460, in their order. A segment arrives half a round trip after its last byte has left, later
by jitter; a lost one is sent again, as TCP does, and holds up those after it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator, Callable

from .streams import Stream, TcpStream, connect

_SEGMENT = 1460
_WINDOW = 1 << 16  # bytes that have arrived and were not read yet, beyond which no more arrive
_LEAST_RETRANSMISSION = 0.2


@dataclasses.dataclass(frozen=True)
class Cut:
    """All connections of a line break, and no new ones come about for a while.

    Args:
        at: when, in seconds after the first connection; or
        after_up: once this many bytes have passed from clients to the server; or
        after_down: from the server to clients.
        seconds: until there are connections again.
        silent: nobody is told: bytes vanish, and attempts to connect get no answer until the cut is over.
    """

    at: float | None = None
    after_up: int | None = None
    after_down: int | None = None
    seconds: float = 0.0
    silent: bool = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.at, self.after_up, self.after_down)) != 1:
            raise ValueError(f"specdec_ops.remote: a Cut must have one of at, after_up and after_down, got {self}")


class _Pipe:
    """One direction of a connection."""

    def __init__(self, link: Link, up: bool) -> None:
        self._link, self._up = link, up
        self._loop = asyncio.get_running_loop()
        self._free = self._latest = 0.0  # when the line can take the next byte, and when the last one arrives
        self._inbox: collections.deque[bytes] = collections.deque()
        self._coming: collections.deque[bytes | None] = collections.deque()  # timers of one moment keep no order
        self._held: collections.deque[bytes] = collections.deque()  # arrived while the window was full
        self._waiting: asyncio.Future | None = None
        self.ended = self.vanishes = False
        self.unsent = 0  # bytes on their way, or held
        self._unread = 0

    def push(self, data: bytes) -> None:
        """Bytes set out."""
        link = self._link
        for start in range(0, len(data), _SEGMENT):
            segment = data[start : start + _SEGMENT]
            self.unsent += len(segment)
            self._free = max(self._loop.time(), self._free) + (len(segment) / link.rate if link.rate else 0.0)
            self._latest = max(self._latest, self._free + link.delay())
            self._coming.append(segment)
            self._loop.call_at(self._latest, self._arrive)

    def finish(self) -> None:
        """No more bytes set out; those on their way arrive."""
        self._latest = max(self._latest, self._loop.time() + self._link.rtt / 2)
        self._coming.append(None)
        self._loop.call_at(self._latest, self._arrive)

    def end(self) -> None:
        """No more bytes arrive."""
        self.ended = True
        self._wake()

    def _arrive(self) -> None:
        segment = self._coming.popleft()
        if self.ended or self.vanishes:
            return
        if segment is None:
            self.end()
            return
        passed, cut = self._link.count(len(segment), self._up)
        if passed:
            self._held.append(segment[:passed])
            self._deliver()
        if cut:
            self._link.cut(cut)

    def _deliver(self) -> None:
        while self._held and self._unread < _WINDOW:
            data = self._held.popleft()
            self.unsent -= len(data)
            self._unread += len(data)
            self._inbox.append(data)
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def read(self) -> bytes:
        """See `Stream.read`."""
        while not self._inbox:
            if self.ended:
                return b""
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        data = b"".join(self._inbox)
        self._inbox.clear()
        self._unread = 0
        self._deliver()
        return data


class _End:
    """One end of a connection in memory: a `Stream`."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming, self._outgoing, self._closed = incoming, outgoing, False

    @property
    def unsent(self) -> int:
        """See `Stream.unsent`."""
        return self._outgoing.unsent

    async def read(self) -> bytes:
        """See `Stream.read`."""
        return await self._incoming.read()

    def write(self, data: bytes) -> None:
        """See `Stream.write`."""
        if not self._closed and data:
            self._outgoing.push(data)

    def close(self) -> None:
        """See `Stream.close`."""
        if not self._closed:
            self._closed = True
            self._outgoing.finish()
            self._incoming.end()

    def abort(self) -> None:
        """See `Stream.abort`."""
        self._closed = True
        self._incoming.end()
        self._outgoing.end()


class Link:
    """A line.

    Args:
        rtt: seconds from one end to the other and back.
        jitter: the most seconds that a segment is later than that.
        rate: bytes per second each way; None: any.
        loss: the share of segments that get lost and are sent again.
        cuts: when it breaks.
        seed: of jitter and loss.
    """

    def __init__(
        self,
        *,
        rtt: float = 0.0,
        jitter: float = 0.0,
        rate: float | None = None,
        loss: float = 0.0,
        cuts: tuple[Cut, ...] = (),
        seed: int = 0,
    ) -> None:
        self.rtt, self.jitter, self.rate, self.loss = rtt, jitter, rate, loss
        self.bytes_up = self.bytes_down = self.connections = 0
        self._chance = random.Random(seed)
        self._cuts = list(cuts)
        self._pairs: list[tuple[_Pipe, _Pipe]] = []
        self._down_until = 0.0
        self._silent = False

    def delay(self) -> float:
        """Seconds that the next segment takes from end to end."""
        seconds = self.rtt / 2 + self.jitter * self._chance.random()
        while self.loss and self._chance.random() < self.loss:
            seconds += max(_LEAST_RETRANSMISSION, 2 * self.rtt)
        return seconds

    def count(self, size: int, up: bool) -> tuple[int, Cut | None]:
        """Bytes arrive. Returns how many still do, and the cut that comes after them, if one does."""
        before = self.bytes_up if up else self.bytes_down
        limits = [(cut.after_up if up else cut.after_down, cut) for cut in self._cuts]
        due = [(limit, cut) for limit, cut in limits if limit is not None and limit <= before + size]
        passed, cut = min(due, key=lambda pair: pair[0], default=(before + size, None))
        passed = max(0, passed - before)
        if up:
            self.bytes_up += passed
        else:
            self.bytes_down += passed
        return passed, cut

    def cut(self, cut: Cut) -> None:
        """Break all connections."""
        if cut in self._cuts:
            self._cuts.remove(cut)
        self._down_until = asyncio.get_running_loop().time() + cut.seconds
        self._silent = cut.silent
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for pipe in pair:
                pipe.vanishes = True
                if not cut.silent:
                    pipe.end()

    def _first_connection(self) -> None:
        loop = asyncio.get_running_loop()
        for cut in [cut for cut in self._cuts if cut.at is not None]:
            loop.call_at(loop.time() + cut.at, self.cut, cut)

    async def connect(self, accept: Callable[[Stream], object]) -> Stream:
        """A connection. `accept` is called with the server's end; the client's is returned.

        Raises:
            ConnectionError: the line is cut.
        """
        loop = asyncio.get_running_loop()
        if self.connections == 0:
            self._first_connection()
        self.connections += 1
        left = self._down_until - loop.time()
        if left > 0:
            await asyncio.sleep(max(left, self.rtt) if self._silent else self.rtt)
            raise ConnectionError("specdec_ops.remote: the line is cut")
        up, down = _Pipe(self, True), _Pipe(self, False)
        self._pairs.append((up, down))
        loop.call_at(loop.time() + self.rtt / 2, accept, _End(up, down))
        await asyncio.sleep(self.rtt)
        return _End(down, up)


@contextlib.asynccontextmanager
async def proxy(link: Link, host: str, port: int) -> AsyncIterator[int]:
    """A server on a free port of this machine that passes on to another one what a line lets through.

    Args:
        link: the line.
        host: of the other server.
        port: of the other server.

    Yields:
        the port.
    """
    tasks: set[asyncio.Task] = set()

    def start(coroutine) -> None:
        task = asyncio.ensure_future(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def pump(source: Stream, sink: Stream) -> None:
        while data := await source.read():
            sink.write(data)
        sink.close()

    async def serve(near: Stream) -> None:
        try:
            far = await connect(host, port)
            middle = await link.connect(lambda end: (start(pump(end, far)), start(pump(far, end))))
        except OSError:
            near.abort()
            return
        await asyncio.gather(pump(near, middle), pump(middle, near))

    server = await asyncio.start_server(lambda reader, writer: start(serve(TcpStream(reader, writer))), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
