"""The merge of a partial result as one Triton kernel: in place, in float32, whatever dtype and strides the partial has.

`ringspan.kernels.partial.merge_` is its specification and its fallback.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS = 16
"""(row, batch, head) triples that one program merges."""


@triton.jit
def _merge_kernel(
    out, lse, part, part_lse, row_stride, batch_stride, head_stride, lse_row_stride, lse_batch_stride, lse_head_stride,
    total, batch, heads, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = index < total
    head = index % heads
    sequence = (index // heads) % batch
    row = index // (heads * batch)
    ours = tl.load(lse + index, inside, other=float("-inf"))
    theirs = tl.load(
        part_lse + row * lse_row_stride + sequence * lse_batch_stride + head * lse_head_stride, inside, other=float("-inf")
    ).to(tl.float32)
    highest = tl.maximum(ours, theirs)
    # A row that neither side has seen: its weights are taken against 0, so that both are exp(−inf) = 0 and nothing is NaN.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    our_weight = tl.exp(ours - reference)
    their_weight = tl.exp(theirs - reference)
    total_weight = our_weight + their_weight
    scale = tl.where(total_weight > 0, 1.0 / total_weight, 0.0)
    column = tl.arange(0, WIDTH)
    both = inside[:, None] & (column < HEAD_DIM)[None, :]
    place = out + index[:, None] * HEAD_DIM + column[None, :]
    source = part + (row * row_stride + sequence * batch_stride + head * head_stride)[:, None] + column[None, :]
    mine = tl.load(place, both, other=0.0)
    other = tl.load(source, both, other=0.0).to(tl.float32)
    tl.store(place, mine * (our_weight * scale)[:, None] + other * (their_weight * scale)[:, None], both)
    tl.store(lse + index, tl.where(total_weight > 0, reference + tl.log(total_weight), float("-inf")), inside)


def fused_merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """See `merge_`. `out [rows, batch, heads, head_dim]` and `lse [rows, batch, heads]` are float32 and contiguous, on CUDA."""
    rows, batch, heads, head_dim = out.shape
    total = rows * batch * heads
    if not total:
        return
    assert out.is_contiguous() and lse.is_contiguous() and other_out.stride(-1) == 1
    _merge_kernel[(triton.cdiv(total, ROWS),)](  # pyright: ignore[reportIndexIssue]
        out, lse, other_out, other_lse, *other_out.stride()[:3], *other_lse.stride(),
        total, batch, heads, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), ROWS=ROWS,
    )  # fmt: skip
