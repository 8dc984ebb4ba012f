"""DISTFLASHATTN's balanced schedule: ranks with little work compute for those with much, in half as many steps.

Li et al., "DISTFLASHATTN" (2310.03294), Algorithm 2, for contiguous shards under a causal mask: at step t = 1 … ⌊P/2⌋ rank p fetches the
keys of rank p − t and attends to them; where there are none (p < t) it is idle, and so it *helps*: it fetches the queries of the heavy
rank p − t + P, attends them to its own keys, and sends the partial result home. Blocks at a distance of up to P/2 are thus computed by
the queries' owner, the others by the keys' owner, under any layout and mask.

Erratum: the printed guard t ≠ ⌊P/2⌋ drops blocks for every odd P; the two roles meet in the same block only where 2t = P. No rank is
idle for odd P. For even P half of the ranks are in the last step, for one block each: P/2 idle blocks. What share that is depends on what
it is a share of:

    1/(2P)     of P² blocks, the time of the unbalanced ring: P steps of P ranks. The paper's figure.
    1/(P + 2)  of this schedule's own P (P/2 + 1) slots, every step counted alike.
    1/(P + 1)  of its time, P (P + 1)/2 blocks: the first step's blocks are triangles, half as long. (With c tokens a rank 1/(P + 1 + 1/c),
               since a triangle has its diagonal.)

For 8 ranks 6%, 10% and 11%. `ringspan show` prints the last, in pairs.
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Piece, ScheduleBuilder
from ringspan.strategies.common import Schedules, block, straight_backward


def balanced(layout: Layout, mask: Mask) -> Schedules:
    """Forward and backward schedules of DISTFLASHATTN for `layout` and `mask`."""
    num_ranks = layout.num_ranks
    builder = ScheduleBuilder("balanced", "forward", layout.shard_lengths)
    for rank in range(num_ranks):
        if (own := block(layout, mask, rank, rank)) is not None:
            builder.attend(rank, 0, *own)
        for step in range(1, num_ranks // 2 + 1):
            other = (rank - step) % num_ranks
            if (pieces := block(layout, mask, rank, other)) is not None:
                builder.transfer(pieces[1], other, rank, posted=step - 1, due=step)
                builder.attend(rank, step, *pieces)
            if 2 * step != num_ranks and (pieces := block(layout, mask, other, rank)) is not None:
                _help(builder, rank, step, *pieces)
    forward = builder.build()
    return Schedules(forward, straight_backward(forward), layout)


def _help(builder: ScheduleBuilder, helper: int, step: int, q: Piece, kv: Piece) -> None:
    """`helper` attends the queries of another rank to its own keys at `step` and sends the partial result home."""
    builder.transfer(q, q.owner, helper, posted=step - 1, due=step)
    builder.attend(helper, step, q, kv)
    part = Piece("o", q.owner, q.start, q.stop)
    builder.transfer(part, helper, q.owner, posted=step + 1, due=step + 2)
    builder.combine(q.owner, step + 2, part, helper)
