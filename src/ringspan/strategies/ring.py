"""Ring attention: keys and values travel round the ring, one rank a step, while each rank attends to the visitor.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2310.01889), Algorithm 1: at step s rank r
attends its queries to the shard of rank (r − s) mod N. The last hop, which the reference implementation makes and nobody reads, is
not sent. In the backward dK and dV travel with K and V, in the accumulator's precision, and make one last hop home.

Under a mask a shard travels only as far as it is read, only the part that is still read ahead, and past ranks that read nothing of it.
Layouts make of this one schedule the contiguous ring, the zigzag ring, and Striped Attention (2311.09431).
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask
from ringspan.schedule import ScheduleBuilder
from ringspan.strategies.common import Schedules, key_visits, ride_home, walk


def ring(layout: Layout, mask: Mask) -> Schedules:
    """Forward and backward schedules of the ring for `layout` and `mask`."""
    forward = ScheduleBuilder("ring", "forward", layout.shard_lengths)
    backward = ScheduleBuilder("ring", "backward", layout.shard_lengths)
    for owner in range(layout.num_ranks):
        stops = [(hops, (owner + hops) % layout.num_ranks) for hops in range(layout.num_ranks)]
        visits = key_visits(layout, mask, owner, stops)
        walk(forward, visits, "kv", start=(0, owner))
        walk(backward, visits, "kv", start=(0, owner))
        ride_home(backward, owner, visits)
    return Schedules(forward.build(), backward.build(), layout)
