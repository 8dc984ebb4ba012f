"""Ring attention: keys and values travel round the ring, one rank a step, while each rank attends to the visitor.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2310.01889), Algorithm 1: at step s rank r
attends its queries to the shard of rank (r − s) mod N. The last hop, which the reference implementation makes and nobody reads, is
not sent. In the backward dK and dV travel with K and V, in the accumulator's precision, and make one last hop home.

Under a mask a shard travels only as far as it is read, only the part that is still read ahead, and past ranks that read nothing of it.
Layouts make of this one schedule the contiguous ring, the zigzag ring, and Striped Attention (2311.09431).

The backward may rotate queries instead, with dO and what its kernel needs, and bring dQ home (BurstAttention, 2403.09347): less traffic
where there are as many key heads as query heads.

In the forward each shard may travel in parts, which are attended one after the other. Where a shard is longer under way than its reader has
to compute before, the last part alone is waited for (cf. the chunks of DISTFLASHATTN and TokenRing); elsewhere it is a launch more.
"""

from __future__ import annotations

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.schedule import ScheduleBuilder
from ringspan.strategies.common import Schedules, key_visits, query_visits, ride_home, walk


def ring(layout: Layout, mask: Mask, rotate: str = "keys", parts: int = 1) -> Schedules:
    """Forward and backward schedules of the ring for `layout` and `mask`.

    Args:
        layout: who owns which positions.
        mask: what a query sees.
        rotate: what the backward rotates, `keys` or `queries`.
        parts: in how many parts a shard of keys travels in the forward.

    Raises:
        RingspanError: for another word than these two, or fewer parts than one.
    """
    if rotate not in ("keys", "queries"):
        raise RingspanError(f"ring with rotate={rotate!r}", "", "The backward rotates keys or queries", "rotate='keys'")
    if parts < 1:
        raise RingspanError(f"ring with parts={parts}", "", "A shard travels in one part or in several", "parts=1")
    forward = ScheduleBuilder("ring", "forward", layout.shard_lengths)
    backward = ScheduleBuilder("ring", "backward", layout.shard_lengths)
    for owner in range(layout.num_ranks):
        stops = [(hops, (owner + hops) % layout.num_ranks) for hops in range(layout.num_ranks)]
        visits = key_visits(layout, mask, owner, stops)
        walk(forward, [visit for visit in visits if visit.rank == owner], ("kv",), start=(0, owner))
        rows = layout.shard_length(owner)
        for part in range(parts):
            keys = rows * part // parts, rows * (part + 1) // parts
            away = [((hops - 1) * parts + part + 1, rank) for hops, rank in stops[1:]]
            walk(forward, key_visits(layout, mask, owner, away, keys), ("kv",), start=(0, owner))
        if rotate == "keys":
            walk(backward, visits, ("kv",), start=(0, owner))
            ride_home(backward, owner, visits)
        else:
            visits = query_visits(layout, mask, owner, stops)
            walk(backward, visits, ("q", "do"), start=(0, owner))
            ride_home(backward, owner, visits, "dq")
    return Schedules(forward.build(), backward.build(), layout)
