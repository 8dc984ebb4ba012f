"""Exact attention over sequences longer than one device holds.

Start with `ContextParallel`, or with `ringspan.transformers.register()` for a Hugging Face model.
"""

from ringspan import transformers
from ringspan.attention import ContextParallel, Sequence
from ringspan.errors import RankFailure, RingspanError, ScheduleError, UnsupportedError
from ringspan.geometry import LAYOUTS as _LAYOUTS
from ringspan.geometry import Mask, causal, full
from ringspan.transport import run_in_process

__version__ = "0.1.0"

layouts: tuple[str, ...] = tuple(_LAYOUTS)
"""The names of the layouts."""

__all__ = [
    "ContextParallel",
    "Mask",
    "RankFailure",
    "RingspanError",
    "ScheduleError",
    "Sequence",
    "UnsupportedError",
    "causal",
    "full",
    "layouts",
    "run_in_process",
    "transformers",
]
