"""`ringspan train` with real processes: the same curve on any number of ranks, stopped and gone on with, and no hung rank."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import list_checkpoints, verify_checkpoint
from ringspan.training.config import TrainingConfig
from ringspan.training.export import export
from ringspan.training.folders import occupied
from ringspan.training.launch import launch
from ringspan.training.metrics import StepRecord
from ringspan.training.model import check_model
from ringspan.training.prepare import prepare
from tests.training import support
from tests.training.conftest import STEPS
from tests.training.processes import rank_process, started, wait_for_step

pytestmark = pytest.mark.slow

# Float32 sums in another order differ by about 1e-7; twenty steps of AdamW on them stay far below this.
TOLERANCE = 1e-4
Finished = Callable[[int], Path]


def assert_same_curve(out: Path, reference: Path) -> None:
    for measure in (support.losses, support.validation_losses):
        mine, theirs = measure(out), measure(reference)
        assert mine.keys() == theirs.keys()
        worst = max(abs(mine[step] - theirs[step]) for step in theirs)
        assert worst < TOLERANCE, f"{measure.__name__} differ by {worst}"


def assert_same_by_context(mine: StepRecord, theirs: StepRecord) -> None:
    pairs = zip(mine.validation_by_context or (), theirs.validation_by_context or (), strict=True)
    assert all(window == other and abs(loss - wanted) < TOLERANCE for (window, loss), (other, wanted) in pairs)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_losses_do_not_depend_on_the_number_of_ranks(finished_run: Finished, ranks: int):
    assert_same_curve(finished_run(ranks), finished_run(1))
    curve = support.losses(finished_run(1))
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < curve[1] - 1
    assert {record.ranks for record in support.records(finished_run(ranks)) if record.step} == {ranks}


def test_a_run_leaves_what_it_says(finished_run: Finished):
    out = finished_run(2)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step-00000010", "step-00000020"]
    assert verify_checkpoint(out / "checkpoints" / "latest").step == STEPS
    *before, last = support.records(out)
    assert all(record.validation_by_context is None for record in before)
    assert [window for window, _ in last.validation_by_context or ()] == [16, 30, 61]
    assert_same_by_context(last, support.records(finished_run(1))[-1])
    config = TrainingConfig.load(out / "config.json")
    assert (config.ranks, config.context, config.tokenizer, config.device) == (2, 61, "bytes", "cpu")


def interrupt(number: signal.Signals, out: Path, after: int, *arguments: object) -> tuple[int, str, int]:
    """Runs until step `after` is written, sends the signal, and returns the exit status, what was said, and the step of the checkpoint."""
    with started("--out", out, *arguments) as process:
        wait_for_step(out, after)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
        assert "Traceback" not in said + errors
        return process.returncode, said, verify_checkpoint(list_checkpoints(out / "checkpoints")[-1]).step


def test_a_run_stopped_twice_and_gone_on_with_on_other_ranks_has_the_uninterrupted_curve(
    finished_run: Finished, text: Path, tmp_path: Path
):
    out = tmp_path / "run"
    every = ("--validation-every", 10, "--checkpoint-every", 10)
    status, said, first = interrupt(signal.SIGINT, out, 2, *support.TINY, "--data", text, "--steps", STEPS, "--ranks", 2, *every)
    assert status == 130
    assert 2 <= first < STEPS
    assert f"stopped after step {first} of {STEPS}; to go on: ringspan train --resume --out {out}" in said
    status, said, second = interrupt(signal.SIGTERM, out, first + 2, "--resume", "--ranks", 1)
    assert (status, second > first) == (143, True), said
    assert f"going on after step {first}" in said
    result = support.run_train("--resume", "--out", out, "--ranks", 3)
    assert result.returncode == 0, result.stderr
    assert_same_curve(out, finished_run(1))
    again = support.run_train("--resume", "--out", out)
    assert again.returncode == 0
    assert "all 20 steps are taken" in again.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_run_at_once_with_its_own_status(number: signal.Signals, status: int, text: Path, tmp_path: Path):
    out = tmp_path / "run"
    with started(*support.TINY, "--data", text, "--steps", 100_000, "--ranks", 2, "--out", out, "--checkpoint-every", 2) as process:
        wait_for_step(out, 4)
        while not list_checkpoints(out / "checkpoints"):
            time.sleep(0.05)
        ranks = [rank_process(process.pid, rank) for rank in (0, 1)]
        # Stopped, they cannot end by the first.
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        process.send_signal(number)
        time.sleep(1.0)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == status, said + errors
    assert f"ringspan train --resume --out {out}" in errors and "ended at once; to go on from step-" in errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_rank_that_dies_ends_the_others_and_is_named(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    with started(*support.TINY, "--data", text, "--steps", 100_000, "--ranks", 2, "--out", out) as process:
        wait_for_step(out, 3)
        other = rank_process(process.pid, 0)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: rank 1: it was ended by SIGKILL")
    assert f"Try: --resume --out {out}, which goes on" in errors
    assert "Traceback" not in said + errors
    assert not Path(f"/proc/{other}").exists()


def test_a_folder_in_which_a_run_is_at_work_takes_no_other(text: Path, tmp_path: Path):
    """Not even one that was allowed to start before the other had."""
    plan = prepare({"data": str(text), "model": "pico", "context": 61, "device": "cpu", "out": str(tmp_path / "run")}, resume=False)
    with occupied(plan.files.out), pytest.raises(RingspanError, match=f"process {os.getpid()} on .* trains there"):
        launch(plan, "ringspan.cli.train_rank", print)
    assert not plan.files.metrics.exists()


def test_ranks_whose_launcher_is_killed_write_a_checkpoint_and_end(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    with started(*support.TINY, "--data", text, "--steps", 100_000, "--ranks", 2, "--out", out, "--checkpoint-every", 1) as process:
        wait_for_step(out, 3)
        ranks = [rank_process(process.pid, rank) for rank in (0, 1)]
        with pytest.raises(RingspanError, match=f"process {ranks[0]} on .* trains there"):
            prepare({"out": str(out)}, resume=True)
        process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert verify_checkpoint(out / "checkpoints" / "latest").step >= 3
    assert prepare({"out": str(out)}, resume=True).first_step >= 3, "a lock ends with its process"


def test_a_rank_that_stops_answering_is_given_up_after_the_timeout_and_named(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    with started(*support.TINY, "--data", text, "--steps", 100_000, "--ranks", 2, "--out", out, "--timeout-seconds", 5) as process:
        wait_for_step(out, 3)
        frozen = rank_process(process.pid, 1)
        os.kill(frozen, signal.SIGSTOP)
        said, errors = process.communicate(timeout=90)
    assert process.returncode == 2
    assert errors.startswith("error: rank 1: it did not answer")
    assert "Traceback" not in said + errors
    assert not Path(f"/proc/{frozen}").exists()


def test_a_checkpoint_that_the_disk_refuses_ends_every_rank_with_one_message(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    command = support.train_command(*support.TINY, "--data", text, "--steps", 3, "--ranks", 2, "--out", out)
    # A limit on the size of a file: the tokens fit below it, the checkpoint does not.
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "limited", *command]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=support.TIMEOUT_SECONDS, env=support.environment())
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: checkpoint of step 3")
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert list_checkpoints(out / "checkpoints") == []


def test_ranks_that_torchrun_started_train_the_same(finished_run: Finished, text: Path, tmp_path: Path):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ringspan.cli.main", "train"]
    arguments = [*support.TINY, "--data", text, "--steps", STEPS, "--out", out, "--validation-every", 10, "--checkpoint-every", 10]
    result = subprocess.run(
        [*torchrun, *map(str, arguments)], capture_output=True, text=True, timeout=support.TIMEOUT_SECONDS, env=support.environment()
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out loss") == result.stdout.count("  by context:  the same bytes with fewer than 16 before") == 1
    assert_same_curve(out, finished_run(2))


def test_training_goes_on_from_a_model_folder_in_bfloat16_with_a_sample(finished_run: Finished, text: Path, tmp_path: Path):
    before = finished_run(2)
    with pytest.raises(RingspanError, match=r"no \.safetensors file.*Try: `ringspan export .*latest DIR` and --model DIR"):
        check_model(str(before / "checkpoints" / "latest" / "model"))
    export(before / "checkpoints" / "latest", tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--tokenizer", "bytes", "--data", text, "--context", 61]
    out = tmp_path / "run"
    result = support.run_train(*arguments, "--steps", 3, "--ranks", 2, "--dtype", "bfloat16", "--sample-tokens", 5, "--out", out)
    assert result.returncode == 0, result.stderr
    curve = support.validation_losses(out)
    reached = support.validation_losses(before)[STEPS]
    # bfloat16 keeps eight bits; the held-out text is the same, in windows of the same length.
    assert math.isclose(curve[0], reached, abs_tol=0.05)
    assert "sample after step 3" in result.stdout
    assert (out / "samples.txt").read_text().count("=== after step") == 2
