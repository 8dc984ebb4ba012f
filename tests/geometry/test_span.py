"""Spans: arithmetic progressions and the two ways of cutting a length into parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.geometry import Span
from ringspan.geometry.span import split_by_weight, split_evenly
from tests.support.sizes import examples

spans = st.builds(Span, st.integers(0, 20), st.integers(0, 60), st.integers(1, 7))


@examples(100)
@given(span=spans, start=st.integers(0, 15), stop=st.integers(0, 15))
def test_a_span_is_its_positions_and_a_slice_of_it_is_a_slice_of_them(span: Span, start: int, stop: int):
    positions = list(range(span.start, span.stop, span.step))
    assert list(span) == positions and len(span) == len(positions)
    assert list(span[start:stop]) == positions[start:stop]
    if positions:
        assert span.last == positions[-1]


@examples(100)
@given(span=spans, low=st.integers(-5, 70), high=st.integers(-5, 70))
def test_clip_gives_the_local_indices_of_the_positions_in_an_interval(span: Span, low: int, high: int):
    first, end = span.clip(low, high)
    assert 0 <= first <= end <= len(span)
    assert list(span)[first:end] == [position for position in span if low <= position < high]


@examples(60)
@given(length=st.integers(0, 200), parts=st.integers(1, 20))
def test_even_parts_follow_one_another_and_differ_by_at_most_one(length: int, parts: int):
    cut = split_evenly(length, parts)
    sizes = [len(part) for part in cut]
    assert [position for part in cut for position in part] == list(range(length))
    assert len(cut) == parts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@examples(60)
@given(length=st.integers(0, 200), weights=st.lists(st.floats(0, 10), min_size=1, max_size=9).filter(lambda weights: sum(weights) > 0.01))
def test_weighted_parts_follow_one_another_and_are_within_one_of_their_share(length: int, weights: list[float]):
    cut = split_by_weight(length, tuple(weights))
    assert [position for part in cut for position in part] == list(range(length))
    for part, weight in zip(cut, weights, strict=True):
        assert abs(len(part) - length * weight / sum(weights)) < 1.0 + 1e-9
        assert weight or len(part) <= 1


def test_a_part_without_weight_is_empty_where_the_shares_come_out_even():
    assert [len(part) for part in split_by_weight(12, (1.0, 0.0, 2.0))] == [4, 0, 8]
    assert [len(part) for part in split_by_weight(131, (1.0, 3.0, 2.0), 10)] == [20, 71, 40], "in tens, and one that is left"


def test_a_span_runs_forwards():
    with pytest.raises(AssertionError, match="forwards"):
        Span(0, 4, 0)
