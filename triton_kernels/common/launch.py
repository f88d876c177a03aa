"""What launches share: where they run, and strides of tensors that requests may share."""

import contextlib

import torch


def on(device):
    """The context of a tensor's GPU when it is not the current one: Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def batch_stride(tensor):
    """From one request to the next; 0 where there is no tensor, or one that all requests share."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)
