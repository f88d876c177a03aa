"""`VocabMap`: which target token each entry of a reduced draft vocabulary is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ._core.checks import INT32_MAX, argument_error, is_int


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False, init=False)
class VocabMap:
    """A draft head over a part of the target's vocabulary (as EAGLE-3's and FR-Spec's), both ways. Make it once.

    Draft tokens are target ids everywhere in this package; only rows of draft logits have draft entries. A target token
    that no entry stands for has draft probability 0.

    Args:
        draft_to_target: int32 or int64 `[draft_vocab]`: the target id of every draft entry, all different. A list or an
            array will do; it goes to the CPU. (EAGLE-3's `d2t` holds differences: pass `d2t + torch.arange(len(d2t))`.)
        vocab: entries of a row of target logits.

    Raises:
        TypeError: the ids are not integers.
        ValueError: they are not one-dimensional, out of range or not all different.

    Making one checks the values, which waits for the device; using one does not.

    Attributes:
        draft_to_target: int32 `[draft_vocab]`: the target token of every draft entry.
        target_to_draft: int32 `[vocab]`: the draft entry of a target token, or -1.
    """

    draft_to_target: torch.Tensor
    target_to_draft: torch.Tensor

    def __init__(self, draft_to_target: torch.Tensor | Sequence[int], vocab: int) -> None:
        ids = draft_to_target
        if not isinstance(ids, torch.Tensor):
            try:
                ids = torch.as_tensor(ids, device="cpu")
            except (RuntimeError, TypeError, ValueError) as error:
                raise TypeError(
                    argument_error("VocabMap", "draft_to_target", "int32 or int64 [draft_vocab]", ids)
                ) from error
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(argument_error("VocabMap", "draft_to_target", "int32 or int64 [draft_vocab]", ids))
        if ids.dim() != 1 or ids.shape[0] < 1:
            raise ValueError(argument_error("VocabMap", "draft_to_target", "int32 or int64 [draft_vocab]", ids))
        if not is_int(vocab):
            raise TypeError(argument_error("VocabMap", "vocab", "an int", vocab))
        if not 1 <= vocab <= INT32_MAX:
            raise ValueError(argument_error("VocabMap", "vocab", "from 1 to 2**31 - 1", vocab))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            must = f"of ids from 0 to {vocab - 1}"
            raise ValueError(f"specdec_ops.VocabMap: draft_to_target must be {must}, got ids from {low} to {high}")
        inverse = torch.full((vocab,), -1, dtype=torch.int32, device=ids.device)
        entries = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
        inverse[ids.long()] = entries
        if not torch.equal(inverse[ids.long()], entries):
            raise ValueError(
                f"specdec_ops.VocabMap: draft_to_target must be of different ids, got {len(ids.unique())} of {len(ids)}"
            )
        # A copy: what the caller does with its own tensor or array afterwards must not move tokens.
        self._set(ids.to(torch.int32, copy=True).contiguous(), inverse)

    @property
    def vocab(self) -> int:
        """Entries of a row of target logits."""
        return self.target_to_draft.shape[0]

    @property
    def draft_vocab(self) -> int:
        """Entries of a row of draft logits."""
        return self.draft_to_target.shape[0]

    def to(self, device: torch.device | str | int) -> VocabMap:
        """The same on another device."""
        other = object.__new__(VocabMap)
        other._set(self.draft_to_target.to(device), self.target_to_draft.to(device))
        return other

    def _set(self, draft_to_target: torch.Tensor, target_to_draft: torch.Tensor) -> None:
        object.__setattr__(self, "draft_to_target", draft_to_target)
        object.__setattr__(self, "target_to_draft", target_to_draft)

    def __repr__(self) -> str:
        device = self.draft_to_target.device
        return f"<VocabMap of {self.draft_vocab} draft entries into {self.vocab} tokens on {device}>"
