"""The drawn schedules that are kept as text: every strategy, 4 ranks, 16 positions, forward and backward.

A change of a schedule, of a layout or of the drawing shows here as a diff to be read. To keep the new drawings, from the repository's root:

    python -m tests.golden.drawings
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ringspan.geometry import Layout, Mask, causal, make_layout, sliding_window
from ringspan.schedule import Schedule
from ringspan.schedule.draw import draw, timeline
from ringspan.strategies import Schedules, make_schedules

HERE = Path(__file__).parent
RANKS, LENGTH, WEIGHTS = 4, 16, (1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Sample:
    """What is drawn: a strategy with its options under a layout and a mask."""

    strategy: str
    layout: str = "zigzag"
    options: dict[str, int | str] = field(default_factory=dict)
    mask: Mask = field(default_factory=causal)

    @property
    def title(self) -> str:
        """The strategy and its options."""
        return " ".join((self.strategy, *(f"{name}={value}" for name, value in self.options.items())))

    def file(self, direction: str) -> str:
        """The file that keeps it."""
        options = [f"{name}_{value}" for name, value in self.options.items()]
        mask = [] if self.mask == causal() else [self.mask.name.partition(":")[0]]
        return "_".join((self.strategy, *options, self.layout, *mask, direction)) + ".txt"


SAMPLES = (
    Sample("ring", "contiguous"),
    Sample("ring", "zigzag"),
    Sample("ring", "striped"),
    Sample("ring", "weighted"),
    Sample("ring", options={"rotate": "queries"}),
    Sample("all_gather"),
    Sample("all_gather", options={"stages": 2}),
    Sample("pass_query"),
    Sample("balanced", "contiguous"),
    Sample("double_ring", options={"window": 2}),
    Sample("direct"),
    Sample("direct", mask=sliding_window(2)),
    Sample("tree", "contiguous"),
    Sample("ulysses"),
    Sample("two_dimensional", options={"ulysses": 2}),
    Sample("two_dimensional", "striped", {"ulysses": 2, "placement": "context_first", "inner": "all_gather"}),
    Sample("ring_self_attention", "contiguous"),
)
"""Each under the layout that its paper has, or zigzag."""


def drawings() -> dict[str, str]:
    """File name to text."""
    found = {}
    for sample in SAMPLES:
        layout = make_layout(sample.layout, LENGTH, RANKS, WEIGHTS if sample.layout == "weighted" else None)
        schedules = make_schedules(sample.strategy, layout, sample.mask, **sample.options)
        for schedule in (schedules.forward, schedules.backward):
            found[sample.file(schedule.direction)] = drawing(sample, schedules, schedule, layout)
    return found


def drawing(sample: Sample, schedules: Schedules, schedule: Schedule, layout: Layout) -> str:
    """Who owns which position, the table of the schedule, and how many pairs each rank computes at each step."""
    owner = {position: rank for rank in range(layout.num_ranks) for position in layout.positions(rank)}
    owners = " ".join(str(owner[position]) for position in range(layout.length))
    pairs = [[0] * schedule.num_ranks for _ in range(schedule.num_steps)]
    for bar in timeline(schedule, schedules.layout, sample.mask).bars:
        pairs[bar.step][bar.rank] += bar.stop - bar.start
    work = "".join(f"{step:<4}" + "".join(f"{count:>5}" for count in row) + "\n" for step, row in enumerate(pairs))
    header = "step" + "".join(f"{f'r{rank}':>5}" for rank in range(schedule.num_ranks))
    title = f"{sample.title} {schedule.direction}, {layout.name}, {sample.mask}"
    return f"{title}\n\nowners of positions: {owners}\n{_head_groups(schedules)}\n{draw(schedule)}\npairs\n{header}\n{work}"


def _head_groups(schedules: Schedules) -> str:
    """Where ranks exchange positions for heads, whom each column stands for: its ranks compute the same for other heads."""
    grid = schedules.grid
    if grid is None:
        return ""
    groups = (f"r{group} is ranks {' '.join(map(str, grid.head_group(group)))}" for group in range(grid.num_groups))
    return f"head groups: {', '.join(groups)}\n"


if __name__ == "__main__":
    for file, text in drawings().items():
        (HERE / file).write_text(text, encoding="utf-8")
