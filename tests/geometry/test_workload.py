"""Workload: pairs per rank, counted and in closed form, and what each layout is for."""

from __future__ import annotations

import pytest

from ringspan.geometry import Workload, causal, full, make_layout
from tests.support.masks import EXAMPLES
from tests.support.sizes import LAYOUT_NAMES, layout_of


@pytest.mark.parametrize("mask", [name for name in EXAMPLES if name != "mask_mod"])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_ranks_pairs_add_up_to_those_of_the_mask(layout: str, mask: str):
    workload = Workload(layout_of(layout, 37, 4), EXAMPLES[mask].make(37))
    assert sum(workload.pairs_per_rank) == int(EXAMPLES[mask].allowed(37).sum())
    assert sum(workload.pairs(q, k) for q in range(4) for k in range(4)) == sum(workload.pairs_per_rank)


def test_under_a_causal_mask_contiguous_shards_are_uneven_and_zigzag_shards_exactly_even():
    contiguous, zigzag, striped = (Workload(make_layout(name, 64, 4), causal()) for name in ("contiguous", "zigzag", "striped"))
    assert contiguous.pairs_per_rank == (136, 392, 648, 904)
    assert contiguous.imbalance == pytest.approx(904 / 520) and contiguous.idle_fraction == pytest.approx(1 - 520 / 904)
    assert set(zigzag.pairs_per_rank) == {520} and zigzag.imbalance == 1.0 and zigzag.idle_fraction == 0.0
    assert 1.0 < striped.imbalance < 1.06


def test_an_even_mask_is_even_under_even_shards():
    assert Workload(make_layout("contiguous", 64, 4), full()).imbalance == 1.0
