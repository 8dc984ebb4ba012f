"""What a run's user should know before it starts, and what is no reason to refuse it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from ringspan.training.config import BYTES, STDLIB, TrainingConfig, option
from ringspan.training.model import PRESETS
from ringspan.training.rope import far_positions
from ringspan.training.tokenizer import IDS


def notes(config: TrainingConfig) -> list[str]:
    """Of a settled configuration: names of ringspan's own that something in this folder bears too, and a context above the model's own."""
    named = {"model": config.model, "data": config.data, "tokenizer": config.tokenizer or BYTES}
    found = [
        f"{option(field)} {name} is ringspan's own; for what is called so in this folder: {option(field)} ./{name}"
        for field, name in named.items()
        if is_own_name(field, name) and Path(name).exists()
    ]
    far = None if config.model in PRESETS else _far(config)
    return found if far is None else [*found, far]


def exported_note(config: TrainingConfig) -> str | None:
    """That plain transformers computes another mask with the exported model than it was trained under; None where it is causal."""
    if config.mask == TrainingConfig().mask:
        return None
    return f"it was trained under --mask {config.mask}; plain transformers computes what its config.json says, and knows nothing of that"


def is_own_name(field: str, value: str) -> bool:
    """Whether it stands for something of ringspan's own, whatever files and folders bear the same name."""
    names: dict[str, Collection[str]] = {"data": (STDLIB,), "model": PRESETS, "tokenizer": (BYTES,)}
    return value in names[field] or (field == "tokenizer" and value.startswith(IDS))


def _far(config: TrainingConfig) -> str | None:
    try:
        described = json.loads((Path(config.model) / "config.json").read_text())
    except (OSError, ValueError):
        # A run that goes on has its model in its checkpoint; the folder that it began from may be gone.
        return None
    return far_positions(described, config.context, scaling=config.rope_scaling, factor=config.rope_factor)
