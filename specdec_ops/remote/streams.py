"""What frames travel on: bytes in their order, both ways. Over TCP here; in memory in link.py."""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol

_CHUNK = 1 << 16


class Stream(Protocol):
    """One end of a connection."""

    @property
    def unsent(self) -> int:
        """Bytes that have been written and that the other end has not taken yet, as far as this end knows."""
        ...

    async def read(self) -> bytes:
        """Some of the bytes that have come, at least one; b"" once none will come any more, for whatever reason."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes. On a connection that has ended they are lost, as they would be on the way."""
        ...

    def close(self) -> None:
        """Send what was written, then end the connection."""
        ...

    def abort(self) -> None:
        """End the connection now; what is unsent is lost."""
        ...


class TcpStream:
    """A `Stream` over TCP, with TLS or without."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @property
    def unsent(self) -> int:
        """Bytes that the system has not taken yet."""
        return self._writer.transport.get_write_buffer_size()

    async def read(self) -> bytes:
        """See `Stream.read`."""
        try:
            return await self._reader.read(_CHUNK)
        except (OSError, ssl.SSLError):
            return b""

    def write(self, data: bytes) -> None:
        """See `Stream.write`."""
        if not self._writer.is_closing():
            self._writer.write(data)

    def close(self) -> None:
        """See `Stream.close`."""
        self._writer.close()

    def abort(self) -> None:
        """See `Stream.abort`."""
        self._writer.transport.abort()


async def connect(host: str, port: int, tls: ssl.SSLContext | None = None) -> TcpStream:
    """A connection to a server.

    Raises:
        OSError: there is none to be had.
    """
    return TcpStream(*await asyncio.open_connection(host, port, ssl=tls))
