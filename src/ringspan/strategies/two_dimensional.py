"""Two-dimensional attention: heads over one axis of ranks, positions over the other.

DeepSpeed-Ulysses (2309.14509) exchanges positions for heads: one all-to-all gives every rank all positions of some heads, any attention
kernel computes them, one all-to-all brings the result back. USP (2405.07719) and LoongTrain (2406.18485) put it around a ring: head groups
of `ulysses` ranks, and among them an inner schedule over positions, which sees a head group as one rank.

The exchange is no schedule but stands before and after one: `Schedules.grid` says who exchanges with whom, `Schedules.layout` what the
inner schedule sees.
"""

from __future__ import annotations

from ringspan.errors import RingspanError
from ringspan.geometry import Grid, Layout, Mask, merge_groups
from ringspan.strategies.common import Schedules


def two_dimensional(
    layout: Layout, mask: Mask, ulysses: int | None = None, inner: str = "ring", placement: str = "head_first"
) -> Schedules:
    """Head groups of `ulysses` ranks (if not given, the divisor of N next above √N) around the strategy `inner`.

    Raises:
        RingspanError: where `ulysses` does not divide the number of ranks, or the inner strategy is two-dimensional itself.
    """
    from ringspan.strategies import make_schedules

    if inner in ("two_dimensional", "ulysses"):
        raise RingspanError(f"two_dimensional around {inner!r}", "", "There are two dimensions, heads and positions", "inner='ring'")
    if ulysses is None:
        ulysses = min(size for size in range(1, layout.num_ranks + 1) if layout.num_ranks % size == 0 and size * size >= layout.num_ranks)
    grid = Grid(layout.num_ranks, ulysses, placement)
    merged = merge_groups(layout, grid)
    schedules = make_schedules(inner, merged, mask)
    return Schedules(schedules.forward, schedules.backward, merged, grid)
