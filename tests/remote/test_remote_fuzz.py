"""100,000 hostile frames: nothing crashes, nothing hangs, memory stays bounded, and a good client never notices.

Each frame starts as a good one of a conversation and is then changed: bits, bytes, lengths, values of fields, order.
All of them are read; every fifth also goes to a server at work, which may have closed the connection by then.
SPECDEC_OPS_FUZZED_FRAMES=1000000 runs more of them, with another seed.
"""

import asyncio
import dataclasses
import functools
import os
import random
import struct
import tracemalloc

import pytest
import torch

pytest.importorskip("msgpack", reason="the extra remote has it")
import msgpack

from specdec_ops.decode import Sampling
from specdec_ops.remote import Limits, Link, wire
from specdec_ops.remote.clock import run
from specdec_ops.remote.connection import Connection, Ended
from tests.remote.talks import DRAFTS, PROMPT, by_hand, client, local, opened, server, verify

FRAMES = int(os.environ.get("SPECDEC_OPS_FUZZED_FRAMES", 100_000))
SEED = 1 if FRAMES == 100_000 else FRAMES
GREEDY = Sampling(max_tokens=20, eos=())
TEXT = local(PROMPT, GREEDY).tokens
LIMITS = Limits(
    sessions=8, connections=16, frame_bytes=4096, unsent_bytes=1 << 16, hello_seconds=5.0, frame_seconds=5.0
)
HOSTILE = (None, True, -1, 0, 1, 2**31 - 1, 2**31, 2**63, -(2**63), 1e308, -0.0, float("nan"), float("inf"), "", "x")
HOSTILE += (b"", b"k" * 16, (), (1,), ((((),),),), {}, {"type": "open"}, "x" * 3000, tuple(range(900)))


def conversation(chance: random.Random) -> list[wire.Message]:
    """Frames of a client, mostly good ones, in some order."""
    key = bytes([chance.randrange(4)]) * 16
    sampled = {"temperature": chance.choice([0.0, 0.7]), "max_tokens": chance.choice([1, 2, 20])}
    sampled |= {"states_from": chance.choice([-1, -1, 0, 3]), "logprobs": chance.random() < 0.2}
    frames: list[wire.Message] = [wire.Hello(), opened(key, **sampled)]
    frames += [verify(1, PROMPT, *TEXT[: chance.randrange(4)]), verify(2, [*PROMPT, TEXT[0]], 1, 2)]
    frames.append(wire.Resume(key, chance.randrange(3), len(PROMPT) + chance.randrange(3), chance.choice([-1, 0])))
    frames.append(wire.Cancel())
    if chance.random() < 0.5:
        chance.shuffle(frames)
    elif chance.random() < 0.5:
        del frames[chance.randrange(1, len(frames))]
    return frames


def with_a_hostile_value(message: wire.Message, chance: random.Random) -> bytes:
    """A frame whose header is msgpack, with a field of another value, or one more, or one less."""
    frame = wire.encode(message)
    header, _ = struct.unpack("<II", frame[:8])
    fields, body = msgpack.unpackb(frame[8 : 8 + header]), frame[8 + header :]
    name = chance.choice([*fields, "more"])
    if chance.random() < 0.1:
        fields.pop(name, None)
    else:
        fields[name] = chance.choice(HOSTILE)
    packed = msgpack.packb(fields)
    return struct.pack("<II", len(packed), len(body)) + packed + body


def mutated(message: wire.Message, chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.4:
        return with_a_hostile_value(message, chance)
    data = bytearray(wire.encode(message))
    if kind < 0.5:
        data[: chance.choice([4, 8])] = chance.randbytes(chance.choice([4, 8]))
    elif kind < 0.6:
        del data[chance.randrange(1, len(data)) :]
    elif kind < 0.65:
        return chance.randbytes(chance.randrange(1, 200))
    else:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


class Bytes:
    """A stream on which some bytes have come, in two pieces, and no more will."""

    unsent = 0

    def __init__(self, data: bytes, place: int) -> None:
        self.pieces = [data[:place], data[place:], b""]

    async def read(self) -> bytes:
        return next(piece for piece in iter(lambda: self.pieces.pop(0), None) if piece or not self.pieces)


@pytest.mark.slow
def test_100_000_hostile_frames_are_read():
    """Each is a message, or refused in one sentence, or not whole; and the bytes after a good one stay in step."""
    chance, ends = random.Random(SEED), {"read": 0, "refused": 0, "not whole": 0}
    good = wire.encode(wire.Cancel())
    messages = conversation(chance)

    async def read():
        for count in range(FRAMES):
            if count % 100 == 0:
                messages[:] = conversation(chance)
            data = mutated(chance.choice(messages), chance)
            place = chance.randrange(len(data)) if chance.random() < 0.3 else 0
            connection = Connection(Bytes(data + good, place), max_body=4096, max_unsent=1)
            try:
                message = await connection.receive()
                ends["read"] += 1
                if len(wire.encode(message)) == len(data):
                    assert await connection.receive() == wire.Cancel()
            except wire.FrameError as error:
                assert "\n" not in str(error) and len(str(error)) < 300
                ends["refused"] += 1
            except Ended:
                ends["not whole"] += 1

    run(read())
    assert sum(ends.values()) == FRAMES and min(ends.values()) > FRAMES / 50


def test_a_server_at_work_gets_hostile_frames():
    count = FRAMES // 5
    chance = random.Random(SEED + 1)
    good = {"none": DRAFTS["none"], "n-gram": DRAFTS["n-gram"]}

    async def talk():
        async with server(states=True, limits=LIMITS, max_batch=8) as there:
            sent = refused = served = 0
            most = 0
            link = Link()
            while sent < count:
                connection = Connection(await link.connect(there.accept), max_body=1 << 20, max_unsent=1 << 24)
                frames = conversation(chance)
                hostile = chance.randrange(len(frames) + 1)
                for place, message in enumerate(frames):
                    data = mutated(message, chance) if place >= hostile else wire.encode(message)
                    connection.stream.write(data)
                    sent += 1
                await asyncio.sleep(chance.choice([0.0, 0.0, 0.1]))
                most = max(most, there.sessions)
                if chance.random() < 0.2:
                    try:
                        while not isinstance(await connection.receive(20.0), wire.Error):
                            pass
                        refused += 1
                    except Ended:
                        pass
                connection.abort()
                if sent // 2000 > served:
                    served += 1
                    one = client(Link(rtt=0.1), there, good[chance.choice(list(good))], deadline=100.0)
                    assert (await one.generate(PROMPT, GREEDY)).tokens == TEXT
            await asyncio.sleep(10.0)
            assert there.connections == 0 and most <= LIMITS.sessions
            assert refused > count / 100 and served == count // 2000
            async with by_hand(there, hello=wire.Hello()) as still:
                still.send(opened(b"z" * 16))
                still.send(verify(1, PROMPT, *TEXT[:3]))
                assert (await still.receive()).tokens == tuple(TEXT[:4])
            await asyncio.sleep(LIMITS.session_seconds + 1)
            assert there.sessions == 0 and there._engine.is_idle and not there._by_number
            assert not there._proposer.trees and not there._proposer.requests and not there._proposer.seen
            pool = there._engine.cache.pool
            assert pool.free == pool.pages
            return tracemalloc.get_traced_memory()[1]

    tracemalloc.start(1)
    try:
        peak = run(talk())
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_hostile_frames_to_a_client():
    """A server that sends nonsense: the client gives up in one sentence, or says what the server said."""
    chance = random.Random(SEED + 1)
    good = [wire.Hello(vocab=40, max_length=64, max_nodes=8), wire.Result(1, len(PROMPT), "", 0.1, (TEXT[0],))]
    good += [wire.Resume(b"k" * 16, 0, len(PROMPT), -1), wire.Error("busy", "later"), wire.State(0, torch.ones(2, 3))]
    ends = {"answers": 0, "errors": 0}

    async def talk():
        for _ in range(300):

            def accept(end):
                end.write(wire.encode(good[0]))
                for message in chance.choices(good, k=4):
                    end.write(mutated(message, chance) if chance.random() < 0.6 else wire.encode(message))

            connect = functools.partial(Link(rtt=0.01).connect, accept)
            one = client(None, None, DRAFTS["n-gram"], connect=connect, give_up=3.0, silence=1.0)
            try:
                result = await one.generate(PROMPT, dataclasses.replace(GREEDY, max_tokens=3))
                assert len(result.tokens) <= 3
                ends["answers"] += 1
            except (RuntimeError, ConnectionError) as error:
                assert "\n" not in str(error)
                ends["errors"] += 1

    run(talk())
    assert ends["answers"] > 30 and ends["errors"] > 3
