"""Law 2: `unshard(shard(x)) == x`, for every layout, length and number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.laws import check_sharding
from tests.support.sizes import LAYOUT_NAMES, NUM_RANKS, examples, layout_of, lengths, num_ranks
from tests.support.split import weights_for


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@examples(25)
@given(length=lengths, ranks=num_ranks, dim=st.integers(0, 3))
def test_what_was_sharded_and_unsharded_is_what_it_was_and_so_is_its_gradient(layout: str, length: int, ranks: int, dim: int):
    check_sharding(layout_of(layout, length, ranks), weights_for(layout, ranks), dim)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("ranks", NUM_RANKS)
def test_fewer_positions_than_ranks_leave_some_ranks_with_nothing(layout: str, ranks: int):
    for length in {1, max(1, ranks - 1)}:
        check_sharding(layout_of(layout, length, ranks), weights_for(layout, ranks), dim=1)


def test_law_2_fails_where_shards_are_put_together_in_another_order(monkeypatch: pytest.MonkeyPatch):
    from ringspan.attention import sharding

    right = sharding.assemble
    monkeypatch.setattr(sharding, "assemble", lambda shards, layout, dim: right(shards[::-1], layout, dim))
    with pytest.raises(AssertionError, match="is x"):
        check_sharding(layout_of("zigzag", 16, 2), None, dim=1)


def test_law_2_fails_where_a_gradient_forgets_the_other_ranks(monkeypatch: pytest.MonkeyPatch):
    from ringspan.attention import sharding

    monkeypatch.setattr(torch, "zeros_like", lambda x: torch.full_like(x, 1.0))
    assert sharding.torch is torch
    with pytest.raises(AssertionError, match="not close"):
        check_sharding(layout_of("zigzag", 16, 2), None, dim=1)
