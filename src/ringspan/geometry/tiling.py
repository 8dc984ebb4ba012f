"""From a layout and a mask to tiles: what is left of one rank's queries against another rank's keys."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate

from ringspan.geometry.layout import Layout
from ringspan.geometry.mask import Band, Mask, Region
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
    queries, keys = _Shard(layout.shards[q_rank]), _Shard(layout.shards[k_rank])
    if not queries.spans or not keys.spans:
        return ()
    found: list[Tile] = []
    if len(queries.spans) * len(keys.spans) <= FEW_PAIRS:
        # Two spans far apart meet few of the regions between them; of many spans, on the other hand, each region meets few.
        for q_span, q_offset in zip(queries.spans, queries.offsets, strict=False):
            for k_span, k_offset in zip(keys.spans, keys.offsets, strict=False):
                for region in mask.regions(q_span.start, q_span.last + 1, k_span.start, k_span.last + 1):
                    if (tile := _region_tile(region, q_span, k_span)) is not None:
                        found.append(tile.shifted(q_offset, k_offset))
        return fused(found)
    for region in mask.regions(queries.starts[0], queries.lasts[-1] + 1, keys.starts[0], keys.lasts[-1] + 1):
        for q_span, q_offset in queries.within(region.q_start, region.q_stop):
            for k_span, k_offset in keys.within(region.k_start, region.k_stop):
                if (tile := _region_tile(region, q_span, k_span)) is not None:
                    found.append(tile.shifted(q_offset, k_offset))
    return fused(found)


FEW_PAIRS = 16
"""Of spans of two shards: zigzag has two spans a shard."""


class _Shard:
    """A shard's spans, found by position."""

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self.spans = spans
        self.starts, self.lasts = [span.start for span in spans], [span.last for span in spans]
        self.offsets = [0, *accumulate(len(span) for span in spans)]

    def within(self, start: int, stop: int) -> list[tuple[Span, int]]:
        """The spans that reach into `[start, stop)`, each with the local index of its first position."""
        first, end = bisect_left(self.lasts, start), bisect_left(self.starts, stop)
        return list(zip(self.spans[first:end], self.offsets[first:end], strict=True))


def _region_tile(region: Region, q_span: Span, k_span: Span) -> Tile | None:
    q_start, q_stop = q_span.clip(region.q_start, region.q_stop)
    k_start, k_stop = k_span.clip(region.k_start, region.k_stop)
    # query − key = distance + (i − j)·step, so the global band becomes a band of local indices, rounded inwards.
    distance = (q_span.start - k_span.start) + (q_start - k_start) * q_span.step
    low = None if region.low is None else -((distance - region.low) // q_span.step)
    high = None if region.high is None else (region.high - distance) // q_span.step
    return trimmed(q_start, q_stop, k_start, k_stop, low, high)
