"""merge_states: join two partial attentions over disjoint slots into the attention over both.

A state is (out, lse): the normalised output and the natural log of the softmax denominator. The weight of each side is
its share of the joint denominator, exp(lse - joint lse): the merge that FlashAttention's partial results allow and
FlashInfer's cascades are built on. One program owns ROWS rows (a row is one query and head) and reads and writes each
byte once: 3 * dim * bytes + 12 per row, so the kernel is bound by memory and needs no shared memory at all.
A side that has seen nothing (lse -inf) has weight 0 and its output is not looked at; two such sides give 0 and -inf. An
lse of NaN or +inf makes the row NaN.
"""

import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import on

ROWS = 16


@triton.jit(do_not_specialize=["rows"])
def merge_states_kernel(out_a, lse_a, out_b, lse_b, out, lse, rows, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
                        ROWS: tl.constexpr):  # fmt: skip
    """Grid: (blocks of ROWS rows). Every tensor is contiguous: out* [rows, DIM], lse* [rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    a = tl.load(lse_a + row, mask=inside, other=float("-inf"))
    b = tl.load(lse_b + row, mask=inside, other=float("-inf"))
    maximum = tl.maximum(a, b)
    safe = tl.where(maximum == float("-inf"), 0.0, maximum)
    weight_a = tl.exp2((a - safe) * 1.4426950408889634)
    weight_b = tl.exp2((b - safe) * 1.4426950408889634)
    total = weight_a + weight_b
    total = tl.where((a < float("inf")) & (b < float("inf")), total, float("nan"))
    inverse = tl.where(total != 0.0, 1.0 / total, 0.0)

    d = tl.arange(0, PADDED_DIM)
    at = row[:, None] * DIM + d[None, :]
    exists = inside[:, None] & (d < DIM)[None, :]
    value_a = tl.load(out_a + at, mask=exists & (weight_a > 0.0)[:, None], other=0.0).to(tl.float32)
    value_b = tl.load(out_b + at, mask=exists & (weight_b > 0.0)[:, None], other=0.0).to(tl.float32)
    merged = value_a * (weight_a * inverse)[:, None] + value_b * (weight_b * inverse)[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=exists)
    joint = tl.where(total != 0.0, safe + tl.log2(total) * 0.6931471805599453, float("-inf"))
    tl.store(lse + row, joint, mask=inside)


def merge_states(arguments, outputs) -> None:
    """Launch the merge on checked, contiguous arguments: out* [..., heads, dim], lse* float32 [..., heads]."""
    out, lse = outputs
    rows, dim = lse.numel(), out.shape[-1]
    if rows == 0:
        return
    with on(out.device):
        merge_states_kernel[(triton.cdiv(rows, ROWS),)](
            **arguments._asdict(), **outputs._asdict(), rows=rows, DIM=dim, PADDED_DIM=triton.next_power_of_2(dim),
            ROWS=ROWS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
