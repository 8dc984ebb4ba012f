"""What a ring leaves open is settled by forecast: what its backward rotates, and in how many parts its shards travel."""

from __future__ import annotations

import pytest

import ringspan
from ringspan.errors import RingspanError
from ringspan.geometry import make_layout
from ringspan.schedule import PieceBytes, Send
from ringspan.strategies import MACHINES, complete_ring, forecast, make_schedules


def completed(tokens: int, heads: int, kv_heads: int, ranks: int = 2, **options):
    mask = ringspan.causal()
    layout = make_layout("zigzag", tokens * ranks, ranks, None, mask)
    sizes = PieceBytes(batch=1, heads=heads, kv_heads=kv_heads, head_dim=128, element_bytes=2, accumulator_bytes=4, single_bytes=2)
    return complete_ring(tuple(options.items()), layout, mask, sizes, MACHINES["cuda"], make_schedules), layout, mask, sizes


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_queries_rotate_where_their_gradient_is_less_than_that_of_keys_and_values(ranks: int):
    assert completed(8192, 32, 32, ranks)[0]["rotate"] == "queries"
    assert completed(8192, 32, 8, ranks)[0]["rotate"] == "keys"


def test_what_is_longer_under_way_than_there_is_to_compute_comes_in_parts():
    assert completed(2048, 32, 32)[0]["parts"] == 2
    assert completed(2048, 32, 8)[0]["parts"] == 1, "a quarter of the bytes"
    options, layout, mask, sizes = completed(8192, 32, 32)
    assert options["parts"] == 1, "a quarter of the bytes for each pair"
    whole, halves = (
        forecast(make_schedules("ring", layout, mask, parts=parts).forward, layout, mask, sizes, MACHINES["cuda"]).seconds
        for parts in (1, 2)
    )
    assert whole <= halves, "all of it is hidden, and that takes a launch more"


def test_what_was_asked_for_stays():
    assert completed(2048, 32, 32, rotate="keys", parts=3)[0] == {"rotate": "keys", "parts": 3}


def test_parts_bring_the_same_rows_one_part_at_a_step():
    mask, layout = ringspan.full(), make_layout("contiguous", 36, 3, None, ringspan.full())
    whole, parts = (make_schedules("ring", layout, mask, parts=number).forward for number in (1, 3))
    for rank in range(3):
        sent = [[action for action in made.programs[rank] if isinstance(action, Send)] for made in (whole, parts)]
        assert sum(len(send.piece) for send in sent[0]) == sum(len(send.piece) for send in sent[1])
        assert len(sent[1]) == 3 * len(sent[0])
        assert len({send.due for send in sent[1]}) == len(sent[1]), "each is due at a step of its own"


def test_no_parts_are_refused():
    with pytest.raises(RingspanError, match="parts=1"):
        make_schedules("ring", make_layout("contiguous", 8, 2, None, ringspan.full()), ringspan.full(), parts=0)
