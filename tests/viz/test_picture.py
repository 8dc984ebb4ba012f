"""The picture, by its structure and its pixels."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ringspan.errors import RingspanError
from ringspan.schedule.draw import Flight, Piece, timeline
from ringspan.viz.lanes import Row, flight_rows, merged_gaps, scale
from ringspan.viz.matrix import MASKED_OUT, shown_extent
from ringspan.viz.palette import rank_colours
from ringspan.viz.picture import check_picture_path, draw_schedule, schedule_figure
from ringspan.viz.study import Study, study

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


@cache
def ring(layout: str) -> Study:
    return study("ring", layout=layout, length=32, num_ranks=4)


def axes_of(figure: Figure) -> tuple[Axes, Axes]:
    matrix, lanes = figure.axes
    assert (matrix.get_label(), lanes.get_label()) == ("matrix", "timeline")
    return matrix, lanes


def painted(axes: Axes, name: str) -> int:
    """How many polygons the collections have whose name begins with `name`."""
    return sum(len(collection.get_paths()) for collection in axes.collections if (collection.get_gid() or "").startswith(name))


def pixels(figure: Figure):
    """A function from a place on an axes, in its data, to the colour there."""
    figure.canvas.draw()
    image = figure.canvas.buffer_rgba()

    def at(axes: Axes, x: float, y: float) -> str:
        column, row = axes.transData.transform((x, y))
        return "#" + "".join(f"{image[image.shape[0] - 1 - int(row), int(column), channel]:02X}" for channel in range(3))

    return at


@pytest.mark.parametrize(
    ("layout", "tiles", "waits", "idle"), [("contiguous", 10, 3, "42%"), ("zigzag", 36, 0, "0%"), ("striped", 528, 6, "8%")]
)
def test_tiles_bars_waits_and_transfers_are_all_drawn(layout: str, tiles: int, waits: int, idle: str):
    shown = ring(layout)
    figure = schedule_figure(shown)
    matrix, lanes = axes_of(figure)
    assert painted(matrix, "computed by") == tiles
    steps = [text.get_text() for text in matrix.texts if not text.get_text().startswith("r")]
    assert len(steps) == tiles and set(steps) == {"0", "1", "2", "3"}
    assert painted(lanes, "visitors") == len(shown.timeline("forward").bars)
    assert painted(lanes, "waits") == waits == len(merged_gaps(shown.timeline("forward")))
    assert painted(lanes, "inputs") == len(shown.timeline("forward").flights)
    assert painted(lanes, "results") == 0
    assert any(text.get_text() == f"ring · {layout} · causal: idle {idle}" for text in figure.texts)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_every_pair_has_the_colour_of_the_rank_that_computes_it(layout: str):
    shown = ring(layout)
    figure = schedule_figure(shown)
    figure.set_dpi(200)
    matrix, _ = axes_of(figure)
    for text in matrix.texts:
        text.set_visible(False)
    at = pixels(figure)
    owner = {position: rank for rank in range(4) for position in shown.layout.positions(rank)}
    colours = rank_colours(4)
    for query in range(32):
        for key in range(32):
            # Off the middle, where no number stands.
            expected = colours[owner[query]] if key <= query else MASKED_OUT
            assert at(matrix, key + 0.3, query + 0.6) == expected, (query, key)


def test_bars_have_the_colour_of_the_visiting_keys_and_waits_are_not_filled():
    figure = schedule_figure(ring("contiguous"))
    at, (_, lanes) = pixels(figure), axes_of(figure)
    colours = rank_colours(4)
    for rank in range(4):
        for step, middle in enumerate((18, 68, 132, 196)):
            found = at(lanes, middle, rank - 0.36)
            assert found == colours[rank - step] if step <= rank else found not in colours


def test_the_backward_outlines_gradients_and_gives_empty_steps_a_place():
    shown = ring("zigzag")
    figure = schedule_figure(shown, "backward")
    _, lanes = axes_of(figure)
    flights = shown.timeline("backward").flights
    assert painted(lanes, "results") == sum(flight.piece.kind == "dkv" for flight in flights) > 0
    assert painted(lanes, "inputs") == sum(flight.piece.kind == "kv" for flight in flights)
    scaled = scale(shown.timeline("backward"))
    assert scaled.starts[-1] == pytest.approx(132 * (1 + 2 / 25), abs=1e-9)
    assert scaled.at(4, 132) == 132 < scaled.starts[5]
    assert "a result on its way home" in [text.get_text() for text in figure.legends[0].get_texts()]


def everything_written(figure: Figure) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text with its left, bottom, right and top, in pixels."""
    figure.canvas.draw()
    found = [*figure.texts, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    return [(text.get_text(), tuple(map(float, text.get_window_extent().extents))) for text in found if text.get_text()]


@pytest.mark.parametrize(
    ("strategy", "layout", "mask", "length", "ranks", "direction"),
    [
        ("ring", "contiguous", "causal", 32, 4, "forward"),
        ("balanced", "contiguous", "window:300&documents:700,900,400", 2000, 7, "backward"),
        ("all_gather", "zigzag", "full", 1_000_003, 16, "backward"),
        ("two_dimensional", "zigzag", "causal", 2**40, 8, "forward"),
        ("ring", "striped", "prefix:77", 1_000_000, 24, "forward"),
        ("ring", "zigzag", "causal", 1, 2, "backward"),
    ],
)
def test_no_word_runs_out_of_the_picture_or_into_another(strategy: str, layout: str, mask: str, length: int, ranks: int, direction: str):
    figure = schedule_figure(study(strategy, layout=layout, mask=mask, length=length, num_ranks=ranks), direction)
    written = everything_written(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for index, (text, (left, bottom, right, top)) in enumerate(written):
        assert left >= 0 and bottom >= 0 and right <= width and top <= height, f"{text!r} is cut off"
        for other, (other_left, other_bottom, other_right, other_top) in written[:index]:
            overlap = min(right, other_right) - max(left, other_left), min(top, other_top) - max(bottom, other_bottom)
            assert min(overlap) < 2, f"{text!r} runs into {other!r}"


def test_arrivals_that_overlap_get_rows_of_their_own():
    kv, dkv = Piece("kv", 0, 0, 4), Piece("dkv", 1, 0, 4)
    alone, long, inside, after = Flight(kv, 0, 1, 0, 1), Flight(kv, 0, 1, 1, 4), Flight(dkv, 2, 1, 2, 3), Flight(dkv, 2, 1, 3, 4)
    elsewhere = Flight(kv, 0, 2, 1, 4)
    assert flight_rows((after, elsewhere, inside, alone, long)) == [
        Row(alone, 0, 1),
        Row(long, 0, 2),
        Row(inside, 1, 2),
        Row(after, 1, 2),
        Row(elsewhere, 0, 1),
    ]


def test_a_wait_over_several_steps_is_one_wait():
    shown = ring("contiguous")
    assert merged_gaps(timeline(shown.schedules.forward, shown.layout, shown.mask)) == [
        (0, 1, 36, 3, 228),
        (1, 2, 100, 3, 228),
        (2, 3, 164, 3, 228),
    ]


def test_long_sequences_are_drawn_whole_unless_their_spans_have_gaps():
    assert shown_extent(study("ring", layout="zigzag", length=10**6, num_ranks=4).layout) == 10**6
    assert shown_extent(study("ring", layout="striped", length=128, num_ranks=4).layout) == 128
    assert shown_extent(study("ring", layout="striped", length=10**6, num_ranks=4).layout) == 64
    assert shown_extent(study("ring", layout="striped", length=10**6, num_ranks=40).layout) == 80


def test_the_file_is_a_png_of_1760_columns_and_the_same_each_time(tmp_path: Path):
    draw_schedule(ring("zigzag"), tmp_path / "one.png")
    draw_schedule(ring("zigzag"), tmp_path / "two.png")
    data = (tmp_path / "one.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 1760
    assert data == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_the_pictures_of_the_documentation_are_there(layout: str):
    data = (PICTURES / f"ring_{layout}.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 1760
    assert len(data) > 30_000


def test_a_path_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path):
    assert check_picture_path(tmp_path / "fine.png") == tmp_path / "fine.png"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder.png").mkdir()
    for path, message in [
        (tmp_path / "missing" / "x.png", "No such file or directory"),
        (tmp_path / "folder.png", "Is a directory"),
        (tmp_path / "x.pdf", "Pictures are PNG files. Try: x.png"),
        (tmp_path, "Pictures are PNG files"),
    ]:
        with pytest.raises(RingspanError, match=message):
            check_picture_path(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path):
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(RingspanError, match="No space left on device"):
        draw_schedule(ring("zigzag"), tmp_path / "full.png")


def test_a_missing_matplotlib_is_named_with_the_extra_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RingspanError, match=r"pip install 'ringspan\[plot\]'"):
        draw_schedule(ring("zigzag"), tmp_path / "x.png")


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path):
    program = f"""
import sys
from ringspan.viz import draw_schedule, study
assert "matplotlib" not in sys.modules
draw_schedule(study(length=8, num_ranks=2), {str(tmp_path / "x.png")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
