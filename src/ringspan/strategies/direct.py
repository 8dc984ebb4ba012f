"""Direct attention: each rank fetches exactly the keys that its queries read, straight from their owners.

No rank forwards what it does not read, and the gaps between the spans that it reads are not sent either: never more than the ring, and less
wherever a ring would carry keys past ranks that read other parts of them, as under zigzag shards and sparse masks. Under a sliding window
over contiguous shards only the neighbours' tails travel, as in a ring that stops where nobody reads on. It is the group-cast of
MagiAttention, written as a schedule. Gradients of exactly these spans go straight home.

Shards of which all the same queries see all that they read may be attended in one kernel call (`shards_at_once`): then the queries are read
once, and what the shards give is added up inside the kernel and not in memory. It costs memory, since they visit together, and time where
they are longer under way than there is to compute meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask, tiles
from ringspan.geometry.span import split_evenly
from ringspan.schedule import Piece, Schedule, ScheduleBuilder
from ringspan.strategies.common import Schedules, block, hull, is_seen_whole, straight_backward


def direct(layout: Layout, mask: Mask, shards_at_once: int = 1) -> Schedules:
    """Forward and backward schedules: at each step a rank attends to the next shards of which it reads anything.

    One at a time they come in the order in which they are met going back round the ring. Where several come together, the fewest come first
    in the forward, so that little is waited for, and last in the backward, so that little goes home at the end.

    Args:
        layout: who owns which positions.
        mask: what a query sees.
        shards_at_once: the most that are attended together.

    Raises:
        RingspanError: for fewer shards at once than one.
    """
    if shards_at_once < 1:
        raise RingspanError(f"direct with shards_at_once={shards_at_once}", "", "A rank attends to at least one", "shards_at_once=1")
    groups = [_groups(layout, mask, rank, shards_at_once) for rank in range(layout.num_ranks)]
    forward, backward = (
        _schedule(layout, mask, [sorted(found, key=len, reverse=fewest_last) for found in groups]) for fewest_last in (False, True)
    )
    return Schedules(forward, straight_backward(backward), layout)


def _schedule(layout: Layout, mask: Mask, groups: Iterable[list[list[int]]]) -> Schedule:
    """The forward in which each rank attends to its groups of shards, one after the other."""
    builder = ScheduleBuilder("direct", "forward", layout.shard_lengths)
    for rank, found in enumerate(groups):
        if (own := block(layout, mask, rank, rank)) is not None:
            builder.attend(rank, 0, *own)
        for step, owners in enumerate(found, start=1):
            queries, spans = [], []
            for owner in owners:
                pieces = block(layout, mask, rank, owner)
                assert pieces is not None, "a group is of shards that are read"
                queries.append(pieces[0])
                spans += read_spans(layout, mask, rank, owner)
            for kv in spans:
                builder.transfer(kv, kv.owner, rank, posted=step - 1, due=step)
            builder.attend(rank, step, hull(queries), *spans)
    return builder.build()


def _groups(layout: Layout, mask: Mask, rank: int, at_once: int) -> list[list[int]]:
    """The owners of the shards that `rank` reads: together those of which all the same queries see all, at most `at_once` of them."""
    by_queries: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for owner in ((rank - hops) % layout.num_ranks for hops in range(1, layout.num_ranks)):
        if found := list(tiles(layout, mask, rank, owner)):
            joins = at_once > 1 and is_seen_whole(found, mask)
            by_queries[(found[0].q_start, found[0].q_stop) if joins else (owner,)].append(owner)
    return [
        [alike[index] for index in span] for alike in by_queries.values() for span in split_evenly(len(alike), -(-len(alike) // at_once))
    ]


def read_spans(layout: Layout, mask: Mask, q_rank: int, k_rank: int) -> list[Piece]:
    """The disjoint spans of the keys of `k_rank` that the queries of `q_rank` read, none of them touching another."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((tile.k_start, tile.k_stop) for tile in tiles(layout, mask, q_rank, k_rank)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return [Piece("kv", k_rank, start, stop) for start, stop in merged]
