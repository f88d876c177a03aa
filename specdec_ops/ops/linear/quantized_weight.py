"""`QuantizedWeight`: an int8 copy of a weight with a scale for each row, half the bytes of bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch

from specdec_ops._core.checks import KERNEL_DTYPES, argument_error, check_field
from specdec_ops._core.shield import shielded_maker

_Kind = TypeVar("_Kind", bound="QuantizedWeight")


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class QuantizedWeight:
    """A weight as int8 rows with a scale each: row v is about `scales[v] * values[v]`. Made by `quantize_linear`.

    No element differs from the weight's by more than half a scale, which is a 254th of the row's largest magnitude. So
    a product differs by at most `scales[v] / 2` times the sum of the magnitudes of the row that it is multiplied with.

    Attributes:
        values: int8 `[outputs, dim]`: from -127 to 127.
        scales: float32 `[outputs]`: one for each row.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_field(owner, "values", self.values, torch.int8, ("outputs", "dim"))
        check_field(owner, "scales", self.scales, torch.float32, self.values.shape[:1], self.values)

    @property
    def outputs(self) -> int:
        """Rows."""
        return self.values.shape[0]

    @property
    def dim(self) -> int:
        """Columns."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything here."""
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    def to(self: _Kind, device: torch.device | str | int) -> _Kind:
        """The same on another device."""
        return type(self)(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def __repr__(self) -> str:
        size = f"{self.outputs} x {self.dim}"
        return f"<{type(self).__name__} of {size} on {self.values.device}, {self.nbytes / 1e6:.1f} MB>"


@shielded_maker
def quantize_linear(weight: torch.Tensor) -> QuantizedWeight:
    """Make the int8 copy of a weight: each row's largest magnitude becomes 127. Once, after loading the weights.

    Args:
        weight: float32, bfloat16, float16 or float64 `[outputs, dim]`, finite.

    Returns:
        A QuantizedWeight on the same device, of `outputs * (dim + 4)` bytes; the weight itself is not kept.

    Raises:
        TypeError: weight is no tensor of these dtypes.
        ValueError: a wrong shape, or a weight that is not finite.
    """
    check_weight("quantize_linear", "weight", "[outputs, dim]", weight)
    values = empty_values(weight)
    scales = [scale for _, scale, _ in quantized_pieces("quantize_linear", "weight", weight, values)]
    return QuantizedWeight(values, torch.cat(scales))


def check_weight(op: str, name: str, layout: str, weight) -> None:
    """Check for what `quantized_pieces` takes."""
    if not isinstance(weight, torch.Tensor) or weight.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise TypeError(argument_error(op, name, f"float32, bfloat16 or float16 {layout}", weight))
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(argument_error(op, name, f"{layout} with at least one of each", weight))
    if weight.is_meta:
        raise ValueError(f"specdec_ops.{op}: {name} must be of values, got a tensor on meta")


def quantized_pieces(
    op: str, name: str, weight: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Write int8 rows to `values`, some at a time: float64 takes four times the bytes of bfloat16.

    Yields:
        Of each piece: its rows in float64, their scales in float32, and the rounded rows in float64.
    """
    rows = max(1, (1 << 24) // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        piece = weight[start : start + rows].double()
        if not piece.isfinite().all():
            raise ValueError(f"specdec_ops.{op}: {name} must be finite, got NaN or infinity in it")
        scale = (piece.abs().amax(dim=1) / 127).float()
        exact = scale.double()[:, None]
        rounded = torch.where(exact > 0, piece / exact, 0.0).round().clamp(-127, 127)
        values[start : start + rows] = rounded.to(torch.int8)
        yield piece, scale, rounded


def empty_values(weight: torch.Tensor) -> torch.Tensor:
    """Memory for an int8 copy. NumPy asks Linux for huge pages, which are read up to 1.2 times as fast."""
    if weight.device.type == "cpu":
        return torch.from_numpy(np.empty(weight.shape, dtype=np.int8))
    return torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
