"""The curve for TensorBoard, beside `metrics.jsonl`: the same numbers, under `--out`/tensorboard. Needs the extra `tensorboard`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ringspan.errors import RingspanError
from ringspan.training.metrics import StepRecord


def check_tensorboard() -> None:
    """Whether TensorBoard's files can be written here.

    Raises:
        RingspanError: where the package is not installed.
    """
    _writer_class()


class Board:
    """Writes records as scalars. Steps after `first_step` that an earlier start wrote are hidden."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._writer = _writer_class()(log_dir=str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, record: StepRecord) -> None:
        """Every number of the record, at its step."""
        for name, value in asdict(record).items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RingspanError(
            "--tensorboard", f"{error}", "TensorBoard's files are written by that package", "pip install 'ringspan[tensorboard]'"
        ) from None
    return SummaryWriter
