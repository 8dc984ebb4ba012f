"""Pass-Q: queries travel round the ring, keys and values stay, and partial results go home in one all-to-all.

"Context Parallelism for Scalable Million-Token Inference" (2411.01783), pass-Q: at step s rank r attends the queries of rank (r − s) mod N
to its own keys; at the end every rank sends each owner its partial output and lse, which the owner merges in the order of the ranks.
Cheaper than moving keys where there are few new tokens and many cached ones (equation 1 there). In the backward dO travels with the
queries, dK and dV never leave home, and dQ goes straight to its owner.
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Piece, ScheduleBuilder
from ringspan.strategies.common import Schedules, query_visits, straight_backward, walk


def pass_query(layout: Layout, mask: Mask) -> Schedules:
    """Forward and backward schedules of pass-Q for `layout` and `mask`."""
    num_ranks = layout.num_ranks
    builder = ScheduleBuilder("pass_query", "forward", layout.shard_lengths)
    for owner in range(num_ranks):
        visits = query_visits(layout, mask, owner, [(hops, (owner + hops) % num_ranks) for hops in range(num_ranks)])
        walk(builder, visits, ("q",), start=(0, owner))
        for visit in visits:
            if visit.rank != owner:
                part = Piece("o", owner, visit.q.start, visit.q.stop)
                builder.transfer(part, visit.rank, owner, posted=num_ranks, due=num_ranks + 1)
                builder.combine(owner, num_ranks + 1, part, visit.rank)
    forward = builder.build()
    return Schedules(forward, straight_backward(forward), layout)
