"""`Line`: a client's way to its server, which may break at any time, and comes back by itself."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Awaitable, Callable

from . import wire
from .answer import Answer
from .connection import Connection
from .host_tree import HostTree
from .streams import Stream

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_MOST_SESSIONS_LOST = 8  # in a row, without a result between them
_MAX_BODY = 1 << 28
_AGAIN = ("busy", "session", "round")
"""Errors after which the text is opened again."""


class RemoteError(RuntimeError):
    """The server refuses what it is asked, for good.

    Attributes:
        code: see `wire.Error`.
    """

    def __init__(self, error: wire.Error) -> None:
        super().__init__(error.message)
        self.code = error.code


class Line:
    """Asks a server for rounds of one text at a time, over as many connections as it takes.

    Args:
        connect: makes a stream to the server.
        hello: of the client.
        silence: seconds without a byte after which a connection is given up, and a new one tried.
        frame_seconds: how long a frame may take from its first byte to its last.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Stream]],
        hello: wire.Hello,
        *,
        silence: float,
        frame_seconds: float = 30.0,
        make_key: Callable[[], bytes] = lambda: secrets.token_bytes(wire.KEY_BYTES),
    ) -> None:
        self._connect, self._hello, self._silence, self._frame_seconds = connect, hello, silence, frame_seconds
        self._make_key = make_key
        self._connection: Connection | None = None
        self._bound: bytes | None = None  # the session of the connection
        self.server: wire.Hello | None = None
        self.connections = 0

    async def hello(self) -> wire.Hello:
        """What the server says of itself; waits until there is one."""
        await self._try(self._connected)
        return self.server

    async def ask(self, answer: Answer, tree: HostTree) -> tuple[wire.Result, float]:
        """The result of a round, and the seconds from sending its tree to having it. Waits until there is one."""
        return await self._try(lambda: self._ask(answer, tree))

    async def _try(self, attempt: Callable[[], Awaitable]):
        """Repeat an attempt until no connection breaks in the middle of it."""
        pause, lost = _FIRST_PAUSE, 0
        while True:
            before = self.connections
            try:
                return await attempt()
            except ssl.SSLCertVerificationError:
                raise  # it won't get better
            except (OSError, asyncio.TimeoutError, wire.FrameError):
                self.close()
            except RemoteError as error:
                lost += 1
                self.close()
                if error.code not in _AGAIN or (error.code != "busy" and lost > _MOST_SESSIONS_LOST):
                    raise
            pause = _FIRST_PAUSE if self.connections > before and lost == 0 else min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _connected(self) -> Connection:
        if self._connection is not None and self._connection.is_open:
            return self._connection
        stream = await asyncio.wait_for(self._connect(), self._silence)
        self._bound = None
        self._connection = Connection(
            stream, max_body=_MAX_BODY, max_unsent=_MAX_BODY, frame_seconds=self._frame_seconds
        )
        self._connection.send(self._hello)
        hello = await self._receive()
        if not isinstance(hello, wire.Hello):
            raise wire.FrameError("specdec_ops.remote: a server's first frame must be a hello")
        self._check(hello)
        self.server = hello
        self.connections += 1
        return self._connection

    def _check(self, hello: wire.Hello) -> None:
        """The server is of this protocol, and what the client and its text need."""
        known = self._hello if self.server is None else self.server
        if hello.protocol != wire.PROTOCOL:
            message = f"protocol must be {wire.PROTOCOL}, got {hello.protocol} from the server"
            raise RemoteError(wire.Error("protocol", f"specdec_ops.remote.Client: {message}"))
        for name in ("model", "tokenizer", "draft"):
            ours, theirs = getattr(known, name), getattr(hello, name)
            if ours and theirs and ours != theirs:
                message = f"the server's {name} must be that of hash {ours[:12]}, got {theirs[:12]}"
                raise RemoteError(wire.Error(name, f"specdec_ops.remote.Client: {message}"))

    async def _receive(self) -> wire.Message:
        message = await self._connection.receive(self._silence)
        if isinstance(message, wire.Error):
            raise RemoteError(message)
        return message

    async def _ask(self, answer: Answer, tree: HostTree) -> tuple[wire.Result, float]:
        connection = await self._connected()
        await self._bind(answer)
        loop = asyncio.get_running_loop()
        sent = loop.time()
        connection.send(wire.Verify(answer.round + 1, len(answer.ids), tuple(tree.tokens), tuple(tree.parents)))
        while True:
            try:
                message = await self._receive()
            except RemoteError as error:
                if error.code in ("session", "round"):
                    answer.key = None
                raise
            if isinstance(message, wire.State):
                self._keep(answer, message)
            elif isinstance(message, wire.Result) and (message.round, message.length) == (
                answer.round + 1,
                len(answer.ids),
            ):
                return message, loop.time() - sent
            else:
                raise wire.FrameError(f"specdec_ops.remote: a {type(message).__name__} is not what was asked for")

    async def _bind(self, answer: Answer) -> None:
        """Let the connection be that of the answer's session; a new one, where the old one can't go on."""
        if answer.key is not None and self._bound == answer.key:
            return
        if self._bound is not None:
            self._connection.send(wire.Cancel())
            self._bound = None
        if answer.key is None or not await self._resume(answer):
            self._open(answer)
        self._bound = answer.key

    async def _resume(self, answer: Answer) -> bool:
        wanted = answer.states_end if self._wants_states else -1
        self._connection.send(wire.Resume(answer.key, answer.round, len(answer.ids), wanted))
        try:
            message = await self._receive()
        except RemoteError as error:
            if error.code != "session":
                raise
            return False
        if not isinstance(message, wire.Resume):
            raise wire.FrameError(f"specdec_ops.remote: a {type(message).__name__} is not what was asked for")
        if (message.round, message.length) == (answer.round, len(answer.ids)) or message.round == answer.round + 1:
            return True
        self._connection.send(wire.Cancel())  # the server is further than this client's saved state
        return False

    def _open(self, answer: Answer) -> None:
        """The text so far as a new session: its next token is the same, since that depends on seed and position."""
        sampling = answer.request.sampling
        answer.key, answer.round = self._make_key(), 0
        names = ("temperature", "top_p", "min_p")
        self._connection.send(
            wire.Open(
                answer.key,
                **{name: float(getattr(sampling, name)) for name in names},
                top_k=sampling.top_k,
                seed=sampling.seed,
                max_tokens=sampling.max_tokens - len(answer.request.tokens),
                eos=tuple(sorted(answer.request.eos)),
                logprobs=sampling.logprobs,
                states_from=answer.states_end if self._wants_states else -1,
                tokens=tuple(answer.ids),
            )
        )

    @property
    def _wants_states(self) -> bool:
        return self._hello.states != ""

    @staticmethod
    def _keep(answer: Answer, state: wire.State) -> None:
        if state.start > answer.states_end:
            raise wire.FrameError("specdec_ops.remote: states must follow one another")
        rows = state.rows[answer.states_end - state.start :]
        if len(rows):
            answer.states.append((answer.states_end, rows))
            answer.states_end += len(rows)

    def cancel(self) -> None:
        """The text is done with."""
        if self._connection is not None and self._bound is not None:
            self._connection.send(wire.Cancel())
        self._bound = None

    def close(self) -> None:
        """End the connection. The next question makes another one."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._bound = None, None
