"""The merge of a partial result as one Triton kernel: in float32, whatever dtypes and strides the partials have, rounded once.

`ringspan.kernels.partial.merge_` is its specification and its fallback.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS, HEADS = 16, 4
"""What one program merges: kernels write lse rows last and out heads last, and both are read in runs."""


@triton.jit
def _merge_kernel(
    into, into_lse, out, lse, part, part_lse,
    into_row, into_batch, into_head, into_lse_row, into_lse_batch, into_lse_head,
    out_row, out_batch, out_head, lse_row, lse_batch, lse_head,
    part_row, part_batch, part_head, part_lse_row, part_lse_batch, part_lse_head,
    rows, heads, first, past,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    item = tl.arange(0, ROWS * HEADS)
    row = tl.program_id(0).to(tl.int64) * ROWS + item // HEADS
    head = tl.program_id(1).to(tl.int64) * HEADS + item % HEADS
    batch = tl.program_id(2).to(tl.int64)
    inside = (row < rows) & (head < heads)
    # Rows outside of [first, past) have no other side: its weight is exp(−inf) = 0.
    merged = inside & (row >= first) & (row < past)
    other = row - first
    ours = tl.load(lse + row * lse_row + batch * lse_batch + head * lse_head, inside, other=float("-inf"))
    theirs = tl.load(part_lse + other * part_lse_row + batch * part_lse_batch + head * part_lse_head, merged, other=float("-inf")).to(
        tl.float32
    )
    highest = tl.maximum(ours, theirs)
    # A row that neither side has seen: its weights are taken against 0, so that both are exp(−inf) = 0 and nothing is NaN.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    our_weight = tl.exp(ours - reference)
    their_weight = tl.exp(theirs - reference)
    total = our_weight + their_weight
    scale = tl.where(total > 0, 1.0 / total, 0.0)
    column = tl.arange(0, WIDTH)
    wide = (column < HEAD_DIM)[None, :]
    mine = tl.load(
        out + (row * out_row + batch * out_batch + head * out_head)[:, None] + column[None, :], inside[:, None] & wide, other=0.0
    ).to(tl.float32)
    added = tl.load(
        part + (other * part_row + batch * part_batch + head * part_head)[:, None] + column[None, :], merged[:, None] & wide, other=0.0
    ).to(tl.float32)
    result = mine * (our_weight * scale)[:, None] + added * (their_weight * scale)[:, None]
    # In place, a warp must not read what another has merged already: few lse are read by many warps.
    tl.debug_barrier()
    tl.store(
        into + (row * into_row + batch * into_batch + head * into_head)[:, None] + column[None, :],
        result.to(into.dtype.element_ty), inside[:, None] & wide,
    )  # fmt: skip
    tl.store(
        into_lse + row * into_lse_row + batch * into_lse_batch + head * into_lse_head,
        tl.where(total > 0, reference + tl.log(total), float("-inf")), inside,
    )  # fmt: skip


def fused_merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, start: int, into: tuple[Tensor, Tensor]) -> None:
    """See `merge_`. Any strides but for the heads' own width, which is contiguous; lse is float32."""
    rows, batch, heads, head_dim = out.shape
    if not out.numel():
        return
    assert out.stride(-1) == other_out.stride(-1) == into[0].stride(-1) == 1
    _merge_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(heads, HEADS), batch)](  # pyright: ignore[reportIndexIssue]
        *into, out, lse, other_out, other_lse,
        *into[0].stride()[:3], *into[1].stride(), *out.stride()[:3], *lse.stride(), *other_out.stride()[:3], *other_lse.stride(),
        rows, heads, start, start + other_out.shape[0],
        HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), ROWS=ROWS, HEADS=HEADS, num_warps=8,
    )  # fmt: skip
