"""The picture of a trace, by its structure: two panels, every part drawn, the words below."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ringspan.errors import RingspanError
from ringspan.trace import Trace, TraceCase, tell
from ringspan.viz.trace_picture import draw_trace, trace_figure
from tests.trace.support import trace_with


def drawn(axes: Axes, name: str) -> int:
    """How many polygons the collections have whose name begins with `name`."""
    return sum(len(collection.get_paths()) for collection in axes.collections if (collection.get_gid() or "").startswith(name))


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


@pytest.fixture(scope="module", params=["ring", "pass_query", "ulysses"])
def trace(request: pytest.FixtureRequest) -> Trace:
    return trace_with(TraceCase(num_ranks=4, strategy=request.param, length=61, heads=4, kv_heads=4, head_dim=8), lambda group: group)


def test_measured_stands_above_predicted_on_one_axis_and_every_part_is_drawn(trace: Trace):
    figure = trace_figure(trace, tell(trace))
    measured, predicted = figure.axes
    assert (measured.get_label(), predicted.get_label()) == ("measured", "predicted")
    assert measured.get_position().y0 > predicted.get_position().y1
    assert measured.get_xlim() == predicted.get_xlim()
    for axes, timeline in ((measured, trace.measured), (predicted, trace.predicted)):
        kinds = [event.kind for event in timeline.events]
        assert drawn(axes, "attend") == kinds.count("attend")
        assert drawn(axes, "waits") == kinds.count("wait")
        assert drawn(axes, "beside") == len(kinds) - kinds.count("attend") - kinds.count("wait")
        assert drawn(axes, "inputs") + drawn(axes, "results") == len(timeline.flights)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["r0", "r1", "r2", "r3"]


def test_the_words_are_below_and_the_title_says_what_was_hidden(trace: Trace):
    story = tell(trace)
    said = texts(trace_figure(trace, story))
    assert "of the communication hidden" in said
    for name in ("Measured", "Predicted", "hidden", "waiting", "held up", "to change", "mind"):
        assert name in said
    assert story.held_up.split(",")[0][:60] in said


def test_the_legend_names_what_visits(trace: Trace):
    (legend,) = trace_figure(trace, tell(trace)).legends
    labels = [text.get_text() for text in legend.get_texts()]
    expected = "keys or queries" if trace.case.strategy == "pass_query" else "keys"
    assert labels[0] == f"computes with the {expected} of the rank so coloured"


def test_nothing_is_written_outside_the_picture(trace: Trace):
    figure = trace_figure(trace, tell(trace))
    figure.canvas.draw()
    width, height = figure.bbox.width, figure.bbox.height
    for text in (*figure.texts, *figure.legends[0].get_texts()):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= width, text.get_text()
        assert 0 <= box.y0 <= box.y1 <= height, text.get_text()


def test_a_rank_alone_and_many_ranks_are_drawn(tmp_path: Path):
    for ranks in (1, 12):
        trace = trace_with(TraceCase(num_ranks=ranks, length=24, heads=2, kv_heads=2, head_dim=8), lambda group: group)
        draw_trace(trace, tell(trace), tmp_path / f"{ranks}.png")
        assert (tmp_path / f"{ranks}.png").read_bytes().startswith(b"\x89PNG")


def test_a_path_that_is_no_png_is_refused(trace: Trace, tmp_path: Path):
    with pytest.raises(RingspanError, match="Pictures are PNG files"):
        draw_trace(trace, tell(trace), tmp_path / "trace.svg")
