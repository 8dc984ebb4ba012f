"""Several signals in one launch, where Triton is there: see `fused_signals`."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def signal_kernels() -> Any:
    """The kernels of `ringspan.kernels.fused_signals`, or None where Triton is not installed."""
    try:
        from ringspan.kernels import fused_signals as fused
    except ImportError:
        return None
    return fused
