"""What the processes of `test_over_gloo` run: every strategy, by turns under every layout, mask, kind of heads and feature."""

from __future__ import annotations

from typing import Any

from tests.strategies.combinations import LAYOUTS, MASKS, VARIANTS, Combination
from tests.strategies.test_exactness import FEATURES, HEADS, MATERIALISED, split_of, whole
from tests.support.split import Part, run_rank

RANKS = 3
Case = tuple[Combination, tuple[int, int], frozenset[str]]


def cases() -> list[Case]:
    """Each strategy twice, each mask twice, and everything else more often."""
    found: list[Case] = []
    for index in range(2 * len(VARIANTS)):
        variant = list(VARIANTS)[index % len(VARIANTS)]
        # Seven masks on from strategy to strategy, and one more the second time round.
        mask = list(MASKS)[(7 * index + index // len(VARIANTS)) % len(MASKS)]
        combination = Combination(variant, LAYOUTS[index % len(LAYOUTS)], mask, RANKS, (31, 12, 2)[index % 3])
        features = FEATURES[index % len(FEATURES)] - (MATERIALISED if combination.strategy == "ring_self_attention" else frozenset())
        found.append((combination, HEADS[index % len(HEADS)], features))
    return found


def attend(group: Any) -> list[Part]:
    """Forward and backward of every case on this rank."""
    return [run_rank(split_of(*case), whole(case[0].length, *case[1:]), group) for case in cases()]
