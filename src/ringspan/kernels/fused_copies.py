"""Many copies as one Triton kernel, of any strides. `copy_all` of `ringspan.kernels.copies` is its specification and its fallback."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from ringspan.kernels.copies import AT_ONCE, Copy, in_eights

BYTES, MOST_ITEMS, WARPS = 1 << 14, 1024, 4
"""What one program copies at a time, heads of so many rows: each thread has eight loads of sixteen bytes under way."""
ROUNDS, MOST_PROGRAMS = 2, 1 << 13
"""How often it does for the largest copy, and more often where a launch would have too many programs: small copies leave them idle."""
FEW, FEW_WARPS = 24, 16
"""Programs of a launch that is to take few multiprocessors, and the warps of each: enough bytes under way to fill a link."""
LEAF = 8
"""Copies of which one is chosen by comparing with each: among more it is looked for by halves."""


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
def _block(number, rows, heads, ITEMS: tl.constexpr):
    blocks = tl.cdiv(rows, ITEMS)
    return (number % heads).to(tl.int64), number // heads % blocks * ITEMS, (number // heads // blocks).to(tl.int64)


@triton.jit
def _lies(where, number, of_batch, of_row, of_head, rows, heads, WIDTH: tl.constexpr, ITEMS: tl.constexpr):
    head, row, batch = _block(number, rows, heads, ITEMS)
    first = where + batch * of_batch + row.to(tl.int64) * of_row + head * of_head
    return first + (tl.arange(0, ITEMS)[:, None] * of_row + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _is_inside(number, total, rows, heads, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr):
    _, row, _ = _block(number, rows, heads, ITEMS)
    return ((tl.arange(0, ITEMS) < rows - row) & (number < total))[:, None] & (tl.arange(0, WIDTH) < COLUMNS)[None, :]


@triton.jit
def _copy_beside(
    target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads, batches, number, programs,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    # Some rows of one head at a time, so that single numbers are divided and not one for each row. The next are loaded while these are
    # stored; nothing but their values and numbers goes round the loop: addresses would take all registers.
    total = batches * heads * tl.cdiv(rows, ITEMS)
    there = _lies(source, number, source_batch, source_row, source_head, rows, heads, WIDTH, ITEMS)
    values = tl.load(there, _is_inside(number, total, rows, heads, COLUMNS, WIDTH, ITEMS))
    while number < total:
        following = number + programs
        there = _lies(source, following, source_batch, source_row, source_head, rows, heads, WIDTH, ITEMS)
        next_values = tl.load(there, _is_inside(following, total, rows, heads, COLUMNS, WIDTH, ITEMS))
        here = _lies(target, number, target_batch, target_row, target_head, rows, heads, WIDTH, ITEMS)
        tl.store(here, values, _is_inside(number, total, rows, heads, COLUMNS, WIDTH, ITEMS))
        values, number = next_values, following


@triton.jit
def _one_of(copies, which, LOW: tl.constexpr, HIGH: tl.constexpr):
    target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads = copies[LOW]
    for i in tl.static_range(LOW + 1, HIGH):
        mine = which == i
        target, source = tl.where(mine, copies[i][0], target), tl.where(mine, copies[i][4], source)
        target_batch, source_batch = tl.where(mine, copies[i][1], target_batch), tl.where(mine, copies[i][5], source_batch)
        target_row, source_row = tl.where(mine, copies[i][2], target_row), tl.where(mine, copies[i][6], source_row)
        target_head, source_head = tl.where(mine, copies[i][3], target_head), tl.where(mine, copies[i][7], source_head)
        rows, heads = tl.where(mine, copies[i][8], rows), tl.where(mine, copies[i][9], heads)
    # One type on all branches, whichever numbers were small, or known as the kernel was compiled.
    short = which * 0
    long = short.to(tl.int64)
    return (
        target, target_batch + long, target_row + long, target_head + long,
        source, source_batch + long, source_row + long, source_head + long, rows + short, heads + short,
    )  # fmt: skip


@triton.jit
def _chosen(copies, which, LOW: tl.constexpr, HIGH: tl.constexpr, MOST: tl.constexpr):
    if HIGH - LOW <= MOST:
        target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads = _one_of(
            copies, which, LOW, HIGH
        )
    else:
        MIDDLE: tl.constexpr = (LOW + HIGH) // 2
        if which < MIDDLE:
            target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads = _chosen(
                copies, which, LOW, MIDDLE, MOST
            )
        else:
            target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads = _chosen(
                copies, which, MIDDLE, HIGH, MOST
            )
    return target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads


@triton.jit
def _copy_kernel(
    copies, batches, programs, COUNT: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ITEMS: tl.constexpr, BESIDE: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    # Which copy it is, is chosen first: one piece of code for all is fetched once. A program of each in turn, lest what a link holds up
    # keeps the others waiting; and as many of each, which go round until theirs is copied.
    which, number, programs = tl.program_id(0) % COUNT, tl.program_id(0) // COUNT, programs // 2
    target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads = _chosen(
        copies, which, 0, COUNT, MOST
    )
    rows = rows // 2
    if BESIDE:
        _copy_beside(
            target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads, batches,
            number, programs, COLUMNS, WIDTH, ITEMS,
        )  # fmt: skip
    else:
        first, total = number * ITEMS, batches * rows * heads
        while first < total:
            _copy_items(
                target, target_batch, target_row, target_head, source, source_batch, source_row, source_head, rows, heads, first, total,
                COLUMNS, WIDTH, ITEMS,
            )  # fmt: skip
            first += programs * ITEMS


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
        warps = FEW_WARPS if few else WARPS
        items = max(1, min(MOST_ITEMS, BYTES // (width * dtype.itemsize))) * (warps // WARPS)
        at_once = FEW if few else AT_ONCE
        for some in (same[first : first + at_once] for first in range(0, len(same), at_once)):
            most = max(target.numel() for target, _ in some) // columns
            assert most < 1 << 30 and items * max(each.stride(1) for pair in some for each in pair) < 1 << 31
            programs = min(triton.cdiv(most, items if few else items * ROUNDS), (FEW if few else MOST_PROGRAMS) // len(some))
            # An odd number stands for the rows and the programs: for 1, and for multiples of 16, Triton would compile a kernel of its own.
            _copy_kernel[(programs * len(some),)](  # pyright: ignore[reportIndexIssue]
                tuple(
                    (target, *target.stride()[:3], source, *source.stride()[:3], 2 * target.shape[1] + 1, target.shape[2])
                    for target, source in some
                ),
                batch, 2 * programs + 1, COUNT=len(some), COLUMNS=columns, WIDTH=width, ITEMS=items, BESIDE=few, MOST=LEAF,
                num_warps=warps,
            )  # fmt: skip
