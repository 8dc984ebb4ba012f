"""What `torch.autocast` asks for, asked in one way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which autocast computes on this kind of device, or None where it is off."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtypes that tensors have, also where autocast would round what they multiply."""
    return nullcontext() if autocast_dtype(device.type) is None else torch.autocast(device.type, enabled=False)
