"""Exact attention over sequences longer than one device holds.

Start with `ContextParallel`, with `attention` where flash-attn's stood, with `parallelize` to train a Hugging Face model, or with
`ringspan.transformers.register()` for its attention alone.
"""

from ringspan import transformers
from ringspan.attention import ContextParallel, Sequence, measure_weights
from ringspan.attention.functional import attention, attention_varlen, scaled_dot_product_attention
from ringspan.errors import RankFailure, RingspanError, ScheduleError, UnsupportedError
from ringspan.geometry import LAYOUTS as _LAYOUTS
from ringspan.geometry import Mask, block_sparse, causal, documents, full, mask_mod, parse_mask, prefix_lm, sliding_window
from ringspan.transformers import parallelize
from ringspan.transport import run_in_process

__version__ = "0.1.0"

layouts: tuple[str, ...] = (*_LAYOUTS, "auto")
"""The names of the layouts."""

__all__ = [
    "ContextParallel",
    "Mask",
    "RankFailure",
    "RingspanError",
    "ScheduleError",
    "Sequence",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "block_sparse",
    "causal",
    "documents",
    "full",
    "layouts",
    "mask_mod",
    "measure_weights",
    "parallelize",
    "parse_mask",
    "prefix_lm",
    "run_in_process",
    "scaled_dot_product_attention",
    "sliding_window",
    "transformers",
]
