"""`Client`: drafts, asks the server, and goes on alone while it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from specdec_ops._core.checks import argument_error, is_int, is_number
from specdec_ops.decode.model import Model
from specdec_ops.decode.sampling import Sampling
from specdec_ops.decode.text import Tokenizer
from specdec_ops.drafts.base import Draft

from . import wire
from .answer import Answer, Piece, RemoteResult
from .clock import Threaded, Work
from .drafter import Drafter, FarTarget
from .hashes import model_hash, tokenizer_hash
from .host_tree import HostTree
from .line import Line
from .pacing import Pacing
from .service import PORT
from .streams import Stream, connect

_OP = "remote.Client"
ON_RETURN = ("rollback", "keep")


class Client:
    """Decodes with a draft that is here and a target that is at a server.

    What it says is what the target would say with rule "match", token for token, for any draft: verified tokens come
    from the server alone. If that does not answer for `deadline` seconds, the draft goes on by itself, and what it says
    is marked as unverified. When the server is back, it verifies those tokens first. With on_return="rollback" they
    stay as far as it agrees, so that the text is the target's again; with "keep" they all stay, which is lossy, and
    those that the target would not have said are reported.

    Args:
        host, port: of the server.
        draft: from `specdec_ops.drafts`; None lets the server say one token after another.
        target: for drafts that use parts of it (Eagle and MixtureOfAttentions: embedding, norm and head).
        tokenizer: for prompts and texts; by default that of target.
        token: the server's shared secret.
        tls: to connect with TLS.
        deadline: seconds without an answer after which the draft goes on alone.
        give_up: seconds without an answer after which an answer that can't grow any more is handed out as it is.
        silence: seconds without a byte after which a connection is taken for broken.
        on_return: "rollback" or "keep".
        draft_hash: of a draft that the server has to know, see `specdec_ops.remote.hashes.draft_hash`.
        connect: makes a stream to the server, in place of host, port and tls.
        work: who runs the draft.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = PORT,
        draft: Draft | None = None,
        *,
        target: Model | None = None,
        tokenizer: Tokenizer | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        deadline: float = 2.0,
        give_up: float = 60.0,
        silence: float = 10.0,
        on_return: str = "rollback",
        draft_hash: str = "",
        connect: Callable[[], Awaitable[Stream]] | None = None,
        work: Work | None = None,
    ) -> None:
        if draft is not None and not isinstance(draft, Draft):
            raise TypeError(argument_error(_OP, "draft", "a specdec_ops.drafts.Draft or None", draft))
        for name, value in (("deadline", deadline), ("give_up", give_up), ("silence", silence)):
            if not is_number(value):
                raise TypeError(argument_error(_OP, name, "a number", value))
            if not value > 0:
                raise ValueError(argument_error(_OP, name, "above 0", value))
        if on_return not in ON_RETURN:
            raise ValueError(argument_error(_OP, "on_return", "'rollback' or 'keep'", on_return))
        self.draft, self._target, self._on_return = draft, target, on_return
        self._tokenizer = target.tokenizer if tokenizer is None and target is not None else tokenizer
        self._deadline, self._give_up, self._silence = deadline, give_up, silence
        self._connect = connect or (lambda: _connect(host, port, tls))
        self._hello = wire.Hello(
            token=token or "",
            model="" if target is None else model_hash(target),
            tokenizer=tokenizer_hash(self._tokenizer),
            draft=draft_hash,
            states="" if draft is None else "hidden" if draft.wants_hidden else "layers" if draft.wants_layers else "",
        )
        self._work = Threaded() if work is None else work

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_) -> None:
        self._work.close()

    async def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> RemoteResult:
        """The whole answer to a prompt. Any number may be awaited at once; each has a connection of its own.

        Args:
            prompt: a string or token ids.
            sampling: greedy by default.

        Raises:
            TypeError, ValueError: the prompt is none, or the draft does not fit the target.
            RemoteError: the server refuses.
            ConnectionError: there was no server for `give_up` seconds.
        """
        async with contextlib.aclosing(self.stream(prompt, sampling)) as pieces:
            async for piece in pieces:
                result = piece.result
        return result

    async def stream(
        self, prompt: str | Sequence[int], sampling: Sampling | None = None, *, save: str | os.PathLike | None = None
    ) -> AsyncIterator[Piece]:
        """Pieces of the answer as they come.

        Args:
            prompt: see `generate`.
            sampling: see `generate`.
            save: a file that always has what `resume` needs, written before each piece is handed out.

        Raises:
            As `generate`.
        """
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise TypeError(argument_error(_OP, "sampling", "a specdec_ops.decode.Sampling", sampling))
        if sampling.stop and self._tokenizer is None:
            raise ValueError(f"specdec_ops.{_OP}: stop must be empty for a client without a tokenizer")
        ids = self._encode(prompt)
        line = self._line()
        try:
            hello = await asyncio.wait_for(line.hello(), self._give_up)
        except asyncio.TimeoutError:
            line.close()
            raise ConnectionError(f"specdec_ops.{_OP}: no server answered for {self._give_up:g} seconds") from None
        except BaseException:
            line.close()
            raise
        if not ids or not all(0 <= token < hello.vocab for token in ids) or len(ids) >= hello.max_length:
            line.close()
            raise ValueError(
                f"specdec_ops.{_OP}: prompt must have from 1 to {hello.max_length - 1} tokens, all ids below "
                f"{hello.vocab}"
            )
        async for piece in self._go_on(Answer(ids, sampling, hello, self._tokenizer), line, save):
            yield piece

    async def resume(self, saved: str | os.PathLike) -> AsyncIterator[Piece]:
        """Go on with an answer that another client has saved; its first piece has all of the answer so far.

        Args:
            saved: the file, which is kept up to date.

        Raises:
            ValueError: the file holds no answer.
            As `generate`.
        """
        answer, line = Answer.load(saved, self._tokenizer), self._line()
        line.server = answer.hello
        async for piece in self._go_on(answer, line, saved):
            yield piece

    def _line(self) -> Line:
        return Line(self._connect, self._hello, silence=self._silence)

    def _encode(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise TypeError(argument_error(_OP, "prompt", "token ids for a client without a tokenizer", prompt))
            return list(self._tokenizer.encode(prompt))
        ids = list(prompt)
        if not all(map(is_int, ids)):
            raise TypeError(argument_error(_OP, "prompt", "a string or a sequence of token ids", prompt))
        return ids

    async def _go_on(self, answer: Answer, line: Line, save) -> AsyncIterator[Piece]:
        talk = _Talk(self, answer, line)

        def piece(*, last: bool = False) -> Piece:
            if save is not None:
                answer.save(save)
            return answer.piece(last=last)

        try:
            if answer.request.tokens or answer.unverified:
                yield piece()
            while not answer.is_finished:
                async with contextlib.aclosing(talk.round()) as events:
                    async for _ in events:
                        if not answer.is_finished:
                            yield piece()
            line.cancel()
            yield piece(last=True)
        finally:
            line.close()
            await talk.close()


class _Talk:
    """The rounds of one answer."""

    def __init__(self, client: Client, answer: Answer, line: Line) -> None:
        self._client, self._answer, self._line = client, answer, line
        self._drafter: Drafter | None = None
        if client.draft is not None:
            target = FarTarget(answer.hello, client._tokenizer) if client._target is None else client._target
            self._drafter = Drafter(client.draft, target, answer.request.sampling, answer.hello.max_length)
        self._pacing = Pacing(1 if self._drafter is None else self._drafter.max_levels)
        self._ahead: tuple[list[int], HostTree] | None = None  # a text as it may be, and a tree after it

    async def close(self) -> None:
        """Give the draft's memory back."""
        if self._drafter is not None:
            await self._client._work(self._drafter.close)

    async def round(self) -> AsyncIterator[None]:
        """Draft, ask, and meanwhile draft on. Yields whenever the answer has something new."""
        answer, client = self._answer, self._client
        loop = asyncio.get_running_loop()
        tree, was_ready = await self._next_tree()
        connections = self._line.connections
        asked = asyncio.ensure_future(self._line.ask(answer, tree))
        began = loop.time()
        try:
            if self._may_draft_ahead(tree):
                await self._draft_ahead(tree)
            await asyncio.wait({asked}, timeout=max(0.0, began + client._deadline - loop.time()))
            if not asked.done():
                async for _ in self._alone(tree, asked):
                    yield
                left = began + client._give_up - loop.time()
                await asyncio.wait({asked}, timeout=max(0.0, left))
            if not asked.done():
                answer.request.finish("disconnected")
                return
            result, seconds = asked.result()
        finally:
            if not asked.done():
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
        stats = answer.stats
        accepted = len(tree.walk(result.tokens)) - 1
        levels = len(tree.likeliest())
        self._pacing.waited(seconds, result.seconds)
        self._pacing.judged(levels, accepted, was_ready)
        stats.calls += 1
        stats.drafted += len(tree.tokens) - 1
        stats.accepted += accepted
        stats.ahead += was_ready
        stats.reconnections += self._line.connections - connections
        answer.take(result, client._on_return)
        yield

    async def _next_tree(self) -> tuple[HostTree, bool]:
        """The next tree to be verified, and whether it was ready."""
        answer, drafter = self._answer, self._drafter
        most = answer.hello.max_nodes
        if answer.unverified or drafter is None:
            return HostTree.chain([answer.ids[-1], *answer.unverified][:most]), False
        if self._ahead is not None:
            text, tree = self._ahead
            self._ahead = None
            if answer.ids[: len(text)] == text:
                path = tree.walk(answer.ids[len(text) :])
                if len(path) - 1 == len(answer.ids) - len(text) > 0:
                    tree = tree.below(path[-1])
                    if len(tree.tokens) > 1:
                        return tree.first(most), True
        levels = self._pacing.levels()
        tree = await self._draft(answer.ids, levels)
        return tree.first(most), False

    async def _draft(self, ids: list[int], levels: int | None = None) -> HostTree:
        loop, drafter, answer = asyncio.get_running_loop(), self._drafter, self._answer
        states, answer.states = answer.states, []
        began = loop.time()
        tree = await self._client._work(_draft, drafter, states, list(ids), levels, self._pacing.seconds())
        self._pacing.drafted(len(tree.likeliest()), loop.time() - began)
        return tree

    def _may_draft_ahead(self, tree: HostTree) -> bool:
        return (
            self._drafter is not None
            and self._drafter.goes_on_alone
            and not self._answer.unverified
            and self._pacing.drafts_ahead()
        )

    async def _draft_ahead(self, tree: HostTree) -> None:
        """Guess that the draft is right so far, and draft what comes then: its first level guesses the next token."""
        text = [*self._answer.ids, *tree.likeliest()]
        if len(text) < self._answer.hello.max_length:
            levels = min(self._pacing.levels() + 1, self._drafter.max_levels)
            self._ahead = text, await self._draft(text, levels)

    async def _alone(self, tree: HostTree, asked: asyncio.Future) -> AsyncIterator[None]:
        """The draft goes on by itself until the server answers, or the answer ends, or it knows nothing more."""
        answer = self._answer
        self._ahead = None
        if self._drafter is None:
            return
        guessed = [] if answer.unverified else tree.likeliest()
        while not asked.done():
            if not guessed and self._drafter.goes_on_alone and answer.room():
                guessed = (await self._draft([*answer.ids, *answer.unverified])).likeliest()
            if asked.done() or not answer.guess(guessed):
                return
            guessed = []
            yield
            await asyncio.sleep(0)


def _draft(drafter: Drafter, states, ids: list[int], levels: int | None, seconds) -> HostTree:
    for start, rows in states:
        drafter.take_states(start, rows)
    return drafter.propose(ids, levels, seconds)


async def _connect(host: str, port: int, tls: ssl.SSLContext | None) -> Stream:
    return await connect(host, port, tls)
