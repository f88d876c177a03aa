"""`MultiCandidate`: a small model drafts a tree of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_ops.decode.model import Model
from specdec_ops.vocab_map import VocabMap

from .fixed_tree import FixedTreeDraft


class MultiCandidate(FixedTreeDraft):
    """Multi-candidate speculative decoding (Yang et al., 2024): several children of every node, drawn from the draft.

    Args:
        model: the draft, with the target's tokenizer.
        branching: children of each node, level by level: `(4, 2, 2, 1)` is a tree of 4 + 8 + 16 + 16 nodes.
        replacement: whether siblings may repeat. Without, more is accepted.
        vocab_map: as for `Chain`.

    Raises:
        TypeError, ValueError: as `Tree.from_branching`.
    """

    def __init__(
        self,
        model: Model,
        branching: Sequence[int] = (4, 2, 2, 1),
        *,
        replacement: bool = False,
        vocab_map: VocabMap | None = None,
    ) -> None:
        super().__init__(model, tuple(branching), replacement=replacement, vocab_map=vocab_map)
