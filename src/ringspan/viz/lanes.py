"""The right half of the picture: a lane for each rank, time running to the right, measured in pairs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ringspan.schedule.draw import Flight, Timeline, is_result, visitor
from ringspan.viz.palette import rank_colours, text_on
from ringspan.viz.words import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#222222"
_SOFT = "#8A8A8A"
_BAR = (-0.40, 0.14)
"""A lane is one unit high; computing fills this part of it, and arrivals the part below."""
_ARRIVALS = (0.18, 0.40)
_SMALLEST_LABEL = 5.0


@dataclass(frozen=True)
class Scale:
    """From steps and pairs to places on the time axis: a step in which nothing is computed still gets a narrow place."""

    starts: tuple[float, ...]
    real: tuple[int, ...]

    def at(self, step: int, pairs: int) -> float:
        """Where `pairs`, reached in `step`, is drawn."""
        return self.starts[step] + (pairs - self.real[step])


def scale(timeline: Timeline) -> Scale:
    """The scale of `timeline`: true to it but for its empty steps, which get a twenty-fifth of the whole each."""
    sliver = max(timeline.duration, 1) / 25
    starts = [0.0]
    for step in range(timeline.num_steps):
        starts.append(starts[-1] + ((timeline.starts[step + 1] - timeline.starts[step]) or sliver))
    return Scale(tuple(starts), timeline.starts)


@dataclass(frozen=True)
class Row:
    """Where an arrival is drawn below its lane: in `row` of `rows`."""

    flight: Flight
    row: int
    rows: int


def flight_rows(flights: tuple[Flight, ...]) -> list[Row]:
    """A row for each arrival, so that no two at one target overlap; those that overlap, also by way of others, share the room."""
    rows: list[Row] = []
    for target in sorted({flight.target for flight in flights}):
        group: list[tuple[Flight, int]] = []
        for flight in sorted((f for f in flights if f.target == target), key=lambda f: (f.posted, f.due, f.source, str(f.piece))):
            if all(other.due <= flight.posted for other, _ in group):
                rows += _shared(group)
                group = []
            taken = {row for other, row in group if other.due > flight.posted}
            group.append((flight, next(row for row in range(len(taken) + 1) if row not in taken)))
        rows += _shared(group)
    return rows


def _shared(group: list[tuple[Flight, int]]) -> list[Row]:
    return [Row(flight, row, 1 + max(row for _, row in group)) for flight, row in group]


def draw_lanes(axes: Axes, timeline: Timeline, width_inches: float, height_inches: float, letter: str = "r") -> None:
    """Draws `timeline` into `axes` of that size: bars in the colour of the visitor, arrivals below them, waits hatched.

    Lanes are named by `letter` and their number.
    """
    scaled = scale(timeline)
    end = max(scaled.starts[-1], 1e-9)
    points_per_pair = width_inches * 72 / end
    points_per_lane = height_inches * 72 / timeline.num_ranks
    axes.set_xlim(0, end)
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    _draw_steps(axes, timeline, scaled, points_per_pair)
    _draw_gaps(axes, timeline, scaled, points_per_pair, points_per_lane)
    _draw_bars(axes, timeline, scaled, points_per_pair, points_per_lane)
    _draw_flights(axes, timeline, scaled, points_per_pair, points_per_lane, letter)
    _label_lanes(axes, timeline, points_per_lane, letter)


def _rectangle(left: float, right: float, top: float, bottom: float) -> tuple[tuple[float, float], ...]:
    return (left, top), (right, top), (right, bottom), (left, bottom)


def _draw_bars(axes: Axes, timeline: Timeline, scaled: Scale, points_per_pair: float, points_per_lane: float) -> None:
    from matplotlib.collections import PolyCollection

    colours = rank_colours(timeline.num_ranks)
    by_owner = defaultdict(list)
    for bar in timeline.bars:
        piece = visitor(bar.rank, bar.q, bar.kv)
        left, right = scaled.at(bar.step, bar.start), scaled.at(bar.step, bar.stop)
        by_owner[piece.owner].append(_rectangle(left, right, bar.rank + _BAR[0], bar.rank + _BAR[1]))
        text = f"{piece.kind}{piece.owner}"
        size = min(9.5, 0.36 * points_per_lane, (right - left) * points_per_pair / (0.72 * len(text)))
        if size >= _SMALLEST_LABEL:
            middle = bar.rank + sum(_BAR) / 2
            colour = text_on(colours[piece.owner])
            axes.text((left + right) / 2, middle, text, fontsize=size, color=colour, ha="center", va="center_baseline")
    for owner, polygons in sorted(by_owner.items()):
        edges = min(0.8, 0.02 * points_per_lane)
        axes.add_collection(
            PolyCollection(polygons, facecolors=colours[owner], edgecolors="white", linewidths=edges, gid=f"visitors from {owner}"),
            autolim=False,
        )


def _draw_gaps(axes: Axes, timeline: Timeline, scaled: Scale, points_per_pair: float, points_per_lane: float) -> None:
    from matplotlib.collections import PolyCollection

    polygons = []
    for rank, first, start, last, stop in merged_gaps(timeline):
        left, right = scaled.at(first, start), scaled.at(last, stop)
        polygons.append(_rectangle(left, right, rank + _BAR[0], rank + _BAR[1]))
        size = min(8.5, 0.3 * points_per_lane)
        if size >= 6 and (right - left) * points_per_pair > 30:
            style = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.15"}
            axes.text(
                (left + right) / 2, rank + sum(_BAR) / 2, "waits", fontsize=size, color="#555555", ha="center", va="center", bbox=style
            )
    axes.add_collection(
        PolyCollection(polygons, facecolors="white", edgecolors="#B5B5B5", linewidths=0.5, hatch="/////", gid="waits"), autolim=False
    )


def merged_gaps(timeline: Timeline) -> list[tuple[int, int, int, int, int]]:
    """(rank, step, start, step, stop) of each wait, one that fills whole steps running on into the next."""
    merged: list[tuple[int, int, int, int, int]] = []
    for gap in sorted(timeline.gaps, key=lambda gap: (gap.rank, gap.step)):
        last = merged[-1] if merged else None
        if last is not None and (last[0], last[3] + 1, last[4]) == (gap.rank, gap.step, gap.start):
            merged[-1] = (*last[:3], gap.step, gap.stop)
        else:
            merged.append((gap.rank, gap.step, gap.start, gap.step, gap.stop))
    return merged


def _draw_flights(axes: Axes, timeline: Timeline, scaled: Scale, points_per_pair: float, points_per_lane: float, letter: str) -> None:
    """Arrivals: filled where an input travels, outlined where a result goes home."""
    from matplotlib.collections import PolyCollection

    colours = rank_colours(timeline.num_ranks)
    groups: dict[tuple[int, bool], list] = defaultdict(list)
    inset = min(1.5 / points_per_pair, 0.006 * scaled.starts[-1])
    for place in flight_rows(timeline.flights):
        flight, height = place.flight, (_ARRIVALS[1] - _ARRIVALS[0]) / place.rows
        left, right = scaled.starts[flight.posted] + inset, scaled.starts[flight.due] - inset
        top = flight.target + _ARRIVALS[0] + place.row * height
        tip = min((right - left) / 2, 5 / points_per_pair)
        middle, bottom = top + height * 0.45, top + height * 0.9
        home = is_result(flight.piece.kind)
        groups[flight.piece.owner, home].append(((left, top), (right - tip, top), (right, middle), (right - tip, bottom), (left, bottom)))
        text, size = _flight_label(flight, letter, (right - left - tip) * points_per_pair, 0.8 * height * points_per_lane)
        if size >= _SMALLEST_LABEL:
            colour = INK if home else text_on(colours[flight.piece.owner])
            axes.text((left + right - tip) / 2, middle, text, fontsize=size, color=colour, ha="center", va="center_baseline")
    for (owner, home), polygons in sorted(groups.items()):
        face = "white" if home else colours[owner]
        name = f"{'results' if home else 'inputs'} of {owner} under way"
        edges = PolyCollection(polygons, facecolors=face, edgecolors=colours[owner], linewidths=0.9 if home else 0.0, gid=name)
        axes.add_collection(edges, autolim=False)


def _flight_label(flight: Flight, letter: str, width_points: float, height_points: float) -> tuple[str, float]:
    """(text, font size): what travels, and where from if that can be read."""
    name = f"{flight.piece.kind}{flight.piece.owner}"
    for text in (f"{name} from {letter}{flight.source}", name):
        size = min(7.5, height_points, width_points / (0.62 * len(text)))
        if size >= 6.5:
            break
    return text, size


def _draw_steps(axes: Axes, timeline: Timeline, scaled: Scale, points_per_pair: float) -> None:
    every = 1
    while timeline.num_steps and scaled.starts[-1] / timeline.num_steps * every * points_per_pair < 13:
        every *= 2
    computing = [after - before for before, after in pairwise(timeline.starts) if after > before]
    room = min(computing, default=0) * points_per_pair >= 34
    for step, (left, right) in enumerate(pairwise(scaled.starts)):
        if timeline.starts[step] == timeline.starts[step + 1]:
            axes.axvspan(left, right, color="#F3F3F3", linewidth=0, zorder=0)
        if step:
            axes.axvline(left, color="#9A9A9A", linewidth=0.7 if every == 1 else 0.3, linestyle=(0, (3, 2)), zorder=0.5)
        if step % every == 0:
            wide = room and timeline.starts[step] < timeline.starts[step + 1]
            axes.text((left + right) / 2, -0.56, f"step {step}" if wide else str(step), fontsize=8.5, color=INK, ha="center", va="bottom")
    ticks: dict[int, float] = {}
    for real, place in zip(timeline.starts, scaled.starts, strict=True):
        last = next(reversed(ticks.values()), None)
        if last is None or (place - last) * points_per_pair > 8 + 5 * len(short_count(real)):
            ticks.setdefault(real, place)
    axes.set_xticks(list(ticks.values()), [short_count(real) for real in ticks])


def label_ranks(axes: Axes, num_ranks: int, middle: float, points_per_lane: float, letter: str = "r") -> range:
    """Names the lanes of a timeline, as many as fit, in their colours where there is room; returns which. `middle`: of a lane's bar."""
    every = 1
    while every * points_per_lane < 9:
        every *= 2
    lanes = range(0, num_ranks, every)
    axes.set_yticks([lane + middle for lane in lanes], [f"{letter}{lane}" for lane in lanes])
    for lane, label in zip(lanes, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold")
        if points_per_lane >= 12:
            colour = rank_colours(num_ranks)[lane]
            label.set_bbox({"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.25"})
            label.set_color(text_on(colour))
    axes.tick_params(axis="y", length=0, labelsize=min(9, max(5, 0.8 * points_per_lane * every)), pad=6)
    return lanes


def _label_lanes(axes: Axes, timeline: Timeline, points_per_lane: float, letter: str) -> None:
    middle = sum(_BAR) / 2
    lanes = label_ranks(axes, timeline.num_ranks, middle, points_per_lane, letter)
    axes.tick_params(axis="x", length=2, labelsize=8, colors="#555555", pad=2)
    apart = any(bar.kv.kind == "k" for bar in timeline.bars)
    axes.set_xlabel(
        "time, in pairs (keys and values are met apart)" if apart else "time, in pairs of a query and a key", fontsize=9, color=INK
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    if points_per_lane >= 12:
        work = timeline.busy_per_rank
        for lane in lanes:
            busy = work[lane] / timeline.duration if timeline.duration else 0.0
            axes.text(
                1.012, lane + middle, f"{busy:.0%} busy", transform=axes.get_yaxis_transform(), fontsize=8, color="#444444", va="center"
            )
