"""What is settled before a process is started: room on the disk, and which folder a job goes on in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import Snapshot, TrainingState, save_checkpoint
from ringspan.training.model import build_model
from ringspan.training.optimizer import Optimizer
from ringspan.training.plan import Plan
from ringspan.training.prepare import prepare
from tests.training.support import write_text


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return {"data": str(write_text(tmp_path / "text.txt", num_words=2000)), "model": "pico", "context": 61, "device": "cpu"}


def save(plan: Plan, step: int) -> Path:
    model = build_model("pico", vocabulary_size=256, context=61, seed=0)
    optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1.0)
    state = TrainingState(step=step, tokens_digest=plan.tokens.digest)
    snapshot = Snapshot(state=state, config=model.config, weights=optimizer.masters, moments=optimizer.moments(), extra_files={})
    return save_checkpoint(plan.files.checkpoints, snapshot, keep=plan.config.keep_checkpoints)


def test_a_run_that_goes_on_needs_room_only_for_the_checkpoints_that_are_not_there(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    out = {"out": "run", "keep_checkpoints": 2}
    plan = prepare(given | out, resume=False)
    usage = shutil.disk_usage(plan.files.out)

    def go_on_with_room_for(checkpoints: float, size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=round(size * checkpoints)))
        prepare(out, resume=True)

    for step, fits in ((1, 2.0), (2, 1.0), (3, 1.0)):
        folder = save(plan, step)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        go_on_with_room_for(fits, size)
        with pytest.raises(RingspanError, match="MB are free and checkpoints need"):
            go_on_with_room_for(fits - 0.1, size)
        # The next one takes the place of what a killed run left half written, which it sweeps away.
        left = shutil.copytree(folder, folder.with_name(".step-00000009.partial"))
        go_on_with_room_for(fits - 1, size)
        shutil.rmtree(left)
