"""Many copies at once: what an exchange writes into the memory of others, and what it reads from its own.

Each is small, and one after the other their launches take longer than the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 48
"""Copies in one launch: what says where they lie is the kernel's arguments, of at most 4 KiB."""

Copy = tuple[Tensor, Tensor]
"""(target, source), `[batch, rows, heads]` or `[batch, rows, heads, head_dim]`, of one shape and dtype and any strides."""


def copy_all(copies: Sequence[Copy], few: bool = False) -> None:
    """`target.copy_(source)` for every (target, source): the very bits, in any order, on CUDA in one launch.

    No target overlaps with another, or with a source. `few`: on few multiprocessors, since the others compute meanwhile.
    """
    copies = [(target, source) for target, source in copies if target.numel()]
    assert all((target.shape, target.dtype) == (source.shape, source.dtype) for target, source in copies), "copied as they are"
    if copies and copies[0][0].is_cuda and (fused := _fused()) is not None:
        fused.fused_copies(copies, few)
        return
    for target, source in copies:
        target, source = in_eights(target, source)
        target.copy_(source)


def in_eights(target: Tensor, source: Tensor) -> Copy:
    """Both eight bytes at a time where they let themselves be read so: a fourth of the loads of bfloat16."""
    if _is_in_eights(target) and _is_in_eights(source):
        return target.view(torch.int64), source.view(torch.int64)
    return target, source


def _is_in_eights(tensor: Tensor) -> bool:
    size = tensor.element_size()
    if size >= 8 or tensor.stride(-1) != 1:
        return False
    steps = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return all(step * size % 8 == 0 for step in steps) and tensor.data_ptr() % 8 == 0


@cache
def _fused() -> Any:
    """The module that makes them one launch, where Triton is installed (torch's CUDA builds bring it)."""
    try:
        from ringspan.kernels import fused_copies
    except ImportError:
        return None
    return fused_copies
