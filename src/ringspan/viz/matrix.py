"""The left half of the picture: the mask, each pair in the colour of the rank that computes it, with the step written on it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from ringspan.geometry import Layout
from ringspan.viz.palette import rank_colours, text_on
from ringspan.viz.study import Study
from ringspan.viz.tiles import PaintedTile, painted_tiles
from ringspan.viz.words import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MASKED_OUT = "#ECECEC"
INK = "#222222"
_CELLS_UP_TO = 128
_SMALLEST_LABEL = 4.5
_LINES_UP_TO = 8000


def shown_extent(layout: Layout) -> int:
    """How many positions are drawn: all, unless spans with gaps make every pair a square of its own; then the first few periods."""
    gaps = any(span.step > 1 for shard in layout.shards for span in shard)
    if not gaps or layout.length <= _CELLS_UP_TO:
        return layout.length
    return min(layout.length, max(64, 2 * layout.num_ranks))


def draw_matrix(axes: Axes, study: Study, direction: str, side_inches: float) -> bool:
    """Draws the pairs of `study` into `axes`, which are square and `side_inches` wide, with the owners of positions along two sides.

    Returns:
        Whether there was room for the number of a step on any of it.
    """
    extent = shown_extent(study.lane_layout)
    painted = list(painted_tiles(study.schedule(direction), study.lane_layout, study.mask, extent))
    colours = rank_colours(study.num_lanes)
    band = 0.055 * extent
    points_per_position = side_inches * 72 / (extent + 1.6 * band)

    axes.set_xlim(-1.6 * band, extent)
    axes.set_ylim(extent, -1.6 * band)
    axes.set_aspect("equal")
    _add_polygons(axes, [((0, 0), (extent, 0), (extent, extent), (0, extent))], MASKED_OUT, 0.0, "masked out")
    line_width = min(1.0, 0.06 * points_per_position) if extent <= _CELLS_UP_TO else 0.2
    if len(painted) > _LINES_UP_TO:
        line_width = 0.0
    by_rank: dict[int, list[PaintedTile]] = defaultdict(list)
    for tile in painted:
        by_rank[tile.rank].append(tile)
    for rank, tiles in sorted(by_rank.items()):
        _add_polygons(axes, [tile.polygon for tile in tiles], colours[rank], line_width, f"computed by {study.lane_letter}{rank}")
    numbered = False
    for tile in painted:
        size = min(13.0, 0.62 * tile.room * points_per_position)
        if size >= _SMALLEST_LABEL:
            axes.text(*tile.centre, str(tile.step), fontsize=size, color=text_on(colours[tile.rank]), ha="center", va="center_baseline")
            numbered = True
    _draw_owners(axes, study.lane_layout, study.lane_letter, extent, band, points_per_position)
    _label_axes(axes, extent)
    return numbered


def _add_polygons(axes: Axes, polygons: list, colour: str, line_width: float, name: str) -> None:
    from matplotlib.collections import PolyCollection

    edge = "white" if line_width else "none"
    axes.add_collection(PolyCollection(polygons, facecolors=colour, edgecolors=edge, linewidths=line_width, gid=name), autolim=False)


def _draw_owners(axes: Axes, layout: Layout, letter: str, extent: int, band: float, points_per_position: float) -> None:
    """A strip above the keys and one beside the queries, in the colours of the ranks that own these positions."""
    colours = rank_colours(layout.num_ranks)
    near, far = -0.35 * band, -1.35 * band
    for rank, shard in enumerate(layout.shards):
        runs = [run for span in shard for run in _runs(span, extent)]
        above = [((start, far), (stop, far), (stop, near), (start, near)) for start, stop in runs]
        beside = [tuple((y, x) for x, y in strip) for strip in above]
        _add_polygons(axes, above + beside, colours[rank], 0.4 if len(runs) < 64 else 0.0, f"owned by {letter}{rank}")
        for start, stop in runs:
            label = f"{letter}{rank}" if (stop - start) * points_per_position >= 14 else str(rank)
            if (stop - start) * points_per_position < 4 + 5 * len(label):
                continue
            for x, y in (((start + stop) / 2, (near + far) / 2), ((near + far) / 2, (start + stop) / 2)):
                axes.text(x, y, label, fontsize=7.5, color=text_on(colours[rank]), ha="center", va="center_baseline")


def _runs(span, extent: int) -> list[tuple[int, int]]:
    """The stretches of neighbouring positions of `span` below `extent`."""
    if span.step == 1:
        return [(span.start, min(span.stop, extent))] if span.start < extent else []
    return [(position, position + 1) for position in span[: span.clip(0, extent)[1]]]


def _label_axes(axes: Axes, extent: int) -> None:
    step = max(1, extent // 4)
    ticks = [*range(0, extent - step // 2, step), extent]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [short_count(tick) for tick in ticks])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=2, labelsize=8, colors="#555555", pad=1)
    axes.set_xlabel("key position", fontsize=9, color=INK)
    axes.set_ylabel("query position", fontsize=9, color=INK)
    axes.spines[:].set_visible(False)
