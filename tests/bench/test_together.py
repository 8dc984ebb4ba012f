"""A rank that fails takes the others along at their next word, and all stay in step."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from ringspan import run_in_process
from ringspan.bench.clock import Clock
from ringspan.bench.together import Broken, Together
from ringspan.transport import Transport


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


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_rank_that_fails_while_all_are_timed_takes_the_others_along(call: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ringspan.bench.clock.MOST_REPEATS", 1)

    def run(group) -> str:
        together, calls = Together(group), 0

        def work() -> None:
            nonlocal calls
            calls += 1
            if group.rank == 1 and calls == call:
                raise MemoryError("no room")

        try:
            clock = Clock(torch.device("cpu"), cast(Transport, together), warmup=2, samples=3)
            clock.in_turns(work, lambda: None)
        except Broken as broken:
            return broken.reason
        except MemoryError as error:
            return together.fail("failed", str(error)).reason
        return "timed"

    assert run_in_process(2, run, timeout_seconds=5.0) == ["rank 1: no room"] * 2
