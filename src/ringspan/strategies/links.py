"""What a strategy sends over each link, the exchange of positions for heads included."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ringspan.geometry import Grid, Layout, head_shares, shared_keys
from ringspan.schedule import PieceBytes, traffic
from ringspan.strategies.common import Schedules

Links = Counter[tuple[int, int]]
"""Bytes by link (source, target)."""


def link_bytes(schedules: Schedules, layout: Layout, sizes: PieceBytes, direction: str, return_lse: bool = False) -> Links:
    """Bytes over each link (source, target) in one direction of a strategy: what the transport's counters must show.

    Args:
        schedules: of the strategy.
        layout: of all ranks (in two-dimensional attention, before head groups are merged).
        sizes: of attention's tensors.
        direction: `forward` or `backward`.
        return_lse: forward: whether lse is asked for, which is brought back where positions are exchanged for heads. Backward: whether it
            was asked for of a kernel that computes a gradient through it, which travels with dO, zeros included.
    """
    sizes = replace(sizes, lse_gradient=return_lse and direction == "backward")
    schedule = schedules.forward if direction == "forward" else schedules.backward
    grid = schedules.grid
    if grid is None:
        return Counter(traffic(schedule, sizes))
    total: Links = Counter()
    for place, share in enumerate(head_shares(sizes.heads, sizes.kv_heads, grid.degree)):
        if share.heads:
            members = grid.context_group(place)
            inner = traffic(schedule, replace(sizes, heads=share.heads, kv_heads=share.kv_heads))
            total.update({(members[source], members[target]): size for (source, target), size in inner.items()})
    for exchange in exchanges_bytes(grid, layout, sizes, direction, return_lse):
        total.update(exchange)
    return +total


def exchanges_bytes(grid: Grid, layout: Layout, sizes: PieceBytes, direction: str, return_lse: bool = False) -> tuple[Links, Links]:
    """The parts of `link_bytes` that are the exchange of positions for heads, and that back.

    Gradients travel in the inputs' dtype, but for those of key heads that several ranks of a head group share: these are parts, which
    their owner adds up, and travel as they were accumulated.
    """
    shares = head_shares(sizes.heads, sizes.kv_heads, grid.degree)
    shared = shared_keys(shares)
    width = sizes.batch * sizes.head_dim * sizes.element_bytes
    wide = sizes.batch * sizes.head_dim * sizes.accumulator_bytes
    lse = sizes.batch * sizes.accumulator_bytes * return_lse
    to_heads: Links = Counter()
    to_positions: Links = Counter()
    for group in range(grid.num_groups):
        for source in grid.head_group(group):
            for target in grid.head_group(group):
                if source == target:
                    continue
                theirs, mine = shares[grid.place(target)], shares[grid.place(source)]
                # Inputs go to the rank that computes the head, results to the rank that owns the position.
                there, back = layout.shard_length(source), layout.shard_length(target)
                if direction == "forward":
                    to_heads[(source, target)] = there * (theirs.heads + 2 * theirs.kv_heads) * width
                    to_positions[(source, target)] = back * mine.heads * (width + lse)
                else:
                    keys = 2 * mine.kv_heads * (wide if shared[grid.place(source)] else width)
                    to_heads[(source, target)] = there * theirs.heads * (width + lse)
                    to_positions[(source, target)] = back * (mine.heads * width + keys)
    return +to_heads, +to_positions
