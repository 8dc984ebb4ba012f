"""What a trace is made of: what each rank does when, and what travels when. Measured or predicted, it is the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

DIRECTIONS: tuple[str, ...] = ("forward", "backward")
COMPUTING = frozenset({"pack", "post", "attend", "merge", "cast"})
"""The kinds of event in which a rank works; `wait` is the other."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one rank does from `start` to `stop`, in seconds from the beginning of its direction.

    Attributes:
        direction: `forward` or `backward`.
        rank: whose.
        step: of the schedule; −1 before the first, the number of steps after the last.
        kind: one of `pack`, `post`, `attend`, `merge`, `wait`, `cast`.
        label: in words: `q0[0:512]×kv3[0:512]`.
        owner: the rank whose piece is visiting; None where none does.
        start: of it.
        stop: of it.
        pairs: how many pairs an attend computes.
        batch: of a wait, which batch of this rank's transfers it waits for; −1 for none.
    """

    direction: str
    rank: int
    step: int
    kind: str
    label: str
    owner: int | None
    start: float
    stop: float
    pairs: int = 0
    batch: int = -1

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Flight:
    """A piece under way from `source` to `target`.

    Attributes:
        direction: `forward` or `backward`.
        step: in which it is posted.
        label: of the piece: `kv3[0:512]`, or `heads` where positions are exchanged for heads.
        owner: the rank whose piece it is.
        source: who sends.
        target: who receives.
        size: bytes.
        ready: when both ends had posted it.
        start: when it is known to be moving.
        stop: when it has arrived.
        home: whether it is a result on its way home.
        source_batch: which batch of the sender's transfers it belongs to.
        target_batch: which of the receiver's.
    """

    direction: str
    step: int
    label: str
    owner: int
    source: int
    target: int
    size: int
    ready: float
    start: float
    stop: float
    home: bool
    source_batch: int = -1
    target_batch: int = -1


@dataclass(frozen=True)
class Timeline:
    """One forward and one backward; in each, time begins at 0 when the first rank begins.

    Attributes:
        num_ranks: how many ranks there are.
        num_steps: of each direction's schedule.
        events: of all ranks, in the order of their time.
        flights: everything that travels.
    """

    num_ranks: int
    num_steps: dict[str, int]
    events: tuple[Event, ...]
    flights: tuple[Flight, ...]

    def of(self, direction: str, rank: int | None = None) -> list[Event]:
        """The events of one direction, of one rank or all."""
        return [event for event in self.events if event.direction == direction and rank in (None, event.rank)]

    @cached_property
    def seconds(self) -> dict[str, float]:
        """By direction, until the last rank is done."""
        return {
            direction: max((event.stop for event in self.events if event.direction == direction), default=0.0) for direction in DIRECTIONS
        }

    def step_seconds(self, direction: str) -> dict[int, float]:
        """For each step how long it lasts on average over the ranks, waiting for the next one included."""
        totals: dict[int, float] = {}
        for rank in range(self.num_ranks):
            reached = 0.0
            ends: dict[int, float] = {}
            for event in self.of(direction, rank):
                ends[event.step] = max(ends.get(event.step, 0.0), event.stop)
            for step in sorted(ends):
                totals[step] = totals.get(step, 0.0) + max(0.0, ends[step] - reached) / self.num_ranks
                reached = max(reached, ends[step])
        return dict(sorted(totals.items()))


Interval = tuple[float, float]


def union(intervals: list[Interval]) -> list[Interval]:
    """The same time in intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, stop in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def common(first: list[Interval], second: list[Interval]) -> float:
    """How long both are: the length of the intersection of two results of `union`."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def length(intervals: list[Interval]) -> float:
    """Of a result of `union`."""
    return sum(stop - start for start, stop in intervals)
