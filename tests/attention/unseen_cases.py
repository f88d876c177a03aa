"""Cases of attention in which everything that a row must not see holds NaN or Inf, and what each row must give then.

`poison` writes such values wherever no row of a request sees: slots outside of every window, nodes of other branches,
pages of nobody, entries of the page table. `taint` writes them where some rows see and others don't, so that each row
must show exactly what it sees. `row_by_row` is attention with nothing but a row's own slots: nothing else can reach it.
"""

import torch

from tests.attention.attention_cases import AttentionCase, _attend, _visibility
from tests.harness.close import assert_as_good_as_torch

NAN, INF = float("nan"), float("inf")


def visible_slots(case: AttentionCase, request: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The rows that have a node; which slots each of them sees, and how far away they are: [rows, slots]."""
    count = len(case.q[case.row_indices[request]])
    size = count if case.trees is None else len(case.trees[request])
    nodes = [case.first_nodes[request] + row for row in range(count)]
    rows = [row for row, node in enumerate(nodes) if case.trees is None or node < size]
    return rows, *_visibility(case, request, [nodes[row] for row in rows])


def places(case: AttentionCase, request: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two indices of slots in the caches."""
    table = case.options.get("page_table")
    if table is None:
        return torch.full_like(slots, request), slots
    page_size = case.k_cache.shape[1]
    return table.cpu()[request, slots // page_size].long(), slots % page_size


def poison(case: AttentionCase, value: float) -> None:
    """Put `value` wherever no row sees, and -1 into the page table where no row sees any slot of the page."""
    table = case.options.get("page_table")
    holds = torch.zeros(case.k_cache.shape[:2], dtype=torch.bool)
    for request in range(len(case.contexts)):
        rows, visible, _ = visible_slots(case, request)
        seen = visible.any(0).nonzero()[:, 0] if rows else torch.zeros(0, dtype=torch.int64)
        holds[places(case, request, seen)] = True
        if table is not None:
            reached = set((seen // case.k_cache.shape[1]).tolist())
            for page in set(range(table.shape[1])) - reached:
                table[request, page] = (-1, -(2**31), 2**31 - 1, len(case.k_cache))[page % 4]
    for cache in (case.k_cache, case.v_cache):
        cache[~holds.to(cache.device)] = value


def taint(case: AttentionCase, values: tuple[float, float, float], seed: int) -> int:
    """Put values where some rows of a request see and others don't: in a slot's V, in its K, in one element of V.

    And a NaN in a row of q. Returns the number of slots that were tainted.
    """
    generator = torch.Generator().manual_seed(seed)
    tainted = 0
    for request, rows_of in enumerate(case.row_indices):
        rows, visible, _ = visible_slots(case, request)
        partly = (visible.any(0) & ~visible.all(0)).nonzero()[:, 0] if len(rows) > 1 else torch.zeros(0)
        partly = partly[torch.randperm(len(partly), generator=generator)][:3]
        dim, head = (int(torch.randint(size, (), generator=generator)) for size in reversed(case.k_cache.shape[2:]))
        for kind, slot in enumerate(partly.tolist()):
            place = tuple(int(index) for index in places(case, request, torch.tensor(slot)))
            cache, own = (case.k_cache, case.keys) if kind == 1 else (case.v_cache, case.values)
            where = (head, dim) if kind == 2 else (slice(None), slice(None))
            cache[place][where] = own[request][slot][where] = values[kind]
            tainted += 1
        if len(rows) > 1:
            case.q[rows_of][rows[-1], 0] = NAN
    return tainted


def row_by_row(case: AttentionCase, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse of attention in `dtype` with each row's own slots alone."""
    out = torch.zeros(case.q.shape, dtype=dtype)
    lse = torch.full(case.q.shape[:-1], -torch.inf, dtype=torch.promote_types(dtype, torch.float32))
    for request, index in enumerate(case.row_indices):
        q = case.q[index].cpu().to(dtype)
        keys, values = case.keys[request].to(dtype), case.values[request].to(dtype)
        for row, sees, distance in zip(*visible_slots(case, request), strict=True):
            one = slice(row, row + 1)
            part = _attend(case, q[one], keys[sees], values[sees], sees[None, sees], distance[None, sees])
            out[index][one], lse[index][one] = part
    return out, lse


def assert_each_row_shows_what_it_sees(case: AttentionCase, got) -> None:
    """Not finite exactly where the row's own slots give that, right everywhere else."""
    for name, result, exact, plain in zip(
        ("out", "lse"), got, row_by_row(case, torch.float64), row_by_row(case, case.q.dtype), strict=True
    ):
        nothing = -INF if name == "lse" else 0.0  # of a row that sees nothing
        result, sound = result.cpu(), exact.isfinite() | (exact == nothing)
        wrong = ((result.isfinite() | (result == nothing)) != sound).nonzero()
        assert len(wrong) == 0, (
            f"{name}{wrong[0].tolist()} and {len(wrong) - 1} more should be {exact[tuple(wrong[0])]}"
        )
        assert_as_good_as_torch(*(torch.where(sound, part, 0.0) for part in (result, exact, plain)), what=name)
