"""Direct attention: each rank fetches exactly the keys that its queries read, straight from their owners.

No rank forwards what it does not read, and the gaps between the spans that it reads are not sent either: never more than the ring, and less
wherever a ring would carry keys past ranks that read other parts of them, as under zigzag shards and sparse masks. Under a sliding window
over contiguous shards only the neighbours' tails travel, as in a ring that stops where nobody reads on. It is the group-cast of
MagiAttention, written as a schedule. Gradients of exactly these spans go straight home.
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask, tiles
from ringspan.schedule import Piece, ScheduleBuilder
from ringspan.strategies.common import Schedules, block, straight_backward


def direct(layout: Layout, mask: Mask) -> Schedules:
    """Forward and backward schedules: at step s a rank attends to the s-th shard, going back round the ring, of which it reads anything."""
    num_ranks = layout.num_ranks
    builder = ScheduleBuilder("direct", "forward", layout.shard_lengths)
    for rank in range(num_ranks):
        if (own := block(layout, mask, rank, rank)) is not None:
            builder.attend(rank, 0, *own)
        step = 1
        for hops in range(1, num_ranks):
            owner = (rank - hops) % num_ranks
            pieces = block(layout, mask, rank, owner)
            if pieces is None:
                continue
            spans = read_spans(layout, mask, rank, owner)
            for kv in spans:
                builder.transfer(kv, owner, rank, posted=step - 1, due=step)
            builder.attend(rank, step, pieces[0], *spans)
            step += 1
    forward = builder.build()
    return Schedules(forward, straight_backward(forward), layout)


def read_spans(layout: Layout, mask: Mask, q_rank: int, k_rank: int) -> list[Piece]:
    """The disjoint spans of the keys of `k_rank` that the queries of `q_rank` read, none of them touching another."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((tile.k_start, tile.k_stop) for tile in tiles(layout, mask, q_rank, k_rank)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return [Piece("kv", k_rank, start, stop) for start, stop in merged]
