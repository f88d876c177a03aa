"""`Cache`: the paged keys and values of one model, for all requests."""

from __future__ import annotations

import torch

from specdec_ops._core.checks import KERNEL_DTYPES
from specdec_ops._core.dispatch import takes_cpu_kernels
from specdec_ops._core.library import FirstCall
from specdec_ops.ops.attention.tree_attention import tree_attention
from specdec_ops.ops.kv.gather_layer_kv import gather_layer_kv
from specdec_ops.ops.kv.kv_append import kv_append
from specdec_ops.ops.kv.kv_commit import kv_commit
from specdec_ops.rope import Rope

from .pages import PagePool
from .rows import Rows, Shape


def _has_exact_attention(shape: Shape, dtype: torch.dtype) -> bool:
    """Whether attention can give a node of a tree, to the last bit, what plain decoding of its path would give."""
    sound = shape.head_dim % 16 == 0 and shape.head_dim <= 256 and dtype in KERNEL_DTYPES
    return sound and takes_cpu_kernels("tree_attention", shape.device)


def _form(rows: torch.Tensor | None) -> tuple:
    return () if rows is None else (type(rows), rows.dtype, rows.shape, rows.stride())


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
        self._is_exact = _has_exact_attention(shape, dtype)
        # Of the last pass. Its layers have rows and caches of one form, so only the first one's calls are checked.
        self._first_append = FirstCall(
            ("k", "v", "q", "q_norm_weight", "k_norm_weight"), ("k_cache", "v_cache", "q_out")
        )
        self._first_attend = FirstCall(("q", "k_cache", "v_cache", "sinks"))

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

    def append(
        self,
        layer: int,
        rows: Rows,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: Rope | None = None,
        interleaved: bool = False,
        *,
        q_norm_weight: torch.Tensor | None = None,
        k_norm_weight: torch.Tensor | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        """Write the keys and values of the rows; rotate them and q, in place. See `kv_append`."""
        inputs = (k, v, q, q_norm_weight, k_norm_weight)
        key = (rope, interleaved, norm_eps, *_form(q), *_form(k), _form(q_norm_weight), _form(k_norm_weight))
        k_cache, v_cache = self.k_caches[layer], self.v_caches[layer]
        if self._first_append.again(rows, key, inputs, (k_cache, v_cache, q)) is not None:
            return
        with self._first_append.kept(rows, key, inputs):
            kv_append(
                k,
                v,
                k_cache,
                v_cache,
                rows.topology,
                rows.context_lens,
                q=q,
                q_out=q,
                rope=rope,
                interleaved=interleaved,
                page_table=rows.page_table,
                query_start=rows.query_start,
                q_norm_weight=q_norm_weight,
                k_norm_weight=k_norm_weight,
                norm_eps=norm_eps,
            )

    def attend(
        self,
        layer: int,
        rows: Rows,
        q: torch.Tensor,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the rows over the text so far and their own tree. See `tree_attention`."""
        key = (scale, window, softcap, *_form(q), _form(sinks))
        k_cache, v_cache = self.k_caches[layer], self.v_caches[layer]
        inputs = (q, k_cache, v_cache, sinks)
        outputs = self._first_attend.again(rows, key, inputs)
        if outputs is not None:
            return outputs.out
        with self._first_attend.kept(rows, key, inputs):
            return tree_attention(
                q,
                k_cache,
                v_cache,
                rows.topology,
                rows.context_lens,
                page_table=rows.page_table,
                query_start=rows.query_start,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                path_invariant=self._is_exact,
            )

    def commit(self, nodes: torch.Tensor, context_lens: torch.Tensor, page_table: torch.Tensor) -> None:
        """Move the accepted nodes to the slots after the context, in all layers. See `kv_commit`."""
        kv_commit(self.k_caches, self.v_caches, nodes, context_lens, page_table=page_table)

    def layer_kv(self, slots: torch.Tensor, requests: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        """Keys and values of all layers for some slots, [rows, layers, 2 * kv_heads * head_dim]."""
        return gather_layer_kv(self.k_caches, self.v_caches, slots, requests=requests, page_table=page_table)
