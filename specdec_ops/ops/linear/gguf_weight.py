"""`GgufWeight`: a quantised weight as a GGUF file has it, in blocks of 32 elements."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from specdec_ops._core.checks import argument_error

from .reference_blocks import BLOCK_BYTES, BLOCK_ELEMENTS, dequantized_blocks


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class GgufWeight:
    """A weight in the blocks of a GGUF file, which `linear` multiplies as they lie there.

    A row is cut into blocks of 32 neighbouring elements. A block begins with its scale d, a float16.

    - q8_0, 34 bytes: 32 int8; element i is `d * q[i]`.
    - q4_0, 18 bytes: 16 bytes; element i is in the low half of byte i, element 16 + i in the high half, and each is
      `d * (q - 8)`.
    - q4_1, 20 bytes: the minimum m, a float16, then as before; each is `d * q + m`.

    Attributes:
        blocks: uint8 `[outputs, dim / 32 * bytes of a block]`, contiguous.
        weight_type: "q8_0", "q4_0" or "q4_1".

    Raises:
        TypeError: blocks is no uint8 tensor.
        ValueError: a wrong shape or layout, or another type.
    """

    blocks: torch.Tensor
    weight_type: str

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, torch.Tensor) or self.blocks.dtype != torch.uint8:
            raise TypeError(argument_error("GgufWeight", "blocks", "uint8 [outputs, bytes]", self.blocks))
        if not isinstance(self.weight_type, str) or self.weight_type not in BLOCK_BYTES:
            must = f"one of {', '.join(BLOCK_BYTES)}"
            raise ValueError(argument_error("GgufWeight", "weight_type", must, self.weight_type))
        size = BLOCK_BYTES[self.weight_type]
        if self.blocks.dim() != 2 or 0 in self.blocks.shape or self.blocks.shape[1] % size:
            must = f"uint8 [outputs, bytes] with a multiple of {size} bytes in a row"
            raise ValueError(argument_error("GgufWeight", "blocks", must, self.blocks))
        if not self.blocks.is_contiguous():
            raise ValueError(argument_error("GgufWeight", "blocks", "contiguous", self.blocks))

    @classmethod
    def from_reader(cls, tensor: Any) -> GgufWeight:
        """Copy a tensor of a file that `gguf.GGUFReader` has opened, one of its list of them.

        Args:
            tensor: a `gguf.ReaderTensor` of type Q8_0, Q4_0 or Q4_1 with two dimensions.

        Raises:
            TypeError: it is none.
            ValueError: it is of another type, or has another number of dimensions. Those of F32 and F16 are plain
                weights, of which torch.from_numpy makes tensors.
        """
        if not all(hasattr(tensor, name) for name in ("data", "shape", "tensor_type")):
            raise TypeError(argument_error("GgufWeight.from_reader", "tensor", "a gguf.ReaderTensor", tensor))
        kind = str(getattr(tensor.tensor_type, "name", tensor.tensor_type)).lower()
        if kind not in BLOCK_BYTES or len(tensor.shape) != 2:
            got = f"one of type {kind.upper()} with {len(tensor.shape)} dimensions"
            must = f"of type {', '.join(BLOCK_BYTES).upper()} with two dimensions"
            raise ValueError(f"specdec_ops.GgufWeight.from_reader: tensor must be {must}, got {got}")
        dim, outputs = (int(size) for size in tensor.shape)  # a GGUF file names the fastest dimension first
        size = dim // BLOCK_ELEMENTS * BLOCK_BYTES[kind]
        blocks = np.empty((outputs, size), dtype=np.uint8)  # NumPy asks for huge pages, which are read faster
        blocks[:] = np.asarray(tensor.data, dtype=np.uint8).reshape(outputs, size)
        return cls(torch.from_numpy(blocks), kind)

    @property
    def outputs(self) -> int:
        """Rows."""
        return self.blocks.shape[0]

    @property
    def dim(self) -> int:
        """Columns."""
        return self.blocks.shape[1] // BLOCK_BYTES[self.weight_type] * BLOCK_ELEMENTS

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.blocks.nbytes

    def to(self, device: torch.device | str | int) -> GgufWeight:
        """The same on another device."""
        return GgufWeight(self.blocks.to(device), self.weight_type)

    def dequantize(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight in float32 `[outputs, dim]`, or some of its rows `[..., dim]`: those of an embedding.

        Args:
            rows: int32 or int64 `[...]`, which ones; one that is out of range counts as the nearest. None: all.
        """
        if rows is None:
            return dequantized_blocks(self.blocks, self.weight_type)
        known = rows.reshape(-1).clamp(0, self.outputs - 1)
        found = dequantized_blocks(self.blocks[known], self.weight_type)
        return found.view(*rows.shape, self.dim)

    def __repr__(self) -> str:
        size = f"{self.outputs} x {self.dim}"
        return f"<GgufWeight of {size}, {self.weight_type}, on {self.blocks.device}, {self.nbytes / 1e6:.1f} MB>"
