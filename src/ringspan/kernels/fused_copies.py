"""Many copies as one Triton kernel, of any strides. `copy_all` of `ringspan.kernels.copies` is its specification and its fallback."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from ringspan.kernels.copies import AT_ONCE, Copy, in_eights

BYTES, MOST_ITEMS = 1 << 15, 1024
"""What one program copies at most, with 256 threads: heads of so many rows, each thread with eight loads of sixteen bytes under way."""
FEW, FEW_WARPS = 24, 16
"""Programs of a launch that is to take few multiprocessors, and the warps of each: enough bytes under way to fill a link."""


@triton.jit
def _copy_items(
    target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads, first, total,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    item = first + tl.arange(0, ITEMS)
    head, row, batch = (item % heads).to(tl.int64), (item // heads % rows).to(tl.int64), (item // heads // rows).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (item < total)[:, None] & (column < COLUMNS)
    there = (batch * source_batch + row * source_row + head * source_head)[:, None] + column
    here = (batch * target_batch + row * target_row + head * target_head)[:, None] + column
    tl.store(target + here, tl.load(source + there, inside), inside)


@triton.jit
def _copy_kernel(
    copies, batches, COUNT: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr, ROUNDS: tl.constexpr
):  # fmt: skip
    # Which copy it is, is chosen first: one piece of code for all is fetched once.
    target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads = copies[0]
    for i in tl.static_range(1, COUNT):
        mine = tl.program_id(1) == i
        target, source = tl.where(mine, copies[i][0], target), tl.where(mine, copies[i][4], source)
        target_batch, source_batch = tl.where(mine, copies[i][1], target_batch), tl.where(mine, copies[i][5], source_batch)
        target_row, source_row = tl.where(mine, copies[i][2], target_row), tl.where(mine, copies[i][6], source_row)
        target_head, source_head = tl.where(mine, copies[i][3], target_head), tl.where(mine, copies[i][7], source_head)
        rows, heads = tl.where(mine, copies[i][8], rows), tl.where(mine, copies[i][9], heads)
    rows = rows // 2
    first, total = tl.program_id(0) * ITEMS, batches * rows * heads
    if ROUNDS:
        while first < total:
            _copy_items(
                target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads, first, total,
                COLUMNS, WIDTH, ITEMS,
            )  # fmt: skip
            first += tl.num_programs(0) * ITEMS
    else:
        _copy_items(
            target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads, first, total,
            COLUMNS, WIDTH, ITEMS,
        )  # fmt: skip


def fused_copies(copies: Sequence[Copy], few: bool = False) -> None:
    """See `copy_all`. What is of one dtype and width is one launch, and nothing is empty."""
    alike: defaultdict[tuple[torch.dtype, int, int], list[Copy]] = defaultdict(list)
    for target, source in copies:
        if target.ndim == 3:
            target, source = target.unsqueeze(-1), source.unsqueeze(-1)
        batch, _, _, columns = target.shape
        if columns > 1 and (target.stride(-1), source.stride(-1)) != (1, 1):
            target.copy_(source)
            continue
        if columns % 16:
            # Triton reads sixteen bytes at once where all strides are multiples of 16.
            target, source = in_eights(target, source)
        alike[(target.dtype, batch, target.shape[-1])].append((target, source))
    for (dtype, batch, columns), same in alike.items():
        width = triton.next_power_of_2(columns)
        wider = FEW_WARPS // 8 if few else 1
        items = max(1, min(MOST_ITEMS, BYTES // (width * dtype.itemsize))) * wider
        at_once = FEW if few else AT_ONCE
        for some in (same[first : first + at_once] for first in range(0, len(same), at_once)):
            most = max(target.numel() for target, _ in some) // columns
            assert most < 1 << 30
            programs = triton.cdiv(most, items)
            # An odd number stands for the rows: for 1, and for multiples of 16, Triton would compile a kernel of its own.
            _copy_kernel[(min(programs, FEW // len(some)) if few else programs, len(some))](  # pyright: ignore[reportIndexIssue]
                tuple(
                    (target, *target.stride()[:3], source, *source.stride()[:3], 2 * target.shape[1] + 1, target.shape[2])
                    for target, source in some
                ),
                batch, COUNT=len(some), COLUMNS=columns, WIDTH=width, ITEMS=items, ROUNDS=few, num_warps=8 * wider,
            )  # fmt: skip
