"""Tiles: closed forms beside counting pair by pair."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ringspan.geometry import Tile, band_pairs
from ringspan.geometry.tile import fused, trimmed
from tests.support.sizes import examples

bounds = st.one_of(st.none(), st.integers(-9, 9))
sizes = st.integers(0, 8)

Pairs = set[tuple[int, int]]


def pairs(q_start: int, q_stop: int, k_start: int, k_stop: int, low: int | None, high: int | None) -> Pairs:
    """Every allowed pair, by asking each."""
    return {
        (q, k)
        for q in range(q_start, q_stop)
        for k in range(k_start, k_stop)
        if (low is None or (q - q_start) - (k - k_start) >= low) and (high is None or (q - q_start) - (k - k_start) <= high)
    }


def of(tile: Tile | None) -> Pairs:
    """The pairs of a tile; none where there is no tile."""
    return set() if tile is None else pairs(tile.q_start, tile.q_stop, tile.k_start, tile.k_stop, tile.low, tile.high)


@examples(300)
@given(queries=sizes, keys=sizes, low=bounds, high=bounds)
def test_the_number_of_pairs_in_a_band_is_what_counting_gives(queries: int, keys: int, low: int | None, high: int | None):
    if low is not None and high is not None and low > high:
        high = low
    assert band_pairs(queries, keys, low, high) == len(pairs(0, queries, 0, keys, low, high))


@examples(300)
@given(queries=sizes, keys=sizes, low=bounds, high=bounds)
def test_a_trimmed_tile_has_the_same_pairs_without_empty_rows_or_columns_or_idle_bounds(queries, keys, low, high):
    tile = trimmed(5, 5 + queries, 3, 3 + keys, low, high)
    wanted = pairs(5, 5 + queries, 3, 3 + keys, low, high)
    assert of(tile) == wanted
    if tile is None:
        return
    assert tile.pairs == len(wanted)
    assert {q for q, _ in wanted} == set(range(tile.q_start, tile.q_stop)), "no row is empty"
    assert {k for _, k in wanted} == set(range(tile.k_start, tile.k_stop)), "no column is empty"
    full = len(wanted) == tile.num_queries * tile.num_keys
    assert (tile.kind == "full") == full, "a bound that binds nowhere is dropped"


@examples(200)
@given(low=bounds, high=bounds, cut=st.tuples(*[st.integers(0, 9)] * 4))
def test_a_clipped_tile_has_the_pairs_inside_the_rectangle(low, high, cut):
    tile = trimmed(0, 7, 0, 8, low, high)
    if tile is None:
        return
    q_start, q_stop, k_start, k_stop = cut
    inside = {(q, k) for q, k in of(tile) if q_start <= q < q_stop and k_start <= k < k_stop}
    assert of(tile.clipped(q_start, q_stop, k_start, k_stop)) == inside


@examples(100)
@given(
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=4), columns=st.lists(st.integers(1, 3), min_size=1, max_size=4), data=st.data()
)
def test_fused_tiles_have_the_same_pairs_once_and_are_no_more(rows: list[int], columns: list[int], data):
    tiles = []
    for i, height in enumerate(rows):
        for j, width in enumerate(columns):
            if data.draw(st.booleans()):
                low = data.draw(st.sampled_from([None, None, 0]))
                tile = trimmed(sum(rows[:i]), sum(rows[:i]) + height, sum(columns[:j]), sum(columns[:j]) + width, low, None)
                tiles.append(tile)
    tiles = [tile for tile in tiles if tile is not None]
    result = fused(tiles)
    assert len(result) <= len(tiles)
    counted = [pair for tile in result for pair in of(tile)]
    assert sorted(counted) == sorted(pair for tile in tiles for pair in of(tile))


def test_shifting_moves_the_corner_and_keeps_the_band():
    assert Tile(0, 2, 1, 4, -1, 1).shifted(10, 20) == Tile(10, 12, 21, 24, -1, 1)


def test_kinds_are_full_causal_and_band():
    assert [Tile(0, 4, 0, 4, *band).kind for band in [(None, None), (0, None), (0, 1), (-1, None), (None, 0)]] == [
        "full",
        "causal",
        "band",
        "band",
        "band",
    ]
