"""Schedules as text: what is written reads back, and what does not read is refused with the place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.errors import ScheduleError
from ringspan.schedule import Attend, Combine, Piece, Receive, ScheduleBuilder, Send, parse_schedule
from ringspan.strategies import STRATEGIES, make_schedules
from tests.support.masks import EXAMPLES
from tests.support.sizes import LAYOUT_NAMES, examples, layout_of, lengths, num_ranks, unless_refused


@pytest.mark.parametrize("strategy", STRATEGIES)
@examples(25)
@given(length=lengths, ranks=num_ranks, layout=st.sampled_from(LAYOUT_NAMES), mask=st.sampled_from(list(EXAMPLES)))
def test_a_schedule_reads_back_from_its_text(strategy: str, length: int, ranks: int, layout: str, mask: str):
    with unless_refused(strategy, layout):
        schedules = make_schedules(strategy, layout_of(layout, length, ranks), EXAMPLES[mask].make(length))
        for schedule in (schedules.forward, schedules.backward):
            assert parse_schedule(str(schedule)) == schedule


def test_the_text_of_the_ring_is_the_table_of_the_paper():
    forward = make_schedules("ring", layout_of("contiguous", 4, 2), EXAMPLES["full"].make(4)).forward
    assert str(forward) == (
        "ring forward lengths=2,2\n"
        "0: kv0[0:2]→1@1 kv1[0:2]←1@1 q0[0:2]×kv0[0:2] | kv1[0:2]→0@1 kv0[0:2]←0@1 q1[0:2]×kv1[0:2]\n"
        "1: q0[0:2]×kv1[0:2] | q1[0:2]×kv0[0:2]\n"
    )


@pytest.mark.parametrize(
    "action",
    [
        Send(1, Piece("kv", 0, 0, 4), 2, 3),
        Receive(1, Piece("do", 11, 2, 9), 0, 2),
        Attend(1, Piece("q", 0, 0, 4), (Piece("kv", 3, 0, 2), Piece("kv", 1, 5, 6))),
        Combine(1, Piece("dkv", 1, 0, 4), 2),
        Combine(1, Piece("o", 1, 0, 4), 2),
    ],
    ids=str,
)
def test_every_action_reads_back(action):
    text = f"own forward lengths=4\n1: {action}\n"
    assert parse_schedule(text).programs == ((action,),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ring sideways lengths=4\n", "header"),
        ("ring forward lengths=\n", "header"),
        ("ring forward lengths=4,4\n0: q0[0:4]×kv0[0:4]\n", "1 columns for 2 ranks"),
        ("ring forward lengths=4\nzero: q0[0:4]×kv0[0:4]\n", "line"),
        ("ring forward lengths=4\n0: q0[0:4]+kv0[0:4]\n", "no send, receive, attend or combine"),
        ("ring forward lengths=4\n0: q0[0:4]×\n", "no send"),
        ("ring forward lengths=4\n0: kv0→1\n", "no send"),
        ("ring forward lengths=4\n0: x0[0:4]→1@2\n", "no send"),
    ],
)
def test_text_that_is_no_schedule_is_refused_with_the_place(text: str, message: str):
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(text)


def test_the_builder_puts_combines_before_transfers_before_attends():
    builder = ScheduleBuilder("own", "backward", (4, 4))
    q, kv, dkv = Piece("q", 0, 0, 4), Piece("kv", 0, 0, 4), Piece("dkv", 0, 0, 4)
    builder.attend(0, 2, q, kv)
    builder.transfer(kv, 0, 1, posted=2, due=3)
    builder.combine(0, 2, dkv, 1)
    assert [type(action) for action in builder.build().programs[0]] == [Combine, Send, Attend]
    assert builder.build().num_steps == 3


def test_a_piece_holds_what_lies_inside_of_it_and_is_of_the_same_shard():
    piece = Piece("kv", 1, 2, 6)
    assert piece.holds(Piece("kv", 1, 3, 6)) and len(piece) == 4
    assert not any(piece.holds(other) for other in (Piece("kv", 1, 1, 4), Piece("kv", 0, 3, 4), Piece("q", 1, 3, 4), Piece("kv", 1, 5, 7)))
