"""The last step is saved before anything is measured of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringspan.training import loop
from ringspan.training.metrics import StepRecord


class Recorded:
    """A trainer and its ranks: what the loop asks of them, in order."""

    def __init__(self, steps: int, checkpoint_every: int, fails: bool) -> None:
        self.config = SimpleNamespace(steps=steps, checkpoint_every=checkpoint_every, validation_every=2)
        self.plan = SimpleNamespace(first_step=0, checkpoint=None)
        self.ranks = SimpleNamespace(agree_on_stop=lambda failed: None)
        self.saver = SimpleNamespace(has_failed=False, written=lambda: None)
        self.step, self.did, self._fails = 0, [], fails

    @property
    def is_finished(self) -> bool:
        return self.step >= self.config.steps

    def take_step(self) -> StepRecord:
        self.step += 1
        return StepRecord(step=self.step)

    def begin_save(self) -> None:
        self.did.append(f"save {self.step}")

    def finish_save(self) -> None:
        pass

    def validate(self) -> float:
        self.did.append(f"measure {self.step}")
        return 1.0

    def validate_by_position(self) -> list:
        return []

    def validate_by_context(self) -> None:
        if self._fails:
            raise MemoryError("windows of a new length")


@pytest.mark.parametrize("checkpoint_every", [2, 3])
@pytest.mark.parametrize("fails", [True, False])
def test_what_is_measured_at_the_end_takes_no_step_with_it(checkpoint_every: int, fails: bool):
    trainer: Any = Recorded(3, checkpoint_every, fails)
    reported: list[int] = []
    try:
        loop._steps(trainer, cast(Any, None), lambda record: reported.append(record.step))
    except MemoryError:
        assert fails
    between = ["save 2"] if checkpoint_every == 2 else []
    assert trainer.did == ["measure 2", *between, "save 3", "measure 3"], "each once, the last before it is measured"
    assert reported == ([1, 2] if fails else [1, 2, 3])
