"""Steps that must not be taken: a loss that is no number, or one far above those before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from ringspan.errors import RingspanError

SKIPS_IN_A_ROW = 10
"""So many skipped steps after one another end the run: what is wrong then is not in one batch."""


class Guard:
    """Judges each step by its loss and gradient norm, before the update; both are the same on every rank, and so is the verdict.

    - *nan*: the loss or the norm is NaN or infinite.
    - *spike*, where `on_spike` is not None: the loss is above `spike_factor` times the median of the last `spike_window` losses of steps
      that were taken; with fewer of them there is no verdict.

    `"stop"` raises, with the weights as they were before the step and no checkpoint of them. `"skip"` leaves weights, moments and the
    median as they were, and goes on with the next batch; ten skips in a row raise.
    """

    def __init__(self, *, on_nan: str, on_spike: str | None, spike_factor: float, spike_window: int, out: str) -> None:
        self._on = {"nan": on_nan, "spike": on_spike}
        self._factor, self._out = spike_factor, out
        self._losses: deque[float] = deque(maxlen=spike_window)
        self.skips_in_a_row = 0

    @property
    def losses(self) -> tuple[float, ...]:
        """Those that the median is taken of, oldest first."""
        return tuple(self._losses)

    def restore(self, losses: Iterable[float], skips_in_a_row: int) -> None:
        """Goes on as it was."""
        self._losses.extend(losses)
        self.skips_in_a_row = skips_in_a_row

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """None where the step is to be taken, else the reason to skip it.

        Raises:
            RingspanError: where the step ends the run.
        """
        reason, found = self._verdict(loss, norm)
        if reason is None:
            self._losses.append(loss)
            self.skips_in_a_row = 0
            return None
        self.skips_in_a_row += 1
        endless = self.skips_in_a_row > SKIPS_IN_A_ROW
        if self._on[reason] == "stop" or endless:
            rule = f"--on-{reason} stop ends a run at such a step, before the update"
            if endless:
                rule = f"{SKIPS_IN_A_ROW} steps in a row were skipped, so it is not the batch"
            raise RingspanError(
                f"step {step}",
                found,
                f"{rule}; the last checkpoint is from before",
                f"--resume --out {self._out} --on-{reason} skip, or a new run with a lower --learning-rate or a longer warm-up",
            )
        return reason

    def _verdict(self, loss: float, norm: float) -> tuple[str | None, str]:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "nan", f"its loss is {loss} and the norm of its gradients {norm}"
        if self._on["spike"] and len(self._losses) == self._losses.maxlen and loss > self._factor * median(self._losses):
            return "spike", f"its loss is {loss:.4g}, the median of the {len(self._losses)} before it {median(self._losses):.4g}"
        return None, ""
