"""Law 3: every allowed pair is computed exactly once; no forbidden pair ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.attention import program
from ringspan.strategies import STRATEGIES
from tests.support.laws import check_pairs
from tests.support.masks import EXAMPLES
from tests.support.sizes import LAYOUT_NAMES, examples, layout_of, lengths, num_ranks, unless_refused


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("mask", EXAMPLES)
@examples(15)
@given(length=lengths, ranks=num_ranks)
def test_the_ring_computes_every_allowed_pair_exactly_once_and_no_other(layout: str, mask: str, length: int, ranks: int):
    check_pairs("ring", layout_of(layout, length, ranks), mask)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ring"])
@examples(40)
@given(length=lengths, ranks=num_ranks, layout=st.sampled_from(LAYOUT_NAMES), mask=st.sampled_from(list(EXAMPLES)))
def test_every_strategy_computes_every_allowed_pair_exactly_once_and_no_other(
    strategy: str, length: int, ranks: int, layout: str, mask: str
):
    with unless_refused(strategy, layout):
        check_pairs(strategy, layout_of(layout, length, ranks), mask)


@pytest.mark.parametrize("change", [{"low": 1}, {"low": -1}, {"k_start": 1}])
def test_law_3_fails_where_a_tile_is_cut_wrong(change: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    right = program.tiles_between

    def wrong(layout, mask, q, kv):
        found = right(layout, mask, q, kv)
        return [replace(found[0], **change), *found[1:]] if q.owner == kv.owner == 1 else found

    monkeypatch.setattr(program, "tiles_between", wrong)
    with pytest.raises(AssertionError, match=r"is computed [02] times|is computed 1 times, and the mask says False"):
        check_pairs("ring", layout_of("contiguous", 12, 3), "causal")


def test_law_3_fails_where_an_attend_is_done_twice(monkeypatch: pytest.MonkeyPatch):
    right = program._launches
    monkeypatch.setattr(program, "_launches", lambda *arguments: right(*arguments) * 2)
    with pytest.raises(AssertionError, match="is computed 2 times"):
        check_pairs("ring", layout_of("zigzag", 12, 3), "causal")
