"""Layouts that know the mask: the bound that they state, and how even they are on real documents."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.geometry import Mask, Workload, block_sparse, causal, documents, full, make_layout, prefix_lm, sliding_window
from ringspan.geometry.balance import EVEN_ENOUGH, _dealt, balanced_layout, query_pairs
from ringspan.geometry.span import split_evenly
from tests.geometry.balance_study import LAYOUTS, PAGE, page, study
from tests.support.sizes import examples


@st.composite
def masks(draw: st.DrawFn, length: int) -> Mask:
    """One mask, or two joined, for sequences of `length`."""
    cuts = draw(st.lists(st.integers(1, max(1, length - 1)), max_size=12, unique=True)) if length > 1 else []
    blocks = draw(st.integers(1, 6))
    pattern = draw(st.lists(st.lists(st.booleans(), min_size=blocks, max_size=blocks), min_size=blocks, max_size=blocks))
    known = [
        causal(),
        full(),
        sliding_window(draw(st.integers(0, length)), draw(st.one_of(st.none(), st.integers(0, length)))),
        prefix_lm(draw(st.integers(0, length))),
        documents([0, *sorted(cuts), length]),
        block_sparse(-(-length // blocks), pattern),
    ]
    first, second = draw(st.sampled_from(known)), draw(st.sampled_from(known))
    return first if first is second else first & second


@examples(150)
@given(data=st.data(), length=st.integers(1, 300), ranks=st.integers(1, 9), chunks_per_rank=st.integers(1, 9))
def test_dealt_chunks_differ_in_work_by_at_most_the_heaviest_minus_the_lightest(data: st.DataObject, length, ranks, chunks_per_rank):
    mask = data.draw(masks(length))
    layout = _dealt(length, ranks, mask, chunks_per_rank)
    assert sorted(position for rank in range(ranks) for position in layout.positions(rank)) == list(range(length))
    chunks = split_evenly(length, chunks_per_rank * ranks)
    weights = [query_pairs(chunk, length, mask) for chunk in chunks]
    work = Workload(layout, mask).pairs_per_rank
    assert sum(work) == sum(weights)
    assert max(work) - min(work) <= max(weights) - min(weights)
    chunk_of = [index for index, chunk in enumerate(chunks) for _ in chunk]
    whole = [index for index, chunk in enumerate(chunks) if len(chunk)]
    owned = [{chunk_of[position] for position in layout.positions(rank)} for rank in range(ranks)]
    assert sorted(index for rank in owned for index in rank) == whole, "a chunk is never cut"
    if len(whole) == len(chunks):
        assert {len(rank) for rank in owned} == {chunks_per_rank}, "as many chunks for every rank"


@examples(100)
@given(data=st.data(), length=st.integers(1, 300), ranks=st.integers(1, 9))
def test_auto_is_as_even_as_contiguous_zigzag_and_dealt_chunks_up_to_what_is_even_enough(data: st.DataObject, length: int, ranks: int):
    mask = data.draw(masks(length))
    auto = Workload(balanced_layout(length, ranks, mask), mask).imbalance
    for other in (make_layout("contiguous", length, ranks), make_layout("zigzag", length, ranks), _dealt(length, ranks, mask, 8)):
        assert auto <= Workload(other, mask).imbalance + EVEN_ENOUGH + 1e-9


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_auto_keeps_the_large_tiles_of_a_plain_layout_that_is_even(ranks: int):
    length = 48 * ranks
    assert make_layout("auto", length, ranks, mask=causal()).shards == make_layout("zigzag", length, ranks).shards
    assert make_layout("auto", length, ranks, mask=full()).shards == make_layout("contiguous", length, ranks).shards
    even = documents([0, *accumulate([48] * ranks)])
    assert make_layout("auto", length, ranks, mask=even).shards == make_layout("contiguous", length, ranks).shards


def test_on_real_documents_auto_is_at_least_as_even_as_zigzag_and_the_page_says_how_much():
    for (length, ranks, name), shared in study().items():
        if name == "auto":
            for auto, zigzag, contiguous in zip(
                shared, *(study()[(length, ranks, other)] for other in ("zigzag", "contiguous")), strict=True
            ):
                assert auto.imbalance <= min(zigzag.imbalance, contiguous.imbalance, 1.02) + EVEN_ENOUGH
    assert {name for *_, name in study()} == set(LAYOUTS)
    assert PAGE.read_text(encoding="utf-8") == page(), "to write it anew: python -m tests.geometry.balance_study"
