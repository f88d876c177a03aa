"""`vocab_map_for`: how the entries of a draft's logits become tokens of the target."""

from __future__ import annotations

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.model import Model
from specdec_ops.vocab_map import VocabMap


def vocab_map_for(draft: Model, target: Model, given: VocabMap | None) -> VocabMap | None:
    """The map between two models' vocabularies. None: each entry of the draft's logits is the token of its number.

    Models with one tokenizer may still have rows of logits of different lengths, since these are padded to round
    numbers. Where both tokenizers are known and agree, the entries that both models have are mapped by number.

    Args:
        draft: the model that drafts.
        target: the model that verifies.
        given: by the user; entries of the draft beyond those of the map are left out.

    Raises:
        TypeError: given is no VocabMap.
        ValueError: the map is for other vocabularies, or there is none and the vocabularies are not one.
    """
    ours, theirs = draft.shape.vocab, target.shape.vocab
    if given is not None:
        if not isinstance(given, VocabMap):
            raise TypeError(argument_error("drafts", "vocab_map", "a specdec_ops.VocabMap or None", given))
        if given.vocab != theirs:
            raise ValueError(f"specdec_ops.drafts: vocab_map must be into {theirs} target tokens, got {given.vocab}")
        if given.draft_vocab > ours:
            raise ValueError(
                f"specdec_ops.drafts: vocab_map must have at most the draft's {ours} entries, got {given.draft_vocab}"
            )
        return given.to(target.shape.device)
    different = _first_difference(draft, target)
    if different:
        raise ValueError(
            f"specdec_ops.drafts: the draft must have the target's tokenizer, or a vocab_map, got another: {different}"
        )
    if ours == theirs:
        return None
    if different is None:
        raise ValueError(
            f"specdec_ops.drafts: the draft must have the target's vocabulary of {theirs} tokens, or a vocab_map, "
            f"got {ours}"
        )
    return VocabMap(torch.arange(min(ours, theirs)), theirs).to(target.shape.device)


def _first_difference(draft: Model, target: Model) -> str | None:
    """What a token that both have is to each of them, if that is not the same; "" if it is; None if nobody knows."""
    words = [getattr(model.tokenizer, "get_vocab", None) for model in (draft, target)]
    if None in words:
        return None
    ours, theirs = ({token: word for word, token in known().items()} for known in words)
    token = next((token for token in sorted(ours.keys() & theirs.keys()) if ours[token] != theirs[token]), None)
    return "" if token is None else f"token {token} is {ours[token]!r} there, and {theirs[token]!r} here"
