"""The mask as a plane of global positions, cut into what one rank computes at one step: polygons, no drawing yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringspan.geometry import Layout, Mask, Span, Tile, tiles
from ringspan.schedule import Attend, Piece, Schedule

Point = tuple[float, float]
_STAIRS_UP_TO = 160
"""Rows up to which a band's edge is drawn pair by pair; beyond, the steps are finer than a pixel."""


@dataclass(frozen=True, slots=True)
class PaintedTile:
    """A connected region that `rank` computes at `step`. The pair (q, k) is the unit square with its corner at x = k, y = q.

    Attributes:
        polygon: its outline, as (key position, query position).
        pairs: how many allowed pairs lie in it.
        centre: where a label fits.
        room: the side of a square that fits there, in positions.
    """

    rank: int
    step: int
    polygon: tuple[Point, ...]
    pairs: int
    centre: Point
    room: float


def painted_tiles(schedule: Schedule, layout: Layout, mask: Mask, extent: int) -> Iterator[PaintedTile]:
    """Every region of the queries and keys below `extent`. Where a layout's spans have gaps, a region is a single pair.

    Where keys and values visit apart, it is the visit of the values that counts, so that no pair is painted twice.
    """
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if isinstance(action, Attend):
                for kv in (kv for kv in action.kvs if kv.kind != "k"):
                    yield from _of_block(layout, mask, rank, action.step, action.q, kv, extent)


def _of_block(layout: Layout, mask: Mask, rank: int, step: int, q: Piece, kv: Piece, extent: int) -> Iterator[PaintedTile]:
    for tile in tiles(layout, mask, q.owner, kv.owner):
        for q_offset, q_span in _spans(layout, q.owner):
            for k_offset, k_span in _spans(layout, kv.owner):
                q_low, q_high = _window(q, q_offset, q_span, extent)
                k_low, k_high = _window(kv, k_offset, k_span, extent)
                part = tile.clipped(q_low, q_high, k_low, k_high)
                if part is None:
                    continue
                part = part.shifted(-q_offset, -k_offset)
                if q_span.step == k_span.step == 1:
                    yield region(rank, step, part, q_span, k_span)
                else:
                    yield from _pairs(rank, step, part, q_span, k_span)


def _spans(layout: Layout, rank: int) -> Iterator[tuple[int, Span]]:
    """(local index where it begins, span) of each span of a shard."""
    offset = 0
    for span in layout.shards[rank]:
        yield offset, span
        offset += len(span)


def _window(piece: Piece, offset: int, span: Span, extent: int) -> tuple[int, int]:
    """The local indices of `piece` that lie in `span` and below `extent`."""
    return max(piece.start, offset), min(piece.stop, offset + span.clip(0, extent)[1])


def row_keys(tile: Tile, row: int) -> tuple[int, int]:
    """The keys `[first, end)` that row `row` of `tile` allows, counted from the tile's corner."""
    first = 0 if tile.high is None else max(0, row - tile.high)
    return first, tile.num_keys if tile.low is None else min(tile.num_keys, row - tile.low + 1)


def _pairs(rank: int, step: int, tile: Tile, q_span: Span, k_span: Span) -> Iterator[PaintedTile]:
    for row in range(tile.num_queries):
        y = q_span.start + (tile.q_start + row) * q_span.step
        for column in range(*row_keys(tile, row)):
            x = k_span.start + (tile.k_start + column) * k_span.step
            square = ((x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1))
            yield PaintedTile(rank, step, square, 1, (x + 0.5, y + 0.5), 1.0)


def region(rank: int, step: int, tile: Tile, q_span: Span, k_span: Span) -> PaintedTile:
    """One tile of two spans without gaps, in local indices of both, as one polygon of global positions."""
    top, left = q_span.start + tile.q_start, k_span.start + tile.k_start
    outline = _stairs(tile) if tile.num_queries <= _STAIRS_UP_TO else _slopes(tile)
    polygon = tuple((left + x, top + y) for x, y in outline)
    # The half that is taken off keeps labels of triangles clear of their stairs.
    room = min(tile.num_queries, tile.num_keys, tile.pairs / max(tile.num_queries, tile.num_keys) - 0.5 * (tile.kind != "full"))
    return PaintedTile(rank, step, polygon, tile.pairs, _centroid(polygon), room)


def _stairs(tile: Tile) -> list[Point]:
    """Down the right edge, row by row, and up the left one."""
    rows = [row_keys(tile, row) for row in range(tile.num_queries)]
    right = [point for row, (_, end) in enumerate(rows) for point in ((end, row), (end, row + 1))]
    left = [point for row, (first, _) in enumerate(rows) for point in ((first, row), (first, row + 1))]
    return _without_repeats(right + left[::-1])


def _slopes(tile: Tile) -> list[Point]:
    """The same with straight edges between the rows where an edge bends."""
    rows, keys = tile.num_queries, tile.num_keys
    bends = {0, rows}
    bends |= set() if tile.low is None else {tile.low, tile.low + keys}
    bends |= set() if tile.high is None else {tile.high, tile.high + keys}
    heights = sorted(bend for bend in bends if 0 <= bend <= rows)
    right = [(keys if tile.low is None else min(keys, max(0, row - tile.low)), row) for row in heights]
    left = [(0 if tile.high is None else min(keys, max(0, row - tile.high)), row) for row in heights]
    return _without_repeats(right + left[::-1])


def _without_repeats(points: Sequence[Point]) -> list[Point]:
    return [point for index, point in enumerate(points) if index == 0 or point != points[index - 1]]


def polygon_area(polygon: tuple[Point, ...]) -> float:
    """The area inside `polygon` (the shoelace formula)."""
    following = (*polygon[1:], polygon[0])
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(polygon, following, strict=True))) / 2


def _centroid(polygon: tuple[Point, ...]) -> Point:
    # Measured from the first point: far from the origin the cross products would lose their digits.
    x_base, y_base = polygon[0]
    near = [(x - x_base, y - y_base) for x, y in polygon]
    crosses = [(x0, y0, x1, y1, x0 * y1 - x1 * y0) for (x0, y0), (x1, y1) in zip(near, [*near[1:], near[0]], strict=True)]
    doubled = sum(cross for *_, cross in crosses)
    if not doubled:
        return x_base, y_base
    x = sum((x0 + x1) * cross for x0, _, x1, _, cross in crosses) / (3 * doubled)
    y = sum((y0 + y1) * cross for _, y0, _, y1, cross in crosses) / (3 * doubled)
    return x_base + x, y_base + y
