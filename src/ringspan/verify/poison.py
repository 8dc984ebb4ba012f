"""Uninitialised memory made visible: whoever reads a buffer that nobody wrote gets NaN instead of a lucky zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_memory(device: torch.device | str = "cpu") -> Iterator[None]:
    """Fills memory that torch hands out without writing it with NaN, as far as the device lets us.

    On the CPU through torch's deterministic mode, which fills every `empty`, those inside kernels too. On CUDA that mode refuses kernels
    that are verified here, so the allocator's cache is instead stocked with blocks of NaN, which is what `empty` then mostly finds.
    """
    if torch.device(device).type == "cuda":
        _stock_cuda_cache()
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    fills = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switch.fill_uninitialized_memory = fills


def _stock_cuda_cache() -> None:
    # All bits set is NaN in every floating-point dtype. Small requests are cut from one pool and larger ones from another.
    blocks = [torch.full((1 << 19,), 255, dtype=torch.uint8, device="cuda") for _ in range(128)]
    blocks += [torch.full((1 << 24,), 255, dtype=torch.uint8, device="cuda") for _ in range(8)]
    del blocks
