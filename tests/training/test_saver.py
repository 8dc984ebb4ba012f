"""Checkpoints are written while training goes on, of the weights as they were, and a failure is told where it is awaited."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from ringspan.errors import RingspanError
from ringspan.training import saver as saver_module
from ringspan.training.checkpoint import load_weights, save_checkpoint, verify_checkpoint
from ringspan.training.model import build_model
from ringspan.training.saver import Saver
from tests.training.test_checkpoint import snapshot_of


def test_steps_taken_while_a_checkpoint_is_written_are_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = build_model("pico", vocabulary_size=256, context=64, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    go_on = threading.Event()

    def slowly(*arguments, **keywords):
        assert go_on.wait(60)
        return save_checkpoint(*arguments, **keywords)

    monkeypatch.setattr(saver_module, "save_checkpoint", slowly)
    saver = Saver(tmp_path, keep=2)
    saver.begin(snapshot_of(model, 3))
    assert saver.written() is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    go_on.set()
    saver.finish()
    folder = saver.written()
    assert folder is not None
    assert saver.written() is None, "each is told of once"
    assert verify_checkpoint(folder).step == 3
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    load_weights(folder, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_a_failure_is_told_once_and_the_next_save_may_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = build_model("pico", vocabulary_size=256, context=64, seed=0)

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ringspan.training.checkpoint.write_manifest", full)
        saver = Saver(tmp_path, keep=2)
        saver.begin(snapshot_of(model, 1))
        saver.close()
        assert saver.has_failed
        assert saver.written() is None
        with pytest.raises(RingspanError, match=r"checkpoint of step 1 in .*No space left on device"):
            saver.begin(snapshot_of(model, 2))
    saver.begin(snapshot_of(model, 2))
    saver.finish()
    assert verify_checkpoint(tmp_path / "latest").step == 2
