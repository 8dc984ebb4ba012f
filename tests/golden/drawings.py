"""The drawn schedules that are kept as text: ring under each layout, causal, 4 ranks, 16 positions, forward and backward.

A change of a schedule, of a layout or of the drawing shows here as a diff to be read. To keep the new drawings, from the repository's root:

    python -m tests.golden.drawings
"""

from __future__ import annotations

from pathlib import Path

from ringspan.geometry import Layout, Mask, causal, make_layout
from ringspan.schedule import Schedule
from ringspan.schedule.draw import draw, timeline
from ringspan.strategies import make_schedules

HERE = Path(__file__).parent
LAYOUTS = ("contiguous", "zigzag", "striped", "weighted")
RANKS, LENGTH, WEIGHTS = 4, 16, (1.0, 2.0, 3.0, 4.0)


def drawings() -> dict[str, str]:
    """File name to text."""
    found = {}
    for name in LAYOUTS:
        layout = make_layout(name, LENGTH, RANKS, WEIGHTS if name == "weighted" else None)
        schedules = make_schedules("ring", layout, causal())
        for schedule in (schedules.forward, schedules.backward):
            found[f"ring_{name}_{schedule.direction}.txt"] = drawing(schedule, layout, causal())
    return found


def drawing(schedule: Schedule, layout: Layout, mask: Mask) -> str:
    """Who owns which position, the table of the schedule, and how many pairs each rank computes at each step."""
    owner = {position: rank for rank in range(layout.num_ranks) for position in layout.positions(rank)}
    owners = " ".join(str(owner[position]) for position in range(layout.length))
    pairs = [[0] * schedule.num_ranks for _ in range(schedule.num_steps)]
    for bar in timeline(schedule, layout, mask).bars:
        pairs[bar.step][bar.rank] += bar.stop - bar.start
    work = "".join(f"{step:<4}" + "".join(f"{count:>5}" for count in row) + "\n" for step, row in enumerate(pairs))
    header = "step" + "".join(f"{f'r{rank}':>5}" for rank in range(schedule.num_ranks))
    title = f"{schedule.name} {schedule.direction}, {layout.name}, {mask}"
    return f"{title}\n\nowners of positions: {owners}\n\n{draw(schedule)}\npairs\n{header}\n{work}"


if __name__ == "__main__":
    for file, text in drawings().items():
        (HERE / file).write_text(text, encoding="utf-8")
