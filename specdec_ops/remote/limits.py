"""`Limits`: what a server allows, so that no client can take more of it than its share."""

from __future__ import annotations

import dataclasses

from specdec_ops._core.checks import argument_error, is_int, is_number

_OP = "remote.Limits"
_MOST_NODES = 1024


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of a server.

    Args:
        sessions: texts that it knows at once, whether their clients are there or not. A new one takes the place of the
            one that has been without its client longest.
        connections: at once.
        nodes: of a tree, its root included; 1024 at most.
        frame_bytes: of the body of a frame that comes in. A text of length n needs 4 n.
        unsent_bytes: that wait for a client to read them. With more its connection ends; its session stays.
        state_rows: rows of State frames that are kept of each session, until the client is known to have them.
        hello_seconds: until a connection has said who it is.
        frame_seconds: from a frame's first byte to its last.
        idle_seconds: of a connection without a frame.
        session_seconds: of a session that is not used.

    Raises:
        TypeError: one is no number.
        ValueError: one is out of range.
    """

    sessions: int = 256
    connections: int = 512
    nodes: int = 64
    frame_bytes: int = 1 << 20
    unsent_bytes: int = 1 << 24
    state_rows: int = 1 << 15
    hello_seconds: float = 10.0
    frame_seconds: float = 30.0
    idle_seconds: float = 3600.0
    session_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, high = getattr(self, field.name), _MOST_NODES if field.name == "nodes" else 2**31 - 1
            sound = is_number(value) if field.name.endswith("_seconds") else is_int(value)
            if not sound:
                must = "a number" if field.name.endswith("_seconds") else "an int"
                raise TypeError(argument_error(_OP, field.name, must, value))
            if not 0 < value <= high:
                raise ValueError(argument_error(_OP, field.name, f"above 0, at most {high}", value))
