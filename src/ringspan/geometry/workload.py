"""Workload: how many (query, key) pairs each rank's queries have, and how uneven that is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ringspan.geometry.layout import Layout
from ringspan.geometry.mask import Mask
from ringspan.geometry.tiling import tiles


@dataclass(frozen=True)
class Workload:
    """The pairs of `layout` under `mask`, where each rank computes its own queries."""

    layout: Layout
    mask: Mask

    def pairs(self, q_rank: int, k_rank: int) -> int:
        """Allowed pairs of the queries of one rank with the keys of another."""
        return sum(tile.pairs for tile in tiles(self.layout, self.mask, q_rank, k_rank))

    @cached_property
    def pairs_per_rank(self) -> tuple[int, ...]:
        """Allowed pairs of each rank's queries with all keys."""
        ranks = range(self.layout.num_ranks)
        return tuple(sum(self.pairs(q_rank, k_rank) for k_rank in ranks) for q_rank in ranks)

    @property
    def imbalance(self) -> float:
        """The largest rank's pairs over the mean: 1 is even, N is one rank doing all. An empty mask counts as even."""
        total = sum(self.pairs_per_rank)
        return max(self.pairs_per_rank) * self.layout.num_ranks / total if total else 1.0

    @property
    def idle_fraction(self) -> float:
        """The share of the ranks' time spent waiting for the busiest one: 1 − 1 / imbalance."""
        return 1.0 - 1.0 / self.imbalance
