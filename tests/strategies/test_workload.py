"""How evenly strategies and layouts work, beside the figures that their papers publish."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ringspan.geometry import Workload, causal, make_layout, tiles
from ringspan.schedule import Attend, Schedule
from tests.strategies.volumes import LENGTH, RANKS, make


def busy(schedule: Schedule) -> list[set[int]]:
    """For each step in which anything is computed, the ranks that compute."""
    steps = [
        {rank for rank in range(schedule.num_ranks) if any(isinstance(action, Attend) for action in schedule.at(rank, step))}
        for step in range(schedule.num_steps)
    ]
    return [ranks for ranks in steps if ranks]


def idle_blocks(schedule: Schedule) -> int:
    """Blocks' times that ranks wait, where a step takes as long as a block for every rank."""
    return sum(schedule.num_ranks - len(ranks) for ranks in busy(schedule))


@pytest.mark.parametrize("ranks", RANKS)
def test_contiguous_causal_rings_idle_half_of_the_time_and_balanced_ones_hardly(ranks: int):
    ring = make("ring", ranks, causal(), "contiguous").forward
    assert len(busy(ring)) == ranks
    assert Fraction(idle_blocks(ring), ranks * ranks) == Fraction(ranks * ranks - ranks, 2 * ranks * ranks)
    balanced = make("balanced", ranks, causal(), "contiguous").forward
    assert len(busy(balanced)) == ranks // 2 + 1
    # The paper counts idle blocks out of the P² of the unbalanced table; out of the steps that there are it is 1/(P + 2).
    assert Fraction(idle_blocks(balanced), ranks * ranks) == (0 if ranks % 2 else Fraction(1, 2 * ranks))
    assert Fraction(idle_blocks(balanced), ranks * len(busy(balanced))) == (0 if ranks % 2 else Fraction(1, ranks + 2))


@pytest.mark.parametrize("ranks", RANKS)
def test_a_striped_step_computes_c_times_c_plus_or_minus_one_half(ranks: int):
    layout, c = make_layout("striped", LENGTH, ranks), LENGTH // ranks
    for rank in range(ranks):
        for step in range(ranks):
            visitor = (rank - step) % ranks
            found = sum(tile.pairs for tile in tiles(layout, causal(), rank, visitor))
            assert found == (c * (c + 1) // 2 if rank >= visitor else c * (c - 1) // 2)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_zigzag_step_computes_as_much_on_every_rank(ranks: int):
    layout, c = make_layout("zigzag", LENGTH, ranks), LENGTH // ranks
    for step in range(ranks):
        pairs = {sum(tile.pairs for tile in tiles(layout, causal(), rank, (rank - step) % ranks)) for rank in range(ranks)}
        assert pairs == {c * (c + 1) // 2 if step == 0 else c * c // 2}
    assert Workload(layout, causal()).imbalance == 1.0
