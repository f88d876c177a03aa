"""`load`: a saved draft of whatever kind a folder holds."""

from __future__ import annotations

import json
import os
from pathlib import Path

from specdec_ops.decode.decoder import Decoder

from . import checkpoint
from .base import Draft
from .eagle import Eagle
from .mixture_of_attentions import MixtureOfAttentions
from .sorted import Sorted

_OF_TARGETS = {"eagle": Eagle, "mixture_of_attentions": MixtureOfAttentions}


def load(folder: str | os.PathLike, target: Decoder | None = None, **options) -> Draft:
    """The draft that a training has saved in a folder.

    Args:
        folder: with a draft.safetensors and a draft.json.
        target: the model that it was trained for, parts of which Eagle and MixtureOfAttentions use; Sorted needs none.
        options: as of its class.

    Raises:
        TypeError, ValueError: there is none in the folder, or it needs a target and none is given, or another one.
        RuntimeError: the package safetensors is not installed.
    """
    if not checkpoint.is_draft(folder):
        raise ValueError(f"specdec_ops.drafts.load: folder must hold a draft.json, got {str(folder)!r}")
    kind = json.loads((Path(folder) / "draft.json").read_text()).get("draft")
    if kind == "sorted":
        return Sorted.load(folder, **options)
    if kind not in _OF_TARGETS:
        must = ", ".join(("sorted", *_OF_TARGETS))
        raise ValueError(f"specdec_ops.drafts.load: folder must hold a draft of kind {must}, got {kind}")
    if target is None:
        raise ValueError(
            f"specdec_ops.drafts.load: target must be given for a draft of kind {kind}, which uses parts of it"
        )
    return _OF_TARGETS[kind].load(folder, target, **options)
