"""When to stop drafting: decision models on what a draft says of itself, and rules without parameters.

Kangaroo's rule (Liu et al., 2024) is early_exit: a draft stops where `max_prob < 0.6`, that is at rows with
`~early_exit(hidden, head, 0.6).exited`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec_ops._core.checks import (
    FLOAT_MAX,
    INT32_MAX,
    KERNEL_DTYPES,
    argument_error,
    as_float32,
    device_error,
    grad_error,
    is_int,
    is_number,
    strides_error,
)

from . import contract
from .exit_confidence import Confidence

FEATURES = 11
_MAX_LAYERS = 8
_DTYPES = (*KERNEL_DTYPES, torch.float64)
_LISTS = (list, tuple, Sequence)  # the common ones first: an abstract class takes long to ask


def exit_mlp(
    features: torch.Tensor,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    threshold: float = 0.5,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score rows with a small decision model, and say whether no row wants to go on.

    Args:
        features: float32, bfloat16 or float16 `[rows, inputs]` with a contiguous last dimension: `exit_features` for an
            11-44-1 model, or a draft's last hidden states for one such as 768-512-256-1 or 2048-1024-512-1.
        layers: 1 to 8 pairs of a weight, float32, bfloat16 or float16 `[outputs, inputs]`, contiguous, and a bias,
            float32 `[outputs]`. ReLU comes between layers; the last has one output, of which the sigmoid is the score.
        threshold: a number: a row with a score above it goes on. The paper uses 0.4.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("exit_mlp")`. A named backend
            never falls back. float64 features, with float64 weights, run with the torch backend.

    Returns:
        score float32 `[rows]`, and stop bool `[1]`, both on the device: stop is true if no score is above the
        threshold, so a level of a draft tree ends when all of its branches do. A NaN does not go on.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    Improved multi-candidate speculative decoding, Lu et al., 2024.
    """
    op = "exit_mlp"
    if not isinstance(features, torch.Tensor) or features.dtype not in _DTYPES:
        raise TypeError(argument_error(op, "features", "float32, bfloat16 or float16 [rows, inputs]", features))
    if features.dim() != 2 or features.shape[1] < 1:
        raise ValueError(argument_error(op, "features", "[rows, inputs] with at least one input", features))
    if max(features.shape) > INT32_MAX:
        raise ValueError(argument_error(op, "features", "of sizes below 2**31", features))
    if features.stride(1) != 1 and features.shape[1] > 1:
        raise ValueError(strides_error(op, "features", "contiguous in its last dimension", features))
    if not is_number(threshold):
        raise TypeError(argument_error(op, "threshold", "a number", threshold))
    if not isinstance(layers, _LISTS) or not all(isinstance(pair, _LISTS) and len(pair) == 2 for pair in layers):
        raise TypeError(argument_error(op, "layers", "a sequence of (weight, bias)", layers))
    if not 1 <= len(layers) <= _MAX_LAYERS:
        raise ValueError(argument_error(op, "layers", f"1 to {_MAX_LAYERS} pairs", len(layers)))
    weights, biases = zip(*layers, strict=True)
    _check_layers(op, features, weights, biases)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, *weights, *biases)):
        raise RuntimeError(grad_error(op))
    arguments = contract.ExitMlpArguments(features, weights, biases, as_float32(op, "threshold", threshold))
    return tuple(contract.exit_mlp(arguments, backend))


def _check_layers(op: str, features: torch.Tensor, weights: tuple, biases: tuple) -> None:
    """Decision models are small and run at every step, so what a tensor says of itself is asked for once."""
    double, inputs, device = features.dtype == torch.float64, features.shape[1], features.device
    dtypes = (torch.float64,) if double else KERNEL_DTYPES
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = index == len(weights) - 1
        if not isinstance(weight, torch.Tensor) or weight.dtype not in dtypes:
            raise TypeError(argument_error(op, f"layers[{index}] weight", _weight_must(double, last, inputs), weight))
        shape = weight.shape
        if len(shape) != 2 or shape[1] != inputs or shape[0] < 1 or (last and shape[0] != 1):
            raise ValueError(argument_error(op, f"layers[{index}] weight", _weight_must(double, last, inputs), weight))
        inputs = shape[0]
        if not isinstance(bias, torch.Tensor) or bias.dtype != torch.float32:
            raise TypeError(argument_error(op, f"layers[{index}] bias", f"float32 [{inputs}]", bias))
        if bias.shape != (inputs,):
            raise ValueError(argument_error(op, f"layers[{index}] bias", f"float32 [{inputs}]", bias))
        for part, tensor in (("weight", weight), ("bias", bias)):
            if not tensor.is_contiguous():
                raise ValueError(strides_error(op, f"layers[{index}] {part}", "contiguous", tensor))
            if tensor.device != device:
                raise ValueError(device_error(op, f"layers[{index}] {part}", device, tensor))


def _weight_must(double: bool, last: bool, inputs: int) -> str:
    return f"{'float64' if double else 'float32, bfloat16 or float16'} [{1 if last else 'outputs'}, {inputs}]"


def exit_features(confidence: Confidence) -> torch.Tensor:
    """Make what the 11-44-1 decision model takes: the entropy, then the ten greatest probabilities.

    Args:
        confidence: of exit_confidence or early_exit with a top_k of at least 10.

    Returns:
        float32 `[rows, 11]` on the same device; 0 where a row has fewer probabilities, and for invalid rows.

    Raises:
        TypeError: confidence is no Confidence.
        ValueError: it lists fewer than ten tokens.
    """
    if not isinstance(confidence, Confidence):
        raise TypeError(argument_error("exit_features", "confidence", "a specdec_ops.Confidence", confidence))
    listed = 0 if confidence.top_logprobs is None else confidence.top_logprobs.shape[1]
    if listed < FEATURES - 1:
        raise ValueError(argument_error("exit_features", "confidence", "made with a top_k of at least 10", listed))
    return torch.cat((confidence.entropy[:, None], confidence.top_logprobs[:, : FEATURES - 1].exp()), dim=1)


def entropy_stop(entropy: torch.Tensor, threshold: torch.Tensor | float, *, gamma: float = 0.2) -> torch.Tensor:
    """Tell which rows stop drafting by AdaEDL: the entropy bounds the chance of acceptance from below.

    Args:
        entropy: float32 `[rows]`, in nats: `Confidence.entropy`.
        threshold: a number, or float32 `[rows]` such as `AdaptiveThreshold.threshold`.
        gamma: the weight of the entropy; 0.2 in the paper.

    Returns:
        bool `[rows]`: `1 - sqrt(gamma * entropy) < threshold`. False where either is NaN.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, or a negative gamma.

    AdaEDL: early draft stopping, Agrawal et al., 2024.
    """
    op = "entropy_stop"
    if not isinstance(entropy, torch.Tensor) or not entropy.dtype.is_floating_point:
        raise TypeError(argument_error(op, "entropy", "float32 [rows]", entropy))
    if entropy.dim() != 1:
        raise ValueError(argument_error(op, "entropy", "float32 [rows]", entropy))
    if not is_number(gamma) or not 0 <= gamma <= FLOAT_MAX:
        raise ValueError(argument_error(op, "gamma", "a finite number of at least 0", gamma))
    if isinstance(threshold, torch.Tensor):
        if threshold.shape not in (entropy.shape, ()):
            raise ValueError(argument_error(op, "threshold", f"a number or float32 {list(entropy.shape)}", threshold))
    elif not is_number(threshold):
        raise TypeError(argument_error(op, "threshold", f"a number or float32 {list(entropy.shape)}", threshold))
    else:
        threshold = as_float32(op, "threshold", threshold)
    return 1 - (gamma * entropy).sqrt() < threshold


class AdaptiveThreshold:
    """The threshold of Draft & Verify, one per request, which follows how much of its drafts is accepted.

    A draft stops where the probability of its token (Draft & Verify) or AdaEDL's bound is below `threshold`. After each
    verification `update` moves it: up if a running mean of the accepted share is below the target, else down, unless
    the draft was as long as drafts may be. Everything stays on the device; nothing waits for it.

    Args:
        requests: how many.
        device: where the state lives.
        start: the first threshold.
        target: of the running mean of the accepted share.
        step: by how much the threshold is to move, before `inertia`.
        memory: weight of the old running mean, which starts at 1.
        inertia: weight of the old threshold.

    Raises:
        TypeError: requests is no int, or another argument no number.
        ValueError: requests is negative, memory or inertia outside of 0 to 1, or another number not finite.

    Attributes:
        threshold: float32 `[requests]`: the threshold now; `update` writes into this tensor.
        accepted_share: float32 `[requests]`: the running mean, 0 to 1; `update` writes into this tensor.

    Draft & Verify, Zhang et al., 2023; AdaEDL uses the same rule and the same numbers.
    """

    def __init__(
        self,
        requests: int,
        device: torch.device | str | int = "cpu",
        *,
        start: float = 0.5,
        target: float = 0.9,
        step: float = 0.01,
        memory: float = 0.5,
        inertia: float = 0.9,
    ) -> None:
        op = "AdaptiveThreshold"
        if not is_int(requests):
            raise TypeError(argument_error(op, "requests", "an int", requests))
        if not 0 <= requests <= INT32_MAX:
            raise ValueError(argument_error(op, "requests", "from 0 to 2**31 - 1", requests))
        for name, value in (
            *(("start", start), ("target", target), ("step", step), ("memory", memory), ("inertia", inertia)),
        ):
            if not is_number(value):
                raise TypeError(argument_error(op, name, "a number", value))
            if name in ("memory", "inertia") and not 0 <= value <= 1:
                raise ValueError(argument_error(op, name, "from 0 to 1", value))
            if not -FLOAT_MAX <= value <= FLOAT_MAX:
                raise ValueError(argument_error(op, name, "a finite number", value))
        self.threshold = torch.full((requests,), float(start), dtype=torch.float32, device=device)
        self.accepted_share = torch.ones(requests, dtype=torch.float32, device=device)
        self._target, self._step, self._memory, self._inertia = target, step, memory, inertia

    def update(self, num_accepted: torch.Tensor, num_drafted: torch.Tensor, max_drafted: int) -> torch.Tensor:
        """Take one verification in.

        Args:
            num_accepted: int32 or int64 `[requests]`: draft tokens that were accepted.
            num_drafted: the same of draft tokens that were verified. A request with none keeps its state.
            max_drafted: how many tokens a draft may have at most.

        Returns:
            The new threshold, float32 `[requests]`: the same tensor as before, changed in place.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape.
        """
        op, shape = "AdaptiveThreshold.update", self.threshold.shape
        for name, value in (("num_accepted", num_accepted), ("num_drafted", num_drafted)):
            if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
                raise TypeError(argument_error(op, name, f"int32 or int64 {list(shape)}", value))
            if value.shape != shape:
                raise ValueError(argument_error(op, name, f"int32 or int64 {list(shape)}", value))
        if not is_int(max_drafted):
            raise TypeError(argument_error(op, "max_drafted", "an int", max_drafted))
        if not 0 <= max_drafted <= INT32_MAX:
            raise ValueError(argument_error(op, "max_drafted", "from 0 to 2**31 - 1", max_drafted))
        drafted = num_drafted > 0
        share = num_accepted.float() / num_drafted.clamp_min(1)
        mean = self._memory * self.accepted_share + (1 - self._memory) * share
        down = self.threshold.where(num_drafted >= max_drafted, self.threshold - self._step)
        wanted = torch.where(mean < self._target, self.threshold + self._step, down)
        moved = self._inertia * self.threshold + (1 - self._inertia) * wanted
        self.accepted_share.copy_(torch.where(drafted, mean, self.accepted_share))
        return self.threshold.copy_(torch.where(drafted, moved, self.threshold))
