"""The plane of pairs, cut into polygons: they hold every allowed pair, each once, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from ringspan.geometry import Mask, Span, Tile, make_layout, parse_mask
from ringspan.strategies import make_schedules
from ringspan.viz.tiles import PaintedTile, Point, painted_tiles, polygon_area, region

MASKS = ["causal", "full", "window:3", "window:2,4", "documents:5,14,10", "prefix:6&window:9,9"]


def paint(strategy: str, layout_name: str, mask: str | Mask, length: int, ranks: int, extent: int | None = None) -> list[PaintedTile]:
    layout = make_layout(layout_name, length, ranks)
    parsed = parse_mask(mask) if isinstance(mask, str) else mask
    schedule = make_schedules(strategy, layout, parsed).forward
    return list(painted_tiles(schedule, layout, parsed, length if extent is None else extent))


def inside(polygon: tuple[Point, ...], x: float, y: float) -> bool:
    """Whether (x, y) lies inside: an odd number of edges to its right."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            crossings += 1
    return crossings % 2 == 1


def pairs_in(tile: PaintedTile) -> list[tuple[int, int]]:
    columns, rows = ([int(value) for value in values] for values in zip(*tile.polygon, strict=True))
    box = ((q, k) for q in range(min(rows), max(rows)) for k in range(min(columns), max(columns)))
    return [(q, k) for q, k in box if inside(tile.polygon, k + 0.5, q + 0.5)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("strategy", ["ring", "balanced"])
def test_the_polygons_hold_each_allowed_pair_once_in_the_colour_of_its_rank(strategy: str, layout: str, mask: str):
    length, ranks = 29, 3
    allowed = {
        (q, k)
        for area in parse_mask(mask).regions(0, length, 0, length)
        for q in range(area.q_start, area.q_stop)
        for k in range(area.k_start, area.k_stop)
        if (area.low is None or q - k >= area.low) and (area.high is None or q - k <= area.high)
    }
    painted = paint(strategy, layout, mask, length, ranks)
    found = Counter(pair for tile in painted for pair in pairs_in(tile))
    assert found == Counter(allowed)
    for tile in painted:
        assert polygon_area(tile.polygon) == pytest.approx(tile.pairs, abs=1e-9)
        assert len(pairs_in(tile)) == tile.pairs
    if strategy == "ring":
        owner = {position: rank for rank in range(ranks) for position in make_layout(layout, length, ranks).positions(rank)}
        for tile in painted:
            for q, k in pairs_in(tile):
                assert (owner[q], (owner[q] - owner[k]) % ranks) == (tile.rank, tile.step)


@pytest.mark.parametrize(("layout", "count"), [("contiguous", 10), ("zigzag", 36), ("striped", 528)])
def test_thirty_two_causal_positions_on_four_ranks_make_so_many_tiles(layout: str, count: int):
    assert len(paint("ring", layout, "causal", 32, 4)) == count


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", ["causal", "window:20000", "documents:123457,876546"])
def test_a_million_positions_take_few_points_and_keep_their_area(layout: str, mask: str):
    painted = paint("ring", layout, mask, 1_000_003, 4)
    assert sum(len(tile.polygon) for tile in painted) < 500
    for tile in painted:
        # A straight edge in place of stairs is off by at most half a pair a row, on either side.
        assert polygon_area(tile.polygon) == pytest.approx(tile.pairs, abs=1_000_003)
        assert inside(tile.polygon, *tile.centre)


def test_only_the_pairs_below_the_extent_are_painted():
    painted = paint("ring", "striped", "causal", 1000, 8, extent=24)
    assert sum(tile.pairs for tile in painted) == 24 * 25 // 2
    assert max(x for tile in painted for x, _ in tile.polygon) == 24


@pytest.mark.parametrize(
    ("tile", "outline"),
    [
        (Tile(0, 2, 0, 3), {(3, 0), (3, 1), (3, 2), (0, 2), (0, 1), (0, 0)}),
        (Tile(0, 2, 0, 2, low=0), {(1, 0), (1, 1), (2, 1), (2, 2), (0, 2), (0, 1), (0, 0)}),
        (Tile(0, 2, 0, 2, low=0, high=0), {(1, 0), (1, 1), (2, 1), (2, 2), (1, 2), (0, 1), (0, 0)}),
    ],
)
def test_outlines_follow_the_stairs_of_the_band(tile: Tile, outline: set[Point]):
    assert {(x, y) for x, y in region(0, 0, tile, Span(0, 9), Span(0, 9)).polygon} == outline
