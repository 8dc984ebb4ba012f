"""The drawing of schedules, in words and in time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ringspan.geometry import causal, full, make_layout, tiles
from ringspan.schedule import Attend, Combine, Piece, Schedule, ScheduleBuilder, Send
from ringspan.schedule.draw import Flight, Gap, cells, compact_cells, draw, pairs_between, piece_text, timeline, visitor
from ringspan.strategies import STRATEGIES, make_schedules

KEYS = Piece("kv", 1, 0, 4)
STRATEGIES_AND_LAYOUTS = [
    (strategy, layout)
    for strategy in sorted(STRATEGIES)
    for layout in ("contiguous", "zigzag", "striped")
    # Head groups of neighbouring ranks own no evenly spaced positions there: the strategy refuses.
    if (strategy, layout) != ("two_dimensional", "striped")
]


def ring(layout: str, length: int = 16, ranks: int = 4, direction: str = "forward") -> Schedule:
    schedules = make_schedules("ring", make_layout(layout, length, ranks), causal())
    return schedules.forward if direction == "forward" else schedules.backward


def test_the_full_ring_is_drawn_as_the_papers_draw_it():
    layout = make_layout("contiguous", 6, 3)
    assert draw(make_schedules("ring", layout, full()).forward) == (
        "step   r0               r1               r2\n"
        "0      q0×kv0  kv0→r1   q1×kv1  kv1→r2   q2×kv2  kv2→r0\n"
        "1      q0×kv2  kv2→r1   q1×kv0  kv0→r2   q2×kv1  kv1→r0\n"
        "2      q0×kv1           q1×kv2           q2×kv0\n"
    )


def test_a_piece_shows_its_cut_and_a_whole_shard_shows_none():
    assert piece_text(KEYS, (4, 4)) == "kv1"
    assert piece_text(KEYS, (4, 6)) == "kv1[0:4]"
    assert piece_text(Piece("dkv", 0, 2, 4), (4, 4)) == "dkv0[2:4]"
    assert piece_text(Piece("kv", 0, 0, 0), (0, 4)) == "kv0"


def test_a_cell_names_what_is_computed_taken_in_and_sent_and_when_a_late_piece_arrives():
    builder = ScheduleBuilder("made", "backward", (4, 4, 4))
    builder.transfer(Piece("kv", 1, 0, 4), 1, 0, posted=0, due=2)
    builder.transfer(Piece("dkv", 2, 0, 4), 1, 2, posted=1, due=2)
    builder.combine(2, 2, Piece("dkv", 2, 0, 4), 1)
    builder.attend(0, 2, Piece("q", 0, 1, 4), Piece("kv", 1, 0, 4), Piece("kv", 0, 0, 2))
    table = cells(builder.build())
    assert [[[word.text for word in cell.words] for cell in row] for row in table] == [
        [[], ["kv1→r0@2"], []],
        [[], ["dkv2→r2"], []],
        [["q0[1:4]×kv1+kv0[0:2]"], [], ["+dkv2←r1"]],
    ]
    assert cells(builder.build(), "g")[0][1].sends[0].text == "kv1→g0@2"


def test_words_carry_the_owner_of_what_visits_and_of_what_travels():
    row = cells(ring("contiguous"))[1]
    assert row[1].attends[0].parts == (("q1", None), ("×", None), ("kv0", 0))
    assert row[1].sends[0].parts == (("kv0", 0), ("→r2", None))
    helped = cells(make_schedules("balanced", make_layout("contiguous", 15, 3), causal()).forward)[1][0]
    assert helped.attends[0].parts == (("q2", 2), ("×", None), ("kv0", None))


def test_the_visitor_is_the_queries_only_where_the_keys_are_at_home():
    q0, q1, kv0 = Piece("q", 0, 0, 4), Piece("q", 1, 0, 4), Piece("kv", 0, 0, 4)
    assert visitor(0, q0, kv0) == kv0
    assert visitor(0, q1, kv0) == q1
    assert visitor(1, q1, kv0) == kv0
    assert visitor(2, q1, kv0) == kv0


@pytest.mark.parametrize(("strategy", "layout"), STRATEGIES_AND_LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_action_but_receives_stands_in_the_table_once(strategy: str, layout: str, direction: str):
    schedules = make_schedules(strategy, make_layout(layout, 13, 6), causal())
    schedule = schedules.forward if direction == "forward" else schedules.backward
    table = cells(schedule)
    assert len(table) == schedule.num_steps and {len(row) for row in table} <= {schedule.num_ranks}
    for rank, program in enumerate(schedule.programs):
        for kind, group in ((Attend, "attends"), (Combine, "combines"), (Send, "sends")):
            drawn = sum(len(getattr(row[rank], group)) for row in table)
            assert drawn == sum(isinstance(action, kind) for action in program)
    assert len(draw(schedule).splitlines()) == schedule.num_steps + 1


def test_the_compact_table_names_owners_runs_of_owners_queries_and_mere_movement():
    assert compact_cells(ring("contiguous", direction="backward")) == (
        ("0", "1", "2", "3"),
        ("", "0", "1", "2"),
        ("", "→", "0", "1"),
        ("", "", "→", "0"),
        ("", "→", "", "→"),
        ("→", "", "", ""),
    )
    gathered = compact_cells(make_schedules("all_gather", make_layout("contiguous", 12, 6), full()).forward)
    assert gathered[1] == ("1-5", "0,2-5", "0-1,3-5", "0-2,4-5", "0-3,5", "0-4")
    queries = compact_cells(make_schedules("pass_query", make_layout("contiguous", 6, 3), full()).forward)
    assert queries[1] == ("q2", "q0", "q1")


def test_causal_pairs_between_two_pieces_are_counted_exactly():
    layout = make_layout("zigzag", 16, 4)
    for q_rank in range(4):
        for k_rank in range(4):
            expected = sum(q >= k for q in layout.positions(q_rank)[1:3] for k in layout.positions(k_rank)[:3])
            assert pairs_between(layout, causal(), Piece("q", q_rank, 1, 3), Piece("kv", k_rank, 0, 3)) == expected


@pytest.mark.parametrize(
    ("layout", "pairs", "starts", "idle"),
    [
        ("contiguous", (10, 26, 42, 58), (0, 10, 26, 42, 58), 1 - 136 / (4 * 58)),
        ("zigzag", (34, 34, 34, 34), (0, 10, 18, 26, 34), 0.0),
        ("striped", (28, 32, 36, 40), (0, 10, 20, 30, 40), 1 - 136 / (4 * 40)),
    ],
)
def test_sixteen_causal_positions_on_four_ranks_take_this_long(layout: str, pairs: tuple, starts: tuple, idle: float):
    found = timeline(ring(layout), make_layout(layout, 16, 4), causal())
    assert found.pairs_per_rank == pairs
    assert found.starts == starts
    assert found.duration == starts[-1]
    assert found.imbalance == pytest.approx(max(pairs) / 34, abs=1e-12)
    assert found.idle_fraction == pytest.approx(idle, abs=1e-12)
    assert found.least_idle_fraction == pytest.approx(1 - 34 / max(pairs), abs=1e-12)


@pytest.mark.parametrize(("strategy", "layout"), STRATEGIES_AND_LAYOUTS)
@pytest.mark.parametrize(("length", "ranks"), [(13, 5), (29, 3), (7, 8), (1, 2)])
def test_bars_and_waits_fill_every_lane_without_overlap(strategy: str, layout: str, length: int, ranks: int):
    schedules = make_schedules(strategy, make_layout(layout, length, ranks), causal())
    for schedule in (schedules.forward, schedules.backward):
        found = timeline(schedule, schedules.layout, causal())
        assert sum(found.pairs_per_rank) == length * (length + 1) // 2
        for rank in range(found.num_ranks):
            parts = sorted((part.start, part.stop) for part in (*found.bars, *found.gaps) if part.rank == rank)
            assert parts and parts[0][0] == 0 and parts[-1][1] == found.duration
            assert all(stop == start for (_, stop), (start, _) in pairwise(parts))


def test_a_stage_becomes_a_bar_for_each_of_its_keys():
    layout = make_layout("contiguous", 12, 3)
    found = timeline(make_schedules("all_gather", layout, full()).forward, layout, full())
    stage = [(bar.start, bar.stop) for bar in found.bars if bar.rank == 1 and bar.step == 1]
    assert stage == [(16, 32), (32, 48)]
    assert {bar.kv.owner for bar in found.bars if bar.rank == 1 and bar.step == 1} == {0, 2}


def test_waits_and_flights_of_the_contiguous_ring_are_where_they_are():
    layout = make_layout("contiguous", 8, 2)
    found = timeline(make_schedules("ring", layout, causal()).forward, layout, causal())
    assert found.gaps == (Gap(rank=0, step=1, start=10, stop=26),)
    assert found.flights == (Flight(Piece("kv", 0, 0, 4), source=0, target=1, posted=0, due=1),)


def test_a_schedule_without_any_work_has_an_empty_timeline():
    found = timeline(ScheduleBuilder("none", "forward", (0, 0)).build(), make_layout("contiguous", 2, 2), causal())
    assert (found.duration, found.num_steps, found.bars, found.gaps, found.idle_fraction, found.imbalance) == (0, 0, (), (), 0.0, 1.0)
    assert tiles(make_layout("contiguous", 2, 2), causal(), 0, 1) == ()
