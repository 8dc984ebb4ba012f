from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import support

STEPS = 20


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the test processes of one session share."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "training"


@pytest.fixture(scope="session")
def text(shared: Path) -> Path:
    """A text file of about 60 KB."""
    return support.once(shared, "text.txt", lambda path: support.write_text(path) and None)


@pytest.fixture(scope="session")
def finished_run(shared: Path, text: Path) -> Callable[[int], Path]:
    """The folder of a run of 20 steps on that many ranks, trained once a session."""

    def run(ranks: int) -> Path:
        def train(out: Path) -> None:
            result = support.run_train(
                *support.TINY,
                "--data",
                text,
                "--steps",
                STEPS,
                "--ranks",
                ranks,
                "--out",
                out,
                "--validation-every",
                10,
                "--checkpoint-every",
                10,
                fresh=ranks == 2,
            )
            assert result.returncode == 0, result.stderr + result.stdout

        return support.once(shared, f"run-on-{ranks}", train)

    return run
