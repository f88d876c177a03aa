"""`Cache`: the paged keys and values of one model, for all requests."""

from __future__ import annotations

import torch

from specdec_ops._core import alloc
from specdec_ops._core.checks import KERNEL_DTYPES
from specdec_ops._core.dispatch import backends
from specdec_ops._core.library import nobody_watches, recorded
from specdec_ops.ops.attention.contract import TreeAttentionOutputs
from specdec_ops.ops.attention.tree_attention import tree_attention
from specdec_ops.ops.kv.contract import KvAppendOutputs
from specdec_ops.ops.kv.gather_layer_kv import gather_layer_kv
from specdec_ops.ops.kv.kv_append import kv_append
from specdec_ops.ops.kv.kv_commit import kv_commit
from specdec_ops.rope import Rope

from .pages import PagePool
from .rows import Rows, Shape


def _has_exact_attention(shape: Shape, dtype: torch.dtype) -> bool:
    """Whether attention can give a node of a tree, to the last bit, what plain decoding of its path would give."""
    sound = shape.head_dim % 16 == 0 and shape.head_dim <= 256 and dtype in KERNEL_DTYPES
    return sound and shape.device.type == "cpu" and backends("tree_attention", "cpu")["cpu"] is None


def _form(rows: torch.Tensor) -> tuple:
    return type(rows), rows.dtype, rows.shape, rows.stride()


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
        self._appended: tuple | None = None  # of the last pass: its rows, the form of a call, and what that came to
        self._attended: tuple | None = None

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
        **norms,
    ) -> None:
        """Write the keys and values of the rows; rotate them and q, in place. See `kv_append`."""
        key = (id(rope), interleaved, *_form(q), *_form(k))
        again = self._again(self._appended, rows, key) if not norms else None
        if again is not None:
            implementation, fixed = again
            outputs = KvAppendOutputs(self.k_caches[layer], self.v_caches[layer], q)
            implementation(fixed._replace(k=k, v=v, q=q), outputs)
            return
        with recorded() as calls:
            kv_append(
                k,
                v,
                self.k_caches[layer],
                self.v_caches[layer],
                rows.topology,
                rows.context_lens,
                q=q,
                q_out=q,
                rope=rope,
                interleaved=interleaved,
                page_table=rows.page_table,
                query_start=rows.query_start,
                **norms,
            )
        self._appended = None
        if len(calls) == 1 and not norms:
            implementation, arguments, _ = calls[0]
            self._appended = (rows, key, implementation, arguments._replace(k=None, v=None, q=None))

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
        key = (scale, window, softcap, *_form(q))
        again = self._again(self._attended, rows, key) if sinks is None else None
        if again is not None:
            implementation, fixed = again
            out = alloc.empty(q.shape, q.dtype, q.device)
            arguments = fixed._replace(q=q, k_cache=self.k_caches[layer], v_cache=self.v_caches[layer])
            implementation(arguments, TreeAttentionOutputs(out, None))
            return out
        with recorded() as calls:
            out = tree_attention(
                q,
                self.k_caches[layer],
                self.v_caches[layer],
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
        self._attended = None
        if len(calls) == 1 and sinks is None:
            implementation, arguments, _ = calls[0]
            self._attended = (rows, key, implementation, arguments._replace(q=None))
        return out

    @staticmethod
    def _again(first: tuple | None, rows: Rows, key: tuple) -> tuple | None:
        """What a call of the pass has come down to, if this one differs in its layer alone.

        The layers of a pass have rows and caches of one form, so only the first of them is checked and resolved.
        """
        if first is None or first[0] is not rows or first[1] != key or torch.is_grad_enabled() or not nobody_watches():
            return None
        return first[2:]

    def commit(self, nodes: torch.Tensor, context_lens: torch.Tensor, page_table: torch.Tensor) -> None:
        """Move the accepted nodes to the slots after the context, in all layers. See `kv_commit`."""
        kv_commit(self.k_caches, self.v_caches, nodes, context_lens, page_table=page_table)

    def layer_kv(self, slots: torch.Tensor, requests: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        """Keys and values of all layers for some slots, [rows, layers, 2 * kv_heads * head_dim]."""
        return gather_layer_kv(self.k_caches, self.v_caches, slots, requests=requests, page_table=page_table)
