"""What a strategy sends over each link, the exchange of positions for heads included."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ringspan.geometry import Layout, head_shares
from ringspan.schedule import PieceBytes, traffic
from ringspan.strategies.common import Schedules


def link_bytes(
    schedules: Schedules, layout: Layout, sizes: PieceBytes, direction: str, return_lse: bool = False
) -> Counter[tuple[int, int]]:
    """Bytes over each link (source, target) in one direction of a strategy: what the transport's counters must show.

    Args:
        schedules: of the strategy.
        layout: of all ranks (in two-dimensional attention, before head groups are merged).
        sizes: of attention's tensors.
        direction: `forward` or `backward`.
        return_lse: whether lse is brought back too, where positions are exchanged for heads.
    """
    schedule = schedules.forward if direction == "forward" else schedules.backward
    grid = schedules.grid
    if grid is None:
        return Counter(traffic(schedule, sizes))
    shares = head_shares(sizes.heads, sizes.kv_heads, grid.degree)
    total: Counter[tuple[int, int]] = Counter()
    for place, share in enumerate(shares):
        if share.heads:
            members = grid.context_group(place)
            inner = traffic(schedule, replace(sizes, heads=share.heads, kv_heads=share.kv_heads))
            total.update({(members[source], members[target]): size for (source, target), size in inner.items()})
    width = sizes.batch * sizes.head_dim * sizes.element_bytes
    lse = sizes.batch * sizes.accumulator_bytes * return_lse
    for group in range(grid.num_groups):
        for source in grid.head_group(group):
            for target in grid.head_group(group):
                theirs, mine = shares[grid.place(target)], shares[grid.place(source)]
                # Inputs go to the rank that computes the head, results to the rank that owns the position.
                out, back = layout.shard_length(source), layout.shard_length(target)
                forward = out * (theirs.heads + 2 * theirs.kv_heads) * width + back * mine.heads * (width + lse)
                backward = out * theirs.heads * (width + lse) + back * (mine.heads + 2 * mine.kv_heads) * width
                if source != target:
                    total[(source, target)] += forward if direction == "forward" else backward
    return +total
