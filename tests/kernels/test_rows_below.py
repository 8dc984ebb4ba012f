"""Lowering for a kernel that takes a right bound of at least the number of keys for none (FlashAttention-2)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.geometry import Tile
from ringspan.geometry.tile import trimmed
from ringspan.kernels import KERNELS, lowered

bounds = st.none() | st.integers(-12, 12)


def pairs(tile: Tile) -> list[tuple[int, int]]:
    """The allowed pairs, one by one."""
    return [
        (tile.q_start + i, tile.k_start + j)
        for i in range(tile.num_queries)
        for j in range(tile.num_keys)
        if (tile.low is None or i - j >= tile.low) and (tile.high is None or i - j <= tile.high)
    ]


@settings(max_examples=300, deadline=None)
@given(queries=st.integers(1, 12), keys=st.integers(1, 12), low=bounds, high=bounds)
def test_every_bound_that_reaches_flash2_is_smaller_than_the_number_of_keys(queries: int, keys: int, low: int | None, high: int | None):
    tile = trimmed(3, 3 + queries, 5, 5 + keys, low, high)
    if tile is None:
        return
    parts = lowered(tile, KERNELS["flash2"].shapes)
    covered = [pair for part in parts for pair in pairs(part)]
    assert sorted(covered) == sorted(pairs(tile))
    for part in parts:
        # FlashAttention counts both bounds from the bottom-right corner.
        corner = part.num_keys - part.num_queries
        assert part.low is None or 0 <= -part.low - corner < part.num_keys
        assert part.high is None or 0 <= part.high + corner < part.num_keys
