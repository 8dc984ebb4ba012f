"""Rotary embeddings for long contexts: the base of a new model, and those of a trained one stretched beyond its own context.

Stretched by the formulas that transformers names:

- `linear` (position interpolation): every position is divided by the factor.
- `yarn`: fast dimensions stay, slow ones are divided, and attention is made a little sharper.
- `dynamic` (NTK): the base θ grows with the longest position L of a forward that is beyond the model's own context C, to
  θ · (factor · L / C − factor + 1)^(d / (d − 2)), d being the rotated part of a head: shorter sequences stay as they were. L is that of the
  whole sequence on every rank, see `ringspan.transformer.rotary`.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

from ringspan.errors import RingspanError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCALINGS = ("linear", "dynamic", "yarn")
USUAL_BASE = 10_000.0


def base_for(context: int) -> float:
    """The base θ of a new model's rotary embeddings: 0.0424 · context^1.628, and never below the usual 10,000.

    The least base with which a query still tells a key like itself from any other at every distance in the context (Men et al., "Base of
    RoPE Bounds Context Length", 2024, figure 1: the line through their bounds for 1,000 to 1,000,000 tokens). The usual one is enough up to
    1,995 tokens; 65,536 take 2.9 million.

    Args:
        context: tokens in one sequence.
    """
    return max(USUAL_BASE, float(round(0.0424 * context**1.628)))


def check_scaling(kind: str) -> None:
    """Whether `--rope-scaling` names one.

    Raises:
        RingspanError: where it does not.
    """
    if kind not in SCALINGS:
        raise RingspanError(f"--rope-scaling {kind}", "unknown", f"It is one of {', '.join(SCALINGS)}", "--rope-scaling yarn")


def scaled(config: PretrainedConfig, kind: str, *, context: int, factor: float | None) -> PretrainedConfig:
    """A copy of a model's configuration whose rotary embeddings are stretched.

    Args:
        kind: `"linear"`, `"dynamic"` or `"yarn"`.
        context: tokens in one sequence.
        factor: how far to stretch; None is as far as `context` needs: context / the model's own.

    Raises:
        RingspanError: where there is nothing to stretch, or the model has been stretched already.
    """
    check_scaling(kind)
    asked = f"--rope-scaling {kind}"
    rope, own = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if not rope or not own or "rope_type" not in rope:
        raise RingspanError(
            asked,
            "the model has no rotary embeddings, or other ones in each layer",
            "One kind for all can be scaled",
            "another model",
        )
    if rope["rope_type"] != "default":
        raise RingspanError(
            asked, f"the model's are {rope['rope_type']!r} already", "What is scaled once is not scaled twice", "leaving --rope-scaling out"
        )
    if factor is None and context <= own:
        raise RingspanError(
            f"{asked} --context {context}", f"the model's own is {own}", "A context that fits needs no scaling", f"--context {2 * own}"
        )
    stretch = factor or context / own
    if stretch < 1 or not math.isfinite(stretch):
        raise RingspanError(f"--rope-factor {factor}", "below 1", "Positions are stretched, not squeezed", "leaving --rope-factor out")
    scaled_config = copy.deepcopy(config)
    theta = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    original = {"original_max_position_embeddings": own} if kind == "yarn" else {}
    scaled_config.rope_parameters = {**theta, "rope_type": kind, "factor": float(stretch), **original}
    if kind != "dynamic":  # which measures by the model's own
        scaled_config.max_position_embeddings = max(context, math.ceil(own * stretch))
    return scaled_config
