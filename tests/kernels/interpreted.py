"""The fused sums beside their specification, and several signals and copies at once, on whatever device there is.

A GPU, or with TRITON_INTERPRET=1 a CPU.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from ringspan.kernels import copy_all
from ringspan.kernels import fused_copies as fused
from ringspan.kernels.copies import AT_ONCE
from ringspan.kernels.fused_copies import fused_copies
from ringspan.kernels.fused_merge import fused_add_, fused_merge_
from ringspan.kernels.fused_signals import fused_await, fused_set
from ringspan.kernels.partial import add_, merge_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SPANS = (((0, 37),), ((0, 37), (0, 37), (0, 37)), ((5, 37), (0, 20)), ((3, 4), (30, 37), (0, 37)))
"""Which of 37 rows each other part has."""
SHAPES = ((1, 1, 8), (2, 6, 64), (1, 5, 80))
"""Batch, heads, head_dim."""


def parts(rows: int, shape: tuple[int, int, int], dtype: torch.dtype, batch_outside: bool) -> tuple[Tensor, Tensor]:
    """out and lse, rows first, as kernels leave them or as they travel; a third of the rows has seen nothing."""
    batch, heads, head_dim = shape
    if batch_outside:
        out, lse = torch.randn(batch, rows, heads, head_dim).movedim(1, 0), torch.randn(batch, heads, rows).permute(2, 0, 1) * 5
    else:
        out, lse = torch.randn(rows, batch, heads, head_dim), torch.randn(rows, batch, heads) * 5
    lse[::3], out[::3] = -torch.inf, 0
    return out.to(DEVICE, dtype), lse.to(DEVICE)


def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Room of its shape and strides, in which nothing is to be left."""
    return torch.full_like(tensor, torch.nan, dtype=dtype)


def check(shape: tuple[int, int, int], spans: tuple[tuple[int, int], ...], dtype: torch.dtype, into: torch.dtype | None) -> None:
    """In place, and into room of another dtype: one rounding, and every row that nobody touches."""
    torch.manual_seed(0)
    out, lse = parts(37, shape, dtype, True)
    others = [(start, *parts(stop - start, shape, dtype, index != 1)) for index, (start, stop) in enumerate(spans)]
    result = dtype if into is None else into
    unit = torch.finfo(result).eps / 2
    wide = [(start, part.double().cpu(), part_lse.double().cpu()) for start, part, part_lse in others]
    exact = out.double().cpu(), lse.double().cpu()
    merge_(*exact, wide)
    found = (out.clone(memory_format=torch.preserve_format), lse.clone()) if into is None else (like(out, into), like(lse, torch.float32))
    fused_merge_(*(found if into is None else (out, lse)), others, found)
    assert torch.equal(found[1].isneginf().cpu(), exact[1].isneginf())
    torch.testing.assert_close(found[0].double().cpu(), exact[0], rtol=1.01 * unit + 1e-6, atol=2e-6)
    seen = ~exact[1].isneginf()
    torch.testing.assert_close(found[1].double().cpu()[seen], exact[1][seen], rtol=2e-6, atol=2e-6)

    total = out.double().cpu()
    add_(total, [(start, part) for start, part, _ in wide])
    found = out.clone(memory_format=torch.preserve_format) if into is None else like(out, into)
    fused_add_(found if into is None else out, [(start, part) for start, part, _ in others], found)
    torch.testing.assert_close(found.double().cpu(), total, rtol=1.01 * unit + 1e-6, atol=2e-6)


def check_signals() -> None:
    """Words that may be set at once, and are, and no others."""
    words = torch.zeros(70, dtype=torch.int32, device=DEVICE)
    some = [0, 3, 4, 33, 69]
    addresses = torch.tensor([words[index].data_ptr() for index in some], dtype=torch.int64, device=DEVICE)
    # The interpreter knows no inline assembly.
    milliseconds = 60_000 if DEVICE == "cuda" else 0
    fused_set(addresses, milliseconds)
    assert words.nonzero().flatten().tolist() == some and words.max() == 1
    words[1] = 1
    fused_await(addresses, milliseconds)
    assert words.nonzero().flatten().tolist() == [1]


def copies(dtype: torch.dtype, head_dim: int, room: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What an exchange copies: rows of some heads, in a run and in steps, and lse, into every other row and half of the heads of `room`."""
    q = torch.randn(2, 37, 7, 3 * head_dim).to(DEVICE, dtype)[..., head_dim : 2 * head_dim]
    columns_apart = torch.randn(2, 5, head_dim, 11).to(DEVICE, dtype).transpose(2, 3)
    lse = torch.randn(2, 7, 37, device=DEVICE).transpose(1, 2)
    found, start = [], 0
    for source in (q[:, :1], q[:, :, 2:5], q[:, 3:30, 6:], q[:, 5:36:3, :1], columns_apart, lse[:, 4:, 1:3]):
        batch, rows, heads = source.shape[:3]
        nbytes = 4 * source.numel() * source.element_size()
        whole = room[start : start + nbytes].view(source.dtype).view(batch, 2 * rows, 2 * heads, *source.shape[3:])
        found += [(whole[:, 1::2, heads // 2 : heads // 2 + heads], source), (whole[:, ::2, heads:], source)]
        start += -(-nbytes // 16) * 16
    return found


def check_copies(dtype: torch.dtype, head_dim: int, more: int) -> None:
    """The very bits of one copy after the other, and nothing beside them; `more` are tiny."""
    torch.manual_seed(0)
    room = torch.full((1 << 20,), 123, dtype=torch.uint8, device=DEVICE)
    right, all_of_it = room.cpu().clone(), copies(dtype, head_dim, room)
    tail = room[len(room) - 24 * more :].view(torch.float64).view(more, 1, 1, 3)
    numbers = torch.arange(2.0 * more, dtype=torch.float64, device=DEVICE).view(more, 1, 1, 2)
    all_of_it += [(tail[i : i + 1, :, :, :2], numbers[i : i + 1]) for i in range(more)]
    for target, source in all_of_it:
        there = right[target.data_ptr() - room.data_ptr() :].view(target.dtype)
        there.as_strided(target.shape, target.stride()).copy_(source.cpu())
    fused_copies(all_of_it)
    assert torch.equal(room.cpu(), right)
    room.fill_(123)
    # Programs that come round several times.
    with mock.patch.object(fused, "MOST_ITEMS", 8):
        for few in (True, False):
            fused_copies(all_of_it, few)
            assert torch.equal(room.cpu(), right)
            room.fill_(123)
    copy_all([*all_of_it, (room[:0].view(1, 0, 1), room[:0].view(1, 0, 1))])
    assert torch.equal(room.cpu(), right)


def main() -> None:
    """Every shape, span and dtype."""
    for dtype, head_dim, more in ((torch.bfloat16, 80, AT_ONCE + 1), (torch.bfloat16, 20, 1), (torch.float16, 3, 0), (torch.float32, 1, 0)):
        check_copies(dtype, head_dim, more)
    for shape in SHAPES:
        for spans in SPANS:
            for dtype, into in ((torch.float32, None), (HALF, None), (HALF, torch.float32), (torch.float32, HALF)):
                check(shape, spans, dtype, into)
    # Nothing to add, and no row.
    empty, lse = torch.empty(0, 1, 2, 8, device=DEVICE), torch.empty(0, 1, 2, device=DEVICE)
    fused_merge_(empty, lse, [(0, empty, lse)], (empty, lse))
    fused_add_(empty, [(0, empty)], empty)
    check_signals()
    print("passed")


if __name__ == "__main__":
    main()
