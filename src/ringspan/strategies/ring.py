"""Ring attention: keys and values travel round the ring, one rank a step, while each rank attends to the visitor.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2310.01889), Algorithm 1: at step s rank r
attends its queries to the shard of rank (r − s) mod N. The last hop, which the reference implementation makes and nobody reads, is
not sent. In the backward dK and dV travel with K and V, in the accumulator's precision, and make one last hop home.

Under a mask a shard travels only as far as it is read, only the part that is still read ahead, and past ranks that read nothing of it.
Layouts make of this one schedule the contiguous ring, the zigzag ring, and Striped Attention (2311.09431).

The backward may rotate queries instead, with dO and what its kernel needs, and bring dQ home (BurstAttention, 2403.09347): less traffic
where there are as many key heads as query heads.
"""

from __future__ import annotations

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.schedule import ScheduleBuilder
from ringspan.strategies.common import Schedules, key_visits, query_visits, ride_home, walk


def ring(layout: Layout, mask: Mask, rotate: str = "keys") -> Schedules:
    """Forward and backward schedules of the ring for `layout` and `mask`; the backward rotates `keys` or `queries`.

    Raises:
        RingspanError: for another word than these two.
    """
    if rotate not in ("keys", "queries"):
        raise RingspanError(f"ring with rotate={rotate!r}", "", "The backward rotates keys or queries", "rotate='keys'")
    forward = ScheduleBuilder("ring", "forward", layout.shard_lengths)
    backward = ScheduleBuilder("ring", "backward", layout.shard_lengths)
    for owner in range(layout.num_ranks):
        stops = [(hops, (owner + hops) % layout.num_ranks) for hops in range(layout.num_ranks)]
        visits = key_visits(layout, mask, owner, stops)
        walk(forward, visits, ("kv",), start=(0, owner))
        if rotate == "keys":
            walk(backward, visits, ("kv",), start=(0, owner))
            ride_home(backward, owner, visits)
        else:
            visits = query_visits(layout, mask, owner, stops)
            walk(backward, visits, ("q", "do"), start=(0, owner))
            ride_home(backward, owner, visits, "dq")
    return Schedules(forward.build(), backward.build(), layout)
