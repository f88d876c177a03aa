"""A saved draft: one folder with draft.safetensors, and a draft.json that says for which target it is."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.decoder import Decoder

_WEIGHTS, _ABOUT = "draft.safetensors", "draft.json"


def _safetensors():
    try:
        import safetensors.torch as found
    except ImportError as error:
        raise RuntimeError(
            "specdec_ops.drafts: saved drafts need the package safetensors (pip install specdec_ops[train])"
        ) from error
    return found


def is_draft(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a saved draft."""
    return (Path(folder) / _ABOUT).is_file()


def tokenizer_hash(tokenizer) -> str | None:
    """Of its vocabulary; None without one."""
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if vocabulary is None:
        return None
    return hashlib.sha256(json.dumps(sorted(vocabulary().items())).encode()).hexdigest()


def identity(target: Decoder) -> dict:
    """What tells a target from others, in whatever form its weights are: sizes, and hashes of vocabulary and norm."""
    shape = target.shape
    norm = target.norm.weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return {
        "target_layers": shape.layers,
        "target_dim": shape.dim,
        "target_vocab": shape.vocab,
        "tokenizer_sha256": tokenizer_hash(target.tokenizer),
        "norm_sha256": hashlib.sha256(norm).hexdigest(),
    }


def save(folder: str | os.PathLike, kind: str, tensors: dict, target: Decoder, about: dict) -> None:
    """Write a draft. Whoever reads the folder meanwhile sees the old files or the new ones.

    Args:
        folder: made if there is none.
        kind: of draft.
        tensors: by name.
        target: the model that it was trained for.
        about: what the JSON says besides.
    """
    safetensors, folder = _safetensors(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = {"draft": kind, "target": os.path.basename(target.name), **identity(target), **about}
    # Copies: layers may share tensors, which the format does not allow.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    for name, write in (
        (_WEIGHTS, lambda path: safetensors.save_file(tensors, path)),
        (_ABOUT, lambda path: path.write_text(json.dumps(said, indent=2) + "\n")),
    ):
        write(folder / f"{name}.part")
        os.replace(folder / f"{name}.part", folder / name)


def check_target(op: str, target: object) -> None:
    """Refuse a target that is no Decoder: a draft that is trained for one reads its weights and sizes."""
    if not isinstance(target, Decoder):
        raise TypeError(argument_error(op, "target", "a specdec_ops.decode.Decoder", target))


def load(folder: str | os.PathLike, kind: str, target: Decoder | None) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and JSON of a draft.

    Args:
        folder: that `save` has written.
        kind: of draft.
        target: for which it must have been trained; None: any.

    Raises:
        ValueError: there is no draft of this kind, or it was trained for another target.
        RuntimeError: the package safetensors is not installed.
    """
    path = Path(folder)
    if not is_draft(path) or not (path / _WEIGHTS).is_file():
        raise ValueError(f"specdec_ops.drafts: folder must hold a {_WEIGHTS} and a {_ABOUT}, got {str(folder)!r}")
    about = json.loads((path / _ABOUT).read_text())
    if about.get("draft") != kind:
        raise ValueError(f"specdec_ops.drafts: folder must hold a draft of kind {kind}, got {about.get('draft')}")
    own = {} if target is None else identity(target)
    either = {name for name in own if own[name] is not None and about.get(name) is not None}
    wrong = sorted(name for name in either if own[name] != about[name])
    if wrong:
        raise ValueError(
            f"specdec_ops.drafts: target must be {about['target']}, for which the draft was trained, got "
            f"{os.path.basename(target.name)} (of another {', '.join(wrong)})"
        )
    return _safetensors().load_file(path / _WEIGHTS), about
