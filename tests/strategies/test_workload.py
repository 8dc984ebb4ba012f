"""How evenly strategies and layouts work, beside the figures that their papers publish."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ringspan.geometry import Workload, causal, make_layout, tiles
from ringspan.schedule import Attend, Schedule
from ringspan.schedule.draw import timeline
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


@pytest.mark.parametrize("ranks", RANKS)
def test_the_same_idle_blocks_of_balanced_are_1_of_2p_p_plus_2_and_p_plus_1(ranks: int):
    layout, c = make_layout("contiguous", LENGTH, ranks), LENGTH // ranks
    schedule = make("balanced", ranks, causal(), "contiguous").forward
    shown = timeline(schedule, layout, causal())
    idle, time = sum(gap.stop - gap.start for gap in shown.gaps), shown.duration * ranks
    blocks = 0 if ranks % 2 else ranks // 2
    assert idle == blocks * c * c and idle_blocks(schedule) == blocks
    # All slots of the unbalanced ring; the slots of this schedule; its time, in which the triangles of step 0 are c (c + 1)/2 pairs.
    assert Fraction(idle_blocks(schedule), ranks * ranks) == (0 if ranks % 2 else Fraction(1, 2 * ranks))
    assert Fraction(idle_blocks(schedule), ranks * len(busy(schedule))) == (0 if ranks % 2 else Fraction(1, ranks + 2))
    assert Fraction(idle, time) == (0 if ranks % 2 else 1 / (ranks + 1 + Fraction(1, c)))
    assert time == ranks * (c * (c + 1) // 2 + ranks // 2 * c * c), "P (P + 1)/2 blocks, and half a diagonal a rank"
    assert shown.idle_fraction == pytest.approx(idle / time)


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
