"""Spans: arithmetic progressions of global positions, the atoms of every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Global positions `start, start + step, …` below `stop`.

    Contiguous shards are spans of step 1; a striped shard is one span whose step is the number of ranks.

    Four tokens on two ranks::

        contiguous  rank 0: Span(0, 2)      -> 0 1      rank 1: Span(2, 4)      -> 2 3
        striped     rank 0: Span(0, 4, 2)   -> 0 2      rank 1: Span(1, 4, 2)   -> 1 3
    """

    start: int
    stop: int
    step: int = 1

    def __post_init__(self) -> None:
        assert self.step >= 1, "a span runs forwards"

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop, self.step))

    def __getitem__(self, index: slice) -> Span:
        """The sub-span of the local indices `index` (a slice without a step)."""
        positions = range(self.start, self.stop, self.step)[index]
        return Span(positions.start, positions.stop, self.step)

    @property
    def last(self) -> int:
        """The last position; only for a span that is not empty."""
        return self.start + (len(self) - 1) * self.step

    def clip(self, low: int, high: int) -> tuple[int, int]:
        """Local indices `[i, j)` of the positions that lie in the global interval `[low, high)`."""
        count = len(self)
        first = min(count, max(0, -(-(low - self.start) // self.step)))
        end = min(count, max(first, -(-(high - self.start) // self.step)))
        return first, end


def split_evenly(length: int, parts: int) -> list[Span]:
    """`parts` contiguous spans that cover `length` positions, the sizes differing by at most one, the larger first.

    Five positions in three parts: `0 1 | 2 3 | 4`. Parts beyond the length are empty.
    """
    size, larger = divmod(length, parts)
    spans, start = [], 0
    for part in range(parts):
        stop = start + size + (part < larger)
        spans.append(Span(start, stop))
        start = stop
    return spans


def split_by_weight(length: int, weights: tuple[float, ...], unit: int = 1) -> list[Span]:
    """Contiguous spans whose sizes are proportional to `weights` (largest remainder), covering `length` positions.

    Sizes are multiples of `unit`, but for that of the largest weight, which has what is left.
    """
    total = sum(weights)
    exact = [length // unit * weight / total for weight in weights]
    sizes = [int(size) for size in exact]
    by_remainder = sorted(range(len(weights)), key=lambda part: sizes[part] - exact[part])
    for part in by_remainder[: length // unit - sum(sizes)]:
        sizes[part] += 1
    sizes = [size * unit for size in sizes]
    sizes[weights.index(max(weights))] += length % unit
    spans, start = [], 0
    for size in sizes:
        spans.append(Span(start, start + size))
        start += size
    return spans
