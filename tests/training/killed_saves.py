"""Run as a program with a folder: saves a checkpoint in a child process that is killed at one of its file operations, at each in turn.

Prints how many moments were tried; ends with an error at the first after which a checkpoint is found that is not whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ringspan.training.checkpoint import list_checkpoints, load_weights, save_checkpoint, verify_checkpoint
from ringspan.training.model import build_model
from tests.training.test_checkpoint import snapshot_of

OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "symlink")


def kill_at(moment: int, spread: Callable[[], Any]) -> None:
    """Ends this process before its operation number `moment`, where it has that many."""
    left = [moment]

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **keywords)

        return run

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    spread()


def try_moments(root: Path) -> int:
    """Kills at operation 1, 2, … until one is beyond the last; the number of those."""
    model = build_model("pico", vocabulary_size=256, context=64, seed=0)
    for step in (1, 2):
        save_checkpoint(root / "before", snapshot_of(model, step), keep=2)
    for moment in range(1, 1000):
        folder = root / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "before", folder, symlinks=True)
        child = os.fork()
        if child == 0:
            kill_at(moment, partial(save_checkpoint, folder, snapshot_of(model, 3), keep=2))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        check(folder, model, f"killed before operation {moment}")
        save_checkpoint(folder, snapshot_of(model, 4), keep=2)
        left = sorted(path.name for path in folder.iterdir())
        assert left[-1] == "step-00000004" and len(left) == 3 and left[0] == "latest", f"moment {moment} left {left}"
        if status == 0:
            return moment - 1
        assert status == signal.SIGKILL
    raise AssertionError("it never ended")


def check(folder: Path, model: Any, when: str) -> None:
    """Whatever bears a checkpoint's name is whole, step 2 or a later one is there, and `latest` leads to one of them."""
    steps = [verify_checkpoint(found).step for found in list_checkpoints(folder)]
    assert max(steps) >= 2, f"{when}: {steps}"
    assert verify_checkpoint(folder / "latest").step in steps, when
    weights = {name: torch.full_like(parameter, float("nan")) for name, parameter in model.named_parameters()}
    load_weights(folder / "latest", weights)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters()), when


if __name__ == "__main__":
    print(try_moments(Path(sys.argv[1])))
