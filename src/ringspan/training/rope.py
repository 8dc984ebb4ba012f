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
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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


def far_positions(described: Mapping[str, Any], context: int, *, scaling: str | None, factor: float | None) -> str | None:
    """That some positions of `context` are new to a trained model, and what would help; None where it knows them all.

    Args:
        described: the model's `config.json`, with `rope_parameters`, or `rope_scaling` as it was called before.
        scaling: what its positions are stretched by, of `SCALINGS`; None leaves them.
        factor: how far; None is as far as `context` needs.
    """
    own = described.get("max_position_embeddings")
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    # One for all layers, or one for each kind of layer.
    ropes = [each for each in (rope, *rope.values()) if isinstance(each, Mapping)]
    stretched = {kind: each for each in ropes if (kind := each.get("rope_type", each.get("type", "default"))) != "default"}
    if not isinstance(own, int) or "dynamic" in (scaling, *stretched) or (scaling is not None and factor is None):
        return None
    # Some configurations have the stretched length in `max_position_embeddings`, others leave it as it was.
    known = max([own, *(int(each.get("factor", 1) * each.get("original_max_position_embeddings", 0)) for each in stretched.values())])
    reach = known if scaling is None else int(known * (factor or 1))
    if context <= reach:
        return None
    nearest = "--rope-scaling yarn stretches them"
    if scaling is not None:
        nearest = "--rope-scaling without --rope-factor stretches them that far"
    elif stretched:
        nearest = f"its config.json stretches them by {', '.join(stretched)} already, and not that far"
    asked = f"--context {context}" if scaling is None else f"--context {context} with --rope-factor {factor:g}"
    return f"{asked} is above the model's own {reach:,} tokens, and later positions are new to it: {nearest}"


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
