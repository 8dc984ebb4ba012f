"""The validator proves what strategies make and refuses what was broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.errors import ScheduleError
from ringspan.geometry import LAYOUTS
from ringspan.schedule import Action, Attend, Combine, Piece, Receive, Schedule, Send, parse_schedule, validate
from ringspan.schedule.validate import _run_blocking
from ringspan.strategies import STRATEGIES, Schedules, make_schedules
from tests.support.masks import EXAMPLES
from tests.support.sizes import LAYOUT_NAMES, examples, layout_of, lengths, num_ranks, unless_refused


def prove(schedules: Schedules, mask_name: str) -> None:
    """Both directions."""
    for schedule in (schedules.forward, schedules.backward):
        validate(schedule, schedules.layout, EXAMPLES[mask_name].make(schedules.layout.length))


@pytest.mark.slow
@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ring_is_proved_for_1_to_64_ranks(layout: str, mask: str):
    for ranks in range(1, 65):
        # 257 is a prime above twice the largest ring; 41 leaves ranks of the larger rings with nothing.
        for length in (257, 41) if ranks in (1, 2, 40, 64) else (257,):
            prove(make_schedules("ring", layout_of(layout, length, ranks), EXAMPLES[mask].make(length)), mask)


@pytest.mark.parametrize("strategy", STRATEGIES)
@examples(30)
@given(length=lengths, ranks=num_ranks, layout=st.sampled_from(LAYOUT_NAMES), mask=st.sampled_from(list(EXAMPLES)))
def test_every_strategy_is_proved_under_every_layout_and_mask(strategy: str, length: int, ranks: int, layout: str, mask: str):
    with unless_refused(strategy, layout):
        prove(make_schedules(strategy, layout_of(layout, length, ranks), EXAMPLES[mask].make(length)), mask)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ring"])
def test_every_strategy_is_proved_for_16_ranks(strategy: str):
    prove(make_schedules(strategy, layout_of("zigzag", 101, 16), EXAMPLES["causal"].make(101)), "causal")


def test_what_is_proved_also_ends_when_ranks_block_and_reads_back_from_text():
    layout = layout_of("zigzag", 37, 5)
    schedules = make_schedules("ring", layout, EXAMPLES["causal"].make(37))
    for schedule in (schedules.forward, schedules.backward):
        assert validate(parse_schedule(str(schedule)), layout, EXAMPLES["causal"].make(37)) == validate(
            schedule, layout, EXAMPLES["causal"].make(37)
        )


def test_the_report_counts_what_visits_and_what_is_sent():
    layout = layout_of("contiguous", 40, 4)
    schedules = make_schedules("ring", layout, EXAMPLES["full"].make(40))
    report = validate(schedules.forward, layout, EXAMPLES["full"].make(40))
    assert report.sent_positions == ({"kv": 30},) * 4
    assert all(live == {"kv": 20} for live in report.live_positions), "one shard is attended while the next arrives"


# ---- broken on purpose: each edits the actions of a valid ring over four contiguous ranks ------------------------------------------

LAYOUT, MASK = layout_of("contiguous", 12, 4), EXAMPLES["full"].make(12)
RING = make_schedules("ring", LAYOUT, MASK)
Edit = Callable[[int, Action], list[Action]]
"""(rank, action) to the actions that stand in its place."""


def edited(schedule: Schedule, edit: Edit) -> Schedule:
    """The schedule with every action replaced by what `edit` makes of it."""
    return replace(
        schedule,
        programs=tuple(tuple(new for action in program for new in edit(rank, action)) for rank, program in enumerate(schedule.programs)),
    )


def at(rank: int, step: int, kind: type, piece_kind: str = "") -> Callable[[int, Action], bool]:
    """Whether an action is the one meant."""

    def meant(here: int, action: Action) -> bool:
        of = action.q if isinstance(action, Attend) else action.piece
        return (here, action.step) == (rank, step) and isinstance(action, kind) and piece_kind in ("", of.kind)

    return meant


def without(meant: Callable[[int, Action], bool]) -> Edit:
    """Drops it."""
    return lambda rank, action: [] if meant(rank, action) else [action]


def twice(meant: Callable[[int, Action], bool]) -> Edit:
    """Does it twice."""
    return lambda rank, action: [action, action] if meant(rank, action) else [action]


def changed(meant: Callable[[int, Action], bool], **fields: object) -> Edit:
    """Changes fields of it."""
    return lambda rank, action: [replace(action, **fields)] if meant(rank, action) else [action]


def wasteful() -> Schedule:
    """A fifth transfer: the last visitor makes the last hop home, as in the published ring. Nobody reads it."""
    forward = RING.forward
    programs = [list(program) for program in forward.programs]
    for rank in range(4):
        owner = (rank - 3) % 4
        piece = Piece("kv", owner, 0, 3)
        programs[rank].append(Send(3, piece, (rank + 1) % 4, 4))
        programs[(rank + 1) % 4].append(Receive(3, piece, rank, 4))
    return replace(forward, programs=tuple(tuple(program) for program in programs))


CIRCULAR = """own forward lengths=3,3
0: q0[0:3]×kv0[0:3] | q1[0:3]×kv1[0:3]
1: kv0[0:3]→1@1 kv1[0:3]←1@1 q0[0:3]×kv1[0:3] | kv1[0:3]→0@1 kv0[0:3]←0@1 q1[0:3]×kv0[0:3]
"""
"""Before it does anything of step 1, each rank waits for what the other posts in step 1."""


BROKEN: dict[str, tuple[Callable[[], Schedule], str]] = {
    "a block is dropped": (lambda: edited(RING.forward, without(at(2, 1, Attend))), "coverage"),
    "a block is computed twice": (lambda: edited(RING.forward, twice(at(2, 1, Attend))), "coverage"),
    "a block is cut short": (
        lambda: edited(RING.forward, changed(at(2, 0, Attend), q=Piece("q", 2, 0, 2))),
        "coverage",
    ),
    "a receive is missing": (lambda: edited(RING.forward, without(at(3, 0, Receive))), "matching"),
    "a send is missing": (lambda: edited(RING.forward, without(at(3, 0, Send))), "matching"),
    "the ends disagree about the piece": (
        lambda: edited(RING.forward, changed(at(3, 0, Send), piece=Piece("kv", 3, 0, 2))),
        "matching",
    ),
    "the ends disagree about the step": (lambda: edited(RING.forward, changed(at(3, 0, Send), due=2)), "matching"),
    "a rank sends to itself": (lambda: edited(RING.forward, changed(at(3, 0, Send), peer=3)), "matching"),
    "a rank sends to one that there is not": (lambda: edited(RING.forward, changed(at(3, 0, Send), peer=9)), "matching"),
    "a transfer arrives before it leaves": (
        lambda: edited(
            RING.forward, lambda rank, action: [replace(action, due=action.step)] if isinstance(action, (Send, Receive)) else [action]
        ),
        "matching",
    ),
    "a rank attends what it does not hold": (
        lambda: edited(RING.forward, lambda rank, action: [replace(action, step=0)] if at(1, 2, Attend)(rank, action) else [action]),
        "possession",
    ),
    "a rank passes on what it does not hold": (
        lambda: edited(
            RING.forward,
            lambda rank, action: [replace(action, step=0)] if at(1, 1, Send)(rank, action) or at(2, 1, Receive)(rank, action) else [action],
        ),
        "possession",
    ),
    "bytes travel that nobody reads": (wasteful, "thrift"),
    "a gradient stays away": (
        lambda: edited(
            RING.backward,
            lambda rank, action: (
                []
                if not isinstance(action, Attend)
                and action.piece == Piece("dkv", 1, 0, 3)
                and (at(0, 4, Send, "dkv")(rank, action) or rank == 1)
                else [action]
            ),
        ),
        "homecoming",
    ),
    "a gradient arrives and is not added": (
        lambda: edited(
            RING.backward, lambda rank, action: [] if isinstance(action, Combine) and rank == 2 and action.piece.owner == 2 else [action]
        ),
        "homecoming",
    ),
    "a gradient is added twice": (
        lambda: edited(
            RING.backward,
            lambda rank, action: [action, action] if isinstance(action, Combine) and action.piece.owner == rank == 2 else [action],
        ),
        "homecoming",
    ),
    "a gradient is sent before it is computed": (
        lambda: edited(
            RING.backward,
            lambda rank, action: (
                [replace(action, step=0)]
                if isinstance(action, (Send, Receive)) and action.piece == Piece("dkv", 0, 0, 3) and action.step == 2
                else [action]
            ),
        ),
        "possession",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_validator_refuses_a_schedule_where(name: str):
    make, rule = BROKEN[name]
    broken = make()
    assert broken not in (RING.forward, RING.backward), "the edit changed something"
    with pytest.raises(ScheduleError, match=f"A schedule keeps {rule}"):
        validate(broken, LAYOUT, MASK)


def test_the_validator_refuses_a_cycle_of_waits():
    schedule = parse_schedule(CIRCULAR)
    # Every cycle has a transfer that is due no later than it is posted: along the others, waiting only goes back in time.
    with pytest.raises(ScheduleError, match="arrives later"):
        validate(schedule, layout_of("contiguous", 6, 2), EXAMPLES["full"].make(6))
    with pytest.raises(ScheduleError, match="a cycle of waits"):
        _run_blocking(schedule)
    _run_blocking(parse_schedule(CIRCULAR.replace("@1", "@2")))


def test_the_validator_refuses_a_schedule_of_other_shards():
    with pytest.raises(ScheduleError, match="shape"):
        validate(RING.forward, layout_of("contiguous", 13, 4), EXAMPLES["full"].make(13))


def test_the_validator_refuses_a_full_ring_under_a_causal_mask():
    with pytest.raises(ScheduleError, match="the mask leaves nothing of it"):
        validate(RING.forward, LAYOUT, EXAMPLES["causal"].make(12))


def test_partials_that_nobody_merges_are_refused():
    schedule = make_schedules("pass_query", LAYOUT, MASK).forward
    lost = edited(schedule, lambda rank, action: [] if isinstance(action, Combine) and rank == 1 else [action])
    with pytest.raises(ScheduleError, match="homecoming"):
        validate(lost, LAYOUT, MASK)
