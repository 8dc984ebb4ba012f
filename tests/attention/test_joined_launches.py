"""Keys of several shards that all the same queries see go into one kernel call, without a copy where they came together."""

from __future__ import annotations

import pytest
import torch

import ringspan
from ringspan.attention.inbox import inbox
from ringspan.attention.mail import Component, TransportCourier, Wire
from ringspan.attention.program import resolve
from ringspan.attention.shelf import joined
from ringspan.geometry import make_layout
from ringspan.kernels import KERNELS
from ringspan.strategies import make_schedules
from ringspan.transport import SingleRank
from tests.support.masks import EXAMPLES

LENGTH, RANKS = 64, 4


def programs(strategy: str, mask: ringspan.Mask, direction: str = "forward", layout: str = "zigzag", **options):
    placed = make_layout(layout, LENGTH, RANKS, None, mask)
    schedule = getattr(make_schedules(strategy, placed, mask, **options), direction)
    return schedule, [resolve(schedule, placed, mask, KERNELS["reference"].shapes, rank) for rank in range(RANKS)]


def calls(program) -> list[int]:
    """For each kernel call of other ranks' keys, in order, of how many ranks."""
    launches = [launch for step in program.steps for launch in step.launches]
    return [len(launch.keys) for launch in launches if launch.kv_owner != program.rank]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1, 1, 1]] * 4),
        # Rank 1 sees one shard before its own with all queries, and the two after it with its later half.
        ({"shards_at_once": 4}, [[3], [1, 2], [1, 2], [3]]),
        ({"shards_at_once": 2}, [[1, 2], [1, 2], [1, 2], [1, 2]]),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_direct_joins_as_many_as_it_is_told_the_fewest_first_forward_and_last_backward(options, expected, direction):
    _, made = programs("direct", ringspan.causal(), direction, **options)
    back = direction == "backward"
    assert [sorted(calls(program), reverse=back) for program in made] == [sorted(each, reverse=back) for each in expected]
    if options:
        assert [calls(program) for program in made] == [sorted(each, reverse=back) for each in expected]


def test_a_stage_of_all_gather_is_a_call_for_each_half_of_the_queries():
    _, made = programs("all_gather", ringspan.causal())
    assert [sorted(calls(program)) for program in made] == [[3], [1, 2], [1, 2], [3]]
    _, made = programs("all_gather", ringspan.full())
    assert [calls(program) for program in made] == [[3]] * 4, "a full mask: everything that visits is one call"


def test_tiles_with_a_border_and_masks_with_a_function_are_calls_of_their_own():
    _, made = programs("all_gather", ringspan.causal(), layout="striped")
    assert all(set(calls(program)) == {1} for program in made)
    _, made = programs("all_gather", EXAMPLES["mask_mod"].make(LENGTH))
    assert all(set(calls(program)) == {1} for program in made), "the function is asked for the positions of one shard"


def test_direct_waits_for_one_shard_at_a_time_where_nothing_is_joined():
    _, made = programs("direct", EXAMPLES["mask_mod"].make(LENGTH), shards_at_once=4)
    for program in made:
        assert all(len({receive.peer for receive in batch.receives}) <= 1 for step in program.steps for batch in step.batches)


def test_a_joined_call_covers_the_pairs_of_its_shards():
    _, made = programs("direct", ringspan.causal(), shards_at_once=4)
    (launch,) = [launch for step in made[3].steps for launch in step.launches if launch.joined]
    assert [owner for owner, _ in launch.blocks] == [0, 1, 2]
    assert launch.pairs == sum(tile.pairs for _, tile in launch.blocks) == 16 * 24


def test_what_comes_together_lies_side_by_side_in_the_inbox():
    schedule, _ = programs("direct", ringspan.causal(), shards_at_once=4)
    mine = inbox(schedule, 3, {"kv": (512, 512), "q": (512,), "o": (512, 4)})
    (places,) = [posting.places for posting in mine.postings if len(posting.places) == 3]
    ends = None
    for component in (0, 1):
        for place in (each[component] for each in places):
            assert ends is None or place.offset == ends, "all k, then all v, without a gap"
            ends = place.offset + place.nbytes


def test_and_side_by_side_in_new_buffers():
    _, made = programs("direct", ringspan.causal(), shards_at_once=4)
    (batch,) = [batch for step in made[3].steps for batch in step.batches if len(batch.receives) == 3]
    courier = TransportCourier(SingleRank(), Wire(torch.float32, torch.float32), torch.device("cpu"))
    components = [[Component((len(receive.piece), 1, 2, 8), torch.float32)] * 2 for receive in batch.receives]
    for parts in zip(*courier.buffers(batch, components), strict=True):
        whole = joined(parts)
        assert whole.data_ptr() == parts[0].data_ptr() and whole.shape == (24, 1, 2, 8)


def test_joined_is_a_view_of_neighbours_and_a_copy_of_others():
    whole = torch.arange(24.0).view(6, 2, 2)
    parts = whole.split([1, 3, 2])
    view = joined(parts)
    assert view.data_ptr() == whole.data_ptr() and torch.equal(view, whole)
    assert joined(parts[1:]).data_ptr() == parts[1].data_ptr()
    turned = joined(parts[::-1])
    assert turned.data_ptr() != whole.data_ptr() and torch.equal(turned, torch.cat(parts[::-1]))
    gap = joined([parts[0], parts[2]])
    assert torch.equal(gap, torch.cat([parts[0], parts[2]]))
    strided = whole.transpose(1, 2)[:2], whole.transpose(1, 2)[2:]
    assert torch.equal(joined(strided), whole.transpose(1, 2))
    assert torch.equal(joined([whole, torch.zeros(1, 2, 2)]), torch.cat([whole, torch.zeros(1, 2, 2)])), "of another storage"
