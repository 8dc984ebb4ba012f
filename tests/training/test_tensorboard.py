"""TensorBoard gets the numbers of `metrics.jsonl`, or the run is refused where the package is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from ringspan.errors import RingspanError
from ringspan.training.metrics import StepRecord
from ringspan.training.prepare import prepare
from ringspan.training.tensorboard import Board


def test_without_the_package_the_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "text.txt").write_text("words " * 100)
    with pytest.raises(RingspanError, match=r"--tensorboard: .*Try: pip install 'ringspan\[tensorboard\]'"):
        prepare({"data": str(tmp_path / "text.txt"), "context": 32, "out": str(tmp_path / "run"), "tensorboard": True}, resume=False)


def test_every_number_is_a_scalar_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, log_dir: str, purge_step: int | None) -> None:
            assert (log_dir, purge_step) == (str(tmp_path), 5)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = Board(tmp_path, first_step=4)
    board.write(StepRecord(step=5, loss=2.0, skipped="nan", tokens=7))
    board.close()
    assert written == [("loss", 2.0, 5), ("tokens", 7, 5), ("closed", 0.0, 0)]


def test_torchs_own_writer_takes_them(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    board = Board(tmp_path, first_step=0)
    board.write(StepRecord(step=5, loss=2.0))
    board.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))
