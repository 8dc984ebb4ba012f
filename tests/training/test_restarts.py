"""Ranks that are killed are started again and go on from the last checkpoint: the curve is the uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringspan.training.checkpoint import list_checkpoints, verify_checkpoint
from tests.training import support
from tests.training.processes import rank_process, started, wait_for_step, wait_until
from tests.training.test_runs import assert_same_curve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 40
RUN = (*support.TINY[:4], "--batch-size", 8, "--accumulate", 2, "--validation-tokens", 183, "--sample-tokens", 0, "--warmup-steps", 3)
WITHOUT_RANKS = (*RUN, "--steps", STEPS, "--validation-every", 10, "--checkpoint-every", 4)
RUN = (*WITHOUT_RANKS, "--ranks", 2)


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = support.run_train(*RUN, "--data", text, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize("seed", [0])
def test_a_run_whose_ranks_are_killed_at_random_steps_has_the_uninterrupted_curve(
    text: Path, tmp_path: Path, uninterrupted: Path, seed: int
):
    draw = random.Random(seed)
    # The first before there is a checkpoint.
    kills = [(draw.randint(1, 3), draw.randrange(2)), (draw.randint(18, 30), draw.randrange(2))]
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    with started(*RUN, "--data", text, "--out", out, "--restarts", 2) as process:
        curve = None
        for step, rank in kills:
            # Each start writes the curve into a new file: with the old one's steps before the checkpoint, and no others.
            wait_until(
                lambda before=curve: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_ino != before, "no start"
            )
            wait_for_step(out, step)
            curve = metrics.stat().st_ino
            os.kill(rank_process(process.pid, rank), signal.SIGKILL)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, f"kills {kills}: {errors}"
    assert "Restart 2 of 2, from the last checkpoint" in errors
    assert "Traceback" not in said + errors
    assert [record.step for record in support.records(out)] == list(range(STEPS + 1))
    assert_same_curve(out, uninterrupted)
    assert verify_checkpoint(list_checkpoints(out / "checkpoints")[-1]).step == STEPS


def test_when_the_restarts_are_used_up_the_rank_that_died_is_named(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    with started(*RUN, "--data", text, "--out", out, "--restarts", 1, "--steps", 100_000) as process:
        for attempt in range(2):
            wait_for_step(out, 4 + 4 * attempt)
            before = (out / "metrics.jsonl").stat().st_ino
            os.kill(rank_process(process.pid, 1), signal.SIGKILL)
            if not attempt:
                wait_until(lambda before=before: (out / "metrics.jsonl").stat().st_ino != before, "no second start")
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: rank 1: it was ended by SIGKILL" in errors
    assert "Traceback" not in said + errors


def test_what_a_rank_refuses_is_not_tried_again(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    command = support.train_command(*RUN, "--data", text, "--out", out, "--restarts", 3)
    # A limit on the size of a file: the tokens fit below it, the checkpoint does not.
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "limited", *command]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=support.TIMEOUT_SECONDS, env=support.environment())
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: checkpoint of step 4")
    assert "Restart" not in result.stderr


def test_ranks_that_torchrun_itself_starts_again_go_on_too(text: Path, tmp_path: Path, uninterrupted: Path):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [*torchrun, "-m", "ringspan.cli.main", "train", *map(str, (*WITHOUT_RANKS, "--data", text, "--out", out))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=support.environment())
    try:
        wait_for_step(out, 9)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, errors
    assert_same_curve(out, uninterrupted)
