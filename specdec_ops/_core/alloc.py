"""The one function that allocates. Tests replace it to fill everything with NaN, so an unwritten element can't hide."""

import torch


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor. Callers look this up through the module, so that tests can replace it.

    Sizes are unpacked since PyTorch parses a torch.Size at twice the cost.
    """
    return torch.empty(*shape, dtype=dtype, device=device)
