"""`QuantizedHead`: an int8 copy of an LM head, half the bytes of bfloat16, with what bounds its error."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core.checks import check_field
from specdec_ops._core.shield import shielded_maker
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight, check_weight, empty_values, quantized_pieces

_GRAM_COLUMNS = 1024  # the errors' products are formed for this many columns: all would take dim / 1024 times as long


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class QuantizedHead(QuantizedWeight):
    """A head as int8 rows with a scale each: row v is about `scales[v] * values[v]`. Made by `quantize_head`.

    As the head of `exit_confidence` it is a head of its own. As the `screen` of the head that it was made from it saves
    half of the reading without changing a result. It is a QuantizedWeight, which `linear` takes as well.

    Attributes:
        values: int8 `[vocab, dim]`: from -127 to 127.
        scales: float32 `[vocab]`: one for each row.
        error_norms: float32 `[vocab]`: not below the Euclidean length of `head[v] - scales[v] * values[v]`.
        norms: float32 `[vocab]`: not below the Euclidean length of `scales[v] * values[v]`.
        error_gain: float32 `[1]`: not below the spectral norm of `head - scales * values`. The errors of all logits of
            a hidden row, taken as one vector, are no longer than this times the row: far less than the single rows'
            bounds together.
    """

    error_norms: torch.Tensor
    norms: torch.Tensor
    error_gain: torch.Tensor

    def __post_init__(self) -> None:
        QuantizedWeight.__post_init__(self)  # super() would look for the class that slots=True has replaced
        for name, size in (("error_norms", self.vocab), ("norms", self.vocab), ("error_gain", 1)):
            check_field("QuantizedHead", name, getattr(self, name), torch.float32, (size,), self.values)

    @property
    def vocab(self) -> int:
        """Rows."""
        return self.values.shape[0]


@shielded_maker
def quantize_head(head: torch.Tensor) -> QuantizedHead:
    """Make the int8 copy of a head: each row's largest magnitude becomes 127. Once, after loading the weights.

    Args:
        head: float32, bfloat16, float16 or float64 `[vocab, dim]`, finite.

    Returns:
        A QuantizedHead on the same device. It takes `vocab * (dim + 12) + 4` bytes; the head itself is not kept.

    Raises:
        TypeError: head is no tensor of these dtypes.
        ValueError: a wrong shape, or a weight that is not finite.
    """
    check_weight("quantize_head", "head", "[vocab, dim]", head)
    values = empty_values(head)
    lists: tuple[list, list, list] = ([], [], [])
    gram = [0.0] * len(range(0, head.shape[1], _GRAM_COLUMNS))
    for piece, scale, rounded in quantized_pieces("quantize_head", "head", head, values):
        exact = scale.double()[:, None]
        error = piece - exact * rounded
        length = torch.linalg.vector_norm(error, dim=1)
        for each, part in zip(lists, (scale, up(length), up(exact[:, 0] * rounded.norm(dim=1))), strict=True):
            each.append(part)
        gram = [old + new.T @ new for old, new in zip(gram, error.split(_GRAM_COLUMNS, dim=1), strict=True)]
    return QuantizedHead(values, *(torch.cat(each) for each in lists), error_gain(gram))


def error_gain(gram: list[torch.Tensor]) -> torch.Tensor:
    """Bound the spectral norm of a matrix by those of its blocks of columns, given as their products with themselves.

    The rounding of the products and of a backward stable eigenvalue is below dim * vocab * 2e-16 of the trace, and the
    trace below dim times the greatest eigenvalue: 1e-6 of the trace is far more.
    """
    squares = [torch.linalg.eigvalsh(block)[-1].clamp_min(0) + 1e-6 * block.diagonal().sum() for block in gram]
    return up(torch.stack(squares).sum().sqrt()[None])


def up(values: torch.Tensor) -> torch.Tensor:
    """Float64 to float32, never downwards, and with room for the rounding of the float64 sums."""
    return torch.nextafter((values * (1 + 1e-12)).float(), torch.tensor(float("inf"), device=values.device))
