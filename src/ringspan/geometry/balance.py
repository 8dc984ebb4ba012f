"""Layouts that know the mask: chunks of the sequence, dealt to ranks so that all have equal work and equally many tokens."""

from __future__ import annotations

from functools import lru_cache

from ringspan.geometry.layout import Layout, contiguous, named_layout, zigzag
from ringspan.geometry.mask import Mask, causal
from ringspan.geometry.span import Span, split_evenly
from ringspan.geometry.tile import trimmed
from ringspan.geometry.workload import Workload

CHUNKS_PER_RANK = 8
"""Chunks that a rank gets: more balance better, and cut the work into smaller tiles."""
EVEN_ENOUGH = 0.1
"""So much imbalance is cheaper than smaller tiles and more keys on the way: on two H100, 131,072 tokens of documents took 10.9 ms forward
and backward in contiguous shards (imbalance 1.07) and 14.9 ms in dealt chunks (1.00)."""


def balanced_layout(length: int, num_ranks: int, mask: Mask, chunks_per_rank: int = CHUNKS_PER_RANK) -> Layout:
    """The first of contiguous, zigzag, and chunks dealt by weight that is within `EVEN_ENOUGH` of the most even of them.

    The sequence is cut into `chunks_per_rank × num_ranks` chunks of one size (up to one token). Sorted by their pairs, they are dealt in
    rounds, each round to the ranks with the least work first: every rank gets as many chunks as any other, and no rank's work exceeds
    another's by more than the heaviest chunk's minus the lightest's. (After each round the spread of the ranks is at most the larger of the
    spread before it and the spread within the round; rounds are disjoint stretches of the sorted list.)
    """
    plain = [contiguous(length, num_ranks), zigzag(length, num_ranks)]
    dealt = _dealt(length, num_ranks, mask, chunks_per_rank)
    imbalances = {layout: Workload(layout, mask).imbalance for layout in (*plain, dealt)}
    taken = next(layout for layout, found in imbalances.items() if found <= min(imbalances.values()) + EVEN_ENOUGH)
    return Layout("auto", length, taken.shards)


def make_layout(name: str, length: int, num_ranks: int, weights: tuple[float, ...] | None = None, mask: Mask | None = None) -> Layout:
    """The layout called `name`, one of `LAYOUTS`, or `auto` for the one that balances `mask` (causal if not given).

    Raises:
        RingspanError: for an unknown name, a length or number of ranks below 1, weights for a layout that takes none, or a mask of another
            length.
    """
    if name != "auto":
        return named_layout(name, length, num_ranks, weights)
    named_layout("zigzag", length, num_ranks, weights)
    mask = causal() if mask is None else mask
    mask.check_length(length)
    return _balanced(length, num_ranks, mask)


@lru_cache(maxsize=256)
def _balanced(length: int, num_ranks: int, mask: Mask) -> Layout:
    return balanced_layout(length, num_ranks, mask)


def _dealt(length: int, num_ranks: int, mask: Mask, chunks_per_rank: int) -> Layout:
    chunks = split_evenly(length, chunks_per_rank * num_ranks)
    by_work = sorted(chunks, key=lambda chunk: -query_pairs(chunk, length, mask))
    work = [0] * num_ranks
    shards: list[list[Span]] = [[] for _ in range(num_ranks)]
    for first in range(0, len(by_work), num_ranks):
        idlest = sorted(range(num_ranks), key=lambda rank: work[rank])
        for rank, chunk in zip(idlest, by_work[first : first + num_ranks], strict=True):
            work[rank] += query_pairs(chunk, length, mask)
            shards[rank].append(chunk)
    return Layout("auto", length, tuple(_joined(shard) for shard in shards))


def query_pairs(chunk: Span, length: int, mask: Mask) -> int:
    """Allowed pairs of the queries of `chunk` with all keys."""
    regions = mask.regions(chunk.start, chunk.stop, 0, length)
    found = 0
    for region in regions:
        low = None if region.low is None else region.low - region.q_start + region.k_start
        high = None if region.high is None else region.high - region.q_start + region.k_start
        tile = trimmed(0, region.q_stop - region.q_start, 0, region.k_stop - region.k_start, low, high)
        found += 0 if tile is None else tile.pairs
    return found


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    """Rising, neighbours as one, the empty ones left out."""
    result: list[Span] = []
    for span in sorted((span for span in spans if len(span)), key=lambda span: span.start):
        if result and result[-1].stop == span.start:
            result[-1] = Span(result[-1].start, span.stop)
        else:
            result.append(span)
    return tuple(result)
