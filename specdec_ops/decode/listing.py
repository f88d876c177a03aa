"""`Replaced`: which modules of a loaded model an op stands for, and how that is printed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from specdec_ops.ops.linear.gguf_weight import GgufWeight
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight

_OF_LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")


class Replaced(NamedTuple):
    """Modules of one model, by their names in it, and what runs in their place."""

    modules: tuple[str, ...]
    by: str


def linear_of(weight: object) -> str:
    """What is said of a product: the form and the sizes of its weight."""
    if isinstance(weight, GgufWeight):
        return f"linear, {weight.weight_type} [{weight.outputs}, {weight.dim}]"
    if isinstance(weight, QuantizedWeight):
        return f"linear, int8 [{weight.outputs}, {weight.dim}]"
    assert isinstance(weight, torch.Tensor)
    return f"linear, {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"


def lines_of(replaced: Iterable[Replaced]) -> list[str]:
    """A line for each, where layers that are alike have one list."""
    lines: list[str] = []
    in_layers: dict[tuple[str, int], list[str]] = {}
    for modules, by in replaced:
        found = _OF_LAYER.fullmatch(modules[0])
        if found is None:
            lines += [*_of_layers(in_layers), f"{', '.join(modules)}: {by}"]
            in_layers = {}
            continue
        stem, index, _ = found.groups()
        inner = ", ".join(module.removeprefix(f"{stem}.{index}.") for module in modules)
        in_layers.setdefault((stem, int(index)), []).append(f"  {inner}: {by}")
    return lines + _of_layers(in_layers)


def _of_layers(in_layers: dict[tuple[str, int], list[str]]) -> list[str]:
    """Of layers in their order. Those that follow one another and are alike are one."""
    lines: list[str] = []
    for (stem, inner), alike in itertools.groupby(in_layers.items(), key=lambda item: (item[0][0], item[1])):
        indices = [index for (_, index), _ in alike]
        last = f" to {stem}.{indices[-1]}" if len(indices) > 1 else ""
        lines += [f"{stem}.{indices[0]}{last}", *inner]
    return lines
