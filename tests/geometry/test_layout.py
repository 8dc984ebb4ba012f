"""Layouts: every position has exactly one owner, for any length and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from ringspan.errors import RingspanError
from ringspan.geometry import LAYOUTS, Layout, Span, make_layout
from tests.support.sizes import LAYOUT_NAMES, examples, layout_of, lengths, num_ranks


@pytest.mark.parametrize("name", LAYOUT_NAMES)
@examples(40)
@given(length=lengths, ranks=num_ranks)
def test_every_position_has_exactly_one_owner_and_rises_with_its_local_index(name: str, length: int, ranks: int):
    layout = layout_of(name, length, ranks)
    owned = [layout.positions(rank) for rank in range(ranks)]
    assert sorted(position for positions in owned for position in positions) == list(range(length))
    assert all(positions == sorted(positions) for positions in owned)
    assert layout.num_ranks == ranks
    assert list(layout.shard_lengths) == [len(positions) for positions in owned] == [layout.shard_length(rank) for rank in range(ranks)]


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@examples(40)
@given(length=lengths, ranks=num_ranks)
def test_shards_of_layouts_that_share_evenly_differ_by_few_positions(name: str, length: int, ranks: int):
    sizes = layout_of(name, length, ranks).shard_lengths
    assert max(sizes) - min(sizes) <= (2 if name == "zigzag" else 1)


@pytest.mark.parametrize(
    ("name", "owners"), [("contiguous", "0011"), ("zigzag", "0110"), ("striped", "0101"), ("weighted", "0110")], ids=lambda value: value
)
def test_four_tokens_on_two_ranks_are_owned_as_the_docstring_draws_it(name: str, owners: str):
    layout = make_layout(name, 4, 2)
    assert "".join(str(rank) for position in range(4) for rank in range(2) if position in layout.positions(rank)) == owners


def test_weights_are_shares():
    layout = make_layout("weighted", 24, 3, (1.0, 0.0, 2.0))
    assert layout.shard_lengths == (8, 0, 16)
    assert make_layout("weighted", 4, 2, (1.0, 0.0)).positions(0) == [0, 1, 2, 3]
    assert make_layout("weighted", 64, 4).shards == make_layout("zigzag", 64, 4).shards
    # Chunks of 16,384 and more are whole blocks of a kernel, and what is left is with the largest weight.
    assert make_layout("weighted", 131072, 4).shards == make_layout("zigzag", 131072, 4).shards
    long = make_layout("weighted", 131072 + 6, 4, (1.0, 0.98, 0.99, 0.955))
    assert [len(span) % 128 for shard in long.shards for span in shard] == [3, 3, 0, 0, 0, 0, 0, 0]
    assert long.shard_lengths == (33286, 32768, 33024, 32000), "of 33,396, 32,728, 33,062 and 31,893 positions"
    short = make_layout("weighted", 65536, 4, (1.0, 0.98, 0.99, 0.955)).shard_lengths
    assert short == (16696, 16364, 16530, 15946)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spiral", 8, 2), "the layouts are contiguous"),
        (("zigzag", 0, 2), "at least 1"),
        (("zigzag", -3, 2), "at least 1"),
        (("zigzag", 8, 0), "at least 1"),
        (("zigzag", 8, 2, (1.0, 1.0)), "Only 'weighted' takes weights"),
        (("weighted", 8, 2, (1.0,)), "one finite weight"),
        (("weighted", 8, 2, (1.0, -1.0)), "one finite weight"),
        (("weighted", 8, 2, (0.0, 0.0)), "above 0"),
        (("weighted", 8, 2, (float("nan"), 1.0)), "finite"),
        (("weighted", 8, 2, (float("inf"), 1.0)), "finite"),
    ],
    ids=str,
)
def test_what_no_layout_can_do_is_refused(arguments: tuple[Any, ...], message: str):
    with pytest.raises(RingspanError, match=message):
        make_layout(*arguments)


def test_a_layout_of_spans_with_unlike_steps_is_a_mistake():
    with pytest.raises(AssertionError, match="one step"):
        Layout("own", 5, ((Span(0, 4, 2),), (Span(4, 5, 1), Span(1, 4, 2))))


def test_the_names_are_those_that_users_are_shown():
    import ringspan

    assert ringspan.layouts == (*LAYOUTS, "auto")
