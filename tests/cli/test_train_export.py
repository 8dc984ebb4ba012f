"""`ringspan export` writes the last checkpoint's model, and refuses in one line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ringspan.cli.main import main
from ringspan.errors import RingspanError
from ringspan.training.checkpoint import Snapshot, TrainingState, save_checkpoint
from ringspan.training.config import TrainingConfig
from ringspan.training.model import build_model
from ringspan.training.optimizer import Optimizer
from ringspan.training.prepare import prepare


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 3 and 5."""
    (tmp_path / "text.txt").write_text("a few words to train on, again and again. " * 100)
    plan = prepare({"data": str(tmp_path / "text.txt"), "model": "pico", "context": 64, "out": str(tmp_path / "run")}, resume=False)
    for step in (3, 5):
        model = build_model("pico", vocabulary_size=256, context=64, seed=step)
        optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1.0)
        state = TrainingState(step=step, tokens_digest=plan.tokens.digest)
        snapshot = Snapshot(state=state, config=model.config, weights=optimizer.masters, moments=optimizer.moments(), extra_files={})
        save_checkpoint(plan.files.checkpoints, snapshot, keep=2)
    return plan.files.out


def test_a_run_that_goes_on_exports_beside_what_it_exported_before(run: Path, tmp_path: Path):
    target = tmp_path / "model"
    replace(TrainingConfig.load(run / "config.json"), export=str(target)).save(run / "config.json")
    given = {"out": str(run), "steps": 9}
    assert prepare(given, resume=True).config.export == str(target)
    target.mkdir()
    (target / "config.json").write_text("{}")
    assert prepare(given, resume=True).config.export == f"{target}-2"
    with pytest.raises(RingspanError, match="something is there already"):
        prepare({**given, "export": str(target)}, resume=True)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ringspan", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_last_checkpoint_is_exported_or_the_one_that_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for source, step in ((run, 5), (run / "checkpoints" / "step-00000003", 3), (run / "checkpoints" / "latest", 5)):
        target = tmp_path / f"model-{source.name}"
        assert call(monkeypatch, source, target) == 0
        assert capsys.readouterr().out == f"step-0000000{step} is now a Hugging Face model: {target}\n"
        exported = AutoModelForCausalLM.from_pretrained(target)
        expected = build_model("pico", vocabulary_size=256, context=64, seed=step)
        assert all((a == b).all() for a, b in zip(exported.parameters(), expected.parameters(), strict=True))


def test_a_mask_that_plain_transformers_does_not_know_of_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    replace(TrainingConfig.load(run / "config.json"), mask="causal&window:4").save(run / "config.json")
    for source in (run, run / "checkpoints" / "step-00000003"):
        assert call(monkeypatch, source, tmp_path / f"model-{source.name}") == 0
        assert "\nnote: it was trained under --mask causal&window:4; plain transformers" in capsys.readouterr().out


def test_what_is_taken_missing_or_damaged_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, run, run) == 2
    assert "something is there already" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path / "nowhere", tmp_path / "model") == 2
    assert "there is no checkpoint in it" in capsys.readouterr().err
    weights = run / "checkpoints" / "step-00000005" / "tensors" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert call(monkeypatch, run, tmp_path / "model") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "tensors/__0_0.distcp is not as it was written" in said
    assert not (tmp_path / "model").exists()
