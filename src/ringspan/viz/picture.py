"""A schedule as a PNG: who computes which pair at which step, and how the ranks spend their time."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringspan.errors import RingspanError
from ringspan.schedule.draw import Timeline, is_result
from ringspan.viz.lanes import draw_lanes
from ringspan.viz.matrix import INK, MASKED_OUT, draw_matrix, shown_extent
from ringspan.viz.palette import rank_colours
from ringspan.viz.study import Study
from ringspan.viz.words import counted, short_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FAINT = "#5A5A5A"
# In inches.
_WIDTH = 10.0
_MATRIX = 4.1
_LEFT, _TOP, _BOTTOM = 0.68, 1.68, 0.52
_LANES_LEFT, _LANES_RIGHT = 5.42, 0.80
_DPI = 176


def draw_schedule(study: Study, path: str | Path, direction: str = "forward") -> None:
    """Writes the picture of `study` to `path`, a PNG of 1760 columns.

    Raises:
        RingspanError: where matplotlib is missing, or `path` is no PNG or cannot be written.
    """
    checked = check_picture_path(path)
    buffer = io.BytesIO()
    schedule_figure(study, direction).savefig(buffer, dpi=_DPI, facecolor="white", metadata={"Software": None})
    try:
        checked.write_bytes(buffer.getvalue())
    except OSError as error:
        raise _unwritable(checked, error.strerror or str(error)) from error


def check_picture_path(path: str | Path) -> Path:
    """`path`, if a picture can be drawn and written there: asked before any work is done. Leaves nothing behind.

    Raises:
        RingspanError: where matplotlib is missing, or `path` is no PNG or cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise RingspanError(
            f"picture {str(path)!r}", f"it ends in {path.suffix or 'nothing'}", "Pictures are PNG files", f"{path.stem or 'ring'}.png"
        )
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise RingspanError(
            f"picture {str(path)!r}", "matplotlib is not installed", "Pictures need the extra 'plot'", "pip install 'ringspan[plot]'"
        ) from error
    new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    return path


def _unwritable(path: Path, reason: str) -> RingspanError:
    return RingspanError(f"picture {str(path)!r}", reason, "A picture goes into a folder that exists and can be written", path.name)


def schedule_figure(study: Study, direction: str = "forward") -> Figure:
    """The picture of `study` as a matplotlib figure, with no screen and no global state."""
    # The object-oriented interface: pyplot would keep state and look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timeline = study.timeline(direction)
    lanes_height = min(max(_MATRIX - 0.35, 0.13 * study.num_lanes), 12.0)
    height = _TOP + max(_MATRIX, lanes_height + 0.35) + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)

    matrix = figure.add_axes((_LEFT / _WIDTH, 1 - (_TOP + _MATRIX) / height, _MATRIX / _WIDTH, _MATRIX / height), label="matrix")
    numbered = draw_matrix(matrix, study, direction, _MATRIX)
    lanes_width = _WIDTH - _LANES_LEFT - _LANES_RIGHT
    lanes = figure.add_axes(
        (_LANES_LEFT / _WIDTH, 1 - (_TOP + lanes_height) / height, lanes_width / _WIDTH, lanes_height / height), label="timeline"
    )
    draw_lanes(lanes, timeline, lanes_width, lanes_height, study.lane_letter)
    _write_titles(figure, study, direction, height, numbered)
    _add_legend(figure, study, direction, height)
    return figure


def _write_titles(figure: Figure, study: Study, direction: str, height: float, numbered: bool) -> None:
    timeline = study.timeline(direction)
    extent = shown_extent(study.lane_layout)
    groups = f" in {counted(study.num_lanes, 'head group')}" if study.schedules.grid is not None else ""
    facts = f"{counted(study.num_ranks, 'rank')}{groups}, {counted(study.layout.length, 'position')}, {direction}"
    apart = " (values)" if any(bar.kv.kind == "v" for bar in timeline.bars) else ""
    colours = f"Colour: the {'rank' if study.schedules.grid is None else 'head group'} that computes." + (
        f" Number: at which step{apart}." if numbered else ""
    )
    cut = f" The first {extent} positions." if extent < study.layout.length else ""
    left, middle, right = 0.25 / _WIDTH, (_LANES_LEFT - 0.4) / _WIDTH, 1 - 0.25 / _WIDTH

    def write(x: float, inches: float, text: str, size: float, **style: Any) -> None:
        figure.text(x, 1 - inches / height, text, fontsize=size, va="center", **style)

    title = f"{_shortened(study.title)}: idle {study.idle_fraction(direction):.0%}"
    # A bold letter is about 0.0096 inches wide for each point of its size, and one of the facts 0.085 inches.
    room = _WIDTH - 0.8 - 0.085 * len(facts)
    write(left, 0.36, title, min(17, room / (0.0096 * len(title))), fontweight="bold", color=INK)
    write(right, 0.36, facts, 10, color=_FAINT, ha="right")
    write(left, 0.80, f"Who computes which pair{', at which step' if numbered else ''}", 11.5, color=INK)
    write(left, 1.02, colours + cut, 9, color=_FAINT)
    write(middle, 0.80, f"The timeline: {_lasts(timeline)}", 11.5, color=INK)
    write(middle, 1.02, _reading(study, direction), 9, color=_FAINT)


def _lasts(timeline: Timeline) -> str:
    even = short_count(-(-sum(timeline.busy_per_rank) // timeline.num_ranks))
    length = f"{short_count(timeline.duration)} pair{'' if timeline.duration == 1 else 's'} long"
    if not timeline.gaps:
        return f"{length}, and nobody waits"
    return f"{length}; {even} if nobody waited" if even != short_count(timeline.duration) else f"{length}, and there is hardly a wait"


def _reading(study: Study, direction: str) -> str:
    """How the timeline reads, in the terms of what travels in it."""
    kinds = {flight.piece.kind for flight in study.timeline(direction).flights}
    visitors = " or ".join(word for kind, word in (("kv", "keys"), ("k", "keys"), ("v", "values"), ("q", "queries")) if kind in kinds)
    if not visitors:
        return "Bar: whose keys are computed with. Nothing travels."
    return f"Bar: whose {visitors} are visiting. Arrow: who is on the way."


def _shortened(title: str) -> str:
    return title if len(title) <= 62 else title[:61] + "…"


def _add_legend(figure: Figure, study: Study, direction: str, height: float) -> None:
    from matplotlib.patches import Patch

    colours = rank_colours(study.num_lanes)
    lanes = study.num_lanes
    shown = range(lanes) if lanes <= 8 else sorted({round(i * (lanes - 1) / 5) for i in range(6)})
    entries = [Patch(facecolor=colours[rank], label=f"{study.lane_letter}{rank}") for rank in shown]
    entries.append(Patch(facecolor=MASKED_OUT, label="masked out"))
    entries.append(Patch(facecolor="white", edgecolor="#B5B5B5", hatch="/////", label="waits for the slowest"))
    if any(is_result(flight.piece.kind) for flight in study.timeline(direction).flights):
        entries.append(Patch(facecolor="white", edgecolor=INK, label="a result on its way home"))
    figure.legend(
        handles=entries, loc="lower left", bbox_to_anchor=(0.12 / _WIDTH, 0.02 / height), ncols=len(entries),
        frameon=False, fontsize=9, handlelength=1.4, handleheight=1.1, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip
