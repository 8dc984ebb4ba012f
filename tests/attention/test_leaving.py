"""When what stages of heads give leaves, and when they keep what they were given: by the speeds of a machine, planned once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringspan.attention.leaving import when_inputs_are_kept, when_stages_leave
from ringspan.geometry import head_shares, head_stages
from ringspan.schedule import PieceBytes
from ringspan.strategies import MACHINES


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "per_rank", "ranks", "stages", "forward", "backward"),
    [
        (32, 32, 128, 32768, 4, 8, "beside", "beside the last"),
        (32, 32, 128, 8192, 4, 8, "beside", "beside"),
        (32, 8, 64, 32768, 4, 2, "beside", "at the end"),
        (64, 8, 128, 32768, 4, 2, "at the end", "at the end"),
        (64, 8, 128, 131072, 2, 4, "at the end", "at the end"),
    ],
)
def test_what_is_sent_when_at_the_lengths_that_are_measured(
    heads: int, kv_heads: int, head_dim: int, per_rank: int, ranks: int, stages: int, forward: str, backward: str
):
    stages_of, length = head_stages(head_shares(heads, kv_heads, ranks), stages), per_rank * ranks
    sizes = PieceBytes(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    ways = {"beside": ["beside"] * stages, "beside the last": ["together"] * (stages - 2) + ["beside"], "at the end": ["together"] * stages}
    for direction, expected in (("forward", forward), ("backward", backward)):
        about = stages_of, length * (length + 1) // 2, length, sizes
        found = when_stages_leave(*about, MACHINES["cuda"], direction)
        assert found == (*ways[expected][: stages - 1], "last")
        slower = replace(MACHINES["cuda"], rest_seconds=None)
        assert when_stages_leave(*about, slower, direction) == ("beside",) * (stages - 1) + ("last",), "other links than NVLink's"


def test_one_stage_leaves_last_and_some_where_one_place_has_more_heads():
    machine, sizes = (
        replace(MACHINES["cuda"], rest_seconds=0.0, exchange_bytes_per_second=1e-30),
        PieceBytes(heads=7, kv_heads=7, head_dim=8),
    )
    assert when_stages_leave([head_shares(7, 7, 2)], 9, 9, sizes, machine, "forward") == ("last",)
    uneven = head_stages(head_shares(7, 7, 2), 3)
    a_head = 4 * 45 * (8 + machine.softmax_width) / machine.flops_per_second
    for heads, expected in ((2.9, ("together", "beside", "last")), (3, ("beside", "beside", "last"))):
        slow = replace(machine, rest_seconds=heads * a_head)
        assert when_stages_leave(uneven, 45, 9, sizes, slow, "forward") == expected, "the first place has three heads before the last stage"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "ranks", "stages", "last"),
    # 32/32 in four stages on two GPUs: each sends half of 4 heads and keeps 12, and memory copies 5.8 times as fast as the link carries.
    [
        (32, 8, 64, 4, 2, 2),
        (32, 8, 64, 4, 1, 1),
        (32, 8, 64, 2, 2, 1),
        (32, 32, 128, 4, 8, 1),
        (32, 32, 128, 2, 4, 0),
        (64, 8, 128, 4, 2, 2),
    ],
)
def test_as_many_of_the_last_stages_keep_what_they_were_given_last_as_a_link_leaves_time_for(
    heads: int, kv_heads: int, head_dim: int, ranks: int, stages: int, last: int
):
    shares = head_stages(head_shares(heads, kv_heads, ranks), stages)
    sizes = PieceBytes(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    expected = ("beside",) * (stages - last) + ("last",) * last
    for length in (8192, 131072):
        assert when_inputs_are_kept(shares, length, sizes, MACHINES["cuda"]) == expected
    endless = replace(MACHINES["cuda"], memory_bytes_per_second=None)
    assert when_inputs_are_kept(shares, 8192, sizes, endless) == ("last",) * stages, "what memory takes is counted elsewhere"
