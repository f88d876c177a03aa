"""The definition of exit_mlp: linear layers, ReLU between them, a sigmoid, and whether any row wants to go on."""

import torch


def exit_mlp(arguments, outputs) -> None:
    """Write each row's score, and whether no row's is above the threshold.

    The arguments and outputs: specdec_ops/ops/early_exit/contract.py.
    """
    compute = torch.promote_types(arguments.features.dtype, torch.float32)
    x = arguments.features.to(compute)
    for index, (weight, bias) in enumerate(zip(arguments.weights, arguments.biases, strict=True)):
        x = torch.relu(x) if index else x
        x = x @ weight.to(compute).T + bias.to(compute)
    outputs.score.copy_(torch.sigmoid(x[:, 0]))
    outputs.stop.copy_(~(outputs.score > arguments.threshold).any())
