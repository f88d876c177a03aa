"""`Cache`: the paged keys and values of one model, for all requests."""

from __future__ import annotations

import torch

from specdec_ops.ops.attention.tree_attention import tree_attention
from specdec_ops.ops.kv.gather_layer_kv import gather_layer_kv
from specdec_ops.ops.kv.kv_append import kv_append
from specdec_ops.ops.kv.kv_commit import kv_commit

from .pages import PagePool
from .rows import Rows, Shape


class Sequence:
    """The pages of one request in a cache, and how many slots of them hold its text."""

    __slots__ = ("length", "pages")

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.length = 0


class Cache:
    """Keys and values of every layer, in pages that requests take as they grow. All memory is allocated once.

    Args:
        shape: of the model.
        pages: of the pool that all requests share.
        page_size: slots of a page.
        dtype: of keys and values; by default the model's.

    Attributes:
        k_caches: a tensor `[pages, page_size, kv_heads, head_dim]` for each layer.
        v_caches: like k_caches.
        pool: who uses which page.
    """

    def __init__(self, shape: Shape, pages: int, page_size: int = 16, dtype: torch.dtype | None = None) -> None:
        size = (shape.layers, pages, page_size, shape.kv_heads, shape.head_dim)
        dtype = dtype or shape.dtype
        self.k_caches = list(torch.zeros(size, dtype=dtype, device=shape.device))
        self.v_caches = list(torch.zeros(size, dtype=dtype, device=shape.device))
        self.pool = PagePool(pages, page_size)
        self.device = shape.device

    def reserve(self, sequence: Sequence, slots: int) -> bool:
        """Give a request pages for `slots` slots. Returns False, and gives none, if there are not enough."""
        missing = -(-slots // self.pool.page_size) - len(sequence.pages)
        if missing <= 0:
            return True
        pages = self.pool.take(missing)
        if pages is None:
            return False
        sequence.pages += pages
        return True

    def drop(self, sequence: Sequence) -> None:
        """Take all pages of a request back."""
        self.pool.drop(sequence.pages)
        sequence.pages, sequence.length = [], 0

    def page_table(self, sequences: list[Sequence]) -> torch.Tensor:
        """int32 [batch, max_pages], with -1 after the last page of each."""
        width = max(1, max((len(sequence.pages) for sequence in sequences), default=1))
        table = [sequence.pages + [-1] * (width - len(sequence.pages)) for sequence in sequences]
        return torch.tensor(table, dtype=torch.int32).to(self.device)

    def append(self, layer: int, rows: Rows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options):
        """Write the keys and values of the rows; rotate them and q, in place. See `kv_append`."""
        kv_append(
            k,
            v,
            self.k_caches[layer],
            self.v_caches[layer],
            rows.topology,
            rows.context_lens,
            q=q,
            q_out=q,
            page_table=rows.page_table,
            query_start=rows.query_start,
            **options,
        )

    def attend(self, layer: int, rows: Rows, q: torch.Tensor, **options) -> torch.Tensor:
        """Attention of the rows over the text so far and their own tree. See `tree_attention`."""
        return tree_attention(
            q,
            self.k_caches[layer],
            self.v_caches[layer],
            rows.topology,
            rows.context_lens,
            page_table=rows.page_table,
            query_start=rows.query_start,
            **options,
        )

    def commit(self, nodes: torch.Tensor, context_lens: torch.Tensor, page_table: torch.Tensor) -> None:
        """Move the accepted nodes to the slots after the context, in all layers. See `kv_commit`."""
        kv_commit(self.k_caches, self.v_caches, nodes, context_lens, page_table=page_table)

    def layer_kv(self, slots: torch.Tensor, requests: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        """Keys and values of all layers for some slots, [rows, layers, 2 * kv_heads * head_dim]."""
        return gather_layer_kv(self.k_caches, self.v_caches, slots, requests=requests, page_table=page_table)
