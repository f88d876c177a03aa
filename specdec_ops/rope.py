"""`Rope`: the cosines and sines of rotary position embedding, as the models of Hugging Face use them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ._core.checks import FLOAT_MAX, INT32_MAX, argument_error, describe, is_int, is_number

_DEFAULT_BASE = 10_000.0
_NOT_OURS = ("rope_theta", "partial_rotary_factor", "finetuned")  # of such a dict, but not of the scaling


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False, init=False)
class Rope:
    """The cosine and sine of every rotated pair at every position (RoFormer, Su et al., 2021). Make it once.

    Pair i turns by `position * base ** (-i / pairs)`, or by what `scaling` makes of it. Angles, cosines and sines are
    computed in float64: far into a context a float32 angle has lost its last digits.

    Args:
        base: theta, above 0: 10,000 in the paper, up to some millions in models of long contexts.
        pairs: how many pairs of elements of a head are rotated: `head_dim / 2`, less with partial rotary.
        positions: for how many positions, from 0 on. Tables take `8 * positions * pairs` bytes.
        scaling: None, or a dict in Hugging Face's words. Its "rope_type" (or "type") decides on the rest:
            "default", none. "linear", with a "factor" by which all angles are divided. "dynamic", with "factor" and
            "original_max_position_embeddings": the base grows with the length, which is `positions`; make another Rope
            for a sequence that becomes longer. "llama3", with "factor", "low_freq_factor", "high_freq_factor" and
            "original_max_position_embeddings". "yarn" (Peng et al., 2023), with "factor",
            "original_max_position_embeddings" and, if wanted, "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim" and "truncate"; cosines and sines are multiplied by the attention factor. "longrope" (Ding
            et al., 2024), with "short_factor" and "long_factor", a number for each pair, and
            "original_max_position_embeddings": with more `positions` than that the long ones count; if wanted with
            "attention_factor", or "factor" to compute it from (else `positions` over the original length).
        device: where the tables will be.

    Attributes:
        cosines: float32 `[positions, pairs]`.
        sines: float32 `[positions, pairs]`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is out of range; the scaling has an unknown type, an unknown key or lacks one.
    """

    cosines: torch.Tensor
    sines: torch.Tensor

    def __init__(
        self,
        base: float,
        pairs: int,
        positions: int,
        *,
        scaling: Mapping[str, Any] | None = None,
        device: torch.device | str | int = "cpu",
    ) -> None:
        if not is_number(base):
            raise TypeError(argument_error("Rope", "base", "a number", base))
        if not 0 < base <= FLOAT_MAX:
            raise ValueError(argument_error("Rope", "base", "a finite number above 0", base))
        for name, value in (("pairs", pairs), ("positions", positions)):
            if not is_int(value):
                raise TypeError(argument_error("Rope", name, "an int", value))
            if not 1 <= value <= INT32_MAX:
                raise ValueError(argument_error("Rope", name, "from 1 to 2**31 - 1", value))
        frequencies, factor = _scaled(float(base), pairs, positions, scaling)
        angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies
        tables = ((factor * function(angles)).astype(np.float32) for function in (np.cos, np.sin))
        self._set(*(torch.from_numpy(table).to(device) for table in tables))

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        positions: int | None = None,
        layer_type: str | None = None,
        device: torch.device | str | int = "cpu",
    ) -> Rope:
        """The Rope of a Hugging Face model: Llama, Mistral, Qwen2 and 3, Phi-3, Gemma 2 and 3, GPT-NeoX and their like.

        Which elements form a pair is not in a configuration: models in Hugging Face's format rotate halves
        (`interleaved=False` in `kv_append`), but for the few that say otherwise in their code.

        Args:
            config: the model's configuration, an object or the dict of its config.json, of any version. That of a
                model of several modalities stands for that of its text model. Without a theta it is 10,000.
            positions: for how many; None: as many as the configuration says.
            layer_type: whose, where layers differ: "full_attention" or "sliding_attention" (Gemma 3).
            device: where the tables will be.

        Raises:
            TypeError: config is neither an object nor a dict with the model's sizes.
            ValueError: layers differ and layer_type is None or unknown; and what `Rope` raises.
        """
        read = _reader(config)
        if read("hidden_size") is None and read("head_dim") is None and read("text_config") is not None:
            read = _reader(read("text_config"))
        longest = read("max_position_embeddings")
        head_dim = read("head_dim") or _quotient(read("hidden_size"), read("num_attention_heads"))
        if head_dim is None:
            must = "a Hugging Face configuration with head_dim, or hidden_size and num_attention_heads"
            raise TypeError(argument_error("Rope.from_config", "config", must, config))
        if positions is None and longest is None:
            raise ValueError("specdec_ops.Rope.from_config: positions must be given: config has none, got None")
        parameters = dict(_parameters(read, layer_type))
        base = _first(parameters.get("rope_theta"), read("rope_theta"), read("rotary_emb_base"), _DEFAULT_BASE)
        share = _first(parameters.get("partial_rotary_factor"), read("partial_rotary_factor"), read("rotary_pct"), 1.0)
        kind = _kind(parameters)
        own_length = parameters.get("original_max_position_embeddings"), read("original_max_position_embeddings")
        if kind == "dynamic":  # stretches from the configuration's length on
            own_length = ()
        if kind in ("dynamic", "yarn", "longrope") and longest is not None:
            original = parameters["original_max_position_embeddings"] = _first(*own_length, longest)
            if kind != "dynamic" and parameters.get("factor") is None:
                parameters["factor"] = longest / original
        return cls(
            base,
            int(head_dim * share) // 2,
            longest if positions is None else positions,
            scaling=parameters,
            device=device,
        )

    @classmethod
    def from_tables(cls, cosines: torch.Tensor, sines: torch.Tensor) -> Rope:
        """A Rope of tables that are there already, as those of a saved model.

        Args:
            cosines: float32 `[positions, pairs]`, contiguous.
            sines: the same.

        Raises:
            TypeError, ValueError: they are no such tables.
        """
        for name, table in (("cosines", cosines), ("sines", sines)):
            must = "float32 [positions, pairs]"
            if not isinstance(table, torch.Tensor) or table.dtype != torch.float32:
                raise TypeError(argument_error("Rope.from_tables", name, must, table))
            if table.dim() != 2 or table.shape != cosines.shape or not table.is_contiguous():
                raise ValueError(argument_error("Rope.from_tables", name, f"contiguous {must}", table))
        made = object.__new__(cls)
        made._set(cosines, sines)
        return made

    @property
    def positions(self) -> int:
        """How many positions the tables have."""
        return self.cosines.shape[0]

    @property
    def pairs(self) -> int:
        """How many pairs of elements of a head are rotated."""
        return self.cosines.shape[1]

    def to(self, device: torch.device | str | int) -> Rope:
        """The same on another device."""
        other = object.__new__(Rope)
        other._set(self.cosines.to(device), self.sines.to(device))
        return other

    def _set(self, cosines: torch.Tensor, sines: torch.Tensor) -> None:
        object.__setattr__(self, "cosines", cosines)
        object.__setattr__(self, "sines", sines)

    def __repr__(self) -> str:
        return f"<Rope of {self.pairs} pairs at {self.positions} positions on {self.cosines.device}>"


def _first(*values):
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _quotient(total, count):
    return None if total is None or not count else total // count


def _reader(config) -> Callable[[str], Any]:
    """`read(name)` of a configuration: None for what it does not have."""
    if isinstance(config, Mapping):
        return config.get
    return lambda name: getattr(config, name, None)


def _parameters(read: Callable[[str], Any], layer_type: str | None) -> Mapping[str, Any]:
    """What a configuration says of one kind of layers."""
    parameters = _first(read("rope_parameters"), read("rope_scaling"), {})
    local = read("rope_local_base_freq")  # Gemma 3's, before rope_parameters
    if local is not None and read("rope_parameters") is None:
        full = {"rope_theta": _first(read("rope_theta"), _DEFAULT_BASE), **parameters}
        parameters = {"full_attention": full, "sliding_attention": {"rope_theta": local}}
    by_layer = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if not by_layer:
        return parameters
    if layer_type not in by_layer:
        raise ValueError(
            argument_error("Rope.from_config", "layer_type", f"one of {', '.join(sorted(by_layer))}", layer_type)
        )
    return parameters[layer_type]


def _kind(scaling: Mapping[str, Any]) -> str:
    return _first(scaling.get("rope_type"), scaling.get("type"), "default")


class _Numbers:
    """The entries of a scaling, checked, and which of them have been asked for."""

    def __init__(self, scaling: Mapping[str, Any]):
        self._scaling, self._known = scaling, {"rope_type", "type", *_NOT_OURS}

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._scaling.get(name)
        self._known.add(name)
        if value is None and default is not None:
            return default
        if not is_number(value):
            raise TypeError(argument_error("Rope", f'scaling["{name}"]', "a number", value))
        if not 0 < value <= FLOAT_MAX:
            raise ValueError(argument_error("Rope", f'scaling["{name}"]', "a finite number above 0", value))
        return float(value)

    def numbers(self, name: str, count: int) -> np.ndarray:
        """One for each pair."""
        values = self._scaling.get(name)
        self._known.add(name)
        must = f"a list of {count} numbers above 0"
        if not isinstance(values, list | tuple) or not all(map(is_number, values)):
            raise TypeError(argument_error("Rope", f'scaling["{name}"]', must, values))
        if len(values) != count or not all(0 < value <= FLOAT_MAX for value in values):
            got = f"{len(values)} numbers" if len(values) != count else describe(min(values))
            raise ValueError(f'specdec_ops.Rope: scaling["{name}"] must be {must}, got {got}')
        return np.array(values, np.float64)

    def has(self, name: str) -> bool:
        """Whether it is there and counts: some configurations have a 0 for none."""
        self._known.add(name)
        return bool(self._scaling.get(name))

    def flag(self, name: str, default: bool) -> bool:
        value = self._scaling.get(name, default)
        self._known.add(name)
        if not isinstance(value, bool):
            raise TypeError(argument_error("Rope", f'scaling["{name}"]', "a bool", value))
        return value

    def refuse_others(self, kind: str, allowed: tuple[str, ...] = ()) -> None:
        """Fail for what this kind of scaling does not know: it may mean that the angles are others."""
        unknown = sorted(set(self._scaling) - self._known - set(allowed))
        if unknown:
            known = ", ".join(sorted(self._known - {"type", *_NOT_OURS}))
            raise ValueError(
                f'specdec_ops.Rope: scaling must be of "{kind}" with no other keys than {known}, got {unknown[0]!r}'
            )


def _scaled(base: float, pairs: int, positions: int, scaling) -> tuple[np.ndarray, float]:
    """The angle of each pair at position 1, float64 [pairs], and the factor of its cosine and sine."""
    if scaling is None:
        scaling = {}
    if not isinstance(scaling, Mapping):
        raise TypeError(argument_error("Rope", "scaling", "None or a dict", scaling))
    kind = _kind(scaling)
    if kind not in _KINDS:
        raise ValueError(argument_error("Rope", 'scaling["rope_type"]', f"one of {', '.join(_KINDS)}", kind))
    entries = _Numbers(scaling)
    frequencies, factor = _KINDS[kind](entries, base, pairs, positions)
    # Configurations carry the original length along where it changes nothing.
    entries.refuse_others(kind, ("original_max_position_embeddings",))
    return frequencies, factor


def _plain(base: float, pairs: int) -> np.ndarray:
    return base ** (-np.arange(pairs, dtype=np.float64) / pairs)


def _default(entries: _Numbers, base: float, pairs: int, positions: int) -> tuple[np.ndarray, float]:
    return _plain(base, pairs), 1.0


def _linear(entries: _Numbers, base: float, pairs: int, positions: int) -> tuple[np.ndarray, float]:
    return _plain(base, pairs) / entries.number("factor"), 1.0


def _dynamic(entries: _Numbers, base: float, pairs: int, positions: int) -> tuple[np.ndarray, float]:
    factor, original = entries.number("factor"), entries.number("original_max_position_embeddings")
    if pairs == 1:  # its only angle does not depend on the base
        return _plain(base, pairs), 1.0
    stretch = factor * max(positions, original) / original - (factor - 1)
    return _plain(base * stretch ** (pairs / (pairs - 1)), pairs), 1.0


def _llama3(entries: _Numbers, base: float, pairs: int, positions: int) -> tuple[np.ndarray, float]:
    """Slow pairs are divided by the factor, fast ones stay, and those in between are in between."""
    factor, original = entries.number("factor"), entries.number("original_max_position_embeddings")
    low, high = entries.number("low_freq_factor"), entries.number("high_freq_factor")
    if not low < high:
        raise ValueError(
            argument_error("Rope", 'scaling["high_freq_factor"]', f"above low_freq_factor of {low:g}", high)
        )
    frequencies = _plain(base, pairs)
    turns = original * frequencies / (2 * math.pi)  # in the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * ((1 - kept) / factor + kept), 1.0


def _yarn(entries: _Numbers, base: float, pairs: int, positions: int) -> tuple[np.ndarray, float]:
    factor, original = entries.number("factor"), entries.number("original_max_position_embeddings")
    fast, slow = entries.number("beta_fast", 32.0), entries.number("beta_slow", 1.0)
    if base == 1:
        raise ValueError(argument_error("Rope", "base", "other than 1 with yarn", base))

    def pair_with(turns: float) -> float:
        """Which pair, as a fraction, turns so often in the original context."""
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first, last = pair_with(fast), pair_with(slow)
    if entries.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    divided = np.clip((np.arange(pairs, dtype=np.float64) - first) / (last - first), 0, 1)

    def attention(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if entries.has("attention_factor"):
        multiplier = entries.number("attention_factor")
        entries.has("mscale"), entries.has("mscale_all_dim")
    elif entries.has("mscale") and entries.has("mscale_all_dim"):
        multiplier = attention(entries.number("mscale")) / attention(entries.number("mscale_all_dim"))
    else:
        entries.has("mscale_all_dim")
        multiplier = attention(1.0)
    return _plain(base, pairs) * (divided / factor + (1 - divided)), multiplier


def _longrope(entries: _Numbers, base: float, pairs: int, positions: int) -> tuple[np.ndarray, float]:
    original = entries.number("original_max_position_embeddings")
    short, long = (entries.numbers(name, pairs) for name in ("short_factor", "long_factor"))
    factor = entries.number("factor", positions / original)
    if entries.has("attention_factor"):
        multiplier = entries.number("attention_factor")
    elif factor <= 1:
        multiplier = 1.0
    else:
        multiplier = math.sqrt(1 + math.log(factor) / math.log(original))
    return _plain(base, pairs) / (long if positions > original else short), multiplier


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
