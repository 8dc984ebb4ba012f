"""A rank that fails takes the others along at their next word, and all stay in step."""

from __future__ import annotations

import pytest

from ringspan import run_in_process
from ringspan.bench.together import Broken, Together


def test_a_failure_is_raised_on_every_rank_in_place_of_what_the_others_say():
    def run(group) -> tuple[str, list]:
        together = Together(group)
        try:
            if group.rank == 1:
                raise together.fail("failed", "out of memory")
            together.gather_objects("and on")
        except Broken as broken:
            said = f"{broken.status}: {broken.reason}"
        return said, together.gather_objects(group.rank)

    assert run_in_process(3, run) == [("failed: rank 1: out of memory", [0, 1, 2])] * 3


def test_what_all_ranks_refuse_is_said_once():
    def run(group) -> str:
        return Together(group).fail("refused", "no such mask").reason

    assert run_in_process(2, run) == ["no such mask"] * 2


def test_everything_else_is_the_transports():
    def run(group) -> tuple[int, list]:
        together = Together(group)
        return together.size, together.gather_objects(group.rank * 2)

    assert run_in_process(2, run) == [(2, [0, 2])] * 2
    with pytest.raises(AttributeError):
        run_in_process(1, lambda group: Together(group).nothing)
