"""Tree attention: queries come to the keys, and partial results meet on the way home.

Shyam et al., "Tree Attention" (2408.04093): the result of a query is a reduction over the ranks that hold keys, and a reduction takes
log₂ N rounds in place of N − 1 hops. Every rank attends all queries that concern it to its own keys in one step; partials of one owner then
merge pairwise, ranks at an odd distance from home first, at each round twice as far. Made for decoding, where queries are few and already
everywhere: `ContextParallel.decode` does that with one maximum and one sum. Queries that live on one rank each, as here, are first sent to
where they are needed.
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Piece, ScheduleBuilder
from ringspan.strategies.common import Schedules, block, hull, straight_backward


def tree(layout: Layout, mask: Mask) -> Schedules:
    """Forward and backward schedules of tree attention for `layout` and `mask`."""
    builder = ScheduleBuilder("tree", "forward", layout.shard_lengths)
    for owner in range(layout.num_ranks):
        parts: dict[int, Piece] = {}
        for distance in range(layout.num_ranks):
            rank = (owner + distance) % layout.num_ranks
            pieces = block(layout, mask, owner, rank)
            if pieces is None:
                continue
            if distance:
                builder.transfer(pieces[0], owner, rank, posted=0, due=1)
                parts[distance] = Piece("o", owner, pieces[0].start, pieces[0].stop)
            builder.attend(rank, 1 if distance else 0, *pieces)
        _reduce(builder, owner, layout.num_ranks, parts)
    forward = builder.build()
    return Schedules(forward, straight_backward(forward), layout)


def _reduce(builder: ScheduleBuilder, owner: int, num_ranks: int, parts: dict[int, Piece]) -> None:
    """Round by round, the partial at distance d with lowest set bit `reach` goes to distance d − reach, until all are home at 0."""
    reach, step = 1, 2
    while parts:
        for distance in [distance for distance in sorted(parts) if distance & reach]:
            piece, nearer = parts.pop(distance), distance - reach
            source, target = (owner + distance) % num_ranks, (owner + nearer) % num_ranks
            builder.transfer(piece, source, target, posted=step, due=step + 1)
            builder.combine(target, step + 1, piece, source)
            if nearer:
                parts[nearer] = hull([piece, parts[nearer]]) if nearer in parts else piece
        reach, step = reach * 2, step + 1
