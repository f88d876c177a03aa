"""What numbers of a request count as that come from the device: see csrc/common/sampling_params.h.

A temperature that is NaN or negative is none, which a status reports. Between the bounds kernels compute 1 / T without
overflow; beyond them the law no longer changes, for any logits that a model gives.
"""

import torch

LEAST_TEMPERATURE, MOST_TEMPERATURE = (torch.tensor(bound, dtype=torch.float32).item() for bound in (1e-20, 1e20))


def sampling_temperature(temperature: float) -> float:
    """Of the acceptance and sampling ops: 0, the argmax, where it is none or tiny; at most MOST_TEMPERATURE."""
    return min(temperature, MOST_TEMPERATURE) if temperature >= LEAST_TEMPERATURE else 0.0


def softmax_temperature(temperatures: torch.Tensor) -> torch.Tensor:
    """Of the early exit ops, [rows]: between the bounds; the lower one where it is none."""
    return temperatures.nan_to_num(LEAST_TEMPERATURE, MOST_TEMPERATURE).clamp(LEAST_TEMPERATURE, MOST_TEMPERATURE)


def is_temperature(temperature):
    """False for NaN and negative numbers."""
    return temperature >= 0
