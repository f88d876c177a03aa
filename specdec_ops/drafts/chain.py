"""`Chain`: a small model drafts one token after another."""

from __future__ import annotations

from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.decode.model import Model
from specdec_ops.tree import MAX_NODES
from specdec_ops.vocab_map import VocabMap

from .fixed_tree import FixedTreeDraft


class Chain(FixedTreeDraft):
    """Speculative decoding as Leviathan et al. (2023) and Chen et al. (2023) have it: `steps` tokens of a small model.

    Args:
        model: the draft, with the target's tokenizer.
        steps: tokens of each draft, from 1.
        vocab_map: which target token each entry of the draft's logits is; None: the token of its number. Models with
            one tokenizer need none, even if their logits are padded to different lengths. Logits beyond the map's
            entries are left out, and the draft reads tokens of the text that it has no entry for as its entry 0.

    Raises:
        TypeError, ValueError: steps is no int from 1 on. An engine refuses a vocab_map for other vocabularies, and a
            draft of another tokenizer or size without one.
    """

    def __init__(self, model: Model, steps: int = 5, *, vocab_map: VocabMap | None = None) -> None:
        if not is_int(steps):
            raise TypeError(argument_error("drafts.Chain", "steps", "an int", steps))
        if not 1 <= steps < MAX_NODES:
            raise ValueError(argument_error("drafts.Chain", "steps", f"from 1 to {MAX_NODES - 1}", steps))
        super().__init__(model, (1,) * steps, vocab_map=vocab_map)
