"""Where slots of requests lie in a cache, dense or paged."""

import triton
import triton.language as tl


@triton.jit
def places(n, rows, requests, slots, page_table, pages, page_size, batch, capacity, page_table_stride):
    """Which rows have a place in the cache, its page (or request) and the slot inside."""
    slot = tl.load(slots + n, mask=n < rows, other=-1)
    request = tl.zeros_like(slot)
    if requests is not None:
        request = tl.load(requests + n, mask=n < rows, other=-1)
    stored = (slot >= 0) & (slot < capacity) & (request >= 0) & (request < batch)
    if page_table is not None:
        at = page_table + request.to(tl.int64) * page_table_stride + slot // page_size
        page = tl.load(at, mask=stored, other=-1)
        return stored & (page >= 0) & (page < pages), page.to(tl.int64), (slot % page_size).to(tl.int64)
    else:
        return stored, request.to(tl.int64), slot.to(tl.int64)
