"""The definition of exit_mlp: linear layers, ReLU between them, a sigmoid, and whether any row wants to go on."""

import torch


def exit_mlp(features, weights, biases, threshold, score, stop) -> None:
    """Write each row's score, and whether no row's is above the threshold.

    Args:
        features: [rows, inputs].
        weights: of each layer, [outputs, inputs]; the last has one output.
        biases: float32 [outputs] of each layer.
        threshold: a number.
        score: float32 [rows].
        stop: bool [1].
    """
    compute = torch.promote_types(features.dtype, torch.float32)
    x = features.to(compute)
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.relu(x) if index else x
        x = x @ weight.to(compute).T + bias.to(compute)
    score.copy_(torch.sigmoid(x[:, 0]))
    stop.copy_(~(score > threshold).any())
