"""Ring Self-Attention: two rings with the scores kept between them. The historical baseline, for comparison.

Li et al., "Sequence Parallelism: Long Sequence Training from System Perspective" (2105.13120): keys go round once and leave each rank with
its queries' scores against the whole sequence, an ordinary softmax follows, and values go round once. Memory grows with the shard times the
whole length, which is what the online softmax of Ring Attention did away with. A forward sends K and V once round, 2(N − 1) shards; the
published backward sends them again and all-reduces dK and dV at full length, 6(N − 1) shards; here dK and dV ride home behind K and V,
4(N − 1).
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Piece, ScheduleBuilder
from ringspan.strategies.common import Schedules, Visit, key_visits, ride_home, walk


def ring_self_attention(layout: Layout, mask: Mask) -> Schedules:
    """Forward and backward schedules: one ring for keys and one for values, values first on the way back."""
    forward = ScheduleBuilder("ring_self_attention", "forward", layout.shard_lengths)
    backward = ScheduleBuilder("ring_self_attention", "backward", layout.shard_lengths)
    for owner in range(layout.num_ranks):
        _turn(forward, layout, mask, owner, "k", 0)
        _turn(forward, layout, mask, owner, "v", layout.num_ranks)
        for kind, first in (("v", 0), ("k", layout.num_ranks)):
            visits = _turn(backward, layout, mask, owner, kind, first)
            ride_home(backward, owner, visits, f"d{kind}")
    return Schedules(forward.build(), backward.build(), layout)


def _turn(builder: ScheduleBuilder, layout: Layout, mask: Mask, owner: int, kind: str, first: int) -> list[Visit]:
    """The keys or the values of `owner` go round once, from step `first` on."""
    stops = [(first + hops, (owner + hops) % layout.num_ranks) for hops in range(layout.num_ranks)]
    visits = [
        Visit(visit.step, visit.rank, visit.q, Piece(kind, owner, visit.kv.start, visit.kv.stop))
        for visit in key_visits(layout, mask, owner, stops)
    ]
    walk(builder, visits, (kind,), start=(first, owner))
    return visits
