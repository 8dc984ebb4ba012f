"""What is settled before a process is started: room on the disk, which folder a job goes on in, and what names stand for."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import Snapshot, TrainingState, save_checkpoint
from ringspan.training.config import TrainingConfig
from ringspan.training.folders import occupied
from ringspan.training.model import build_model
from ringspan.training.optimizer import Optimizer
from ringspan.training.plan import Plan
from ringspan.training.prepare import prepare, prepare_restarted
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


def test_a_run_that_has_just_begun_keeps_its_configuration_from_another(given: dict[str, Any]):
    """Until its model is made it has written neither metrics nor a checkpoint."""
    begun = prepare(given | {"out": "run", "seed": 7}, resume=False)
    with occupied(begun.files.out), pytest.raises(RingspanError, match=f"--out run: process {os.getpid()} on .* trains there"):
        prepare(given | {"out": "run", "seed": 8}, resume=False)
    assert TrainingConfig.load(begun.files.config).seed == 7
    assert prepare(given | {"out": "run", "seed": 8}, resume=False).config.seed == 8, "free again"


def test_a_lock_that_cannot_be_opened_is_said_like_all_that_cannot_be_written(given: dict[str, Any]):
    plan = prepare(given | {"out": "run"}, resume=False)
    (plan.files.out / ".lock").unlink(missing_ok=True)
    (plan.files.out / ".lock").mkdir()
    save(plan, 1)
    with pytest.raises(RingspanError, match="--out run: Is a directory"):
        prepare({"out": "run"}, resume=True)


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path: Path):
    """What cannot be said of the process is left unsaid, inside and on the way out."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(RingspanError, match="the reason"), occupied(tmp_path):
            raise RingspanError("the reason")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def test_a_run_that_is_refused_leaves_no_folder_of_its_own_and_keeps_one_that_was_there(given: dict[str, Any], tmp_path: Path):
    with pytest.raises(RingspanError, match="The text must hold one context"):
        prepare(given | {"context": 10**6}, resume=False)
    assert not (tmp_path / "runs" / "train").exists()
    assert prepare(given, resume=False).files.out == Path("runs/train"), "the next one has the name that is promised"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(RingspanError, match="The text must hold one context"):
        prepare(given | {"context": 10**6, "out": "mine"}, resume=False)
    assert (tmp_path / "mine" / "notes.txt").is_file()


def test_ranks_that_torchrun_starts_again_go_on_in_the_folder_of_their_own_job(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    first, second = {**given, "learning_rate": 1e-3}, {**given, "learning_rate": 5e-2}

    def of_job(name: str) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)

    of_job("a")
    own = prepare(first, resume=False, world_size=2)
    of_job("b")
    other = prepare(second, resume=False, world_size=2)
    assert Path(own.config.out) != Path(other.config.out)
    of_job("a")
    assert prepare_restarted(first, world_size=2) == own
    save(own, 3)
    again = prepare_restarted(first, world_size=1)
    assert (Path(again.config.out), again.first_step) == (Path(own.config.out), 3)
    of_job("b")
    assert prepare_restarted(second, world_size=2) == other, "its own, though the other one was written to later"
    of_job("c")
    assert not {prepare_restarted(first, world_size=2).config.out} & {own.config.out, other.config.out}
    # What torchrun calls every job that was given no id and is not alone.
    of_job("none")
    with pytest.raises(RingspanError, match=r"none of the runs in runs is marked as this job's.*Try: --out DIR"):
        prepare_restarted(first, world_size=2)
    unnamed = prepare(first, resume=False, world_size=2)
    assert prepare_restarted(first, world_size=2) == unnamed, "the same process starts these ranks"


def test_ranks_that_torchrun_starts_again_with_other_options_are_refused_before_there_is_a_checkpoint_too(given: dict[str, Any]):
    plan = prepare({**given, "out": "run"}, resume=False, world_size=2)
    assert prepare_restarted({**given, "out": "run"}, world_size=2) == plan
    with pytest.raises(RingspanError, match=r"--seed 1.*this run has 0"):
        prepare_restarted({**given, "out": "run", "seed": 1}, world_size=2)


def test_names_of_ringspans_own_are_not_looked_for_among_the_folders(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    library = tmp_path / "library"
    library.mkdir()
    (library / "module.py").write_text("1 2 3 " * 1000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    build_model("pico", vocabulary_size=256, context=61, seed=3).save_pretrained(tmp_path / "tiny")
    for name in ("bytes", "ids:300", "stdlib"):
        (tmp_path / name).mkdir()
    for tokenizer in ("bytes", "ids:300"):
        named = {"data": "stdlib", "model": "tiny", "tokenizer": tokenizer}
        config = prepare({**given, **named, "out": f"run-{tokenizer}"}, resume=False).config
        assert {name: getattr(config, name) for name in named} == named
    config = prepare({**given, "model": "./tiny", "tokenizer": "bytes", "out": "run"}, resume=False).config
    assert config.model == str(tmp_path / "tiny"), "a path is one"


@pytest.mark.parametrize(
    ("name", "value", "owner"),
    [
        ("rope_factor", 4.0, "--rope-scaling"),
        ("lora_alpha", 32.0, "--lora-rank"),
        ("lora_targets", "q_proj", "--lora-rank"),
        ("spike_factor", 3.0, "--on-spike"),
        ("spike_window", 8, "--on-spike"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(given: dict[str, Any], name: str, value: object, owner: str):
    with pytest.raises(RingspanError, match=f"without {owner}: it would change nothing"):
        prepare(given | {name: value}, resume=False)
    prepare(given | {"spike_factor": 3.0, "on_spike": "skip"}, resume=False)
