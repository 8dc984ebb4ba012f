"""From a layout and a mask to tiles: what is left of one rank's queries against another rank's keys."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from ringspan.geometry.layout import Layout
from ringspan.geometry.mask import Band, Mask
from ringspan.geometry.span import Span
from ringspan.geometry.tile import Tile, fused, trimmed


@lru_cache(maxsize=65536)
def tiles(layout: Layout, mask: Mask, q_rank: int, k_rank: int) -> tuple[Tile, ...]:
    """The tiles that `mask` leaves of the queries of `q_rank` against the keys of `k_rank`, in local indices of both.

    Empty where no pair is allowed. Four tokens on two ranks, zigzag (rank 0 owns 0 and 3), causal: rank 1 (1, 2) against rank 0 is
    one full tile, 2 queries × key 0.
    """
    if q_rank == k_rank and isinstance(mask, Band) and mask.name == "causal":
        # Positions rise with the local index, so a shard under its own causal mask is one triangle, however many spans it has.
        length = layout.shard_length(q_rank)
        whole = trimmed(0, length, 0, length, 0, None)
        return (whole,) if whole else ()
    found: list[Tile] = []
    q_offset = 0
    for q_span in layout.shards[q_rank]:
        k_offset = 0
        for k_span in layout.shards[k_rank]:
            found.extend(tile.shifted(q_offset, k_offset) for tile in _span_tiles(mask, q_span, k_span))
            k_offset += len(k_span)
        q_offset += len(q_span)
    return fused(found)


def _span_tiles(mask: Mask, q_span: Span, k_span: Span) -> Iterable[Tile]:
    for region in mask.regions(q_span.start, q_span.last + 1, k_span.start, k_span.last + 1):
        q_start, q_stop = q_span.clip(region.q_start, region.q_stop)
        k_start, k_stop = k_span.clip(region.k_start, region.k_stop)
        if q_start == q_stop or k_start == k_stop:
            continue
        # query − key = distance + (i − j)·step, so the global band becomes a band of local indices, rounded inwards.
        distance = (q_span.start - k_span.start) + (q_start - k_start) * q_span.step
        low = None if region.low is None else -((distance - region.low) // q_span.step)
        high = None if region.high is None else (region.high - distance) // q_span.step
        tile = trimmed(q_start, q_stop, k_start, k_stop, low, high)
        if tile is not None:
            yield tile
