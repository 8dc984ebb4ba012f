"""The drawn schedules are the kept ones."""

from __future__ import annotations

import difflib

import pytest

from ringspan.strategies import STRATEGIES
from tests.golden.drawings import HERE, SAMPLES, drawings

DRAWN = drawings()


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_the_schedule_is_drawn_as_it_was(name: str):
    kept, drawn = (HERE / name).read_text(encoding="utf-8"), DRAWN[name]
    difference = "".join(difflib.unified_diff(kept.splitlines(True), drawn.splitlines(True), f"kept {name}", "drawn now"))
    assert not difference, f"to keep the new drawing: python -m tests.golden.drawings\n{difference}"


def test_no_kept_drawing_is_without_its_schedule():
    assert sorted(path.name for path in HERE.glob("*.txt")) == sorted(DRAWN)


def test_every_strategy_is_drawn():
    assert {sample.strategy for sample in SAMPLES} == set(STRATEGIES)
