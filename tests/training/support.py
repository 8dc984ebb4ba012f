"""What the tests of training share: a text, a tiny model, and `ringspan train` as a user starts it."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ringspan.training.metrics import StepRecord, read_metrics
from tests.training import forked

TIMEOUT_SECONDS = 150
# Small enough to be quick, and with a context that neither 2 nor 3 ranks divide.
TINY = (
    "--model",
    "pico",
    "--context",
    "61",
    "--batch-size",
    "2",
    "--validation-tokens",
    "183",
    "--sample-tokens",
    "0",
    "--warmup-steps",
    "3",
)


def write_text(path: Path, num_words: int = 12_000) -> Path:
    """A text of made-up words in which some words follow others more often, so that there is something to learn."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    line, lines = [draw.choice(words)], []
    for _ in range(num_words):
        line.append(words[(words.index(line[-1]) * 7 + draw.randint(0, 3)) % len(words)])
        if len(line) == 12:
            lines.append(" ".join(line))
            line = line[-1:]
    path.write_text("\n".join(lines))
    return path


def environment() -> dict[str, str]:
    """The tests' own, without what a launcher around them may have set."""
    torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in torchrun} | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"}


def train_command(*arguments: object) -> list[str]:
    """`ringspan train` with these arguments."""
    return [sys.executable, "-m", "ringspan.cli.main", "train", *map(str, arguments)]


def run_train(*arguments: object, timeout: float = TIMEOUT_SECONDS, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs it to its end: forked, ranks too, from a process that has imported it, or `fresh` as a user starts it."""
    if fresh:
        return subprocess.run(train_command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment())
    with tempfile.TemporaryDirectory(prefix="ringspan-test-") as folder:
        return forked.run(["train", *map(str, arguments)], environment(), Path(folder), timeout)


def losses(out: Path) -> dict[int, float]:
    """The training loss of each step."""
    return {record.step: record.loss for record in read_metrics(out / "metrics.jsonl") if record.loss is not None}


def validation_losses(out: Path) -> dict[int, float]:
    """The held-out loss at each step that has one."""
    return {record.step: record.validation_loss for record in records(out) if record.validation_loss is not None}


def records(out: Path) -> list[StepRecord]:
    """Every line of the metrics."""
    return read_metrics(out / "metrics.jsonl")


def once(root: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `root/name`, made by the first test process that wants it and awaited by the others."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.made").exists():
            # What a failed attempt of another test left would hide its error behind another one.
            shutil.rmtree(root / name, ignore_errors=True)
            make(root / name)
            (root / f"{name}.made").touch()
    return root / name
