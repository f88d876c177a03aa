"""`Server`: verifies what clients draft."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import hmac
import ipaddress
import logging
import ssl
from collections.abc import Callable

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.engine import Engine
from specdec_ops.decode.model import Model
from specdec_ops.decode.sampling import Sampling
from specdec_ops.drafts.base import Draft
from specdec_ops.tree import Tree

from . import wire
from .clock import Threaded, Work
from .connection import Ended
from .hashes import model_hash, tokenizer_hash
from .host_tree import HostTree
from .limits import Limits
from .sessions import ClientConnection, Session, WireDraft
from .streams import Stream, TcpStream

_OP = "remote.Server"
PORT = 7353
log = logging.getLogger("specdec_ops.remote")


class Refused(Exception):
    """A message that asks for what can't be; its session ends."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = wire.Error(code, f"specdec_ops.{_OP}: {message}")


class Server:
    """Verifies trees of many clients in common rounds of one engine.

    The engine's rule is "match": the token after a text depends on the text, the request's settings and its seed
    alone. So a round that is asked for twice, a session that is opened again with the text so far, and a server that
    was started anew all go on with the same tokens as if nothing had happened.

    Args:
        target: the model that verifies.
        token: the shared secret that clients have to say; None: none.
        limits: of sessions, nodes, bytes and time.
        states: True sends the target's rows to clients that ask for them. A draft that goes on from keys and values of
            all layers (MixtureOfAttentions) sends what it makes of those; clients need the same one. Texts that begin
            alike then share no pages.
        draft_hash: of the draft that clients have to have, "" if any will do.
        work: who runs the engine.
        options: of `Engine`: max_batch, max_length, pages, page_size, prefill_rows.

    Raises:
        TypeError, ValueError: as `Engine`.
    """

    def __init__(
        self,
        target: Model,
        *,
        token: str | None = None,
        limits: Limits | None = None,
        states: bool | Draft = False,
        draft_hash: str = "",
        work: Work | None = None,
        **options,
    ) -> None:
        self.limits = Limits() if limits is None else limits
        if not isinstance(self.limits, Limits):
            raise TypeError(argument_error(_OP, "limits", "a specdec_ops.remote.Limits or None", limits))
        if token is not None and not token:
            raise ValueError(argument_error(_OP, "token", "a text of at least one character, or None", token))
        if not isinstance(states, bool) and not (isinstance(states, Draft) and states.wants_layers):
            raise TypeError(argument_error(_OP, "states", "a bool, or a draft that wants layers", states))
        draft = WireDraft(self.limits.nodes, wants_hidden=states is not False)
        self._engine = Engine(target, draft, "match", adapt=False, **options)
        self._proposer = self._engine.proposer
        if isinstance(states, Draft):
            self._proposer.go_on_from_layers(self._engine.cache, states.states)
        self._token = None if token is None else _digest(token)
        self.hello = wire.Hello(
            model=model_hash(target),
            tokenizer=tokenizer_hash(target.tokenizer),
            draft=draft_hash,
            vocab=target.shape.vocab,
            eos=tuple(target.eos),
            max_length=self._engine.longest_text,
            max_nodes=self.limits.nodes,
            states="layers" if isinstance(states, Draft) else "hidden" if states else "",
        )
        self._work = Threaded() if work is None else work
        self._sessions: dict[bytes, Session] = {}
        self._by_number: dict[int, Session] = {}
        self._todo: collections.deque[Callable[[], None]] = collections.deque()  # before the next step of the engine
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()
        self._clients: set[ClientConnection] = set()
        self._rounds: asyncio.Task | None = None
        self._listening: list[asyncio.Server] = []

    @property
    def sessions(self) -> int:
        """Texts that it knows."""
        return len(self._sessions)

    @property
    def connections(self) -> int:
        """Clients that are there."""
        return len(self._clients)

    # Its life.

    async def __aenter__(self) -> Server:
        self._rounds = asyncio.ensure_future(self._run())
        self._tasks.add(self._rounds)
        return self

    async def __aexit__(self, *_) -> None:
        for server in self._listening:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._work.close()

    async def listen(self, host: str = "127.0.0.1", port: int = PORT, tls: ssl.SSLContext | None = None) -> int:
        """Take connections. Returns the port, which was chosen by the system if it was 0.

        Raises:
            ValueError: others than this machine can reach the address, and there is no token.
        """
        if self._token is None and not _is_loopback(host):
            raise ValueError(
                f"specdec_ops.{_OP}: token must be given where others than this machine can connect, "
                f"got None for host {host!r}"
            )
        server = await asyncio.start_server(
            lambda reader, writer: self.accept(TcpStream(reader, writer)), host, port, ssl=tls
        )
        self._listening.append(server)
        return server.sockets[0].getsockname()[1]

    async def serve(self) -> None:
        """Go on until something goes wrong."""
        await self._rounds

    def accept(self, stream: Stream) -> None:
        """Talk with who is at the other end of a stream."""
        task = asyncio.ensure_future(self._talk(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Rounds.

    async def _run(self) -> None:
        """Whatever has come while a step ran takes part in the next one. A step that fails ends the server."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._do()
                while self._engine.is_busy:
                    chunks = await self._work(self._engine.step)
                    self._send_states()
                    for chunk in chunks:
                        self._send_result(chunk)
                    self._do()
        except Exception:
            log.exception("specdec_ops.%s: a step of the engine has failed", _OP)
            for connection in list(self._clients):
                connection.abort()
            raise

    def _do(self) -> None:
        """What handlers of frames have left to be done while the engine rests."""
        while self._todo:
            self._todo.popleft()()

    def _later(self, action: Callable[[], None]) -> None:
        self._todo.append(action)
        self._wake.set()

    def _send_states(self) -> None:
        seen, self._proposer.seen = self._proposer.seen, []
        for number, start, rows in seen:
            session = self._by_number.get(number)
            state = session and session.keep_states(start, rows, self.limits.state_rows)
            if state is not None and session.connection is not None:
                session.connection.send(state)

    def _send_result(self, chunk) -> None:
        number = chunk.request
        self._engine.pause(number)
        request = self._proposer.requests.get(number)
        if chunk.result is not None:
            self._proposer.requests.pop(number, None)
        session = self._by_number.get(number)
        if session is None:
            return
        logprobs = ()
        if request is not None and request.sampling.logprobs and chunk.tokens:
            logprobs = tuple(request.logprobs[-len(chunk.tokens) :])
        if chunk.result is not None:
            del self._by_number[number]
            session.number, session.finish = None, chunk.result.finish_reason
        now = asyncio.get_running_loop().time()
        seconds = max(0.0, now - session.asked)
        session.result = wire.Result(session.round + 1, session.length, session.finish, seconds, chunk.tokens, logprobs)
        session.round += 1
        session.length += len(chunk.tokens)
        session.last = chunk.tokens[-1] if chunk.tokens else session.last
        session.asked = None
        if session.connection is not None:
            session.connection.send(session.result)

    # Connections.

    async def _talk(self, stream: Stream) -> None:
        limits = self.limits
        connection = ClientConnection(
            stream,
            max_body=limits.frame_bytes,
            max_unsent=limits.unsent_bytes,
            frame_seconds=limits.frame_seconds,
        )
        self._clients.add(connection)
        try:
            if len(self._clients) > limits.connections:
                raise Refused("busy", f"at most {limits.connections} connections are taken at once")
            self._greet(connection, await connection.receive(limits.hello_seconds))
            while connection.is_open:
                self._take(connection, await connection.receive(limits.idle_seconds))
        except Ended:
            pass
        except wire.FrameError as error:
            connection.send(wire.Error("frame", str(error)))
            self._forget(connection.session)
        except Refused as refused:
            connection.send(refused.error)
            self._forget(connection.session)
        finally:
            self._clients.discard(connection)
            self._leave(connection)
            connection.close()

    def _greet(self, connection: ClientConnection, hello: wire.Message) -> None:
        if not isinstance(hello, wire.Hello):
            raise Refused("protocol", "the first frame must be a hello")
        if self._token is not None and not hmac.compare_digest(_digest(hello.token), self._token):
            raise Refused("token", "the token is not the server's")
        if hello.protocol != wire.PROTOCOL:
            raise Refused("protocol", f"protocol must be {wire.PROTOCOL}, got {hello.protocol}")
        for name, what in (("model", "the model"), ("tokenizer", "the tokenizer"), ("draft", "the draft")):
            theirs, ours = getattr(hello, name), getattr(self.hello, name)
            if theirs and ours and theirs != ours:
                raise Refused(name, f"{what} must be the server's of hash {ours[:12]}, got {theirs[:12]}")
        if hello.states and self.hello.states and hello.states != self.hello.states:
            raise Refused("states", f"states must be those of kind {self.hello.states}, got {hello.states}")
        connection.send(self.hello)

    def _take(self, connection: ClientConnection, message: wire.Message) -> None:
        session = connection.session
        if isinstance(message, wire.Open):
            self._open(connection, message)
        elif isinstance(message, wire.Resume):
            self._resume(connection, message)
        elif isinstance(message, wire.Verify):
            if session is None or session.connection is not connection:
                raise Refused("session", "this connection has no session")
            self._touch(session)
            self._verify(session, message)
        elif isinstance(message, wire.Cancel):
            self._forget(session)
            connection.session = None
        else:
            raise Refused("protocol", f"a {type(message).__name__.lower()} is nothing that a client sends")

    def _open(self, connection: ClientConnection, asked: wire.Open) -> None:
        if asked.states_from >= 0 and not self.hello.states:
            raise Refused("request", "this server sends no states")
        if asked.key in self._sessions:
            raise Refused("session", "there is a session of this key")
        try:
            prompt = self._engine.encode(asked.tokens)
            names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "eos", "logprobs")
            sampling = Sampling(**{name: getattr(asked, name) for name in names})
        except (TypeError, ValueError) as error:
            raise Refused("request", str(error)) from error
        self._leave(connection)
        self._make_room()
        session = Session(asked.key, len(prompt), prompt[-1])
        if asked.states_from >= 0:
            session.states, session.states_end = collections.deque(), asked.states_from
        self._sessions[session.key] = session
        self._bind(connection, session)

        def submit() -> None:
            if session.key in self._sessions:
                session.number = self._engine.submit(prompt, sampling)
                self._engine.pause(session.number)
                self._by_number[session.number] = session

        self._later(submit)

    def _make_room(self) -> None:
        """For one more session."""
        if len(self._sessions) < self.limits.sessions:
            return
        alone = [session for session in self._sessions.values() if session.connection is None]
        if not alone:
            raise Refused("busy", f"at most {self.limits.sessions} sessions are taken at once")
        self._forget(min(alone, key=lambda session: session.used))

    def _resume(self, connection: ClientConnection, asked: wire.Resume) -> None:
        session = self._sessions.get(asked.key)
        states = None if session is None else session.states_since(asked.states_from)
        if session is None or states is None:
            self._forget(session)  # its client lacks what is gone, and opens the text again
            connection.send(wire.Error("session", f"specdec_ops.{_OP}: there is no session of this key to go on with"))
            return
        self._leave(connection)
        self._bind(connection, session)
        connection.send(wire.Resume(session.key, session.round, session.length, asked.states_from))
        for state in states:
            connection.send(state)

    def _verify(self, session: Session, asked: wire.Verify) -> None:
        if asked.round == session.round and session.result is not None:
            session.connection.send(session.result)  # it was lost on the way
            return
        if asked.round != session.round + 1:
            raise Refused("round", f"round must be {session.round + 1}, or {session.round} again, got {asked.round}")
        if session.asked is not None:
            return  # it is being verified
        if session.finish:
            raise Refused("round", "the text has ended")
        if asked.length != session.length:
            raise Refused("round", f"length must be {session.length}, got {asked.length}")
        tree = self._checked_tree(session, asked)
        session.asked = asyncio.get_running_loop().time()
        if session.states is not None:  # who asks has the last result, and what came before it
            session.states.clear()

        def propose() -> None:
            if session.number is not None:
                self._proposer.trees[session.number] = tree
                self._engine.resume(session.number)

        self._later(propose)

    def _checked_tree(self, session: Session, asked: wire.Verify) -> HostTree:
        most, vocab = self.limits.nodes, self.hello.vocab
        if not 1 <= len(asked.tokens) <= most or len(asked.parents) != len(asked.tokens):
            raise Refused("request", f"a tree must have from 1 to {most} nodes, each with a parent")
        if asked.tokens[0] != session.last or not all(0 <= token < vocab for token in asked.tokens):
            raise Refused("request", f"a tree must begin with the text's last token, and have ids below {vocab}")
        if asked.parents[0] != -1 or any(not 0 <= p < node for node, p in enumerate(asked.parents[1:], 1)):
            raise Refused("request", "a tree must have one root, and parents before their children")
        Tree.from_parents(asked.parents)
        return HostTree(list(asked.tokens), list(asked.parents))

    # Sessions.

    def _bind(self, connection: ClientConnection, session: Session) -> None:
        """From now on the session's client is at this connection. An older one has nothing to say any more."""
        if session.connection is not None:
            old = session.connection
            old.session = None
            old.close()
        session.connection, connection.session = connection, session
        self._touch(session)

    def _leave(self, connection: ClientConnection) -> None:
        """The connection's session stays behind without a client."""
        session, connection.session = connection.session, None
        if session is not None and session.connection is connection:
            session.connection = None

    def _touch(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        session.used = loop.time()
        if session.timer is None:
            session.timer = loop.call_later(self.limits.session_seconds, self._look_at, session)

    def _look_at(self, session: Session) -> None:
        """Forget a session that has not been used for long."""
        loop = asyncio.get_running_loop()
        left = session.used + self.limits.session_seconds - loop.time()
        session.timer = None
        if left <= 0:
            self._forget(session)
        elif self._sessions.get(session.key) is session:
            session.timer = loop.call_later(left, self._look_at, session)

    def _forget(self, session: Session | None) -> None:
        if session is None or self._sessions.get(session.key) is not session:
            return
        del self._sessions[session.key]
        if session.timer is not None:
            session.timer.cancel()
        if session.connection is not None:
            session.connection.session = None
            session.connection = None

        def cancel() -> None:
            if session.number is not None:
                self._by_number.pop(session.number, None)
                self._proposer.trees.pop(session.number, None)
                self._engine.cancel(session.number)
                session.number = None

        self._later(cancel)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
