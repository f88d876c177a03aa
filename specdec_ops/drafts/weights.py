"""The weights of models in whatever form they have, as plain tensors."""

from __future__ import annotations

import torch

from specdec_ops.ops.linear.gguf_weight import GgufWeight
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight

Weight = torch.Tensor | QuantizedWeight | GgufWeight


def dense_weight(weight: Weight) -> torch.Tensor:
    """[outputs, dim]: a weight in float32. Of a float32 tensor it is that tensor."""
    if isinstance(weight, GgufWeight):
        return weight.dequantize()
    if isinstance(weight, QuantizedWeight):
        return weight.values.float() * weight.scales[:, None]
    return weight.float()
