"""Layouts: which global positions each rank owns. Any length, any number of ranks; a rank may own nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ringspan.errors import RingspanError, nearest_name
from ringspan.geometry.span import Span, split_by_weight, split_evenly

KERNEL_ROWS = 128
"""Rows that a kernel's block has, mostly: one that is begun takes as long as a whole one."""
LONG_CHUNK = 128 * KERNEL_ROWS
"""Chunks that are so long on average are whole blocks, which then is off by less than what GPUs of one kind differ by."""


@dataclass(frozen=True)
class Layout:
    """A partition of the positions `0 … length − 1` over ranks.

    `shards[rank]` lists the rank's spans in rising order; a rank's local index runs through them one after the other, so a
    rank's positions always rise with its local index. All spans of a layout have the same step.
    """

    name: str
    length: int
    shards: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        assert len({span.step for shard in self.shards for span in shard}) <= 1, "all spans of a layout share one step"

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.length, self.shards))

    def __hash__(self) -> int:
        # Layouts are keys of every cache on the way to a schedule, and a tuple of spans is slow to hash anew each time.
        return self._hash

    @property
    def num_ranks(self) -> int:
        """How many ranks share the sequence."""
        return len(self.shards)

    @cached_property
    def shard_lengths(self) -> tuple[int, ...]:
        """How many positions each rank owns."""
        return tuple(sum(len(span) for span in shard) for shard in self.shards)

    def shard_length(self, rank: int) -> int:
        """How many positions `rank` owns."""
        return self.shard_lengths[rank]

    def positions(self, rank: int) -> list[int]:
        """The global positions of `rank`, in its local order."""
        return [position for span in self.shards[rank] for position in span]


def _layout(name: str, length: int, shards: list[list[Span]]) -> Layout:
    return Layout(name, length, tuple(tuple(span for span in shard if len(span)) for shard in shards))


def contiguous(length: int, num_ranks: int) -> Layout:
    """Rank r owns the r-th of `num_ranks` contiguous parts (Liu et al., 2310.01889).

    Four tokens on two ranks: `0 0 1 1`. Under a causal mask rank 0 does one part of the work and the last rank nearly two.
    """
    return _layout("contiguous", length, [[span] for span in split_evenly(length, num_ranks)])


def zigzag(length: int, num_ranks: int) -> Layout:
    """Rank r owns chunks r and 2N−1−r of 2N contiguous chunks, so that causal work is even on every rank and step.

    Four tokens on two ranks: `0 1 1 0`.
    """
    chunks = split_evenly(length, 2 * num_ranks)
    return _layout("zigzag", length, [[chunks[rank], chunks[2 * num_ranks - 1 - rank]] for rank in range(num_ranks)])


def striped(length: int, num_ranks: int) -> Layout:
    """Rank r owns the positions ≡ r modulo N (Striped Attention, 2311.09431), so that every step is a triangle.

    Four tokens on two ranks: `0 1 0 1`.
    """
    return _layout("striped", length, [[Span(rank, length, num_ranks)] for rank in range(num_ranks)])


def weighted(length: int, num_ranks: int, weights: Sequence[float] | None = None) -> Layout:
    """Zigzag whose chunks are proportional to `weights`: for ranks of unequal speed, or unequal memory.

    Rank r owns chunk r and its mirror image, both of size ∝ weights[r]; equal weights give zigzag up to rounding, long chunks to whole
    blocks of a kernel.
    Four tokens on two ranks with weights 1, 0: `0 0 0 0` (rank 1 owns nothing).
    """
    chosen = tuple(float(weight) for weight in ((1.0,) * num_ranks if weights is None else weights))
    if len(chosen) != num_ranks or min(chosen) < 0 or not 0 < sum(chosen) < float("inf"):
        raise RingspanError(
            f"layout 'weighted' with weights {chosen} on {num_ranks} ranks",
            f"{len(chosen)} weights, the least {min(chosen, default=None)}",
            "There is one finite weight ≥ 0 for each rank, and at least one of them is above 0",
            f"weights={(1.0,) * num_ranks}",
        )
    unit = KERNEL_ROWS if length // (2 * num_ranks) >= LONG_CHUNK else 1
    first = split_by_weight(length - length // 2, chosen, unit)
    mirror = split_by_weight(length // 2, chosen[::-1], unit)[::-1]
    offset = length - length // 2
    shards = [[first[rank], Span(mirror[rank].start + offset, mirror[rank].stop + offset)] for rank in range(num_ranks)]
    return _layout("weighted", length, shards)


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
    "weighted": weighted,
}
"""The layouts that do not depend on the mask, by name."""


@lru_cache(maxsize=256)
def named_layout(name: str, length: int, num_ranks: int, weights: tuple[float, ...] | None = None) -> Layout:
    """The layout called `name`, checked: `make_layout` for the layouts that do not depend on the mask.

    Raises:
        RingspanError: for an unknown name, a length or number of ranks below 1, or weights for a layout that takes none.
    """
    if name not in LAYOUTS:
        raise RingspanError(
            f"layout {name!r}",
            f"the layouts are {', '.join(LAYOUTS)}, auto",
            "A layout is asked for by name",
            f"layout={nearest_name(name, ('zigzag', 'auto', *LAYOUTS))!r}",
        )
    if length < 1 or num_ranks < 1:
        raise RingspanError(
            f"a sequence of {length} positions on {num_ranks} ranks",
            f"length {length}, ranks {num_ranks}",
            "Both are at least 1",
            f"length {max(length, 1)} on {max(num_ranks, 1)} ranks",
        )
    if name == "weighted":
        return weighted(length, num_ranks, weights)
    if weights is not None:
        raise RingspanError(
            f"layout {name!r} with weights", "this layout shares evenly", "Only 'weighted' takes weights", "layout='weighted'"
        )
    return LAYOUTS[name](length, num_ranks)
