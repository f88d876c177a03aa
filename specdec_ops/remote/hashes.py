"""Hashes by which client and server find out whether they mean the same model, vocabulary and draft."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from specdec_ops.decode.model import Model
from specdec_ops.decode.text import Tokenizer

_CHUNK = 1 << 20


def _of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_hash(target: Model) -> str:
    """Of a target's sizes and final norm, which no two trained models share, in whatever form its weights are."""
    shape = target.shape
    sizes = (shape.layers, shape.kv_heads, shape.head_dim, shape.dim, shape.vocab)
    norm = getattr(target, "norm", None)
    weight = None if norm is None else norm.weight.detach().to("cpu").bfloat16().float().tolist()
    return _of([sizes, weight])


def tokenizer_hash(tokenizer: Tokenizer | None) -> str:
    """Of a vocabulary; "" where there is none, or where the tokenizer keeps it to itself."""
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return "" if vocabulary is None else _of(sorted(vocabulary().items()))


def draft_hash(folder: str | os.PathLike) -> str:
    """Of the weights of a saved draft: of the file draft.safetensors in its folder."""
    made = hashlib.sha256()
    with (Path(folder) / "draft.safetensors").open("rb") as file:
        while data := file.read(_CHUNK):
            made.update(data)
    return made.hexdigest()
