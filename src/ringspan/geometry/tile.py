"""Tiles: the rectangles of a (query, key) block that a mask leaves, in local indices, each with its band."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `[q_start, q_stop)` × keys `[k_start, k_stop)`; a pair is allowed where `low <= i − j <= high`.

    `i` and `j` count from the tile's own corner; `None` means no bound. No row and no column of a tile is empty. Causal
    attention of a shard to itself is `low=0`; a window of `w` keys to the left adds `high=w`::

        full        causal (low=0)   band (low=0, high=1)
        x x x x     x . . .          x . . .
        x x x x     x x . .          x x . .
        x x x x     x x x .          . x x .
        x x x x     x x x x          . . x x
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    low: int | None = None
    high: int | None = None

    @property
    def num_queries(self) -> int:
        """How many query rows the tile has."""
        return self.q_stop - self.q_start

    @property
    def num_keys(self) -> int:
        """How many key columns the tile has."""
        return self.k_stop - self.k_start

    @property
    def kind(self) -> str:
        """`full`, `causal` (`low == 0` alone) or `band`."""
        if self.low is None and self.high is None:
            return "full"
        return "causal" if self.low == 0 and self.high is None else "band"

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs the tile allows."""
        return band_pairs(self.num_queries, self.num_keys, self.low, self.high)

    def shifted(self, queries: int, keys: int) -> Tile:
        """The same tile, its corner moved by so many queries and keys."""
        return replace(
            self,
            q_start=self.q_start + queries,
            q_stop=self.q_stop + queries,
            k_start=self.k_start + keys,
            k_stop=self.k_stop + keys,
        )

    def clipped(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Tile | None:
        """The part of the tile inside a rectangle, or None where that is empty."""
        new_q, new_k = max(self.q_start, q_start), max(self.k_start, k_start)
        shift = (new_q - self.q_start) - (new_k - self.k_start)
        low = None if self.low is None else self.low - shift
        high = None if self.high is None else self.high - shift
        return trimmed(new_q, min(self.q_stop, q_stop), new_k, min(self.k_stop, k_stop), low, high)


def _pairs_up_to(queries: int, keys: int, bound: int) -> int:
    """The number of pairs with j − i <= bound: the sum over i of clamp(i + bound + 1, 0, keys)."""
    first = max(0, -bound)  # the first row that sees a key
    full = min(max(keys - bound - 1, first), queries)  # the first row that sees all keys
    rising = full - first
    if queries <= first:
        return 0
    return rising * (first + bound + 1) + rising * (rising - 1) // 2 + (queries - full) * keys


def band_pairs(queries: int, keys: int, low: int | None, high: int | None) -> int:
    """How many pairs of a `queries × keys` rectangle satisfy `low <= i − j <= high`. Closed form."""
    if queries <= 0 or keys <= 0:
        return 0
    allowed = queries * keys if low is None else _pairs_up_to(queries, keys, -low)
    return allowed if high is None else allowed - _pairs_up_to(queries, keys, -high - 1)


def trimmed(q_start: int, q_stop: int, k_start: int, k_stop: int, low: int | None, high: int | None) -> Tile | None:
    """The tile without empty rows and columns and without bounds that bind nowhere; None where nothing is left."""
    queries, keys = q_stop - q_start, k_stop - k_start
    if queries <= 0 or keys <= 0 or (low is not None and high is not None and low > high):
        return None
    first_row = 0 if low is None else max(0, low)
    end_row = queries if high is None else min(queries, keys + high)
    if first_row >= end_row:
        return None
    low = None if low is None else low - first_row
    high = None if high is None else high - first_row
    queries = end_row - first_row
    first_column = 0 if high is None else max(0, -high)
    end_column = keys if low is None else min(keys, queries - low)
    if first_column >= end_column:
        return None
    low = None if low is None else low + first_column
    high = None if high is None else high + first_column
    keys = end_column - first_column
    low = None if low is not None and low <= 1 - keys else low
    high = None if high is not None and high >= queries - 1 else high
    return Tile(q_start + first_row, q_start + end_row, k_start + first_column, k_start + end_column, low, high)


def fused(tiles: list[Tile]) -> tuple[Tile, ...]:
    """The same pairs in fewer tiles: full tiles that share a side become one."""
    result = _fused_along(sorted(tiles, key=lambda tile: (tile.k_start, tile.q_start)), queries=True)
    return tuple(_fused_along(sorted(result, key=lambda tile: (tile.q_start, tile.k_start)), queries=False))


def _fused_along(tiles: list[Tile], *, queries: bool) -> list[Tile]:
    result: list[Tile] = []
    for tile in tiles:
        last = result[-1] if result else None
        if last is not None and last.kind == tile.kind == "full":
            same_keys = (last.k_start, last.k_stop) == (tile.k_start, tile.k_stop)
            same_queries = (last.q_start, last.q_stop) == (tile.q_start, tile.q_stop)
            if queries and same_keys and last.q_stop == tile.q_start:
                result[-1] = replace(last, q_stop=tile.q_stop)
                continue
            if not queries and same_queries and last.k_stop == tile.k_start:
                result[-1] = replace(last, k_stop=tile.k_stop)
                continue
        result.append(tile)
    return result
