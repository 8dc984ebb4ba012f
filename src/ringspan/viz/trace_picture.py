"""A trace as a PNG: what each rank did, and below it what the schedule foretold, on one time axis."""

from __future__ import annotations

import io
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from ringspan.trace import Story, Timeline, Trace
from ringspan.trace.chrome import backward_offset, rows_of
from ringspan.trace.numbers import count_text, percent, seconds_text
from ringspan.trace.timeline import DIRECTIONS, Event
from ringspan.viz.lanes import label_ranks
from ringspan.viz.palette import rank_colours, text_on
from ringspan.viz.picture import check_picture_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, _FAINT, _RULE = "#222222", "#5A5A5A", "#9A9A9A"
BESIDE = "#55595F"
"""Work that is no attend: packing, posting, merging, casting."""
_BAR, _ARRIVALS = (-0.42, 0.12), (0.17, 0.42)
# In inches.
_WIDTH, _LEFT, _RIGHT = 12.5, 0.85, 0.95
_HEAD, _BETWEEN, _LINE, _FOOT = 1.05, 0.62, 0.22, 0.55
_DPI = 150
_SMALLEST_LABEL = 5.5


def draw_trace(trace: Trace, story: Story, path: str | Path) -> None:
    """Writes the picture of `trace` to `path`, a PNG.

    Raises:
        RingspanError: where matplotlib is missing, or `path` is no PNG or cannot be written.
    """
    checked = check_picture_path(path)
    buffer = io.BytesIO()
    trace_figure(trace, story).savefig(buffer, dpi=_DPI, facecolor="white", metadata={"Software": None})
    checked.write_bytes(buffer.getvalue())


def trace_figure(trace: Trace, story: Story) -> Figure:
    """The picture as a matplotlib figure, with no screen and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = min(max(1.3, 0.44 * trace.case.num_ranks), 9.0)
    sentences = _sentences(story)
    text = _LINE * sum(len(lines) for _, lines in sentences) + 0.15
    height = _HEAD + 2 * lanes + 2 * _BETWEEN + text + _FOOT
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    backward = backward_offset(trace.measured, trace.predicted)
    end = backward + max(timeline.seconds["backward"] for timeline in (trace.measured, trace.predicted))
    width = _WIDTH - _LEFT - _RIGHT
    for index, (name, timeline) in enumerate((("measured", trace.measured), ("predicted", trace.predicted))):
        top = _HEAD + index * (lanes + _BETWEEN)
        axes = figure.add_axes((_LEFT / _WIDTH, 1 - (top + lanes) / height, width / _WIDTH, lanes / height), label=name)
        _draw(axes, timeline, backward, max(end, 1e-9), width, lanes)
        figure.text(0.25 / _WIDTH, 1 - (top - 0.15) / height, name.capitalize(), fontsize=11.5, fontweight="bold", color=INK, va="center")
    _write(figure, trace, story, height, sentences)
    return figure


def _draw(axes: Axes, timeline: Timeline, backward: float, end: float, width_inches: float, height_inches: float) -> None:
    offsets = dict(zip(DIRECTIONS, (0.0, backward), strict=True))
    points_per_second = width_inches * 72 / end
    points_per_lane = height_inches * 72 / timeline.num_ranks
    axes.set_xlim(0, end)
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    for direction in DIRECTIONS:
        start, length = offsets[direction], timeline.seconds[direction]
        axes.axvspan(start, start + length, color="#F6F6F6", linewidth=0, zorder=0)
        axes.text(start + length / 2, -0.56, f"{direction} {seconds_text(length)}", fontsize=9.5, color=INK, ha="center", va="bottom")
    _draw_events(axes, timeline, offsets, points_per_second, points_per_lane)
    _draw_flights(axes, timeline, offsets, points_per_second, points_per_lane)
    _label(axes, timeline, offsets, points_per_lane)


def _rectangle(left: float, right: float, top: float, bottom: float) -> tuple[tuple[float, float], ...]:
    return (left, top), (right, top), (right, bottom), (left, bottom)


def _draw_events(axes: Axes, timeline: Timeline, offsets: dict[str, float], points_per_second: float, points_per_lane: float) -> None:
    from matplotlib.collections import PolyCollection

    colours = rank_colours(timeline.num_ranks)
    groups: dict[tuple[str, int], list] = defaultdict(list)
    for event in timeline.events:
        left, right = offsets[event.direction] + event.start, offsets[event.direction] + event.stop
        group = ("attend", event.owner) if event.kind == "attend" and event.owner is not None else (_group(event), -1)
        groups[group].append(_rectangle(left, right, event.rank + _BAR[0], event.rank + _BAR[1]))
        text = f"{_visitor(event)}" if group[0] == "attend" else "waits" if group[0] == "waits" else ""
        size = min(9.0, 0.34 * points_per_lane, (right - left) * points_per_second / (0.74 * max(1, len(text))))
        if text and size >= _SMALLEST_LABEL:
            colour = text_on(colours[group[1]]) if group[0] == "attend" else "#555555"
            box = None if group[0] == "attend" else {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.12"}
            axes.text(
                (left + right) / 2,
                event.rank + sum(_BAR) / 2,
                text,
                fontsize=size,
                color=colour,
                ha="center",
                va="center_baseline",
                bbox=box,
            )
    for (name, owner), polygons in sorted(groups.items()):
        style = {"facecolors": colours[owner], "edgecolors": "white", "linewidths": min(0.5, 0.02 * points_per_lane)}
        if name == "waits":
            style = {"facecolors": "white", "edgecolors": "#B5B5B5", "linewidths": 0.4, "hatch": "/////"}
        elif name == "beside":
            style = {"facecolors": BESIDE, "edgecolors": BESIDE, "linewidths": 0.2}
        gid = f"{name} of visitors from {owner}" if name == "attend" else name
        axes.add_collection(PolyCollection(polygons, gid=gid, zorder=1.5, **style), autolim=False)


def _group(event: Event) -> str:
    return "waits" if event.kind == "wait" else "beside"


def _visitor(event: Event) -> str:
    """`kv3`, or `q3` where queries visit."""
    q, kv = (part.split("[")[0] for part in event.label.split("+")[0].split("×"))
    return q if kv[-len(str(event.rank)) :] == str(event.rank) and q != f"q{event.rank}" else kv


def _draw_flights(axes: Axes, timeline: Timeline, offsets: dict[str, float], points_per_second: float, points_per_lane: float) -> None:
    from matplotlib.collections import PolyCollection

    colours = rank_colours(timeline.num_ranks)
    groups: dict[tuple[int, bool], list] = defaultdict(list)
    for rank in range(timeline.num_ranks):
        coming = [flight for flight in timeline.flights if flight.target == rank]
        places = [(offsets[flight.direction] + flight.start, offsets[flight.direction] + flight.stop) for flight in coming]
        rows = rows_of(places)
        height = (_ARRIVALS[1] - _ARRIVALS[0]) / (max(rows, default=0) + 1)
        for flight, (left, right), row in zip(coming, places, rows, strict=True):
            # What is too short to be seen is drawn a point wide.
            right = max(right, left + 1 / points_per_second)
            top = rank + _ARRIVALS[0] + row * height
            tip = min((right - left) / 2, 4 / points_per_second)
            middle, bottom = top + 0.45 * height, top + 0.9 * height
            shape = ((left, top), (right - tip, top), (right, middle), (right - tip, bottom), (left, bottom))
            groups[(flight.owner, flight.home)].append(shape)
            text = f"{flight.label.split('[')[0]} from r{flight.source}"
            size = min(7.5, 0.8 * height * points_per_lane, (right - left - tip) * points_per_second / (0.62 * len(text)))
            if size >= _SMALLEST_LABEL:
                colour = INK if flight.home else text_on(colours[flight.owner])
                axes.text((left + right - tip) / 2, middle, text, fontsize=size, color=colour, ha="center", va="center_baseline")
    for (owner, home), polygons in sorted(groups.items()):
        face = "white" if home else colours[owner]
        gid = f"{'results' if home else 'inputs'} of {owner} under way"
        axes.add_collection(
            PolyCollection(polygons, facecolors=face, edgecolors=colours[owner], linewidths=0.8 if home else 0.0, gid=gid), autolim=False
        )


def _label(axes: Axes, timeline: Timeline, offsets: dict[str, float], points_per_lane: float) -> None:
    from matplotlib.ticker import MaxNLocator

    middle = sum(_BAR) / 2
    lanes = label_ranks(axes, timeline.num_ranks, middle, points_per_lane)
    axes.tick_params(axis="x", length=2, labelsize=8, colors=_FAINT, pad=2)
    # Time begins anew in each direction, at the same distance between its marks.
    places = MaxNLocator(12).tick_values(0, axes.get_xlim()[1])
    apart = places[1] - places[0]
    ticks = [(offsets[name] + i * apart, i * apart) for name in DIRECTIONS for i in range(int(timeline.seconds[name] / apart) + 1)]
    border = offsets["backward"]
    ticks = [(place, seconds) for place, seconds in ticks if not border - 0.6 * apart < place < border or not seconds]
    axes.set_xticks([place for place, _ in ticks], [seconds_text(seconds) for _, seconds in ticks])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    if points_per_lane >= 12:
        total = sum(timeline.seconds.values())
        for lane in lanes:
            busy = sum(event.seconds for event in timeline.events if event.rank == lane and event.kind != "wait")
            text = f"{percent(busy / total) if total else '0%'} busy"
            axes.text(1.01, lane + middle, text, transform=axes.get_yaxis_transform(), fontsize=8, color="#444444", va="center")


def _sentences(story: Story) -> list[tuple[str, list[str]]]:
    parts = [("hidden", story.hidden), ("waiting", story.waiting), ("held up", story.held_up)]
    parts += [("to change" if index == 0 else "", text) for index, text in enumerate(story.change)]
    parts += [("mind", text) for text in story.caveats]
    return [(name, textwrap.wrap(text, 158)) for name, text in parts]


def _write(figure: Figure, trace: Trace, story: Story, height: float, sentences: list[tuple[str, list[str]]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    case, setting = trace.case, trace.setting
    hidden = story.measured.hidden_share
    title = f"{case.title}: " + ("nothing travels" if hidden is None else f"{percent(hidden)} of the communication hidden")
    facts = (
        f"{count_text(case.num_ranks)} ranks, {count_text(case.length)} positions, {case.heads}/{case.kv_heads} heads of {case.head_dim}, "
        f"{case.dtype}, {setting.kernel} on {setting.device}, {setting.transport}"
    )
    left = 0.25 / _WIDTH
    figure.text(left, 1 - 0.30 / height, title, fontsize=min(16, 900 / len(title)), fontweight="bold", color=INK, va="center")
    figure.text(left, 1 - 0.58 / height, facts, fontsize=9.5, color=_FAINT, va="center")
    inches = height - _FOOT - _LINE * sum(len(lines) for _, lines in sentences)
    for name, lines in sentences:
        colour = "#A33B00" if name == "mind" else INK
        figure.text(left, 1 - inches / height, name, fontsize=9, fontweight="bold", color=colour, va="center")
        for line in lines:
            figure.text(left + 0.85 / _WIDTH, 1 - inches / height, line, fontsize=9, color=colour, va="center")
            inches += _LINE
    visiting = sorted({_visitor(event).rstrip("0123456789") for event in trace.predicted.events if event.kind == "attend"})
    whose = " or ".join({"kv": "keys", "k": "keys", "v": "values", "q": "queries"}[kind] for kind in visiting) or "keys"
    entries: list[Patch | Line2D] = [
        Patch(facecolor=rank_colours(case.num_ranks)[0], label=f"computes with the {whose} of the rank so coloured")
    ]
    entries.append(Patch(facecolor=BESIDE, label="packs, posts, merges, casts"))
    entries.append(Patch(facecolor="white", edgecolor="#B5B5B5", hatch="/////", label="waits"))
    arrow = {"marker": ">", "linestyle": "none", "markersize": 6}
    entries.append(Line2D([], [], color=_FAINT, label="on its way to the rank above it", **arrow))
    entries.append(Line2D([], [], color=INK, markerfacecolor="white", label="a result on its way home", **arrow))
    figure.legend(
        handles=entries, loc="lower left", bbox_to_anchor=(0.12 / _WIDTH, 0.03 / height), ncols=len(entries), frameon=False, fontsize=9,
        handlelength=1.4, handleheight=1.1, columnspacing=1.3, handletextpad=0.5,
    )  # fmt: skip
