"""Ring attention: keys and values travel round the ring, one rank a step, while each rank attends to the visitor.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2310.01889), Algorithm 1: at step s rank r
attends its queries to the shard of rank (r − s) mod N. The last hop, which the reference implementation makes and nobody reads, is
not sent. In the backward dK and dV travel with K and V, in the accumulator's precision, and make one last hop home.

Under a mask a shard travels only as far as it is read, only the part that is still read ahead, and past ranks that read nothing of it.
Layouts make of this one schedule the contiguous ring, the zigzag ring, and Striped Attention (2311.09431).
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Piece, Schedule, ScheduleBuilder
from ringspan.strategies.common import Schedules, block, hull


def ring(layout: Layout, mask: Mask) -> Schedules:
    """Forward and backward schedules of the ring for `layout` and `mask`."""
    return Schedules(_forward(layout, mask), _backward(layout, mask))


def _visits(layout: Layout, mask: Mask, owner: int) -> list[tuple[int, int, Piece, Piece]]:
    """(hops, rank, queries, keys) for each rank that reads the shard of `owner`, in the order in which it passes them."""
    visits = []
    for hops in range(layout.num_ranks):
        rank = (owner + hops) % layout.num_ranks
        pieces = block(layout, mask, rank, owner)
        if pieces is not None:
            visits.append((hops, rank, *pieces))
    return visits


def _walk(builder: ScheduleBuilder, owner: int, visits: list[tuple[int, int, Piece, Piece]]) -> None:
    """The shard of `owner` goes from reader to reader; what goes on from each is what is still read ahead."""
    here, since = owner, 0
    for index, (hops, rank, q, kv) in enumerate(visits):
        if rank != owner:
            builder.transfer(hull([visit[3] for visit in visits[index:]]), here, rank, posted=since, due=hops)
        builder.attend(rank, hops, q, kv)
        here, since = rank, hops


def _forward(layout: Layout, mask: Mask) -> Schedule:
    builder = ScheduleBuilder("ring", "forward", layout.shard_lengths)
    for owner in range(layout.num_ranks):
        _walk(builder, owner, _visits(layout, mask, owner))
    return builder.build()


def _backward(layout: Layout, mask: Mask) -> Schedule:
    builder = ScheduleBuilder("ring", "backward", layout.shard_lengths)
    for owner in range(layout.num_ranks):
        visits = _visits(layout, mask, owner)
        _walk(builder, owner, visits)
        # The owner's own part waits at home; the others' rides behind the shard, one step later, growing at each reader.
        away = [visit for visit in visits if visit[1] != owner]
        for index, (hops, rank, _, _) in enumerate(away):
            grown = hull([visit[3] for visit in away[: index + 1]])
            rides = Piece("dkv", owner, grown.start, grown.stop)
            target, due = (away[index + 1][1], away[index + 1][0] + 1) if index + 1 < len(away) else (owner, hops + 2)
            builder.transfer(rides, rank, target, posted=hops + 1, due=due)
            builder.combine(target, due, rides, rank)
    return builder.build()
