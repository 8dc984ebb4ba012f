"""Bad input: each an error that teaches, before any process is started, with exit status 2 and no traceback."""

from __future__ import annotations

import json
import os
import sys
from array import array
from pathlib import Path

import pytest

from ringspan.cli.main import main
from ringspan.training import launch
from ringspan.training.checkpoint import Snapshot, TrainingState, save_checkpoint
from ringspan.training.model import build_model
from ringspan.training.optimizer import Optimizer
from ringspan.training.prepare import prepare

TOO_LONG = "x" * 300
"""Of such a name pathlib raises even when it is only asked whether there is a file; also for root, whom no permission stops."""


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `ringspan train` with arguments that must be refused, and returns what it says on stderr."""

    def never(*arguments: object) -> None:
        raise AssertionError("no rank may be started")

    monkeypatch.setattr(launch, "launch", never)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["ringspan", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert "Traceback" not in said.err + said.out
        return said.err

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("a few words to train on, again and again. " * 100)
    return file


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "nowhere.txt"], ["--data nowhere.txt", "no such file"]),
        (["--ranks", "0"], ["--ranks 0", "Try: --ranks 2"]),
        (["--ranks", "-1"], ["--ranks -1"]),
        (["--context", "0"], ["--context 0"]),
        (["--context", "-8"], ["--context -8"]),
        (["--context", "2", "--ranks", "3"], ["rank 2 would own none of the 2 tokens", "Try: --context 6"]),
        (["--out", ""], ["--out ''", "Try: --out runs/train"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--batch-size", "-1"], ["--batch-size -1"]),
        (["--learning-rate", "0"], ["--learning-rate 0"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--strategy", "rign"], ["--strategy rign", "ring"]),
        (["--layout", "zagzig"], ["--layout zagzig", "contiguous, zigzag, striped"]),
        (["--mask", "casual"], ["--mask casual", "causal"]),
        (["--mask", "full"], ["--mask full", "--mask causal"]),
        (["--kernel", "fast"], ["--kernel fast", "reference"]),
        (["--kernel", "cudnn", "--device", "cpu"], ["--kernel cudnn", "Try: --kernel auto"]),
        (["--model", "huge"], ["--model huge", "nano, tiny, small"]),
        (["--dtype", "float8"], ["--dtype float8", "float32, bfloat16"]),
        (["--device", "tpu"], ["--device tpu", "auto, cpu, cuda"]),
        (["--tokenizer", "nowhere.json"], ["--tokenizer nowhere.json", "Try: --tokenizer bytes"]),
        (["--context", "2101"], ["--context 2101", "has 4200 tokens", "Try: --context 2100"]),
        (["--resume"], ["--resume", "there is no checkpoint"]),
        (["--out", "text.txt/below"], ["--out text.txt/below", "Not a directory"]),
        (["--out", "/proc/ringspan"], ["--out /proc/ringspan"]),
        (["--out", TOO_LONG], [f"--out {TOO_LONG}", "File name too long"]),
        (["--data", TOO_LONG], [TOO_LONG]),
        (["--model", TOO_LONG], [TOO_LONG]),
        (["--config", TOO_LONG], [TOO_LONG]),
        (["--resume", "--out", TOO_LONG], [TOO_LONG]),
    ],
)
def test_it_says_what_was_asked_what_was_found_and_what_works(refused, text: Path, arguments: list[str], expected: list[str]):
    said = refused(*(["--data", text] if "--data" not in arguments else []), *arguments)
    assert said.startswith("error: ")
    for part in expected:
        assert part in said


def test_an_empty_file_is_refused(refused, tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    assert "all empty" in refused("--data", tmp_path / "empty.txt")


def test_an_option_that_is_no_number_and_one_that_there_is_not_are_refused(refused):
    assert "--steps" in refused("--steps", "many")
    assert "--stepps" in refused("--stepps", "3")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(refused, text: Path, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused("--data", text, "--out", tmp_path / "locked" / "run")


def test_a_disk_without_room_for_the_checkpoints_is_refused(refused, text: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    said = refused("--data", text, "--context", 64)
    assert "1.00 MB are free and checkpoints need 1" in said


def test_gpus_that_are_not_there_are_refused(refused, text: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this machine has 0 CUDA devices" in refused("--data", text, "--device", "cuda")


def test_a_folder_that_holds_a_run_is_not_overwritten(refused, text: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    said = refused("--data", text, "--context", 64, "--out", tmp_path / "run")
    assert "it holds a run already (metrics.jsonl, which ended before its first checkpoint)" in said and "or removing" in said
    said = refused("--resume", "--out", tmp_path / "run")
    assert "there is no checkpoint in it" in said and f"after removing {tmp_path / 'run'}" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}"


def test_a_run_under_torchrun_has_torchruns_ranks(refused, text: Path):
    from ringspan.errors import RingspanError

    with pytest.raises(RingspanError, match="torchrun started 4"):
        prepare({"data": str(text), "ranks": 3}, resume=False, world_size=4)


def test_a_model_folder_without_a_readable_configuration_is_refused(refused, text: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "no config.json" in refused("--data", text, "--model", folder)
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text("{")
    assert "is no JSON" in refused("--data", text, "--model", folder)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_size": 32}))
    assert "tokenizer.json" in refused("--data", text, "--model", folder)


@pytest.fixture
def stopped_run(text: Path, tmp_path: Path) -> Path:
    """A folder as a run leaves it that was stopped after its third step."""
    plan = prepare({"data": str(text), "model": "pico", "context": 64, "out": str(tmp_path / "run")}, resume=False)
    model = build_model("pico", vocabulary_size=256, context=64, seed=0)
    optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1.0)
    state = TrainingState(step=3, tokens_digest=plan.tokens.digest)
    snapshot = Snapshot(state=state, config=model.config, weights=optimizer.masters, moments=optimizer.moments(), extra_files={})
    save_checkpoint(plan.files.checkpoints, snapshot, keep=2)
    return plan.files.out


def test_a_stopped_run_can_be_gone_on_with(stopped_run: Path):
    assert prepare({"out": str(stopped_run), "ranks": 3}, resume=True).first_step == 3


def test_a_damaged_checkpoint_is_refused_with_the_file(refused, stopped_run: Path):
    damaged = stopped_run / "checkpoints" / "step-00000003" / "tensors" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    said = refused("--resume", "--out", stopped_run)
    assert "tensors/__0_0.distcp has 1000 bytes" in said
    assert "Try: starting a new run" in said


def test_a_run_does_not_go_back_and_keeps_its_number_of_steps(refused, stopped_run: Path):
    before = (stopped_run / "config.json").read_text()
    assert "--steps 2 with --resume: 3 are taken" in refused("--resume", "--out", stopped_run, "--steps", 2)
    assert (stopped_run / "config.json").read_text() == before


def test_a_resumed_run_with_another_context_is_refused(refused, stopped_run: Path):
    said = refused("--resume", "--out", stopped_run, "--context", 32)
    assert "--context 32 with --resume: this run has 64" in said


def test_a_resumed_run_whose_text_is_gone_or_another_goes_on_with_its_tokens_or_is_refused(refused, stopped_run: Path, text: Path):
    text.write_text("quite another text " * 100)
    assert prepare({"out": str(stopped_run)}, resume=True).first_step == 3
    (stopped_run / "tokens" / "tokens.bin").unlink()
    assert "its text is no longer what the run began with" in refused("--resume", "--out", stopped_run)


def test_a_configuration_file_gives_options_that_the_command_line_overrides(refused, text: Path, tmp_path: Path):
    (tmp_path / "given.json").write_text(json.dumps({"data": str(text), "context": 64, "strategy": "rign"}))
    assert "--strategy rign" in refused("--config", tmp_path / "given.json")
    assert "--strategy rang" in refused("--config", tmp_path / "given.json", "--strategy", "rang")
    assert "--context 1" in refused("--config", tmp_path / "given.json", "--context", "1")
    (tmp_path / "given.json").write_text('{"stepps": 3}')
    assert "it has stepps" in refused("--config", tmp_path / "given.json")
    assert "--config with --resume" in refused("--config", tmp_path / "given.json", "--resume")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_anything_starts(refused, tmp_path: Path):
    build_model("pico", vocabulary_size=260, context=64, seed=0).save_pretrained(tmp_path / "model")
    (tmp_path / "ids.bin").write_bytes(array("H", range(256)).tobytes())
    said = refused("--data", tmp_path / "ids.bin", "--tokenizer", "ids:300", "--model", tmp_path / "model", "--context", "64")
    assert "its vocabulary has 260 tokens and the tokenizer 300" in said and "Try: --tokenizer ids:260" in said


def test_an_export_to_a_folder_that_is_taken_is_refused_before_anything_starts(refused, text: Path, tmp_path: Path):
    assert "something is there already" in refused("--data", text, "--context", "64", "--export", tmp_path)
