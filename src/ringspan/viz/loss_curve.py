"""The loss of a training run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringspan.training.metrics import StepRecord

_SMOOTHING_PARTS = 40


def draw_loss_curve(records: Sequence[StepRecord], path: Path, *, unit: str, title: str) -> None:
    """Draws training and held-out loss over the steps of `records` into a PNG; beside it held-out loss by context, where it is known.

    The line of the right panel is the loss of the same tokens, given fewer than so many before them; the grey behind it is the loss of what
    lies at these positions.

    Args:
        unit: what one token is called on the axis: a byte, or a token.
    """
    # The object-oriented interface: pyplot would keep state and look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = [(record.step, record.loss) for record in records if record.loss is not None]
    held_out = [(record.step, record.validation_loss) for record in records if record.validation_loss is not None]
    measured = next((record for record in reversed(records) if record.validation_by_position), None)
    figure = Figure(figsize=(12 if measured else 8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 2 if measured else 1, 1)
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="training, each batch")
        window = max(1, len(losses) // _SMOOTHING_PARTS)
        if window > 1:
            axes.plot(steps, running_mean(losses, window), color="#1f4e8c", linewidth=1.8, label=f"training, mean of {window} steps")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="#c8553d", marker="o", markersize=5, linewidth=1.4, label="held-out text")
        axes.annotate(f"{losses[-1]:.2f}", (steps[-1], losses[-1]), textcoords="offset points", xytext=(6, 4), color="#c8553d", fontsize=11)
    axes.set_xlabel("optimizer step", fontsize=11)
    axes.set_ylabel(f"loss (nats per {unit})", fontsize=11)
    axes.set_title(title, fontsize=12, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if trained or held_out:
        axes.legend(frameon=False, fontsize=10)
    if measured:
        _draw_by_context(figure.add_subplot(1, 2, 2), measured.validation_by_position or (), measured.validation_by_context or (), unit)
    figure.savefig(path)


def _draw_by_context(axes: Any, ranges: Sequence[Sequence[float]], windows: Sequence[Sequence[float]], unit: str) -> None:
    grey, red = "#bbbbbb", "#c8553d"
    for index, (low, high, loss) in enumerate(ranges):
        label = "by position" if index == 0 else None
        axes.plot((max(low, 1), high), (loss, loss), color=grey if windows else red, linewidth=2.4, solid_capstyle="butt", label=label)
    if windows:
        most, losses = zip(*windows, strict=True)
        axes.plot(most, losses, color=red, marker="o", markersize=5, linewidth=1.6, label=f"by context: the same {unit}s, given fewer")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
    axes.set_xlabel(f"{unit}s before a {unit}", fontsize=11)
    axes.set_ylabel(f"held-out loss at the end (nats per {unit})", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the axes: the ranges may lie anywhere in them.
    axes.legend(frameon=False, fontsize=10, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window − 1` before it."""
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i + 1 - window) : i + 1]]]
