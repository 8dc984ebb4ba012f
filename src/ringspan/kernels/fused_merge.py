"""Sums of partial results as one Triton kernel each: in float32, whatever dtypes and strides the parts have, rounded once.

`merge_` and `add_` of `ringspan.kernels.partial` are their specifications and their fallbacks. Several parts are one pass over memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS, HEADS = 16, 4
"""What one program sums: kernels write lse rows last and out heads last, and both are read in runs."""


@triton.jit
def _merge_kernel(
    into, into_lse, out, lse, others,
    into_row, into_batch, into_head, into_lse_row, into_lse_batch, into_lse_head,
    out_row, out_batch, out_head, lse_row, lse_batch, lse_head, rows, heads,
    COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    item = tl.arange(0, ROWS * HEADS)
    row = tl.program_id(0).to(tl.int64) * ROWS + item // HEADS
    head = tl.program_id(1).to(tl.int64) * HEADS + item % HEADS
    batch = tl.program_id(2).to(tl.int64)
    inside = (row < rows) & (head < heads)
    column = tl.arange(0, WIDTH)[None, :]
    wide = column < HEAD_DIM
    ours = tl.load(lse + row * lse_row + batch * lse_batch + head * lse_head, inside, other=float("-inf"))
    highest = ours
    for i in tl.static_range(COUNT):
        part, part_lse, part_row, part_batch, part_head, part_lse_row, part_lse_batch, part_lse_head, first, past = others[i]
        # Rows outside of [first, past) have no such side: its weight is exp(−inf) = 0.
        merged = inside & (row >= first) & (row < past)
        at = part_lse + (row - first) * part_lse_row + batch * part_lse_batch + head * part_lse_head
        highest = tl.maximum(highest, tl.load(at, merged, other=float("-inf")).to(tl.float32))
    # A row that no side has seen: its weights are taken against 0, so that all are exp(−inf) = 0 and nothing is NaN.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(ours - reference)
    total = weight
    mine = out + (row * out_row + batch * out_batch + head * out_head)[:, None] + column
    result = tl.load(mine, inside[:, None] & wide, other=0.0).to(tl.float32) * weight[:, None]
    for i in tl.static_range(COUNT):
        part, part_lse, part_row, part_batch, part_head, part_lse_row, part_lse_batch, part_lse_head, first, past = others[i]
        merged = inside & (row >= first) & (row < past)
        at = part_lse + (row - first) * part_lse_row + batch * part_lse_batch + head * part_lse_head
        weight = tl.exp(tl.load(at, merged, other=float("-inf")).to(tl.float32) - reference)
        total += weight
        added = part + ((row - first) * part_row + batch * part_batch + head * part_head)[:, None] + column
        result += tl.load(added, merged[:, None] & wide, other=0.0).to(tl.float32) * weight[:, None]
    result *= tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    # In place, a warp must not read what another has merged already: few lse are read by many warps.
    tl.debug_barrier()
    tl.store(
        into + (row * into_row + batch * into_batch + head * into_head)[:, None] + column,
        result.to(into.dtype.element_ty), inside[:, None] & wide,
    )  # fmt: skip
    tl.store(
        into_lse + row * into_lse_row + batch * into_lse_batch + head * into_lse_head,
        tl.where(total > 0, reference + tl.log(total), float("-inf")), inside,
    )  # fmt: skip


@triton.jit
def _add_kernel(
    into, held, others, into_row, into_batch, into_head, held_row, held_batch, held_head, rows, heads,
    COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    item = tl.arange(0, ROWS * HEADS)
    row = tl.program_id(0).to(tl.int64) * ROWS + item // HEADS
    head = tl.program_id(1).to(tl.int64) * HEADS + item % HEADS
    batch = tl.program_id(2).to(tl.int64)
    inside = (row < rows) & (head < heads)
    column = tl.arange(0, WIDTH)[None, :]
    wide = column < HEAD_DIM
    mine = held + (row * held_row + batch * held_batch + head * held_head)[:, None] + column
    total = tl.load(mine, inside[:, None] & wide, other=0.0).to(tl.float32)
    for i in tl.static_range(COUNT):
        part, part_row, part_batch, part_head, first, past = others[i]
        added = inside & (row >= first) & (row < past)
        at = part + ((row - first) * part_row + batch * part_batch + head * part_head)[:, None] + column
        total += tl.load(at, added[:, None] & wide, other=0.0).to(tl.float32)
    tl.store(
        into + (row * into_row + batch * into_batch + head * into_head)[:, None] + column,
        total.to(into.dtype.element_ty), inside[:, None] & wide,
    )  # fmt: skip


def fused_merge_(out: Tensor, lse: Tensor, others: Sequence[tuple[int, Tensor, Tensor]], into: tuple[Tensor, Tensor]) -> None:
    """See `merge_`. Any strides but for the heads' own width, which is contiguous; lse is float32."""
    if not out.numel():
        return
    assert all(tensor.stride(-1) == 1 for tensor in (out, into[0], *(part for _, part, _ in others)))
    _merge_kernel[_grid(out)](  # pyright: ignore[reportIndexIssue]
        *into, out, lse,
        tuple((part, part_lse, *part.stride()[:3], *part_lse.stride(), start, start + len(part)) for start, part, part_lse in others),
        *into[0].stride()[:3], *into[1].stride(), *out.stride()[:3], *lse.stride(), **_sizes(out), COUNT=len(others),
    )  # fmt: skip


def fused_add_(held: Tensor, others: Sequence[tuple[int, Tensor]], into: Tensor) -> None:
    """See `add_`. Any strides but for the heads' own width, which is contiguous; nothing is float64."""
    if not held.numel():
        return
    assert all(tensor.stride(-1) == 1 for tensor in (held, into, *(part for _, part in others)))
    _add_kernel[_grid(held)](  # pyright: ignore[reportIndexIssue]
        into, held, tuple((part, *part.stride()[:3], start, start + len(part)) for start, part in others),
        *into.stride()[:3], *held.stride()[:3], **_sizes(held), COUNT=len(others),
    )  # fmt: skip


def _grid(tensor: Tensor) -> tuple[int, int, int]:
    rows, batch, heads, _ = tensor.shape
    return triton.cdiv(rows, ROWS), triton.cdiv(heads, HEADS), batch


def _sizes(tensor: Tensor) -> dict[str, int]:
    rows, _, heads, head_dim = tensor.shape
    width = triton.next_power_of_2(head_dim)
    return {"rows": rows, "heads": heads, "HEAD_DIM": head_dim, "WIDTH": width, "ROWS": ROWS, "HEADS": HEADS, "num_warps": 8}
