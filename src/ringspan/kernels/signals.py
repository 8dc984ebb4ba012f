"""What devices tell each other by in few launches, where Triton is there: see `fused_signals`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 1 << 24
"""Of all copies of one launch: copy engines carry more as fast, and leave the multiprocessors alone."""


@cache
def signal_kernels() -> Any:
    """The kernels of `ringspan.kernels.fused_signals`, or None where Triton is not installed."""
    try:
        from ringspan.kernels import fused_signals as fused
    except ImportError:
        return None
    return fused


def copy_all_(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`target.copy_(source)` for each (target, source), by one kernel where all are contiguous on a GPU, of one dtype each, and small.

    For where no other kernel runs: beside one that fills the GPU it would wait for a multiprocessor, and a copy engine would not.
    """
    copies = [(target, source) for target, source in copies if target.numel()]
    if not copies:
        return
    small = sum(target.numel() * target.element_size() for target, _ in copies) <= MOST_BYTES
    if copies[0][0].is_cuda and small and all(map(_in_eights, *zip(*copies, strict=True))) and (fused := signal_kernels()) is not None:
        fused.fused_copies([(_eights(target), _eights(source)) for target, source in copies])
        return
    for target, source in copies:
        target.copy_(source)


def _in_eights(target: Tensor, source: Tensor) -> bool:
    alike = target.dtype == source.dtype and target.shape == source.shape and target.is_contiguous() and source.is_contiguous()
    return alike and all(tensor.data_ptr() % 8 == 0 and tensor.numel() * tensor.element_size() % 8 == 0 for tensor in (target, source))


def _eights(tensor: Tensor) -> Tensor:
    """All of it, flat."""
    return tensor.view(-1).view(torch.int64)
