"""The words of a trace: each culprit is named, each advice carries its numbers, and nothing is advised where nothing is to be gained."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ringspan.trace import TraceCase, tell
from ringspan.trace.numbers import count_text, percent, rate_text, seconds_text
from ringspan.trace.words import step_rows
from tests.trace.support import DEVICES, MACHINE, HeldUp, does, flies, timeline, trace_with, traced

SHARED = replace(DEVICES, transport="in-process", local_ranks=4, cores=2)
EVEN = [does(rank, 0, "attend", 0, 10, pairs=100) for rank in range(3)]


def test_numbers_have_three_figures_and_a_unit():
    assert [seconds_text(value) for value in (0, 4.56e-6, 0.0123, 1.234, 0.9996)] == ["0", "4.56 µs", "12.3 ms", "1.23 s", "1.00 s"]
    assert [rate_text(value, "B") for value in (12.0, 3.4e5, 2.9e11)] == ["12.0 B/s", "340 kB/s", "290 GB/s"]
    assert [percent(value) for value in (0, 1e-5, 0.004, 0.95, 1)] == ["0%", "0%", "0.4%", "95%", "100%"]
    assert count_text(8192) == "8,192"


def test_where_all_is_hidden_nothing_is_to_be_changed():
    story = tell(traced(timeline(3, EVEN, [flies(0, 1, 0, 9), flies(1, 2, 0, 9), flies(2, 0, 0, 9)])))
    assert story.hidden.startswith("100% of the time in flight was under computing")
    assert story.held_up == "nobody: the ranks lost less than 1% of their time to one another"
    assert story.change == ("nothing: 100% of what travels is hidden, and the ranks stood still 0% of their time",)
    assert not story.caveats


def test_a_rank_alone_has_nothing_that_travels():
    story = tell(traced(timeline(1, [does(0, 0, "attend", 0, 1, pairs=10)])))
    assert story.hidden == "nothing travels"
    assert story.change[0].startswith("nothing: nothing travels")


def test_an_uneven_layout_is_to_be_exchanged_for_one_that_is_even():
    case = TraceCase(num_ranks=4, layout="contiguous", length=64)
    pairs = [136, 392, 648, 904]
    events = [does(rank, 0, "attend", 0, count / 100, pairs=count) for rank, count in enumerate(pairs)]
    (advice,) = tell(traced(timeline(4, events), case)).change
    assert advice.startswith("layout zigzag instead of contiguous: rank 3 computes 1.74 times the mean, and with zigzag")
    assert "the busiest would compute 1.00 times" in advice
    idle = sum(904 - count for count in pairs) / (4 * 904)
    assert f"the ranks stand still {percent(idle)} of their time" in advice


def test_a_slow_link_is_named_with_its_rate_and_that_of_the_others():
    events = [*EVEN[:2], does(2, 0, "attend", 0, 2, pairs=20), does(2, 0, "wait", 2, 9, batch=0), does(2, 1, "attend", 9, 10, pairs=80)]
    flights = [flies(0, 1, 0, 1), flies(1, 2, 0, 9, size=900), flies(2, 0, 0, 1)]
    story = tell(traced(timeline(3, events, flights)))
    assert "the link from rank 1 to rank 2 for 7.00 s (100%)" in story.held_up
    assert any("the link from rank 1 to rank 2 carries 100 B/s, the others 1.00 kB/s" in advice for advice in story.change)


def test_a_slow_rank_is_named_with_its_speed_and_the_weights_that_would_even_it_out():
    events = [
        does(0, 0, "attend", 0, 10, pairs=100),
        does(1, 0, "attend", 0, 5, pairs=100), does(1, 0, "wait", 5, 10, batch=0),
        does(2, 0, "attend", 0, 5, pairs=100), does(2, 0, "wait", 5, 10, batch=0),
    ]  # fmt: skip
    story = tell(traced(timeline(3, events, [flies(0, 1, 10, 10), flies(1, 2, 10, 10)])))
    assert story.held_up.startswith("of 10.0 s that ranks stood still, they stood for rank 0 for 10.0 s")
    (advice,) = story.change
    assert advice.startswith("rank 0 computes at 50% of the others' speed")
    assert "weights 0.5,1,1" in advice
    shared = tell(traced(timeline(3, events, [flies(0, 1, 10, 10)]), setting=SHARED))
    assert not any("speed" in advice for advice in shared.change), "threads are slow and fast by turns"


def test_a_rank_whose_host_thread_is_held_up_is_told_from_one_that_computes_slowly():
    events = [
        does(0, 0, "post", 0, 6), does(0, 0, "attend", 6, 10, pairs=100),
        does(1, 0, "post", 0, 1), does(1, 0, "attend", 1, 5, pairs=100), does(1, 0, "wait", 5, 10, batch=0),
        does(2, 0, "post", 0, 1), does(2, 0, "attend", 1, 5, pairs=100), does(2, 0, "wait", 5, 10, batch=0),
    ]  # fmt: skip
    (advice,) = tell(traced(timeline(3, events, [flies(0, 1, 10, 10), flies(1, 2, 10, 10)]))).change
    assert advice.startswith("rank 0 spends 6.00 s beside its kernel calls, posting and merging, where the others spend 1.00 s")


def test_launches_that_take_the_time_are_to_become_fewer():
    case = TraceCase(num_ranks=2, length=64)
    launches = [does(rank, step, "attend", step * 1e-4, (step + 1) * 1e-4, pairs=4) for rank in range(2) for step in range(10)]
    machine = replace(MACHINE, launch_seconds=8e-5)
    (advice,) = tell(traced(timeline(2, launches), case, machine=machine)).change
    assert advice.startswith("10 kernel calls of a rank take 80.0 µs each to launch, 80% of the time: strategy all_gather")
    gathered = tell(traced(timeline(2, launches), replace(case, strategy="all_gather"), machine=machine)).change
    assert "longer sequences" in gathered[0]


def test_transfers_longer_than_the_computing_ask_for_a_longer_context_by_the_numbers():
    # 32 positions a rank; computing takes 1 and a transfer 4: c ≥ F/B from 4 · 32 = 128 on.
    events, flights = [], []
    for rank in range(2):
        events += [does(rank, 0, "attend", 0, 1, pairs=512), does(rank, 0, "wait", 1, 4, batch=0), does(rank, 1, "attend", 4, 5, pairs=512)]
        flights.append(flies(rank, 1 - rank, 0, 4, size=4000))
    story = tell(traced(timeline(2, events, flights), TraceCase(num_ranks=2, length=64, heads=2, kv_heads=2, head_dim=16)))
    assert story.measured.hidden_share == pytest.approx(0.25)
    (advice,) = story.change
    rate = 512 * 4 * 2 * 16
    assert f"at F = {rate_text(rate, 'FLOP')} a rank and B = 1.00 kB/s a link, a transfer takes 4 times" in advice
    assert "c ≥ F/B holds from about 130 positions a rank, 260 in all (here 32 a rank)" in advice


def test_what_threads_cannot_show_is_taken_from_the_prediction():
    # Threads fetch what is sent while they wait; by the rates, 32 positions a rank are too few.
    events = [does(0, 0, "attend", 0, 10, pairs=100), does(1, 0, "attend", 0, 5, pairs=100), does(1, 0, "wait", 5, 10, batch=0)]
    story = tell(traced(timeline(2, events, [flies(0, 1, 5, 10)]), setting=SHARED))
    assert "threads fetch what was sent while they wait for it" in story.hidden
    (advice,) = [advice for advice in story.change if advice.startswith("longer context per rank")]
    assert advice.endswith("by the prediction: threads cannot show it")


def test_time_that_nothing_explains_is_said_to_be_so_and_shared_cores_explain_it():
    # As many pairs, nearly as fast, and the rest waited: 1.5 of 20.
    events = [
        does(0, 0, "attend", 0, 10, pairs=100),
        does(1, 0, "attend", 0, 8.5, pairs=100), does(1, 0, "wait", 8.5, 10, batch=0),
    ]  # fmt: skip
    flights = [flies(1, 0, 0, 5), flies(0, 1, 10, 10)]
    (advice,) = tell(traced(timeline(2, events, flights))).change
    assert advice.startswith("look at the timeline: the ranks stood still 8% of the time")
    assert "neither work, launches nor links explain the rest" in advice
    shared = replace(SHARED, transport="gloo")
    (advice,) = tell(traced(timeline(2, events, flights), setting=shared)).change
    assert advice.startswith("nothing that this run could tell")


def test_what_ranks_share_is_said_and_so_is_a_prediction_for_another_machine():
    (caveat,) = tell(traced(timeline(3, EVEN), setting=SHARED)).caveats
    assert caveat.startswith("4 ranks are threads of one process on 2 cores")
    assert "not the time that as many devices would take" in caveat
    gpus = replace(DEVICES, transport="in-process", local_ranks=4, devices=1)
    assert tell(traced(timeline(3, EVEN), setting=gpus)).caveats[0].startswith("4 ranks share 1 GPU")
    other = tell(traced(timeline(3, EVEN), machine=replace(MACHINE, name="NVLink GPUs")))
    assert other.caveats == ("the prediction is for NVLink GPUs, not for what was measured here",)


def test_steps_are_laid_beside_the_prediction_and_end_with_all():
    rows = step_rows(traced(timeline(3, [*EVEN, does(0, 2, "cast", 10, 12)])))
    names = [name for name, _ in rows]
    assert names[0] == "0"
    assert names[-1] == "all"
    assert rows[-1][1][0][0] == 12
    forward = [pairs[0] for name, pairs in rows if name == "0"]
    assert forward[0][0] == pytest.approx(10)
    assert forward[0][1] > 0


# ---- ranks that are really held up ---------------------------------------------------------------------------------------------------

SMALL = TraceCase(num_ranks=3, length=48, heads=2, kv_heads=2, head_dim=8)


def test_a_rank_that_posts_late_is_named_in_a_real_run():
    story = tell(trace_with(SMALL, lambda group: HeldUp(group, late_seconds=0.05) if group.rank == 1 else group))
    named = re.search(r"they stood for (rank \d|the link from rank \d to rank \d)", story.held_up)
    assert named is not None
    assert named[1] == "rank 1"
    assert any(advice.startswith("rank 1 spends") for advice in story.change), story.change


def test_a_link_that_is_slow_is_named_in_a_real_run():
    story = tell(trace_with(SMALL, lambda group: HeldUp(group, slow_from=0, slow_seconds=0.05) if group.rank == 1 else group))
    named = re.search(r"they stood for (rank \d|the link from rank \d to rank \d)", story.held_up)
    assert named is not None
    assert named[1] == "the link from rank 0 to rank 1"
    assert any(advice.startswith("the link from rank 0 to rank 1 carries") for advice in story.change), story.change
