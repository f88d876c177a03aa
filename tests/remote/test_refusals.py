"""What a server refuses, in one sentence, and that nobody else notices."""

import asyncio
import dataclasses

import pytest

pytest.importorskip("msgpack", reason="the extra remote has it")

from specdec_ops.decode import Sampling
from specdec_ops.remote import Client, Limits, Link, RemoteError, Server, wire
from specdec_ops.remote.clock import Inline, run
from specdec_ops.remote.connection import Connection, Ended
from tests.harness.tiny_models import make_decoder
from tests.remote.talks import DRAFTS, PROMPT, TARGET, by_hand, client, local, opened, server, verify

GREEDY = Sampling(max_tokens=20, eos=())
TEXT = local(PROMPT, GREEDY).tokens


class Words:
    """A tokenizer with a vocabulary."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return " ".join(self.words[token] for token in ids)


HELLOS = {
    "wrong token": (wire.Hello(token="guess"), "token", "the token is not the server's"),
    "no token": (wire.Hello(), "token", "the token is not the server's"),
    "wrong protocol": (wire.Hello(protocol=2, token="secret"), "protocol", "protocol must be 1, got 2"),
    "wrong model": (wire.Hello(token="secret", model="x" * 64), "model", "the model must be the server's of hash"),
    "wrong tokenizer": (
        wire.Hello(token="secret", tokenizer="x" * 64),
        "tokenizer",
        "the tokenizer must be the server",
    ),
    "wrong draft": (wire.Hello(token="secret", draft="x" * 64), "draft", "the draft must be the server's of hash"),
    "no hello": (wire.Cancel(), "protocol", "the first frame must be a hello"),
}


@pytest.mark.parametrize("name", HELLOS)
def test_wrong_hellos_are_refused(name):
    hello, code, sentence = HELLOS[name]

    async def talk():
        target = dataclasses.replace(TARGET, tokenizer=Words("a", "b"))
        async with server(target, token="secret", draft_hash="d" * 64) as there, by_hand(there) as connection:
            connection.send(hello)
            error = await connection.receive()
            with pytest.raises(Ended):
                await connection.receive()
            return error, there.hello

    error, of_server = run(talk())
    assert isinstance(error, wire.Error) and error.code == code and sentence in error.message
    if code == "token":
        assert not any(getattr(of_server, what)[:12] in error.message for what in ("model", "tokenizer", "draft"))


WRONG_CLIENTS = {
    "token": ({"token": "guess"}, "the token is not the server's"),
    "model": ({"target": make_decoder(2)}, "the model must be the server's of hash"),
    "tokenizer": ({"tokenizer": Words("b", "a")}, "the tokenizer must be the server's of hash"),
    "draft": ({"draft_hash": "x" * 64}, "the draft must be the server's of hash"),
}


@pytest.mark.parametrize("code", WRONG_CLIENTS)
def test_a_client_that_is_refused_says_why(code):
    options, sentence = WRONG_CLIENTS[code]

    async def talk():
        target = dataclasses.replace(TARGET, tokenizer=Words("a", "b"))
        async with server(target, token="secret", draft_hash="d" * 64) as there:
            await client(Link(), there, **{"token": "secret"} | options).generate(PROMPT, GREEDY)

    with pytest.raises(RemoteError, match=sentence) as caught:
        run(talk())
    assert caught.value.code == code


def frames_that_end_a_session():
    first = verify(1, PROMPT)
    yield "round skipped", dataclasses.replace(first, round=3), "round", "round must be 1, or 0 again, got 3"
    yield "round 0", dataclasses.replace(first, round=0), "round", "round must be 1, or 0 again, got 0"
    yield "another length", dataclasses.replace(first, length=5), "round", "length must be 8, got 5"
    yield "no nodes", wire.Verify(1, 8, (), ()), "request", "from 1 to 64 nodes"
    yield "too many nodes", verify(1, PROMPT, *range(30), *range(40)), "request", "from 1 to 64 nodes"
    yield "a parent too few", wire.Verify(1, 8, (3, 4), (-1,)), "request", "each with a parent"
    yield "another root", wire.Verify(1, 8, (4,), (-1,)), "request", "begin with the text's last token"
    yield "an id too high", verify(1, PROMPT, 40), "request", "ids below 40"
    yield "a negative id", verify(1, PROMPT, -1), "request", "ids below 40"
    yield "two roots", wire.Verify(1, 8, (3, 4), (-1, -1)), "request", "one root, and parents before"
    yield "a circle", wire.Verify(1, 8, (3, 4, 5), (-1, 2, 1)), "request", "parents before their children"
    yield "its own parent", wire.Verify(1, 8, (3, 4), (-1, 1)), "request", "parents before their children"
    yield "a parent too high", wire.Verify(1, 8, (3, 4), (-1, 2**31 - 1)), "request", "parents before their children"
    yield "another hello", wire.Hello(), "protocol", "a hello is nothing that a client sends"
    yield "a result", wire.Result(1, 8, "", 0.0, (1,)), "protocol", "a result is nothing that a client sends"
    yield "an error", wire.Error("", ""), "protocol", "an error is nothing that a client sends"
    yield "the same key", opened(), "session", "there is a session of this key"
    yield "states", opened(b"o" * 16, states_from=0), "request", "this server sends no states"
    yield "no prompt", opened(b"o" * 16, tokens=()), "request", "prompt must have at least one token"
    yield "a long prompt", opened(b"o" * 16, tokens=(1,) * 128), "request", "prompt must have fewer than 128 tokens"
    yield "a prompt too high", opened(b"o" * 16, tokens=(40,)), "request", "all ids below 40"
    yield "a top_p of 2", opened(b"o" * 16, top_p=2.0), "request", "top_p must be from 0 to 1"
    yield "no tokens", opened(b"o" * 16, max_tokens=0), "request", "max_tokens must be from 1"


REFUSED = {name: rest for name, *rest in frames_that_end_a_session()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_frame_ends_its_session_and_no_other(name):
    frame, code, sentence = REFUSED[name]

    async def talk():
        async with (
            server() as there,
            by_hand(there, hello=wire.Hello()) as bad,
            by_hand(there, hello=wire.Hello()) as good,
        ):
            bad.send(opened())
            good.send(opened(b"g" * 16))
            good.send(verify(1, PROMPT))
            assert (await good.receive()).tokens == tuple(TEXT[:1])
            assert there.sessions == 2
            bad.send(frame)
            error = await bad.receive()
            with pytest.raises(Ended):
                await bad.receive()
            assert there.sessions == 1
            good.send(verify(2, [*PROMPT, TEXT[0]], *TEXT[1:5]))
            return error, await good.receive()

    error, result = run(talk())
    assert error.code == code and sentence in error.message.replace("a error", "an error")
    assert error.message.startswith("specdec_ops.") and "\n" not in error.message
    assert result.tokens == tuple(TEXT[1:6]), "the other session goes on"


def test_what_is_no_frame_ends_its_session_and_no_other():
    async def talk():
        async with (
            server(limits=Limits(frame_bytes=1000)) as there,
            by_hand(there, hello=wire.Hello()) as good,
        ):
            good.send(opened(b"g" * 16))
            for data in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"\xff" * 100,
                b"\x01\x00\x00\x00\xe9\x03\x00\x00\x80",
                b"\x00" * 8,
            ):
                async with by_hand(there, hello=wire.Hello()) as bad:
                    bad.send(opened())
                    bad.stream.write(data)
                    error = await bad.receive()
                    assert error.code == "frame" and error.message.startswith("specdec_ops.remote: a frame's")
                    with pytest.raises(Ended):
                        await bad.receive()
            assert there.sessions == 1
            good.send(verify(1, PROMPT, *TEXT[:3]))
            assert (await good.receive()).tokens == tuple(TEXT[:4])

    run(talk())


# Rounds that are asked for again.


def test_a_repeated_round_gives_the_same_result_and_no_work():
    async def talk():
        async with server() as there, by_hand(there, hello=wire.Hello()) as connection:
            steps, step = [], there._engine.step
            there._engine.step = lambda: steps.append(0) or step()
            connection.send(opened())
            connection.send(verify(1, PROMPT, *TEXT[:2]))
            first = await connection.receive()
            done = len(steps)
            for again in (verify(1, PROMPT, *TEXT[:2]), verify(1, PROMPT, 9, 9, 9), verify(1, PROMPT)):
                connection.send(again)
                assert await connection.receive() == first, "whatever it says the second time"
            assert len(steps) == done
            text = [*PROMPT, *first.tokens]
            for _ in range(5):  # while it is being verified
                connection.send(verify(2, text, *TEXT[3:5]))
            second = await connection.receive()
            assert second.round == 2 and second.tokens == tuple(TEXT[3:6])
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(connection.receive(), 10.0)
            connection.send(verify(1, PROMPT))
            return await connection.receive()

    assert run(talk()).message.endswith("round must be 3, or 2 again, got 1"), "older ones are refused"


def test_a_round_goes_on_over_another_connection():
    """The newest connection gets the result; the older one is closed, and may not go on."""

    async def talk():
        async with (
            server() as there,
            by_hand(there, hello=wire.Hello()) as old,
            by_hand(there, hello=wire.Hello()) as new,
        ):
            old.send(opened())
            old.send(verify(1, PROMPT))
            await asyncio.sleep(0)
            new.send(wire.Resume(b"k" * 16, 0, len(PROMPT), -1))
            assert await new.receive() == wire.Resume(b"k" * 16, 0, len(PROMPT), -1)
            result = await new.receive()
            with pytest.raises(Ended):
                await old.receive()
            new.send(wire.Resume(b"?" * 16, 0, len(PROMPT), -1))
            error = await new.receive()
            assert (error.code, there.sessions) == ("session", 1) and new.is_open
            return result

    assert run(talk()).tokens == tuple(TEXT[:1])


def test_a_text_that_has_ended_gives_its_last_result_again():
    async def talk():
        async with server() as there, by_hand(there, hello=wire.Hello()) as connection:
            connection.send(opened(max_tokens=2))
            connection.send(verify(1, PROMPT, *TEXT[:5]))
            first = await connection.receive()
            assert (first.tokens, first.finish) == (tuple(TEXT[:2]), "length")
            connection.send(verify(1, PROMPT))
            assert await connection.receive() == first
            connection.send(verify(2, [*PROMPT, *TEXT[:2]]))
            return await connection.receive()

    assert run(talk()).message.endswith("the text has ended")


def test_a_session_that_is_cancelled_gives_its_pages_back():
    async def talk():
        async with server() as there, by_hand(there, hello=wire.Hello()) as connection:
            for cancel_at_once in (True, False):
                connection.send(opened())
                connection.send(verify(1, PROMPT))
                if not cancel_at_once:
                    await connection.receive()
                connection.send(wire.Cancel())
                await asyncio.sleep(1.0)
                assert there.sessions == 0 and there._engine.is_idle
                pool = there._engine.cache.pool
                assert pool.free == pool.pages
            connection.send(verify(1, PROMPT))
            return await connection.receive()

    assert run(talk()).message.endswith("this connection has no session")


# Bounds.


def test_sessions_have_a_bound_and_those_without_a_client_make_room():
    async def talk():
        async with server(limits=Limits(sessions=2)) as there:
            async with by_hand(there, hello=wire.Hello()) as left:
                left.send(opened(b"l" * 16))
                await asyncio.sleep(1.0)
            async with by_hand(there, hello=wire.Hello()) as first, by_hand(there, hello=wire.Hello()) as second:
                first.send(opened(b"1" * 16))
                second.send(opened(b"2" * 16))
                await asyncio.sleep(1.0)
                assert there.sessions == 2, "the one that was left alone made room"
                async with by_hand(there, hello=wire.Hello()) as third:
                    third.send(opened(b"3" * 16))
                    error = await third.receive()
                    assert error.code == "busy" and "at most 2 sessions are taken at once" in error.message
                first.send(verify(1, PROMPT))
                assert (await first.receive()).tokens == tuple(TEXT[:1])

    run(talk())


def test_a_client_that_finds_no_room_comes_back():
    async def talk():
        async with server(limits=Limits(sessions=1)) as there:
            clients = [client(Link(rtt=0.1), there, DRAFTS["n-gram"], deadline=100.0) for _ in range(3)]
            return await asyncio.gather(*(one.generate(PROMPT, GREEDY) for one in clients))

    assert [result.tokens for result in run(talk())] == [TEXT] * 3


def test_connections_have_a_bound():
    async def talk():
        async with server(limits=Limits(connections=2)) as there:
            first, second = (by_hand(there, hello=wire.Hello()) for _ in range(2))
            async with first, second, by_hand(there) as third:
                error = await third.receive()
                assert error.code == "busy" and "at most 2 connections" in error.message
            await asyncio.sleep(1.0)
            async with by_hand(there, hello=wire.Hello()):
                assert there.connections == 1

    run(talk())


def test_who_says_nothing_or_half_a_frame_is_sent_away():
    async def talk():
        limits = Limits(hello_seconds=3.0, frame_seconds=5.0, idle_seconds=50.0)
        async with server(limits=limits) as there:
            loop, times = asyncio.get_running_loop(), {}
            for name, hello, data in (
                ("no hello", None, b""),
                ("half a hello", None, wire.encode(wire.Hello())[:20]),
                ("half a frame", wire.Hello(), wire.encode(verify(1, PROMPT))[:-1]),
                ("nothing more", wire.Hello(), b""),
            ):
                async with by_hand(there, hello=hello) as connection:
                    start = loop.time()
                    connection.stream.write(data)
                    with pytest.raises(Ended):
                        await connection.receive()
                    times[name] = loop.time() - start
                    assert there.connections == 0
            return times

    times = run(talk())
    assert times == pytest.approx({"no hello": 3.0, "half a hello": 5.0, "half a frame": 5.0, "nothing more": 50.0})


def test_a_frame_may_trickle_in():
    async def talk():
        async with server() as there, by_hand(there, hello=wire.Hello()) as connection:
            for byte in wire.encode(opened()) + wire.encode(verify(1, PROMPT)):
                connection.stream.write(bytes([byte]))
                await asyncio.sleep(0.05)
            return await connection.receive()

    assert run(talk()).tokens == tuple(TEXT[:1])


def test_a_slow_reader_loses_its_connection_and_not_its_session():
    async def talk():
        limits = Limits(unsent_bytes=20_000)
        async with server(limits=limits) as there, by_hand(there, Link(), wire.Hello()) as slow:
            slow.send(opened())
            slow.send(verify(1, PROMPT))
            first = await slow.receive()
            peak = 0
            for _ in range(3000):  # asks for the result again and again, and does not read it
                slow.send(verify(1, PROMPT))
                await asyncio.sleep(0.01)
                peak = max(peak, *(c.stream.unsent for c in there._clients), 0)
                if not there.connections:
                    break
            assert not there.connections and peak <= 20_000 and there.sessions == 1
            async with by_hand(there, hello=wire.Hello()) as again:
                again.send(wire.Resume(b"k" * 16, 1, len(PROMPT) + 1, -1))
                assert isinstance(await again.receive(), wire.Resume)
                again.send(verify(1, PROMPT))
                assert await again.receive() == first

    run(talk())


def test_states_that_are_kept_have_a_bound():
    async def talk():
        async with server(states=True, limits=Limits(state_rows=4)) as there:
            async with by_hand(there, hello=wire.Hello()) as connection:
                connection.send(opened(states_from=2))
                state = await connection.receive()
                assert (state.start, len(state.rows)) == (2, len(PROMPT) - 1 - 2)
                (session,) = there._sessions.values()
                assert not session.states, "more rows than are kept"
                connection.send(verify(1, PROMPT, TEXT[0]))
                assert (await connection.receive()).start == len(PROMPT) - 1
                assert isinstance(await connection.receive(), wire.Result)
            async with by_hand(there, hello=wire.Hello()) as connection:
                connection.send(wire.Resume(b"k" * 16, 1, 10, 2))
                assert (await connection.receive()).code == "session", "rows from 2 on are not there any more"

    run(talk())


def test_servers_for_others_need_a_token():
    async def talk(host, token):
        async with server(token=token) as there:
            await there.listen(host, 0)

    for host in ("0.0.0.0", "::", "example.org", "192.168.1.1"):
        with pytest.raises(ValueError, match="token must be given where others than this machine can connect"):
            asyncio.run(talk(host, None))
    with pytest.raises(ValueError, match="token must be a text of at least one character"):
        asyncio.run(talk("127.0.0.1", ""))
    asyncio.run(talk("127.0.0.1", None))
    asyncio.run(talk("0.0.0.0", "secret"))


def test_a_step_that_fails_ends_the_server():
    async def talk():
        async with server() as there, by_hand(there, hello=wire.Hello()) as connection:
            there._engine.step = lambda: 1 // 0
            connection.send(opened())
            with pytest.raises(Ended):
                await connection.receive()
            await there.serve()

    with pytest.raises(ZeroDivisionError):
        run(talk())


WRONG_ARGUMENTS = {
    "draft": ({"draft": "ngram"}, TypeError, "draft must be a specdec_ops.drafts.Draft or None, got 'ngram'"),
    "deadline": ({"deadline": 0}, ValueError, "deadline must be above 0, got 0"),
    "silence": ({"silence": "1"}, TypeError, "silence must be a number, got '1'"),
    "on_return": ({"on_return": "drop"}, ValueError, "on_return must be 'rollback' or 'keep', got 'drop'"),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments_of_a_client(name):
    options, kind, sentence = WRONG_ARGUMENTS[name]
    with pytest.raises(kind, match=sentence):
        Client(work=Inline(), **options)


def test_wrong_arguments_of_limits_and_of_a_server():
    with pytest.raises(TypeError, match=r"sessions must be an int, got 1\.5"):
        Limits(sessions=1.5)
    with pytest.raises(ValueError, match="nodes must be above 0, at most 1024, got 1025"):
        Limits(nodes=1025)
    with pytest.raises(ValueError, match="idle_seconds must be above 0"):
        Limits(idle_seconds=0)
    with pytest.raises(TypeError, match=r"limits must be a specdec_ops.remote.Limits or None, got 'few'"):
        Server(TARGET, limits="few")


WRONG_PROMPTS = {
    "a text without a tokenizer": ("text", TypeError, "prompt must be token ids for a client without a tokenizer"),
    "no ids": (["a"], TypeError, "prompt must be a string or a sequence of token ids"),
    "empty": ([], ValueError, "prompt must have from 1 to 127 tokens, all ids below 40"),
    "too high": ([40], ValueError, "prompt must have from 1 to 127 tokens, all ids below 40"),
    "too long": ([1] * 128, ValueError, "prompt must have from 1 to 127 tokens, all ids below 40"),
}


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_wrong_prompts(name):
    prompt, kind, sentence = WRONG_PROMPTS[name]

    async def talk():
        async with server() as there:
            await client(Link(), there).generate(prompt, GREEDY)

    with pytest.raises(kind, match=sentence):
        run(talk())


def test_a_server_that_says_nonsense_is_given_up():
    """And one that is of another protocol, or that speaks first of something else."""

    async def talk(data: bytes):
        ends = []

        def accept(end):
            ends.append(Connection(end, max_body=1000, max_unsent=1000))
            end.write(data)

        link = Link()
        there = Client(connect=lambda: link.connect(accept), give_up=9.0, work=Inline())
        try:
            await there.generate(PROMPT, GREEDY)
        finally:
            assert link.connections < 20

    for data in (b"HTTP/1.1 400 Bad Request\r\n", wire.encode(wire.Cancel())):
        with pytest.raises(ConnectionError, match="no server answered for 9 seconds"):
            run(talk(data))
    with pytest.raises(RemoteError, match="protocol must be 1, got 7 from the server"):
        run(talk(wire.encode(wire.Hello(protocol=7))))
