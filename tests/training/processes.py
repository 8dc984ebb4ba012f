"""`ringspan train` in the background, watched and interfered with."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.training import support
from tests.training.forked import Command


@contextmanager
def started(*arguments: object) -> Iterator[Command]:
    """`ringspan train` in the background; whatever is left of it at the end is ended."""
    with tempfile.TemporaryDirectory(prefix="ringspan-test-") as folder:
        command = Command(["train", *map(str, arguments)], support.environment(), Path(folder))
        try:
            yield command
        finally:
            command.kill()
            command.communicate()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Returns once it holds."""
    deadline = time.monotonic() + support.TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError(what)


def wait_for_step(out: Path, step: int) -> None:
    """Returns once the metrics hold that step."""
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and any(record.step >= step for record in support.records(out)), f"step {step} was not reached")


def rank_process(launcher: int, rank: int) -> int:
    """The process id of a rank."""
    for thread in Path(f"/proc/{launcher}/task").iterdir():
        for child in (thread / "children").read_text().split():
            started_afresh = f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes()
            if started_afresh or Path(f"/proc/{child}/comm").read_text() == f"rank {rank}\n":
                return int(child)
    raise LookupError(f"rank {rank} is not running")
