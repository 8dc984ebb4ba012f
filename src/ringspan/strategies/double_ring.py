"""The double ring: inner rings of w ranks turn under one outer transfer, so that a slow link has w steps to deliver.

Gu et al., "LoongTrain" (2406.18485), 2D attention's context-parallel half: N ranks are N/w inner rings of w. At outer step a, inner step
b, rank (g, p) attends to the shard born at (g − a, p − b). What a rank holds at the start of an outer step goes to its twin in the next
inner ring at once and is due w steps later; within the ring it goes round one rank a step. Put the ranks of one machine in one inner
ring. In the backward dK and dV ride each inner ring and cross to their owner once a ring.
"""

from __future__ import annotations

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.schedule import ScheduleBuilder
from ringspan.strategies.common import Schedules, Visit, hull, key_visits, ride_home, walk


def double_ring(layout: Layout, mask: Mask, window: int | None = None) -> Schedules:
    """Forward and backward schedules with inner rings of `window` ranks; if not given, the divisor of N next to √N.

    Raises:
        RingspanError: where `window` does not divide the number of ranks.
    """
    num_ranks = layout.num_ranks
    divisors = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    window = max(size for size in divisors if size * size <= num_ranks) if window is None else window
    if window not in divisors:
        raise RingspanError(
            f"double_ring with window={window} on {num_ranks} ranks",
            f"{num_ranks} has the divisors {', '.join(map(str, divisors))}",
            "Inner rings are of one size",
            f"window={min(divisors, key=lambda size: abs(size - window))}",
        )
    forward = ScheduleBuilder("double_ring", "forward", layout.shard_lengths)
    backward = ScheduleBuilder("double_ring", "backward", layout.shard_lengths)
    for owner in range(num_ranks):
        turns = _turns(layout, mask, owner, window)
        for builder in (forward, backward):
            _cross(builder, owner, turns)
        for _, _, visits in turns:
            ride_home(backward, owner, visits)
    return Schedules(forward.build(), backward.build(), layout)


def _turns(layout: Layout, mask: Mask, owner: int, window: int) -> list[tuple[int, int, list[Visit]]]:
    """(first step, entrance, visits) of each inner ring in which anyone reads the keys of `owner`, in the order of the outer ring."""
    ring, place = divmod(owner, window)
    num_rings = layout.num_ranks // window
    turns = []
    for outer in range(num_rings):
        base = (ring + outer) % num_rings * window
        stops = [(outer * window + inner, base + (place + inner) % window) for inner in range(window)]
        visits = key_visits(layout, mask, owner, stops)
        if visits:
            turns.append((*stops[0], visits))
    return turns


def _cross(builder: ScheduleBuilder, owner: int, turns: list[tuple[int, int, list[Visit]]]) -> None:
    """The outer ring: from entrance to entrance goes what is still read in this inner ring and beyond."""
    since, here = 0, owner
    for index, (step, entrance, visits) in enumerate(turns):
        if entrance != here:
            ahead = hull([visit.kv for _, _, later in turns[index:] for visit in later])
            builder.transfer(ahead, here, entrance, posted=since, due=step)
        walk(builder, visits, ("kv",), start=(step, entrance))
        since, here = step, entrance
