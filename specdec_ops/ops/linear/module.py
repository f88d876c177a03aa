"""`Linear`: what `linear` does as a torch.nn.Module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specdec_ops._core.checks import argument_error

from .gguf_weight import GgufWeight
from .linear import linear
from .quantized_weight import QuantizedWeight, quantize_linear


class Linear(torch.nn.Module):
    """A drop-in for torch.nn.Linear at inference: `linear` with a weight, and what goes with it, of its own.

    Attributes:
        bias: `[weight rows]`, a parameter without gradients, or None.
        norm_weight: `[dim]`, the same.
        norm_eps: of the norm.
        activation: None, "swiglu" or "geglu".
        backend: as `linear` has it.

    A plain weight and the bias are parameters without gradients under torch.nn.Linear's names, so its state_dict fits.
    Those of a quantised weight are buffers: `values` and `scales`, or `blocks`. `to(device)` moves all; a change of
    dtype leaves quantised weights and their scales as they are.

    Args:
        weight: as `linear` has it: a tensor, a QuantizedWeight or a GgufWeight.
        bias: one number for each row of the weight, or None.
        norm_weight: `[dim]` of an RMSNorm before the product, or None.
        norm_eps: of that norm.
        activation: None, "swiglu" or "geglu": then the weight has the rows of the gate and those of the up projection.
        backend: as `linear` has it.
    """

    def __init__(
        self,
        weight: torch.Tensor | QuantizedWeight | GgufWeight,
        bias: torch.Tensor | None = None,
        *,
        norm_weight: torch.Tensor | None = None,
        norm_eps: float = 1e-6,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._weight_type = ""
        if isinstance(weight, GgufWeight):
            self._weight_type = weight.weight_type
            self.register_buffer("blocks", weight.blocks)
        elif isinstance(weight, QuantizedWeight):
            self._weight_type = "int8"
            self.register_buffer("values", weight.values)
            self.register_buffer("scales", weight.scales)
        elif isinstance(weight, torch.Tensor):
            self.weight = _parameter(weight)
        else:
            must = "a tensor, a specdec_ops.QuantizedWeight or a specdec_ops.GgufWeight"
            raise TypeError(argument_error("Linear", "weight", must, weight))
        self.bias = _parameter(bias)
        self.norm_weight = _parameter(norm_weight)
        self.norm_eps, self.activation, self.backend = norm_eps, activation, backend

    @classmethod
    def from_module(
        cls,
        *modules: torch.nn.Linear,
        quantized: bool = False,
        norm_weight: torch.Tensor | None = None,
        norm_eps: float = 1e-6,
        activation: str | None = None,
        backend: str = "auto",
    ) -> Linear:
        """Make one of torch.nn.Linear, or of several, whose rows follow one another: q, k and v, or gate and up.

        Args:
            modules: at least one, all with as many input features, with a bias or without. The weight of a single one
                is shared, not copied.
            quantized: keep an int8 copy of the weight in place of it (`quantize_linear`).
            norm_weight: as above, and so is the rest.
            norm_eps: of the norm.
            activation: None, "swiglu" or "geglu".
            backend: as `linear` has it.

        Raises:
            TypeError: there is no module, or one is no torch.nn.Linear.
            ValueError: they differ in their input features, or some have a bias and others not.
        """
        op = "Linear.from_module"
        for module in modules or (None,):
            if not isinstance(module, torch.nn.Linear):
                raise TypeError(argument_error(op, "modules", "one torch.nn.Linear or several", module))
        sizes = [module.in_features for module in modules]
        if len(set(sizes)) > 1:
            raise ValueError(f"specdec_ops.{op}: modules must be of the same in_features, got {sizes}")
        biases = [module.bias.detach() for module in modules if module.bias is not None]
        if len(biases) not in (0, len(modules)):
            raise ValueError(f"specdec_ops.{op}: modules must all have a bias or none, got {len(biases)} with one")
        weights = [module.weight.detach() for module in modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return cls(
            quantize_linear(weight) if quantized else weight,
            None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases),
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            activation=activation,
            backend=backend,
        )

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply `[..., dim]`; a residual `[..., outputs]` is added last."""
        weight: Any
        if not self._weight_type:
            weight = self.weight
        elif self._weight_type == "int8":
            weight = QuantizedWeight(self.values, self.scales)
        else:
            weight = GgufWeight(self.blocks, self._weight_type)
        result = linear(
            input.reshape(-1, input.shape[-1]),
            weight,
            bias=self.bias,
            norm_weight=self.norm_weight,
            norm_eps=self.norm_eps,
            activation=self.activation,
            residual=None if residual is None else residual.reshape(-1, residual.shape[-1]),
            backend=self.backend,
        )
        return result.view(*input.shape[:-1], result.shape[1])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear:
        """Moves all; scales stay float32, whatever the dtype that a model is brought to."""
        scales = getattr(self, "scales", None)
        super()._apply(fn, recurse)
        if scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """What is in it, beside tensors."""
        kind = self._weight_type or str(self.weight.dtype).removeprefix("torch.")
        parts = [f"weight={kind}", f"bias={self.bias is not None}"]
        if self.norm_weight is not None:
            parts.append(f"norm_eps={self.norm_eps}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)


def _parameter(value: torch.Tensor | None) -> torch.nn.Parameter | None:
    return None if value is None else torch.nn.Parameter(value.detach(), requires_grad=False)
