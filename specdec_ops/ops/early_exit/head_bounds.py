"""`HeadBounds`: what bounds the logits of those entries of an LM head that have not been read yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from specdec_ops._core.checks import INT32_MAX, KERNEL_DTYPES, argument_error, check_field, is_int
from specdec_ops._core.shield import shielded_maker

from .quantized_head import QuantizedHead, up

MAX_PARTS = 16
_FIRST_PART = 16  # by default the first part is a 16th of the head, and each one doubles what has been read
_MULTIPLE = 512  # of entries, in parts made by default: what a CPU thread takes at a time


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadBounds:
    """A head in parts, and how long the rows behind each of them are. Made by `bound_head`.

    Attributes:
        ends: where the parts end in the vocabulary, ascending.
        norms_after: float32 `[parts]`: not below the Euclidean length of any row of the head behind the part; the last
            one is 0.
    """

    ends: tuple[int, ...]
    norms_after: torch.Tensor

    def __post_init__(self) -> None:
        ends = self.ends
        if not isinstance(ends, tuple) or not all([is_int(end) for end in ends]):
            raise TypeError(argument_error("HeadBounds", "ends", "a tuple of ints", ends))
        rises = all([low < high for low, high in zip((0, *ends), ends)])  # noqa: B905 (one is longer)
        if not 1 <= len(ends) <= MAX_PARTS or not rises or ends[-1] > INT32_MAX:
            raise ValueError(argument_error("HeadBounds", "ends", f"ascending, 1 to {MAX_PARTS} of them", ends))
        check_field("HeadBounds", "norms_after", self.norms_after, torch.float32, (len(ends),))

    def to(self, device: torch.device | str | int) -> HeadBounds:
        """The same on another device."""
        return HeadBounds(self.ends, self.norms_after.to(device))

    def __repr__(self) -> str:
        return f"<HeadBounds of {self.ends[-1]} entries in {len(self.ends)} parts on {self.norms_after.device}>"


@shielded_maker
def bound_head(head: torch.Tensor | QuantizedHead, ends: Sequence[int] | None = None) -> HeadBounds:
    """Bound the logits of the unread entries of a head, for `early_exit(..., bounds=...)`. Once, after loading.

    A row's unread logits are at most its length times the greatest length of an unread entry. Reading can therefore end
    early only where the entries that matter come first and the others are short: put the longest rows, or the most
    frequent tokens, at the front, for instance by

        >>> head = torch.randn(1000, 64)
        >>> order = head.float().norm(dim=1).argsort(descending=True)
        >>> head, vocab_map = head[order].contiguous(), VocabMap(order, len(order))
        >>> bounds = bound_head(head)

    Where all rows are about as long, as in most trained heads, no bound of this kind holds before the end, and
    `early_exit` without bounds is the better choice; `Exit.seen` tells.

    Args:
        head: float32, bfloat16, float16 or float64 `[vocab, dim]`, finite, or a QuantizedHead.
        ends: where the parts end, ascending, the last one at vocab; at most 16. By default a sixteenth of the head,
            an eighth, a quarter, half and all of it, rounded up to multiples of 512.

    Returns:
        A HeadBounds on the same device: 4 bytes for each part.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or order, or a weight that is not finite.
    """
    op = "bound_head"
    if isinstance(head, QuantizedHead):
        norms = head.norms
    elif not isinstance(head, torch.Tensor) or head.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise TypeError(
            argument_error(op, "head", "float32, bfloat16 or float16 [vocab, dim], or a QuantizedHead", head)
        )
    elif head.dim() != 2 or 0 in head.shape:
        raise ValueError(argument_error(op, "head", "[vocab, dim] with at least one of each", head))
    elif head.is_meta:
        raise ValueError("specdec_ops.bound_head: head must be of values, got a tensor on meta")
    elif not head.isfinite().all():
        raise ValueError("specdec_ops.bound_head: head must be finite, got NaN or infinity in it")
    else:
        rows = max(1, (1 << 24) // head.shape[1])  # a piece at a time: float64 takes four times the bytes of bfloat16
        norms = torch.cat([up(torch.linalg.vector_norm(piece.double(), dim=1)) for piece in head.split(rows)])
    vocab = norms.shape[0]
    ends = _default_ends(vocab) if ends is None else _checked_ends(op, ends, vocab)
    after = [norms[end:].max() if end < vocab else norms.new_zeros(()) for end in ends]
    return HeadBounds(ends, torch.stack(after))


def _default_ends(vocab: int) -> tuple[int, ...]:
    parts = (vocab * share // _FIRST_PART for share in (1, 2, 4, 8))
    ends = (-(-max(part, 1) // _MULTIPLE) * _MULTIPLE for part in parts)
    return (*dict.fromkeys(end for end in ends if end < vocab), vocab)


def _checked_ends(op: str, ends, vocab: int) -> tuple[int, ...]:
    must = f"ascending ints that end at {vocab}, at most {MAX_PARTS}"
    if not isinstance(ends, Sequence) or not all(is_int(end) for end in ends):
        raise TypeError(argument_error(op, "ends", must, ends))
    ends = tuple(int(end) for end in ends)
    rises = all(low < high for low, high in zip((0, *ends), ends))  # noqa: B905 (one is longer)
    if not 1 <= len(ends) <= MAX_PARTS or not rises or ends[-1] != vocab:
        raise ValueError(argument_error(op, "ends", must, ends))
    return ends
