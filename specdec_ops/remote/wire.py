"""The frames that client and server exchange: what they say, and how that becomes bytes and comes back.

A frame is two little-endian uint32, the lengths of a header and of a body; then the header, a msgpack map with the
frame's type and its small fields; then the body, the raw bytes of its tensors one after another, little-endian, whose
dtypes and shapes the header states. Nothing is ever unpickled. Whatever arrives is checked against the type's fields,
and anything else is a `FrameError`: a field too many or too few, a wrong type, a number out of range, a tensor whose
size is not that of its bytes. No length is believed before it has been compared with a bound.

Hello    both, first: versions, hashes; the server also says what it allows
Open     client: a text, how its tokens are chosen, under a key that the client has made up
State    server: what the target knows of some tokens, for drafts that go on from it
Verify   client: a tree of tokens after the text
Result   server: the tokens of a round
Resume   both: a session by its key, and how far each has got
Cancel   client: the session may be forgotten
Error    both: why something was refused, in one sentence
"""

# ruff: noqa: RUF009 -- _field is dataclasses.field

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

PROTOCOL = 1
MAX_HEADER = 8192
KEY_BYTES = 16
_PREFIX = struct.Struct("<II")
PREFIX_BYTES = _PREFIX.size
_MOST_TEXT = 1024  # characters of a field
_MOST_EOS = 64
_ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrameError(ValueError):
    """What arrived is no frame of this protocol, in one sentence."""


def _msgpack():
    try:
        import msgpack as found
    except ImportError as error:
        raise RuntimeError(
            "specdec_ops.remote: client and server need the package msgpack (pip install specdec_ops[remote])"
        ) from error
    return found


# Kinds of fields. A kind in the header is a check that says what is wrong, or nothing.


def _is_int(value) -> bool:
    return type(value) is int


def _count(value) -> bool:
    return _is_int(value) and 0 <= value < 2**31


def _seed(value) -> bool:
    return _is_int(value) and -(2**63) <= value < 2**64


def _position(value) -> bool:
    return _is_int(value) and -1 <= value < 2**31


def _number(value) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0


def _flag(value) -> bool:
    return type(value) is bool


def _text(value) -> bool:
    return type(value) is str and len(value) <= _MOST_TEXT


def _key(value) -> bool:
    return type(value) is bytes and len(value) == KEY_BYTES


def _eos(value) -> bool:
    return type(value) is tuple and len(value) <= _MOST_EOS and all(map(_count, value))


class _Tensor(NamedTuple):
    """A field in the body. `tuple` fields have one dimension, and are tuples of numbers in Python."""

    dtypes: tuple[str, ...]
    rank: int


_IDS = _Tensor(("int32",), 1)
_FLOATS = _Tensor(("float32",), 1)
_ROWS = _Tensor(tuple(_ROW_DTYPES), 2)
_NUMPY = {"int32": np.dtype("<i4"), "float32": np.dtype("<f4")}
_ITEM_BYTES = {"int32": 4, "float32": 4, "bfloat16": 2, "float16": 2}
_MISSING = dataclasses.MISSING


def _field(kind: Callable[[Any], bool] | _Tensor, default: Any = _MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind})


@dataclasses.dataclass(frozen=True)
class Hello:
    """Who is there. The client's comes first, and the server answers with its own, or with an Error.

    Attributes:
        protocol: the version of all this, which has to be the same.
        token: the client's shared secret, "" from the server.
        model: a hash of the target; "" from a client to whom any will do.
        tokenizer: a hash of the vocabulary; "" where it is not known.
        draft: a hash of the draft's weights, for drafts that both ends have a part of, else "".
        vocab: tokens of the target's vocabulary; this and the rest from the server only.
        eos: ids that end a text unless a client asks for others.
        max_length: the most tokens of a text.
        max_nodes: of a tree, its root included.
        states: what State frames hold: "hidden", rows of the target's last layer; "layers", what a draft that both ends
            have makes of keys and values of all layers; "" if there are none, or none are wanted.
    """

    protocol: int = _field(_count, PROTOCOL)
    token: str = _field(_text, "")
    model: str = _field(_text, "")
    tokenizer: str = _field(_text, "")
    draft: str = _field(_text, "")
    vocab: int = _field(_count, 0)
    eos: tuple[int, ...] = _field(_eos, ())
    max_length: int = _field(_count, 0)
    max_nodes: int = _field(_count, 0)
    states: str = _field(_text, "")


@dataclasses.dataclass(frozen=True)
class Open:
    """A new session. There is no answer but to the Verify that follows.

    Attributes:
        key: 16 bytes that nobody can guess.
        temperature, top_k, top_p, min_p, seed, max_tokens, eos, logprobs: as those of `specdec_ops.decode.Sampling`.
        states_from: the first position whose State is wanted; -1: none are.
        tokens: the text so far.
    """

    key: bytes = _field(_key)
    temperature: float = _field(_number)
    top_k: int = _field(_count)
    top_p: float = _field(_number)
    min_p: float = _field(_number)
    seed: int = _field(_seed)
    max_tokens: int = _field(_count)
    eos: tuple[int, ...] = _field(_eos)
    logprobs: bool = _field(_flag)
    states_from: int = _field(_position)
    tokens: tuple[int, ...] = _field(_IDS)


@dataclasses.dataclass(frozen=True)
class State:
    """What the target has made of some tokens of the text.

    Attributes:
        start: the position of the first.
        rows: [tokens, dim], of the last layer before the final norm.
    """

    start: int = _field(_count)
    rows: torch.Tensor = _field(_ROWS)


@dataclasses.dataclass(frozen=True)
class Verify:
    """A tree after the text; node 0 is the text's last token.

    Attributes:
        round: one more than that of the last Result.
        length: tokens of the text, so that both mean the same one.
        tokens: of each node.
        parents: of each node, -1 for node 0; a parent comes before its children.
    """

    round: int = _field(_count)
    length: int = _field(_count)
    tokens: tuple[int, ...] = _field(_IDS)
    parents: tuple[int, ...] = _field(_IDS)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a round has added to the text.

    Attributes:
        round: that of the Verify.
        length: tokens of the text before.
        finish: "" if the text goes on, else why it ended, as in `specdec_ops.decode.Result`.
        seconds: from the Verify's arrival to this.
        tokens: accepted ones, then the target's own.
        logprobs: of each of them if asked for, else ().
    """

    round: int = _field(_count)
    length: int = _field(_count)
    finish: str = _field(_text)
    seconds: float = _field(_number)
    tokens: tuple[int, ...] = _field(_IDS)
    logprobs: tuple[float, ...] = _field(_FLOATS, ())


@dataclasses.dataclass(frozen=True)
class Resume:
    """A session goes on over another connection. The server answers with its own round and length.

    Attributes:
        key: of the session.
        round: of the last Result that the client has; in the answer, that the server has made.
        length: tokens of the text after it.
        states_from: as in Open.
    """

    key: bytes = _field(_key)
    round: int = _field(_count)
    length: int = _field(_count)
    states_from: int = _field(_position)


@dataclasses.dataclass(frozen=True)
class Cancel:
    """The connection's session is over."""


@dataclasses.dataclass(frozen=True)
class Error:
    """Something was refused.

    Attributes:
        code: "token", "protocol", "model", "tokenizer", "draft", "frame", "session", "round", "busy" or "request".
        message: one sentence.
    """

    code: str = _field(_text)
    message: str = _field(_text)


Message = Hello | Open | State | Verify | Result | Resume | Cancel | Error
_TYPES: dict[str, type] = {
    kind.__name__.lower(): kind for kind in (Hello, Open, State, Verify, Result, Resume, Cancel, Error)
}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_KINDS = {kind: {f.name: f.metadata["kind"] for f in dataclasses.fields(kind)} for kind in _TYPES.values()}


def encode(message: Message) -> bytes:
    """The frame of a message.

    Raises:
        ValueError: its header is too long to be read again.
    """
    header: dict[str, Any] = {"type": _NAMES[type(message)]}
    body = []
    for name, kind in _KINDS[type(message)].items():
        value = getattr(message, name)
        if not isinstance(kind, _Tensor):
            header[name] = value
        elif isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            header[name] = (str(value.dtype).removeprefix("torch."), *value.shape)
            body.append(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            header[name] = (kind.dtypes[0], len(value))
            body.append(np.asarray(value, dtype=_NUMPY[kind.dtypes[0]]).tobytes())
    packed = _msgpack().packb(header)
    if len(packed) > MAX_HEADER:
        raise ValueError(f"specdec_ops.remote: a header must have at most {MAX_HEADER} bytes, got {len(packed)}")
    data = b"".join(body)
    return b"".join((_PREFIX.pack(len(packed), len(data)), packed, data))


def lengths(prefix: bytes, max_body: int) -> tuple[int, int]:
    """Of a frame's header and body, from its first bytes.

    Args:
        prefix: `PREFIX_BYTES` bytes.
        max_body: the longest body that is taken.

    Raises:
        FrameError: one of them is too long.
    """
    header, body = _PREFIX.unpack(prefix)
    for name, length, most in (("header", header, MAX_HEADER), ("body", body, max_body)):
        if length > most:
            raise FrameError(f"specdec_ops.remote: a frame's {name} must have at most {most} bytes, got {length}")
    return header, body


def decode(header: bytes, body: bytes) -> Message:
    """The message of a header and a body.

    Raises:
        FrameError: they are those of no message.
    """
    try:
        fields = _msgpack().unpackb(header, use_list=False)
    except (ValueError, RecursionError) as error:
        raise FrameError("specdec_ops.remote: a frame's header must be msgpack") from error
    if type(fields) is not dict or not isinstance(fields.get("type"), str) or fields["type"] not in _TYPES:
        raise FrameError(f"specdec_ops.remote: a frame's type must be one of {', '.join(_TYPES)}")
    name, place = fields.pop("type"), 0
    kinds = _KINDS[_TYPES[name]]
    if fields.keys() != kinds.keys():
        raise FrameError(f"specdec_ops.remote: a frame of type {name} must have the fields {', '.join(kinds)}")
    for field, kind in kinds.items():
        if isinstance(kind, _Tensor):
            fields[field], place = _tensor(f"{name}.{field}", kind, fields[field], body, place)
        elif not kind(fields[field]):
            must = kind.__name__.removeprefix("_")
            raise FrameError(f"specdec_ops.remote: {name}.{field} must be a {must}, got {_short(fields[field])}")
    if place != len(body):
        raise FrameError(f"specdec_ops.remote: a frame of type {name} must have {place} bytes of body, got {len(body)}")
    return _TYPES[name](**fields)


def _tensor(name: str, kind: _Tensor, described, body: bytes, place: int) -> tuple[Any, int]:
    sound = type(described) is tuple and len(described) == kind.rank + 1 and described[0] in kind.dtypes
    if not sound or not all(map(_count, described[1:])):
        must = f"one of {', '.join(kind.dtypes)} and {kind.rank} lengths"
        raise FrameError(f"specdec_ops.remote: {name} must be {must}, got {_short(described)}")
    dtype, *shape = described
    end = place + math.prod(shape) * _ITEM_BYTES[dtype]
    if end > len(body):
        raise FrameError(f"specdec_ops.remote: {name} must have its bytes in the frame's body, got {_short(described)}")
    if kind.rank == 1:
        return tuple(np.frombuffer(body, _NUMPY[dtype], shape[0], place).tolist()), end
    if end == place:
        return torch.empty(shape, dtype=_ROW_DTYPES[dtype]), end
    return torch.frombuffer(bytearray(body[place:end]), dtype=_ROW_DTYPES[dtype]).view(shape), end


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
