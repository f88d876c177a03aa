"""When a draft stops: decision models over its rows, and thresholds without parameters."""

from __future__ import annotations

import abc
import os
from typing import Literal

import torch

from specdec_ops._core.checks import argument_error, is_number
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.model import Model
from specdec_ops.ops.acceptance.sample import sample_children
from specdec_ops.ops.early_exit.exit_mlp import FEATURES, entropy_stop, exit_mlp

from . import checkpoint

Measure = Literal["probability", "margin", "entropy_bound"]
Features = Literal["confidence", "hidden"]
_TOP = FEATURES - 1
_PARTS = 64  # of a row that are added up apart, so that PyTorch adds every row in the same order however many there are
_LEAST_LOG = -1e4  # instead of -inf, which times a probability of 0 would be NaN


class Stop(abc.ABC):
    """Tells which rows of a draft want another level. Drafting of a request ends when none of its rows does.

    What it says of a row must depend on that row alone, to the last bit, or texts would depend on batching.
    """

    def check(self, model: Model) -> None:  # noqa: B027 -- most fit any model
        """Whether it fits a draft's model.

        Raises:
            TypeError, ValueError: it does not.
        """

    @abc.abstractmethod
    def goes_on(self, logits: torch.Tensor, hidden: torch.Tensor, model: Model) -> torch.Tensor:
        """Which rows want to go on.

        Args:
            logits: [rows, vocab], what the children of the rows were drawn from, before temperature and filters.
            hidden: [rows, dim], before the final norm.
            model: the draft's.

        Returns:
            bool [rows], on the device.
        """


def check_stop(op: str, value) -> None:
    """Check a Stop or None."""
    if value is not None and not isinstance(value, Stop):
        raise TypeError(argument_error(op, "stop", "a specdec_ops.drafts.Stop or None", value))


class StopBelow(Stop):
    """Stop where the draft is not sure of itself. Temperature and filters play no part in it.

    Args:
        measure: "probability", of the likeliest token (Kangaroo: 0.6); "margin", by which it exceeds that of the second
            (CALM); or "entropy_bound", AdaEDL's bound from below of the chance of acceptance,
            `1 - sqrt(0.2 * entropy)`.
        threshold: rows at which the measure is below it do not go on.

    Raises:
        TypeError, ValueError: measure is none of these, or threshold no number.
    """

    def __init__(self, measure: Measure, threshold: float) -> None:
        if measure not in ("probability", "margin", "entropy_bound"):
            raise ValueError(
                argument_error("drafts.StopBelow", "measure", "'probability', 'margin' or 'entropy_bound'", measure)
            )
        if not is_number(threshold):
            raise TypeError(argument_error("drafts.StopBelow", "threshold", "a number", threshold))
        self.measure, self.threshold = measure, float(threshold)

    def goes_on(self, logits: torch.Tensor, hidden: torch.Tensor, model: Model) -> torch.Tensor:
        """See `Stop.goes_on`."""
        if self.measure == "entropy_bound":
            return ~entropy_stop(entropy(logits), self.threshold)
        best = top_probabilities(logits, 2)
        return (best[:, 0] if self.measure == "probability" else best[:, 0] - best[:, 1]) >= self.threshold


class Decision(Stop):
    """Stop where a small network says that what was drafted will not be accepted.

    Args:
        layers: pairs of a weight [outputs, inputs] and a bias float32 [outputs], as `exit_mlp` takes them.
        features: what it reads: "confidence", the entropy and the ten greatest probabilities of a row (11 inputs), or
            "hidden", the draft's last row after its final norm (as many as its dim).
        threshold: rows with a score above it go on. The paper uses 0.4.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is none of these.

    Improved multi-candidate speculative decoding, Lu et al., 2024: 11-44-1, 768-512-256-1 and 2048-1024-512-1.
    Trained by `python -m specdec_ops.train.decision`.
    """

    def __init__(
        self,
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        features: Features = "confidence",
        threshold: float = 0.4,
    ) -> None:
        op = "drafts.Decision"
        if features not in ("confidence", "hidden"):
            raise ValueError(argument_error(op, "features", "'confidence' or 'hidden'", features))
        if not is_number(threshold):
            raise TypeError(argument_error(op, "threshold", "a number", threshold))
        self.layers = [tuple(layer) for layer in layers]
        self.features, self.threshold = features, float(threshold)
        first = self.layers[0][0] if self.layers else torch.zeros(1, 1)
        inputs = first.shape[1]
        exit_mlp(first.new_zeros((1, inputs)), self.layers, self.threshold)  # checks them
        if features == "confidence" and inputs != FEATURES:
            raise ValueError(argument_error(op, "layers", f"of {FEATURES} inputs for features 'confidence'", inputs))

    @classmethod
    def load(cls, folder: str | os.PathLike, model: Decoder, threshold: float | None = None) -> Decision:
        """The network in a folder that `save` has written.

        Args:
            folder: with a draft.safetensors and a draft.json.
            model: the draft's, whose rows it reads.
            threshold: None: the one that was saved.

        Raises:
            TypeError, ValueError: it was trained for another draft, or there is no such network in the folder.
            RuntimeError: the package safetensors is not installed.
        """
        _check_decoder(model)
        tensors, about = checkpoint.load(folder, "decision", model)
        device = model.shape.device
        layers = [
            (tensors[f"{number}.weight"].to(device), tensors[f"{number}.bias"].to(device))
            for number in range(len(tensors) // 2)
        ]
        return cls(layers, about["features"], about["threshold"] if threshold is None else threshold)

    def save(self, folder: str | os.PathLike, model: Decoder, about: dict | None = None) -> None:
        """Write it into a folder: draft.safetensors, and a draft.json that says for which draft it is.

        Args:
            folder: made if there is none.
            model: the draft's, whose rows it reads.
            about: what else the JSON shall say, such as the command that trained it.

        Raises:
            RuntimeError: the package safetensors is not installed.
        """
        _check_decoder(model)
        tensors = {}
        for number, (weight, bias) in enumerate(self.layers):
            tensors |= {f"{number}.weight": weight, f"{number}.bias": bias}
        said = {"features": self.features, "threshold": self.threshold}
        checkpoint.save(folder, "decision", tensors, model, said | (about or {}))

    def check(self, model: Model) -> None:
        """See `Stop.check`."""
        if self.features == "hidden":
            _check_decoder(model)
            inputs = self.layers[0][0].shape[1]
            if inputs != model.shape.dim:
                must = f"of {model.shape.dim} inputs for a draft of dim {model.shape.dim}"
                raise ValueError(argument_error("drafts.Decision", "layers", must, inputs))

    def goes_on(self, logits: torch.Tensor, hidden: torch.Tensor, model: Model) -> torch.Tensor:
        """See `Stop.goes_on`."""
        read = confidence(logits) if self.features == "confidence" else model.norm(hidden)
        return exit_mlp(read, self.layers, self.threshold)[0] > self.threshold


def _check_decoder(model) -> None:
    if not isinstance(model, Decoder):
        raise TypeError(argument_error("drafts.Decision", "model", "a specdec_ops.decode.Decoder", model))


def top_probabilities(logits: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [rows, count]: the greatest probabilities of rows [rows, vocab], descending; 0 where there are fewer."""
    tokens = sample_children(logits[None], count, seeds=0, positions=0, temperature=0.0).tokens[0]
    found = logits.float().softmax(-1).gather(1, tokens.long().clamp(min=0))
    return found.where(tokens >= 0, 0.0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """float32 [rows]: the entropy of rows [rows, vocab], in nats."""
    logits = logits.float()
    terms = logits.softmax(-1) * logits.log_softmax(-1).clamp(min=_LEAST_LOG)
    terms = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % _PARTS))
    return -terms.unflatten(-1, (_PARTS, -1)).sum(-1).sum(-1)


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """float32 [rows, 11]: the entropy of rows [rows, vocab] and their ten greatest probabilities."""
    return torch.cat((entropy(logits)[:, None], top_probabilities(logits, _TOP)), dim=1)
