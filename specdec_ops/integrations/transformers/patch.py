"""`patch`: our products, norms and attention inside a Hugging Face model's own modules, for its own loops."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.ops.linear.linear import linear
from specdec_ops.ops.linear.rms_norm import rms_norm

from .attention import register
from .families import refuse_unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OP = "integrations.transformers.patch"


class Patch:
    """What `patch` has done to a model. `undo` takes it back; so does the end of a `with` block.

    Attributes:
        modules: the names of the modules that run on our ops, in the model's order.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._before = model, model.config._attn_implementation
        self._classes: list[tuple[torch.nn.Module, type]] = []
        self.modules: list[str] = []
        for name, module in model.named_modules():
            made = _class_for(type(module))
            if made is not None:
                self._classes.append((module, type(module)))
                self.modules.append(name)
                module.__class__ = made
        model.set_attn_implementation(register())

    def undo(self) -> None:
        """The model is as it was. Once more does nothing."""
        if self._classes:
            for module, own in self._classes:
                module.__class__ = own
            self._classes = []
            self._model.set_attn_implementation(self._before)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<Patch of {type(self._model).__name__}: {len(self.modules)} modules and attention>"


def patch(model: PreTrainedModel) -> Patch:
    """Let a model's own modules run on `linear`, `rms_norm` and `tree_attention`, in whatever loop it is used.

    `model.generate` then is faster without another line, and what looks ahead in it, assisted generation and prompt
    lookup, pays sooner, since a pass over a few rows takes about as long as one over a single row. `print(model)` shows
    which modules are patched. Weights stay where they are, under their names, and are not copied. GPT-2's projections,
    whose weights lie the other way round, are left as they are, and so is every module whose input wants gradients.

    The engine does more: `load` also joins products that read the same rows, takes norms, activations and residuals
    along with them, rotates and stores keys in one pass, and keeps them in pages. A model may be patched and loaded.

    Args:
        model: of a family that `load` supports.

    Returns:
        A Patch; its `undo()` takes all back.

    Raises:
        TypeError: model is no model of transformers.
        ValueError: the model's family is not supported, or it is patched already.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise TypeError(argument_error(_OP, "model", "a model of transformers", model))
    refuse_unsupported(_OP, model)
    if any(isinstance(module, _Patched) for module in model.modules()):
        raise ValueError(f"specdec_ops.{_OP}: model must not be patched already; undo the first patch")
    return Patch(model)


class _Patched:
    """A class that a module is given in place of its own, from which it is derived."""

    def _get_name(self) -> str:
        return f"{type(self).__name__} on specdec_ops"


class _Linear(_Patched):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _is_for_us(input, self.weight):
            rows = linear(input.reshape(-1, input.shape[-1]), self.weight.detach(), bias=_detached(self.bias))
            return rows.view(*input.shape[:-1], -1)
        return super().forward(input)


class _RmsNorm(_Patched):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if _is_for_us(hidden_states, self.weight):
            eps = getattr(self, "variance_epsilon", None) or self.eps
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            return rms_norm(rows, self._factors(), eps=eps).view(hidden_states.shape)
        return super().forward(hidden_states)

    def _factors(self) -> torch.Tensor:
        return self.weight.detach()


class _GemmaRmsNorm(_RmsNorm):
    def _factors(self) -> torch.Tensor:
        return 1 + self.weight.detach().float()


def _is_for_us(x: torch.Tensor, weight: torch.Tensor) -> bool:
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.numel() > 0 and x.dtype == weight.dtype and not wants_gradient


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


@functools.cache
def _class_for(own: type) -> type | None:
    """A class of the same module on our ops, or None where there is none."""
    if own is torch.nn.Linear:
        kind: type = _Linear
    elif own.__name__.endswith("RMSNorm"):
        kind = _GemmaRmsNorm if own.__name__.startswith("Gemma") else _RmsNorm
    else:
        return None
    return type(own.__name__, (kind, own), {"__module__": __name__})
