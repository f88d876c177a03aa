"""What the engine asks of a model: `Model.forward` over `Rows` and a `Cache`."""

from __future__ import annotations

from typing import Protocol

import torch

from .cache import Cache
from .rows import Output, Rows, Shape
from .text import Tokenizer


class Model(Protocol):
    """A decoder that reads and writes a paged cache."""

    shape: Shape
    tokenizer: Tokenizer | None
    eos: tuple[int, ...]

    def forward(
        self,
        rows: Rows,
        cache: Cache,
        *,
        layers: tuple[int, int] | None = None,
        hidden: torch.Tensor | None = None,
        want: torch.Tensor | bool = True,
    ) -> Output:
        """Run rows through layers `layers[0]` to `layers[1]`, all by default.

        Args:
            rows: the tokens and where they stand.
            cache: of this model; the keys and values of the rows are written to it.
            layers: with `hidden`, the rows that enter the first of them.
            hidden: [rows, dim], in place of the tokens' embeddings.
            want: of which rows to make logits: all, none, or int64 [wanted].
        """
        ...
