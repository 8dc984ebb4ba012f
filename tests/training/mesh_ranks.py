"""What the three processes of test_meshes run: the trainer over meshes, saved on one and gone on with on another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringspan.training import lora
from ringspan.training import trainer as trainer_module
from ringspan.training.prepare import prepare
from ringspan.training.ranks import Ranks, StopSignal
from ringspan.training.trainer import Trainer
from tests.training.test_lora import stand_in

FOLDER = "RINGSPAN_TESTS_MESHES"
STEPS, SAVED = 4, 2
# Four rows a step, and held out, over three replicas: two of them have a blank pass. The norm matters, since it is always clipped.
GIVEN: dict[str, Any] = {
    "model": "pico", "context": 61, "batch_size": 1, "accumulate": 4, "steps": STEPS, "device": "cpu", "warmup_steps": 2,
    "sample_tokens": 3, "validation_tokens": 244, "gradient_clip": 0.3, "prompt": "ab", "temperature": 0.0,
}  # fmt: skip
MESHES: dict[str, dict[str, Any]] = {
    "context": {"shard_parameters": True},
    "shard": {"shard": 3, "shard_parameters": True, "rematerialise": "attention_output"},
    "replicate": {"replicate": 3, "shard_parameters": True, "rematerialise": "none"},
    "whole": {"shard": 3, "shard_parameters": False},
    "host": {
        "shard": 3, "parameters_on_host": True, "offload": True, "rematerialise": "full", "feed_forward_chunk": "7", "loss_tile": "9"
    },
}  # fmt: skip
AFTER_ONE = ("context", "replicate", "host")
"""Meshes that also go on from what one rank saved."""
ADAPTERS = {"lora_rank": 4, "tokenizer": "bytes", "learning_rate": 1e-2}
Steps = list[tuple[float, float]]
"""The loss and the gradients' norm of each."""


def steps_of(trainer: Trainer, last: int, save_at: int | None = None) -> Steps:
    """Steps up to `last`, and a checkpoint after one of them, written while the next is taken."""
    taken = []
    while trainer.step < last:
        record = trainer.take_step()
        assert record.loss is not None and record.gradient_norm is not None
        taken.append((record.loss, record.gradient_norm))
        if trainer.step == save_at:
            trainer.begin_save()
    trainer.finish_save()
    return taken


def run(place: Any, given: dict[str, Any], *, resume: bool = False) -> tuple[Steps, list[float], str]:
    """All steps of a run, the validation loss after them, that by context, and a text; with checkpoints in the middle and at the end."""
    plan = place.on_first(lambda: prepare(given, resume=resume))
    trainer = Trainer(plan, place)
    steps = steps_of(trainer, STEPS, SAVED)
    trainer.begin_save()
    trainer.finish_save()
    by_context = trainer.validate_by_context()
    assert by_context is not None and [window for window, _ in by_context] == [16, 30, 61]
    return steps, [trainer.validate(), *(loss for _, loss in by_context)], trainer.write_sample()[1]


def everything(group: Any) -> dict[str, Any]:
    """Every mesh from the start, some from where one rank stopped, and adapters."""
    folder = Path(os.environ[FOLDER])
    saving = dist.new_group(backend="gloo")
    assert isinstance(saving, dist.ProcessGroup)
    place = Ranks(rank=dist.get_rank(), num_ranks=3, device=torch.device("cpu"), control=group, saving=saving, stop=StopSignal())
    given = {**GIVEN, "data": str(folder / "text.txt"), "ranks": 3}
    found: dict[str, Any] = {"read": {}}
    read, right = [], trainer_module.build_model
    trainer_module.build_model = lambda *args, **options: read.append("the whole model") or right(*args, **options)
    for name, mesh in MESHES.items():
        read.clear()
        found[name] = run(place, {**given, **mesh, "out": str(folder / name)})
        found["read"][name] = len(read)
    trainer_module.build_model = right
    for name, mesh in MESHES.items():
        if name not in AFTER_ONE:
            continue
        found[f"{name} after one rank"] = run(place, {"ranks": 3, **mesh, "out": str(folder / f"stopped-{name}")}, resume=True)
    lora._peft = stand_in  # type: ignore[assignment]
    adapters = {**given, **ADAPTERS, "model": str(folder / "model"), "shard_parameters": True, "out": str(folder / "adapters")}
    found["adapters"] = run(place, adapters)
    return found
