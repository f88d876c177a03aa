"""Frames: what is said arrives, and whatever else arrives is refused in one sentence."""

import dataclasses
import random
import struct
import sys

import pytest
import torch

pytest.importorskip("msgpack", reason="the extra remote has it")
import msgpack

from specdec_ops.remote import wire

MESSAGES = {
    "hello": wire.Hello(),
    "server's hello": wire.Hello(1, "", "m" * 64, "t" * 64, "", 40, (1, 2), 512, 64, "hidden"),
    "open": wire.Open(bytes(range(16)), 0.7, 40, 0.9, 0.05, 2**64 - 1, 100, (0,), True, 0, (5, 6, 7)),
    "open, negative seed": wire.Open(bytes(16), 0.0, 0, 1.0, 0.0, -(2**63), 1, (), False, -1, (5,)),
    "state": wire.State(3, torch.arange(6, dtype=torch.float32).view(2, 3)),
    "state, bfloat16": wire.State(0, torch.arange(6).view(3, 2).bfloat16()),
    "state, no rows": wire.State(0, torch.empty(0, 4, dtype=torch.float16)),
    "verify": wire.Verify(2, 9, (7, 8, 9), (-1, 0, 0)),
    "result": wire.Result(2, 9, "eos", 0.25, (8, 1), (-0.5, -1.25)),
    "result, invalid": wire.Result(2, 9, "invalid", 0.0, ()),
    "resume": wire.Resume(b"\xff" * 16, 3, 12, -1),
    "cancel": wire.Cancel(),
    "error": wire.Error("busy", "später"),
}


def parts(frame: bytes) -> tuple[bytes, bytes]:
    header, body = wire.lengths(frame[: wire.PREFIX_BYTES], 1 << 20)
    start = wire.PREFIX_BYTES
    assert len(frame) == start + header + body
    return frame[start : start + header], frame[start + header :]


def same(one, other) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)]
    return type(one) is type(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape if isinstance(a, torch.Tensor) else a == b
        for a, b in pairs
    )


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_said_arrives(name):
    assert same(wire.decode(*parts(wire.encode(MESSAGES[name]))), MESSAGES[name])


@pytest.mark.parametrize("name", MESSAGES)
def test_every_shorter_and_longer_frame_is_refused(name):
    header, body = parts(wire.encode(MESSAGES[name]))
    for end in range(len(header)):
        with pytest.raises(wire.FrameError):
            wire.decode(header[:end], body)
    for end in range(len(body)):
        with pytest.raises(wire.FrameError):
            wire.decode(header, body[:end])
    for longer in ((header + b"\x00", body), (header, body + b"\x00")):
        with pytest.raises(wire.FrameError):
            wire.decode(*longer)


VERIFY = {"type": "verify", "round": 1, "length": 3, "tokens": ["int32", 1], "parents": ["int32", 1]}
BODY = struct.pack("<ii", 5, -1)
WRONG = {
    "no map": ([1, 2], "type must be one of"),
    "unknown type": (VERIFY | {"type": "pickle"}, "type must be one of hello, open"),
    "type of no text": (VERIFY | {"type": ["verify"]}, "type must be one of"),
    "missing field": ({k: v for k, v in VERIFY.items() if k != "round"}, "must have the fields round, length"),
    "another field": (VERIFY | {"more": 1}, "must have the fields"),
    "negative round": (VERIFY | {"round": -1}, "verify.round must be a count, got -1"),
    "round too great": (VERIFY | {"round": 2**31}, "verify.round must be a count"),
    "round a bool": (VERIFY | {"round": True}, "verify.round must be a count, got True"),
    "round a float": (VERIFY | {"round": 1.0}, "verify.round must be a count, got 1.0"),
    "round a map": (VERIFY | {"round": {"a": 1}}, "verify.round must be a count"),
    "tensor of objects": (VERIFY | {"tokens": ["object", 1]}, "verify.tokens must be one of int32 and 1 lengths"),
    "two lengths": (VERIFY | {"tokens": ["int32", 1, 1]}, "verify.tokens must be one of int32"),
    "negative length": (VERIFY | {"tokens": ["int32", -1]}, "verify.tokens must be one of int32"),
    "more than the body": (VERIFY | {"tokens": ["int32", 2**30]}, "must have its bytes in the frame's body"),
    "less than the body": (VERIFY | {"parents": ["int32", 0]}, "must have 4 bytes of body, got 8"),
    "an extension": (VERIFY | {"round": msgpack.ExtType(5, b"x")}, "verify.round must be a count"),
    "a time": (VERIFY | {"round": msgpack.Timestamp(1, 2)}, "verify.round must be a count"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_message_is_refused_in_one_sentence(name):
    header, sentence = WRONG[name]
    with pytest.raises(wire.FrameError, match=r"^specdec_ops\.remote: ") as caught:
        wire.decode(msgpack.packb(header), BODY)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1, "0.5"], ids=str)
def test_numbers_are_finite_floats(value):
    fields = {"type": "result", "round": 1, "length": 1, "finish": "", "seconds": value}
    with pytest.raises(wire.FrameError, match=r"result.seconds must be a number"):
        wire.decode(msgpack.packb(fields | {"tokens": ["int32", 0], "logprobs": ["float32", 0]}), b"")


def test_texts_and_keys_have_bounds():
    for name, value in (("code", "x" * 1025), ("code", b"x")):
        with pytest.raises(wire.FrameError, match=r"error.code must be a text"):
            wire.decode(msgpack.packb({"type": "error", "message": "", "code": ""} | {name: value}), b"")
    fields = {"type": "resume", "round": 1, "length": 1, "states_from": -1}
    for key in (b"", b"k" * 15, b"k" * 17, "k" * 16):
        with pytest.raises(wire.FrameError, match=r"resume.key must be a key"):
            wire.decode(msgpack.packb(fields | {"key": key}), b"")


HOSTILE = {
    "nested maps": b"\x81" * 4000,
    "nested lists": b"\x91" * 8000,
    "huge map": b"\xdf\xff\xff\xff\xff",
    "huge list": b"\xdd\xff\xff\xff\xff\x01",
    "huge bytes": b"\xc6\xff\xff\xff\xff",
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_hostile_msgpack_is_refused(header):
    with pytest.raises(wire.FrameError, match=r"must be msgpack|type must be one of"):
        wire.decode(header, b"")


def test_lengths_are_compared_before_they_are_believed():
    assert wire.lengths(struct.pack("<II", wire.MAX_HEADER, 100), 100) == (wire.MAX_HEADER, 100)
    with pytest.raises(wire.FrameError, match="header must have at most 8192 bytes, got 4294967295"):
        wire.lengths(b"\xff" * 8, 100)
    with pytest.raises(wire.FrameError, match="body must have at most 100 bytes, got 101"):
        wire.lengths(struct.pack("<II", 5, 101), 100)
    with pytest.raises(wire.FrameError, match="header must have at most"):
        wire.lengths(b"GET / HTTP/1.1"[:8], 100)


def test_a_header_that_could_not_be_read_again_is_not_written():
    with pytest.raises(ValueError, match="a header must have at most 8192 bytes"):
        wire.encode(wire.Hello(eos=tuple(range(2**20, 2**20 + 4000))))


def test_mutated_frames_are_messages_or_refused():
    chance = random.Random(1)
    frames = [parts(wire.encode(message)) for message in MESSAGES.values()]
    for _ in range(20_000):
        header, body = (bytearray(part) for part in chance.choice(frames))
        for _ in range(chance.randint(1, 4)):
            part = header if chance.random() < 0.8 or not body else body
            place = chance.randrange(len(part)) if part else 0
            action = chance.randrange(4)
            if action == 0 and part:
                part[place] ^= 1 << chance.randrange(8)
            elif action == 1 and part:
                del part[place : place + chance.randint(1, 8)]
            elif action == 2:
                part[place:place] = chance.randbytes(chance.randint(1, 8))
            elif part:
                part[place] = chance.choice([0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xC9, 0xDF, 0xFF])
        try:
            message = wire.decode(bytes(header), bytes(body))
        except wire.FrameError:
            continue
        assert isinstance(message, wire.Message)


def test_without_msgpack_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(RuntimeError, match=r"need the package msgpack \(pip install specdec_ops\[remote\]\)"):
        wire.encode(wire.Cancel())
