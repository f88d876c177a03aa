"""early_exit: which rows of a sorted draft may stop at a layer, by what exit_confidence says of them."""

from __future__ import annotations

import dataclasses

import torch

from specdec_ops._core.checks import argument_error, device_error
from specdec_ops.vocab_map import VocabMap

from . import contract
from .exit_confidence import (
    Confidence,
    check_arguments,
    check_screen,
    check_top_k,
    confidence_of,
    per_row,
    run_head,
)
from .head_bounds import HeadBounds
from .quantized_head import QuantizedHead

MEASURES = ("max_prob", "margin", "entropy")
LEVELS = ("row", "any", "all")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Exit:
    """Which rows exit at a layer, and the others in their order, on the device.

    Attributes:
        confidence: the `Confidence` of all rows, also of those that go on.
        exited: bool `[rows]`: whether the row may stop at this layer.
        active_rows: int32 `[rows]`: the rows that go on, ascending, then -1.
        inverse: int32 `[rows]`: each row's place in active_rows, -1 if it exits.
        num_active: int32 `[1]`: how many rows go on.
        seen: int32 `[rows]`: how many of the head's first entries the row's Confidence takes in; None without bounds.
    """

    confidence: Confidence
    exited: torch.Tensor
    active_rows: torch.Tensor
    inverse: torch.Tensor
    num_active: torch.Tensor
    seen: torch.Tensor | None = None


def early_exit(
    hidden: torch.Tensor,
    head: torch.Tensor | QuantizedHead,
    threshold: torch.Tensor | float,
    *,
    measure: str = "max_prob",
    level: str = "row",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 1.0,
    top_k: int = 0,
    vocab_map: VocabMap | None = None,
    screen: QuantizedHead | None = None,
    tolerance: float = 0.01,
    bounds: HeadBounds | None = None,
    backend: str = "auto",
) -> Exit:
    """Decide for each row whether a sorted draft may stop at this layer, and list the rows that go on.

    Thresholds mean something only for exits that were trained: a draft whose layers were fine-tuned to share the final
    norm and head (S2D, LayerSkip), so that its confidence says how often it is right. The head reads any layer of any
    model, and its answer at an untrained one may be confident and wrong: after layer 10 of 30 of a model without
    trained exits 68% of the rows passed their threshold, and none had the token of the whole model. So compare `token`
    with the last layer's on some text of yours before a threshold is trusted.

    Args:
        hidden: as in exit_confidence, like head and all options that are not described here.
        head: see hidden.
        threshold: float32 `[rows]` or a number. A row exits if its figure is at least the threshold (entropy: at most).
            So with an infinite one every valid row exits, or none; with NaN, in a tensor, none.
        measure: "max_prob" (S2D, Kangaroo), "margin" (CALM) or "entropy".
        level: "row": each row for itself. "any", "all": if one row passes, or every row does, all of them exit, as one
            level of a draft tree does in S2D.
        norm_weight: of the final norm.
        norm_eps: of the final norm.
        bias: of the head.
        temperature: of the softmax.
        top_k: how many of the most likely tokens to return.
        vocab_map: of a reduced head.
        screen: as in exit_confidence. Each row's decision is the whole head's, by whichever measure.
        tolerance: of max_prob and margin with a screen. 1 asks for the token and the decision alone.
        bounds: `bound_head(head)`, made from this very head, which may be quantised; not together with a screen. The
            head is read a part at a time until no entry that is left can change a decision, or what a row that exits
            returns. Each decision is the whole head's. A row that exits has the whole head's token and top_tokens; its
            other statistics, and all of those of a row that goes on, are of the `seen` entries. Levels "any" and "all"
            read until one decision for all rows is certain.
        backend: as in exit_confidence; with bounds see `backends("bounded_exit")`.

    Returns:
        An Exit. Its lists are padded with -1 and num_active stays on the device, so that nothing waits. An invalid row
        never exits.

    Raises:
        TypeError, ValueError, RuntimeError: as in exit_confidence.
    """
    op = "early_exit"
    arguments = check_arguments(op, hidden, head, norm_weight, norm_eps, bias, temperature, vocab_map)
    check_top_k(op, top_k)
    if not isinstance(measure, str) or measure not in MEASURES:
        raise ValueError(argument_error(op, "measure", "'max_prob', 'margin' or 'entropy'", measure))
    if not isinstance(level, str) or level not in LEVELS:
        raise ValueError(argument_error(op, "level", "'row', 'any' or 'all'", level))
    limit = per_row(op, "threshold", threshold, hidden)
    screening = check_screen(op, screen, tolerance, hidden, head)
    arguments = (*arguments, *limit, measure, level)
    if bounds is not None:
        bounded = check_bounds(op, bounds, screen, hidden, head)
        results = contract.bounded_exit(contract.BoundedExitArguments(*arguments, *bounded), backend, top_k=top_k)
    else:
        results = run_head(arguments, screening, top_k, backend)
    return Exit(
        confidence_of(results, screen is not None),
        results.exited,
        results.active_rows,
        results.inverse,
        results.num_active,
        results.seen if bounds is not None else None,
    )


def check_bounds(op: str, bounds, screen, hidden: torch.Tensor, head) -> tuple:
    """What the implementations take of bounds."""
    if not isinstance(bounds, HeadBounds):
        raise TypeError(argument_error(op, "bounds", "a specdec_ops.HeadBounds or None", bounds))
    if screen is not None:
        raise ValueError(argument_error(op, "bounds", "None with a screen", bounds))
    vocab = head.vocab if isinstance(head, QuantizedHead) else head.shape[0]
    if bounds.ends[-1] != vocab:
        raise ValueError(argument_error(op, "bounds", f"made from the head, of {vocab} entries", bounds))
    if bounds.norms_after.device != hidden.device:
        raise ValueError(device_error(op, "bounds.norms_after", hidden.device, bounds.norms_after))
    return bounds.norms_after, bounds.ends
