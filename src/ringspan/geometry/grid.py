"""Two-dimensional groups of ranks: some share heads, the others share positions."""

from __future__ import annotations

from dataclasses import dataclass

from ringspan.errors import RingspanError
from ringspan.geometry.layout import Layout
from ringspan.geometry.span import Span

PLACEMENTS = ("head_first", "context_first")
"""Which ranks are neighbours in a `Grid`: those of a head group, or those of a context group."""


@dataclass(frozen=True)
class Grid:
    """`num_ranks` ranks as head groups of `degree` ranks; the i-th ranks of all head groups are a context group.

    Ranks of one head group hold the same positions after the exchange, each for its own heads; a context group runs the inner schedule.
    `head_first` makes neighbouring ranks a head group (all-to-all on the fastest links), `context_first` a context group. Four ranks,
    degree 2::

        head_first     head groups {0 1} {2 3}   context groups {0 2} {1 3}
        context_first  head groups {0 2} {1 3}   context groups {0 1} {2 3}
    """

    num_ranks: int
    degree: int
    placement: str = "head_first"

    def __post_init__(self) -> None:
        divisors = [size for size in range(1, self.num_ranks + 1) if self.num_ranks % size == 0]
        if self.degree not in divisors:
            raise RingspanError(
                f"head groups of {self.degree} on {self.num_ranks} ranks",
                f"{self.num_ranks} has the divisors {', '.join(map(str, divisors))}",
                "Head groups are of one size",
                f"{min(divisors, key=lambda size: abs(size - self.degree))}",
            )
        if self.placement not in PLACEMENTS:
            raise RingspanError(f"placement {self.placement!r}", f"the placements are {', '.join(PLACEMENTS)}", "", "head_first")

    @property
    def num_groups(self) -> int:
        """How many head groups there are: the ranks of the inner schedule."""
        return self.num_ranks // self.degree

    def group(self, rank: int) -> int:
        """The head group of `rank`: its rank in the inner schedule."""
        return rank // self.degree if self.placement == "head_first" else rank % self.num_groups

    def place(self, rank: int) -> int:
        """Which of its head group's ranks `rank` is: whose heads it computes."""
        return rank % self.degree if self.placement == "head_first" else rank // self.num_groups

    def rank_at(self, group: int, place: int) -> int:
        """The rank that is number `place` of head group `group`."""
        return group * self.degree + place if self.placement == "head_first" else place * self.num_groups + group

    def head_group(self, group: int) -> tuple[int, ...]:
        """The ranks of a head group, by place."""
        return tuple(self.rank_at(group, place) for place in range(self.degree))

    def context_group(self, place: int) -> tuple[int, ...]:
        """The ranks of a context group, by their rank in the inner schedule."""
        return tuple(self.rank_at(group, place) for group in range(self.num_groups))


def merge_groups(layout: Layout, grid: Grid) -> Layout:
    """The layout of the inner schedule: each head group owns what its ranks own, in the order of positions.

    Zigzag over N ranks becomes zigzag over the head groups.

    Raises:
        RingspanError: where a group's positions are no spans of one step (striped with neighbouring ranks in one head group).
    """
    shards = []
    for group in range(grid.num_groups):
        spans = sorted((span for rank in grid.head_group(group) for span in layout.shards[rank]), key=lambda span: span.start)
        shards.append(_coalesced(spans, layout, grid))
    return Layout(layout.name, layout.length, tuple(shards))


def _coalesced(spans: list[Span], layout: Layout, grid: Grid) -> tuple[Span, ...]:
    if not spans or spans[0].step == 1:
        result: list[Span] = []
        for span in spans:
            if result and result[-1].stop == span.start:
                result[-1] = Span(result[-1].start, span.stop)
            else:
                result.append(span)
        return tuple(result)
    step = layout.num_ranks // grid.degree
    expected = Span(spans[0].start, layout.length, step)
    if sum(len(span) for span in spans) != len(expected) or any((span.start - expected.start) % step for span in spans):
        raise RingspanError(
            f"layout {layout.name!r} with head groups of {grid.degree}, {grid.placement}",
            "a head group's positions are not evenly spaced",
            "Every rank's positions after the exchange are spans of one step",
            "placement='context_first' with 'striped', or layout='zigzag'",
        )
    return (expected,)


def rows_within(part: tuple[Span, ...], whole: tuple[Span, ...]) -> list[tuple[slice, slice]]:
    """Where the positions of `part` lie within `whole`: (rows of the part, rows of the whole), slices of equal length."""
    result = []
    offset = 0
    for span in part:
        base = 0
        for outer in whole:
            first, end = span.clip(outer.start, outer.last + 1)
            if first < end:
                start = base + (span.start + first * span.step - outer.start) // outer.step
                stride = span.step // outer.step
                result.append((slice(offset + first, offset + end), slice(start, start + (end - first - 1) * stride + 1, stride)))
            base += len(outer)
        offset += len(span)
    return result
