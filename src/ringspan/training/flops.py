"""Model FLOPs of a step, and the share of the hardware's peak that they are (MFU).

    forward  = Σ over linear layers 2 · weights · tokens  +  Σ over layers 4 · pairs · heads · head_dim
    backward = 2 · forward, less 2 · weights · tokens for each frozen linear layer, whose weights get no gradient
    MFU      = (forward + backward) / seconds / (ranks · peak)

`pairs` are the (query, key) pairs that the mask allows, so causal attention counts once and not as a full square. Embedding look-ups,
norms and softmax count nothing, and neither does what is computed a second time to save memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from ringspan.geometry import Mask, Workload, make_layout, sliding_window

PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
}
"""Dense bfloat16 FLOP/s from the makers' data sheets, by a part of the device's name; the first that fits counts."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The peak of a device in bfloat16; None for other dtypes, whose rate depends on switches, and for devices that the table lacks."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """What one token and one (query, key) pair cost a model, forward and backward.

    Attributes:
        per_token: of its linear layers.
        per_pair: of attention, by the window of the layers that it is summed over (None for those without).
    """

    per_token: float
    per_pair: dict[int | None, float]

    def of_rows(self, masks: Iterable[tuple[Mask, int]], context: int) -> float:
        """Of rows of `context` tokens: how many under which mask."""
        return sum(rows * (self.per_token * context + self._attention(mask, context)) for mask, rows in masks)

    def _attention(self, mask: Mask, context: int) -> float:
        windows = {window: mask if window is None else mask & sliding_window(window - 1) for window in self.per_pair}
        return sum(flops * allowed_pairs(windows[window], context) for window, flops in self.per_pair.items())


@lru_cache(maxsize=256)
def allowed_pairs(mask: Mask, context: int) -> int:
    """How many (query, key) pairs `mask` allows in a sequence; in integers, however long it is."""
    return Workload(make_layout("contiguous", context, 1, mask=mask), mask).pairs_per_rank[0]


def count_flops(model: nn.Module, config: Any) -> ModelFlops | None:
    """The cost of a Hugging Face decoder; None where it cannot be told from its layers: experts, of which a token passes a few."""
    if any(parameter.dim() > 2 for parameter in model.parameters()) or _experts(config):
        return None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"]
    per_token = sum(2.0 * module.weight.numel() * (3 if module.weight.requires_grad else 2) for module in linear)  # type: ignore[union-attr]
    try:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except AttributeError:
        return None
    per_pair: dict[int | None, float] = {}
    for window in _windows(config, layers):
        per_pair[window] = per_pair.get(window, 0.0) + 3 * 4.0 * heads * head_dim
    return ModelFlops(per_token=per_token, per_pair=per_pair)


def _experts(config: Any) -> bool:
    return any((getattr(config, name, 0) or 0) > 1 for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def _windows(config: Any, layers: int) -> Sequence[int | None]:
    """Each layer's window, as Hugging Face counts it: with the query's own position."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
