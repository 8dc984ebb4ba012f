"""What constructed timelines tell: how much was hidden, who waited how long, and for whom."""

from __future__ import annotations

import pytest

from ringspan.trace import Culprit, find
from ringspan.trace.timeline import common, length, union
from tests.trace.support import does, flies, timeline


def test_intervals_are_joined_and_intersected():
    joined = union([(3, 4), (0, 1), (0.5, 2), (2, 2), (4, 5)])
    assert joined == [(0, 2), (3, 5)]
    assert length(joined) == 4
    assert common(joined, [(1, 3.5), (4.5, 9)]) == pytest.approx(1 + 0.5 + 0.5)


def test_hidden_is_the_part_of_the_flight_under_which_the_receiver_computes():
    # Rank 1 computes for 6 and waits for 2 of the 8 that rank 0's keys are under way; a second flight at the same time adds nothing.
    found = find(
        timeline(
            2,
            [does(0, 0, "attend", 0, 10), does(1, 0, "attend", 0, 6), does(1, 0, "wait", 6, 8, batch=0), does(1, 1, "attend", 8, 10)],
            [flies(0, 1, 0, 8), flies(0, 1, 1, 3)],
        )
    )
    assert found.in_flight == 8
    assert found.hidden == 6
    assert found.hidden_share == pytest.approx(0.75)
    assert found.waits == (0, 2)
    assert found.share(found.waiting) == pytest.approx(2 / 20)


def test_nothing_that_travels_is_no_share_at_all():
    assert find(timeline(1, [does(0, 0, "attend", 0, 1)])).hidden_share is None


def test_a_slow_link_is_named_where_both_ends_had_posted_in_time():
    found = find(
        timeline(
            3,
            [does(rank, 0, "attend", 0, 1) for rank in range(3)]
            + [does(2, 0, "wait", 1, 5, batch=0), does(0, 1, "attend", 1, 5), does(1, 1, "attend", 1, 5), does(2, 1, "attend", 5, 5.5)],
            [flies(1, 2, 0.1, 5), flies(0, 1, 0.1, 0.2), flies(2, 0, 0.1, 0.2)],
        )
    )
    culprit, seconds = next(iter(found.blames.items()))
    assert culprit == Culprit(1, 2)
    assert seconds == pytest.approx(4)
    assert str(culprit) == "the link from rank 1 to rank 2"


def test_a_slow_rank_is_named_through_the_rank_that_waits_for_it():
    # Rank 0 computes until 9. Rank 1 waits for it, and rank 2 for what rank 1 posts only then.
    found = find(
        timeline(
            3,
            [
                does(0, 0, "attend", 0, 9), does(0, 1, "attend", 9, 10),
                does(1, 0, "attend", 0, 1), does(1, 0, "wait", 1, 9.5, batch=0), does(1, 1, "attend", 9.5, 10),
                does(2, 0, "attend", 0, 2), does(2, 0, "wait", 2, 9.75, batch=0), does(2, 1, "attend", 9.75, 10),
            ],
            [flies(0, 1, 9, 9.5), flies(1, 2, 9.5, 9.75)],
        )
    )  # fmt: skip
    assert list(found.blames) == [Culprit(0), Culprit(0, 1), Culprit(1, 2)]
    assert found.blames[Culprit(0)] == pytest.approx(8 + 7)
    assert found.blames[Culprit(0, 1)] == pytest.approx(0.5 + 0.5)
    assert found.blames[Culprit(1, 2)] == pytest.approx(0.25)
    assert sum(found.blames.values()) == pytest.approx(found.waiting), "every second that was waited has a cause"


def test_a_rank_that_waits_for_its_own_send_waits_for_the_receiver():
    events = [does(0, 0, "attend", 0, 1), does(0, 0, "wait", 1, 4, batch=7), does(1, 0, "attend", 0, 3.5), does(1, 1, "attend", 3.5, 4)]
    flight = flies(0, 1, 3.5, 4, batch=9)
    found = find(timeline(2, events, [type(flight)(**{**fields(flight), "source_batch": 7})]))
    assert found.blames == {Culprit(1): pytest.approx(2.5), Culprit(0, 1): pytest.approx(0.5)}


def test_a_rank_that_posts_only_after_its_bytes_have_come_is_still_who_was_waited_for():
    events = [does(0, 0, "attend", 0, 5), does(1, 0, "attend", 0, 1), does(1, 0, "wait", 1, 4.9, batch=0)]
    found = find(timeline(2, events, [flies(0, 1, 5, 5)]))
    assert found.blames[Culprit(0)] == pytest.approx(3.9 + 0.1), "the wait, and being done before it"
    assert sum(found.blames.values()) == pytest.approx(found.waiting + found.idle)


def fields(flight):
    return {name: getattr(flight, name) for name in flight.__dataclass_fields__}


def test_a_rank_that_is_done_stands_still_for_the_last_one():
    found = find(timeline(2, [does(0, 0, "attend", 0, 1), does(1, 0, "attend", 0, 4)]))
    assert (found.waiting, found.idle) == (0, 3)
    assert found.blames == {Culprit(1): pytest.approx(3)}


def test_two_ranks_that_wait_for_each_other_do_not_make_it_go_on_forever():
    events = [does(0, 0, "wait", 0, 5, batch=0), does(1, 0, "wait", 0, 5, batch=0)]
    found = find(timeline(2, events, [flies(0, 1, 5, 5), flies(1, 0, 5, 5)]))
    assert sum(found.blames.values()) == pytest.approx(10)


def test_directions_are_kept_apart():
    both = [does(0, 0, "attend", 0, 2), does(0, 0, "attend", 0, 3, direction="backward"), does(1, 0, "wait", 0, 1, batch=0)]
    found = find(timeline(2, both, [flies(0, 1, 0, 1, direction="backward")]))
    assert found.seconds == {"forward": 2, "backward": 3}
    assert not any(culprit.target is not None for culprit in found.blames), "the backward's flight explains no wait of the forward"


def test_a_step_lasts_from_the_end_of_the_one_before_on_average_over_the_ranks():
    events = [
        does(0, 0, "attend", 0, 2),
        does(0, 0, "wait", 2, 3),
        does(0, 1, "attend", 3, 4),
        does(1, 0, "attend", 0.5, 1),
        does(1, 2, "merge", 1, 6),
    ]
    assert timeline(2, events).step_seconds("forward") == {0: (3 + 1) / 2, 1: 0.5, 2: 2.5}
