"""Whether launches are recorded now. A CUDA graph knows addresses alone: what it reads must stay there, and none says when it ends."""

from __future__ import annotations

import torch


def is_captured(device: torch.device) -> bool:
    """Whether what the current stream of `device` is given goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
