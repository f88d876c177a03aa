"""What the blocks of GGUF files stand for: the definition."""

import torch

BLOCK_ELEMENTS = 32
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
"""Of a block: a float16 scale, in q4_1 a float16 minimum, and 32 elements of 8 or 4 bits."""


def dequantized_blocks(blocks: torch.Tensor, weight_type: str) -> torch.Tensor:
    """The elements of blocks in float32 [outputs, dim]: each is one product, and of q4_1 one sum more."""
    each = blocks.unflatten(1, (-1, BLOCK_BYTES[weight_type]))
    scale = each[:, :, :2].contiguous().view(torch.float16).float()
    if weight_type == "q8_0":
        elements = scale * each[:, :, 2:].contiguous().view(torch.int8).float()
    else:
        packed = each[:, :, -16:]
        quarters = torch.cat([packed & 15, packed >> 4], dim=2).float()
        if weight_type == "q4_0":
            elements = scale * (quarters - 8)
        else:
            elements = scale * quarters + each[:, :, 2:4].contiguous().view(torch.float16).float()
    return elements.flatten(1)
