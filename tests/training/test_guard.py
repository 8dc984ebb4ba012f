"""A step whose loss is no number, or far above those before it, is not taken: the run stops, or skips it, by the stated rule."""

from __future__ import annotations

import math

import pytest

from ringspan.errors import RingspanError
from ringspan.training.guard import SKIPS_IN_A_ROW, Guard


def guard(**changes: object) -> Guard:
    settings = {"on_nan": "skip", "on_spike": "skip", "spike_factor": 2.0, "spike_window": 4, "out": "runs/x"}
    return Guard(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_no_number_is_skipped_or_stops(loss: float, norm: float):
    assert guard().judge(7, loss, norm) == "nan"
    with pytest.raises(RingspanError, match=r"step 7: its loss is .*--on-nan stop .*--resume --out runs/x --on-nan skip"):
        guard(on_nan="stop").judge(7, loss, norm)


def test_a_spike_is_above_the_factor_times_the_median_of_a_full_window():
    judge = guard()
    assert [judge.judge(step, loss, 1.0) for step, loss in enumerate([1.0, 9.0, 1.0, 1.0], 1)] == [None] * 4
    assert judge.judge(5, 2.0, 1.0) is None
    assert judge.judge(6, 2.01, 1.0) is None, "the median of 9, 1, 1, 2 is 1.5"
    assert judge.judge(7, 4.0, 1.0) == "spike"
    assert judge.losses == (1.0, 1.0, 2.0, 2.01), "a skipped loss is no part of the median"
    with pytest.raises(RingspanError, match=r"its loss is 9, the median of the 1 before it 1\."):
        stops = guard(on_spike="stop", spike_window=1)
        stops.judge(1, 1.0, 1.0)
        stops.judge(2, 9.0, 1.0)


def test_spikes_are_nobodys_business_unless_asked_for():
    judge = guard(on_spike=None)
    assert [judge.judge(step, 10.0**step, 1.0) for step in range(12)] == [None] * 12


def test_too_many_skips_in_a_row_end_the_run():
    judge = guard()
    for step in range(SKIPS_IN_A_ROW):
        assert judge.judge(step, math.nan, 1.0) == "nan"
    with pytest.raises(RingspanError, match="10 steps in a row were skipped"):
        judge.judge(SKIPS_IN_A_ROW, math.nan, 1.0)


def test_a_step_that_is_taken_ends_the_row():
    judge = guard()
    for step in range(5 * SKIPS_IN_A_ROW):
        judge.judge(step, math.nan if step % 2 else 1.0, 1.0)
    assert judge.skips_in_a_row == 1


def test_a_restored_guard_judges_as_the_one_that_it_was():
    one = guard()
    for step, loss in enumerate([1.0, 2.0, 1.0, 2.0, 1.0]):
        one.judge(step, loss, 1.0)
    one.judge(5, math.nan, 1.0)
    other = guard()
    other.restore(one.losses, one.skips_in_a_row)
    assert (other.losses, other.skips_in_a_row) == (one.losses, 1)
    assert one.judge(6, 3.1, 1.0) == other.judge(6, 3.1, 1.0) == "spike"
