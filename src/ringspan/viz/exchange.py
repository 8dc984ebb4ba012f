"""Two-dimensional attention's bytes: the exchange of positions for heads, and the inner schedule run once by each context group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ringspan.geometry import Grid, Layout, head_shares
from ringspan.schedule import PieceBytes, Schedule, traffic


def sizes_of_places(grid: Grid, sizes: PieceBytes) -> tuple[PieceBytes, ...]:
    """For each place in a head group, the weight of a position of its share of the heads."""
    shares = head_shares(sizes.heads, sizes.kv_heads, grid.degree)
    return tuple(replace(sizes, heads=share.heads, kv_heads=share.kv_heads) for share in shares)


def two_dimensional_links(schedule: Schedule, grid: Grid, layout: Layout, sizes: PieceBytes) -> Mapping[tuple[int, int], int]:
    """`{(source, target): bytes}` of the exchange before `schedule`, of the schedule, and of the exchange after it."""
    links: Counter[tuple[int, int]] = Counter()
    places = sizes_of_places(grid, sizes)
    for place, own in enumerate(places):
        members = grid.context_group(place)
        for (source, target), size in traffic(schedule, own).items():
            links[members[source], members[target]] += size
    # Before: q, k and v, in the backward dO. After: out, in the backward dq, dk and dv. Gradients keep their tensor's precision.
    moved = [(place.of("q"), place.of("kv")) for place in places]
    for group in range(grid.num_groups):
        members = grid.head_group(group)
        for here, source in enumerate(members):
            for there, target in enumerate(members):
                if here != there:
                    (q_there, kv_there), (q_here, kv_here) = moved[there], moved[here]
                    forward = schedule.direction == "forward"
                    before = layout.shard_length(source) * (q_there + kv_there if forward else q_there)
                    after = layout.shard_length(target) * (q_here if forward else q_here + kv_here)
                    links[source, target] += before + after
    return {link: size for link, size in links.items() if size}
