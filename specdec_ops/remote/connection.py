"""`Connection`: frames over a stream, each within bounds of bytes and time."""

from __future__ import annotations

import asyncio

from . import wire
from .streams import Stream


class Ended(ConnectionError):
    """The other end is gone, or too slow."""


class Connection:
    """Sends messages and receives them, one at a time.

    Args:
        stream: that the frames travel on.
        max_body: the longest body of a frame that comes in, in bytes.
        max_unsent: bytes that may wait for a slow reader; with more the connection ends.
        frame_seconds: how long a frame may take from its first byte to its last.
    """

    def __init__(self, stream: Stream, *, max_body: int, max_unsent: int, frame_seconds: float = 30.0) -> None:
        self.stream = stream
        self._max_body, self._max_unsent, self._frame_seconds = max_body, max_unsent, frame_seconds
        self._came = bytearray()
        self.is_open = True

    async def receive(self, seconds: float | None = None) -> wire.Message:
        """The next message.

        Args:
            seconds: how long its first byte may take; None: as long as it likes.

        Raises:
            Ended: the connection is over, or time is.
            FrameError: what came is no message. Nothing that comes after it can be read.
        """
        await self._fill(1, seconds)
        until = asyncio.get_running_loop().time() + self._frame_seconds
        await self._fill(wire.PREFIX_BYTES, self._frame_seconds)
        header, body = wire.lengths(bytes(self._came[: wire.PREFIX_BYTES]), self._max_body)
        start, middle = wire.PREFIX_BYTES, wire.PREFIX_BYTES + header
        end = middle + body
        await self._fill(end, until - asyncio.get_running_loop().time())
        message = wire.decode(bytes(self._came[start:middle]), bytes(self._came[middle:end]))
        del self._came[:end]
        return message

    async def _fill(self, count: int, seconds: float | None) -> None:
        """Wait until `count` bytes are there."""
        if len(self._came) >= count:
            return
        until = None if seconds is None else asyncio.get_running_loop().time() + seconds
        while len(self._came) < count:
            left = None if until is None else until - asyncio.get_running_loop().time()
            try:
                came = await (self.stream.read() if left is None else asyncio.wait_for(self.stream.read(), left))
            except asyncio.TimeoutError:
                raise Ended("specdec_ops.remote: the other end took too long") from None
            if not came:
                raise Ended("specdec_ops.remote: the other end is gone")
            self._came += came

    def send(self, message: wire.Message) -> None:
        """Send a message, unless the connection is over. A reader that is too slow loses it."""
        if not self.is_open:
            return
        self.stream.write(wire.encode(message))
        if self.stream.unsent > self._max_unsent:
            self.abort()

    def close(self) -> None:
        """Send what was sent, then end."""
        if self.is_open:
            self.is_open = False
            self.stream.close()

    def abort(self) -> None:
        """End now."""
        if self.is_open:
            self.is_open = False
            self.stream.abort()
