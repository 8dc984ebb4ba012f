"""From what each rank recorded to one timeline: when a transfer was under way, and clocks that do not agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringspan.attention.observe import AFTER, BEFORE
from ringspan.attention.program import Batch, Launch
from ringspan.geometry import Tile, causal, make_layout
from ringspan.kernels import KERNELS, Kernel
from ringspan.kernels.reference import Reference
from ringspan.schedule import Piece, PieceBytes, Receive, Send
from ringspan.strategies import make_schedules
from ringspan.trace import Mark, RankRecord, TraceCase, measured_timeline
from tests.strategies.test_singles import Rounding
from tests.trace.support import MACHINE, trace_with

SCHEDULES = make_schedules("ring", make_layout("contiguous", 8, 2), causal())
SIZES = PieceBytes(heads=2, kv_heads=2, head_dim=5, element_bytes=4)
KV = Piece("kv", 0, 0, 4)
SENT, TAKEN = Batch(0, 0, 1, (Send(0, KV, 1, 1),), ()), Batch(0, 0, 1, (), (Receive(0, KV, 0, 1),))
PRICED = 1e-5 + 4 * SIZES.of("kv") / 1e10


def records(*, wait: tuple[float, float], arrived: float | None = None, posted: tuple[float, float] = (1.0, 2.0), ahead: float = 0.0):
    """Rank 0 sends its keys at `posted[0]`, rank 1 stands ready at `posted[1]` and waits; its clock is `ahead`."""
    first = (
        Mark("forward", BEFORE, "pack", None, 0.0, 0.5, None, -1),
        Mark("forward", 0, "transfer", SENT, posted[0], 20.0, None, 0),
        Mark("forward", 0, "attend", Launch(0, 0, Tile(0, 4, 0, 4, 0)), 1.5, 20.0, None, -1),
    )
    second = (
        Mark("forward", 0, "transfer", TAKEN, posted[1], wait[1], arrived, 3),
        Mark("forward", 0, "wait", TAKEN, *wait, None, 3),
        Mark("forward", AFTER, "cast", None, wait[1], wait[1] + 1, None, -1),
    )
    moved = tuple(
        replace(mark, start=mark.start + ahead, stop=mark.stop + ahead, arrived=None if mark.arrived is None else mark.arrived + ahead)
        for mark in second
    )
    return [RankRecord(0, (0, 1), first), RankRecord(1, (0, 1), moved, ahead)]


def flight_of(copied: bool = False, **about):
    (flight,) = measured_timeline(records(**about), SCHEDULES, SIZES, MACHINE, copied=copied).flights
    return flight


def test_a_flight_begins_when_both_ends_have_posted_it_and_ends_with_the_wait_that_it_blocked():
    flight = flight_of(wait=(5.0, 9.0))
    assert (flight.source, flight.target, flight.size, flight.label) == (0, 1, 4 * SIZES.of("kv"), "kv0[0:4]")
    assert (flight.ready, flight.start, flight.stop) == (2.0, 2.0, 9.0)
    assert (flight.source_batch, flight.target_batch, flight.home) == (0, 3, False)


def test_a_flight_that_nobody_had_to_wait_for_takes_what_its_bytes_should_take():
    flight = flight_of(wait=(5.0, 5.0 + 1e-6))
    assert (flight.start, flight.stop) == (2.0, pytest.approx(2.0 + PRICED))
    assert flight_of(wait=(2.0 + PRICED / 2, 2.0 + PRICED / 2)).stop <= 2.0 + PRICED / 2, "it had come before the wait began"


def test_where_the_device_tells_when_it_came_that_is_its_end():
    flight = flight_of(wait=(5.0, 5.0), arrived=3.0)
    assert (flight.start, flight.stop) == (2.0, 3.0)


def test_between_threads_nothing_moves_before_the_receiver_fetches_it():
    flight = flight_of(copied=True, wait=(5.0, 5.5))
    assert (flight.start, flight.stop) == (5.0, 5.5)
    late = flight_of(copied=True, wait=(5.0, 9.0), posted=(7.0, 2.0))
    assert (late.ready, late.start, late.stop) == (7.0, 7.0, 9.0)


def test_what_went_to_a_receiver_that_was_not_ready_never_ends_before_it_begins():
    flight = flight_of(wait=(1.1, 1.2), posted=(1.0, 6.0))
    assert flight.start <= flight.stop


def test_what_had_come_before_its_sender_was_back_from_posting_was_under_way_while_it_posted():
    first, second = records(wait=(5.0, 9.0), posted=(9.5, 2.0))
    posting = Mark("forward", 0, "post", SENT, 7.0, 9.5, None, 0)
    (flight,) = measured_timeline([replace(first, marks=(*first.marks, posting)), second], SCHEDULES, SIZES, MACHINE).flights
    assert (flight.ready, flight.start, flight.stop) == (7.0, 7.0, 9.0)


def test_a_clock_that_is_ahead_is_set_back():
    own = measured_timeline(records(wait=(5.0, 9.0)), SCHEDULES, SIZES, MACHINE)
    ahead = measured_timeline(records(wait=(5.0, 9.0), ahead=1024.0), SCHEDULES, SIZES, MACHINE)
    assert own == ahead


def test_events_have_the_names_and_the_steps_of_the_schedule():
    found = measured_timeline(records(wait=(5.0, 9.0)), SCHEDULES, SIZES, MACHINE)
    steps = found.num_steps["forward"]
    assert [(event.rank, event.step, event.kind, event.label) for event in found.events] == [
        (0, -1, "pack", ""),
        (0, 0, "attend", "q0[0:4]×kv0[0:4]"),
        (1, 0, "wait", "kv0[0:4]←0"),
        (1, steps, "cast", ""),
    ]
    assert found.events[1].pairs == 10
    assert found.events[2].batch == 3, "a wait can be joined with what it waits for"


def test_ranks_of_a_context_group_are_named_by_their_number_among_all():
    first, second = records(wait=(5.0, 9.0))
    found = measured_timeline([replace(first, members=(4, 6), rank=4), replace(second, members=(4, 6), rank=6)], SCHEDULES, SIZES, MACHINE)
    assert [(flight.source, flight.target, flight.label) for flight in found.flights] == [(4, 6, "kv4[0:4]")]
    assert found.events[1].label == "q4[0:4]×kv4[0:4]"


def test_of_several_tiles_in_one_launch_the_pairs_are_theirs_and_not_those_of_the_rectangle_around_them():
    parts = (Tile(0, 2, 0, 2, 0), Tile(2, 4, 2, 4, 0))
    launch = Launch(0, 0, Tile(0, 4, 0, 4), parts=parts)
    record = RankRecord(0, (0, 1), (Mark("forward", 0, "attend", launch, 0.0, 1.0, None, -1),))
    (event,) = measured_timeline([record, RankRecord(1, (0, 1), ())], SCHEDULES, SIZES, MACHINE).events
    assert event.pairs == 6


@pytest.mark.parametrize("kernel", [Reference(), Rounding()], ids=["wide", "rounding"])
@pytest.mark.parametrize("strategy", ["ring", "balanced", "ring_self_attention"])
def test_flights_weigh_what_the_transport_counts_measured_and_predicted(strategy: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(KERNELS, "reference", kernel)
    ranks = []

    def counting(rank):
        ranks.append(rank)
        return rank

    case = TraceCase(num_ranks=3, strategy=strategy, length=37, heads=4, kv_heads=2, head_dim=8, dtype="bfloat16", kernel="reference")
    found = trace_with(case, counting)
    # A run to warm up, and the one that is traced.
    counted = sum(rank.bytes_sent.total() for rank in ranks)
    for timeline in (found.measured, found.predicted):
        assert 2 * sum(flight.size for flight in timeline.flights) == counted
