"""`metrics.jsonl`: one line a step, so that a curve can be drawn, and gone on with, from the file alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from ringspan.errors import RingspanError
from ringspan.training.folders import going_on
from ringspan.training.manifest import write_whole


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step. The loss is that of the step's batch before its update, the validation loss that after it; step 0 has the latter alone.

    Losses are nats per token, `seconds` is this step's wall time without validation, checkpoints and samples. What is not known is left
    out of the file.

    Attributes:
        validation_by_position: at the end of a run, (first position, past its last, loss) for ranges of positions in the context, or in
            their documents.
        validation_by_context: beside it, (window, loss) of the same tokens, the last halves of the held-out rows, each predicted from less
            than a window of tokens before it: where it goes on falling, what is further back is used. None where less cannot be given.
        skipped: why the update was not made: `"nan"` or `"spike"`.
        tokens: read by all steps so far.
        model_tflops_per_second: of all ranks together, as `ringspan.training.flops` counts; None where it cannot (experts).
        mfu: that over the ranks' peak, 0 to 1; None where no peak is known (CPUs, float32, devices that the table lacks).
        peak_memory_bytes, reserved_memory_bytes: the largest of any rank; on CUDA.
        joules_per_token: of the devices, where NVML answers.
        attention_share, feed_forward_share, communication_share: of the ranks' time, 0 to 1, see `ringspan.training.shares`; the rest is
            projections, norms, embeddings, loss and optimizer. Left out of steps in which it was not measured.
    """

    step: int
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    ranks: int | None = None
    skipped: str | None = None
    model_tflops_per_second: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    reserved_memory_bytes: int | None = None
    joules_per_token: float | None = None
    attention_share: float | None = None
    feed_forward_share: float | None = None
    communication_share: float | None = None
    validation_by_position: Sequence[Sequence[float]] | None = None
    validation_by_context: Sequence[Sequence[float]] | None = None


class MetricsFile:
    """Appends records to a file, each whole line at once. Use as a context manager."""

    def __init__(self, path: Path, *, after_step: int | None) -> None:
        """Opens `path`, and keeps of what it holds the steps up to `after_step`; None and 0, which is measured again, start anew."""
        kept = [record for record in read_metrics(path) if record.step <= after_step] if after_step and path.exists() else []
        write_whole(path, "".join(map(_line, kept)))
        self._path = path
        self._stream: TextIO = path.open("a")

    def write(self, record: StepRecord) -> None:
        """Appends one line, and hands it to the operating system.

        Raises:
            RingspanError: where it is not taken.
        """
        try:
            self._stream.write(_line(record))
            self._stream.flush()
        except OSError as error:
            raise RingspanError(
                f"step {record.step} in {self._path}",
                str(error.strerror),
                "A run writes one line a step there",
                f"making room and {going_on(self._path.parent)}",
            ) from None

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        # After a full disk there is a rest that cannot be written; its error has been said.
        with contextlib.suppress(OSError):
            self._stream.close()


def _line(record: StepRecord) -> str:
    return json.dumps({name: value for name, value in asdict(record).items() if value is not None}) + "\n"


def read_metrics(path: Path) -> list[StepRecord]:
    """Every whole record in the file; a last line that a crash cut short is left out.

    Raises:
        RingspanError: for a line before the last that is no record.
    """
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(StepRecord(**json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise RingspanError(
                    f"metrics {path}",
                    f"line {number} is no record",
                    "Each line is one JSON object of StepRecord",
                    f"deleting line {number}",
                ) from None
    return records
