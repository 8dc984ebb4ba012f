"""Masks: which keys a query may see, as bands of global positions, and the tiles that they leave of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from ringspan.errors import RingspanError
from ringspan.geometry.layout import Layout
from ringspan.geometry.span import Span
from ringspan.geometry.tile import Tile, fused, trimmed


@dataclass(frozen=True, slots=True)
class Region:
    """Global queries `[q_start, q_stop)` × keys `[k_start, k_stop)`, allowed where `low <= query − key <= high`."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class Mask:
    """What a query may see. A mask is the union of disjoint `Region`s; two masks are joined by `&`."""

    @property
    def name(self) -> str:
        """The mask in the words that `parse_mask` reads."""
        raise NotImplementedError

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """Disjoint regions that hold every allowed pair of the rectangle, and no forbidden pair of it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    @property
    def name(self) -> str:
        """`full`."""
        return "full"

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """The rectangle itself."""
        return (Region(q_start, q_stop, k_start, k_stop),)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees the keys at its own position and before it."""

    @property
    def name(self) -> str:
        """`causal`."""
        return "causal"

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """The rectangle with `query − key >= 0`."""
        return (Region(q_start, q_stop, k_start, k_stop, low=0),)


def full() -> Mask:
    """Every query sees every key."""
    return Full()


def causal() -> Mask:
    """A query sees the keys at its own position and before it."""
    return Causal()


MASKS: dict[str, Callable[[], Mask]] = {"causal": causal, "full": full}


def parse_mask(text: str) -> Mask:
    """The mask that `text` names.

    Raises:
        RingspanError: for a name that is not one of `MASKS`.
    """
    if text not in MASKS:
        raise RingspanError(f"mask {text!r}", f"the masks are {', '.join(MASKS)}", "A mask is asked for by name", "mask 'causal'")
    return MASKS[text]()


@lru_cache(maxsize=65536)
def tiles(layout: Layout, mask: Mask, q_rank: int, k_rank: int) -> tuple[Tile, ...]:
    """The tiles that `mask` leaves of the queries of `q_rank` against the keys of `k_rank`, in local indices of both.

    Empty where no pair is allowed. Four tokens on two ranks, zigzag (rank 0 owns 0 and 3), causal: rank 1 (1, 2) against rank 0 is
    one full tile, 2 queries × key 0.
    """
    if q_rank == k_rank and isinstance(mask, Causal):
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
