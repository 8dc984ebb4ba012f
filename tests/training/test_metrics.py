"""Metrics are whole lines that a resumed run goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringspan.errors import RingspanError
from ringspan.training.metrics import MetricsFile, StepRecord, read_metrics
from ringspan.viz.loss_curve import _draw_by_context, draw_loss_curve, running_mean


def write(path: Path, steps: range, *, after_step: int | None) -> None:
    with MetricsFile(path, after_step=after_step) as metrics:
        for step in steps:
            metrics.write(StepRecord(step=step, loss=float(step)))


def test_a_resumed_curve_drops_the_steps_after_its_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 9), after_step=None)
    write(path, range(6, 8), after_step=5)
    assert [record.step for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_new_run_starts_a_new_curve(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 9), after_step=None)
    write(path, range(1, 3), after_step=None)
    assert [record.step for record in read_metrics(path)] == [1, 2]


def test_a_run_stopped_before_its_first_step_measures_step_0_again_and_has_it_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1), after_step=None)
    write(path, range(3), after_step=0)
    assert [record.step for record in read_metrics(path)] == [0, 1, 2]


def test_a_line_that_a_crash_cut_short_is_left_out_but_one_before_it_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), after_step=None)
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "lo')
    assert [record.step for record in read_metrics(path)] == [1, 2, 3]
    path.write_text('{"step"\n' + whole)
    with pytest.raises(RingspanError, match="line 1"):
        read_metrics(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named_with_the_step(tmp_path: Path):
    with MetricsFile(tmp_path / "metrics.jsonl", after_step=None) as metrics:
        metrics._stream.close()
        metrics._stream = open("/dev/full", "a")  # noqa: SIM115
        with pytest.raises(RingspanError, match=r"step 3 in .*No space left on device"):
            metrics.write(StepRecord(step=3, loss=1.0))


def test_only_what_was_measured_is_written(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, after_step=None) as metrics:
        metrics.write(StepRecord(step=0, validation_loss=5.5))
    assert path.read_text() == '{"step": 0, "validation_loss": 5.5}\n'


@pytest.mark.parametrize("num_steps", [0, 1, 200])
def test_the_loss_curve_is_a_picture_for_any_number_of_steps(tmp_path: Path, num_steps: int):
    records = [StepRecord(step=step, loss=5.0 / step, validation_loss=1.0 if step % 50 == 0 else None) for step in range(1, num_steps + 1)]
    draw_loss_curve(records, tmp_path / "loss.png", unit="byte", title="nano")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_the_same_tokens_by_context_are_a_line_before_what_lies_at_each_position():
    from matplotlib.figure import Figure

    ranges, windows = [(0, 16, 2.6), (16, 64, 2.2)], [(16, 2.5), (32, 2.3), (64, 2.2)]
    axes, alone = Figure().subplots(1, 2)
    _draw_by_context(axes, ranges, windows, "byte")
    first, second, line = axes.get_lines()
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 16], [2.6, 2.6]), "a logarithmic axis has no 0"
    assert list(second.get_xdata()) == [16, 64]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == windows
    assert line.get_color() != first.get_color() == second.get_color()
    _draw_by_context(alone, ranges, (), "byte")
    assert {each.get_color() for each in alone.get_lines()} == {line.get_color()}, "where it is all there is, it is not in the background"


def test_a_running_mean_looks_back_alone():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
