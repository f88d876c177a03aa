"""`Sampling`: what a request asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from specdec_ops._core.checks import FLOAT_MAX, INT32_MAX, argument_error, is_int, is_number

_OP = "Sampling"


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of a request are chosen, and where its text ends. The default is greedy.

    Args:
        temperature: 0 takes the most likely token, the lowest id among equals.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: of these, keep the most likely ones that together have at least this share; 1 is off.
        min_p: of these, keep those with at least this share of the greatest probability; 0 is off.
        seed: of the request's own noise. The same prompt with the same seed, draft and rule gives the same text,
            whatever else the engine works on.
        max_tokens: the most tokens of the answer, at least 1.
        eos: ids that end the text, and are its last token. None: those of the model. `()`: none, the text goes on.
        stop: strings that end the text. They are no part of it. A single string will do.
        logprobs: also return the natural log of each token's probability, after temperature and the filters above.
        speculate: False decodes this request without a draft.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 128
    eos: int | Sequence[int] | None = None
    stop: str | Sequence[str] = ()
    logprobs: bool = False
    speculate: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.0, FLOAT_MAX), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(argument_error(_OP, name, "a number", value))
            if not low <= value <= high:
                raise ValueError(argument_error(_OP, name, f"from {low:g} to {high:.3g}", value))
        for name, low, high in (("top_k", 0, INT32_MAX), ("seed", -(2**63), 2**64 - 1), ("max_tokens", 1, INT32_MAX)):
            value = getattr(self, name)
            if not is_int(value):
                raise TypeError(argument_error(_OP, name, "an int", value))
            if not low <= value <= high:
                raise ValueError(argument_error(_OP, name, f"from {low} to {high}", value))
        for name in ("logprobs", "speculate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(argument_error(_OP, name, "True or False", getattr(self, name)))
        object.__setattr__(self, "eos", _ids(self.eos))
        object.__setattr__(self, "stop", _strings(self.stop))


def _ids(eos) -> tuple[int, ...] | None:
    if eos is None:
        return None
    ids = (eos,) if is_int(eos) else eos
    if isinstance(ids, str) or not isinstance(ids, Sequence | set | frozenset) or not all(map(is_int, ids)):
        raise TypeError(argument_error(_OP, "eos", "None, an id or a sequence of ids", eos))
    if not all(0 <= token <= INT32_MAX for token in ids):
        raise ValueError(argument_error(_OP, "eos", "ids from 0 on", eos))
    return tuple(ids)


def _strings(stop) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) for string in strings):
        raise TypeError(argument_error(_OP, "stop", "a string or a sequence of strings", stop))
    if not all(strings):
        raise ValueError(argument_error(_OP, "stop", "of strings that are not empty", stop))
    return tuple(strings)
