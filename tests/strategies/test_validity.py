"""The validator's six points, for every strategy under every layout and mask, on 1 to 64 ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringspan.errors import ScheduleError
from ringspan.schedule import Attend, validate
from ringspan.strategies import STRATEGIES
from tests.strategies.combinations import LAYOUTS, MASKS, VARIANTS, Combination, each, length_for


def prove(combination: Combination) -> None:
    """Both directions hold, of each head group where there are any."""
    mask = MASKS[combination.mask].make(combination.length)
    with combination.unless_refused():
        schedules = combination.make_schedules()
        for schedule in (schedules.forward, schedules.backward):
            try:
                validate(schedule, schedules.layout, mask)
            except Exception as error:
                error.add_note(str(combination))
                raise


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_strategy_layout_and_mask_is_proven_on_one_to_five_ranks_and_one_larger_number(variant: str):
    proven = set()
    for index, make in enumerate(each([variant])):
        larger = 6 + (index + list(VARIANTS).index(variant)) % 11
        for ranks in (1, 2, 3, 4, 5, larger):
            combination = make(ranks, length_for(ranks, index + ranks))
            prove(combination)
            proven.add((combination.layout, combination.mask, ranks))
    assert len({(layout, mask) for layout, mask, _ in proven}) == len(LAYOUTS) * len(MASKS)
    assert {ranks for *_, ranks in proven} == set(range(1, 17))


@pytest.mark.slow
@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("first", [17, 18, 19, 20])
def test_every_number_of_ranks_up_to_64_is_proven_with_every_strategy_layout_and_mask_by_turns(first: int):
    turns = list(each())
    for ranks in range(first, 65, 4):
        for turn in (2 * ranks, 2 * ranks + 1):
            # 37 shares no factor with the number of turns: each is another one, and every variant comes up six times or seven.
            prove(turns[37 * turn % len(turns)](ranks, 3 * ranks + ranks % 4))


def test_every_strategy_is_among_the_variants():
    assert {strategy for strategy, _ in VARIANTS.values()} == set(STRATEGIES)


def test_proving_fails_where_an_attend_is_left_out():
    combination = Combination("ring", "zigzag", "causal", 3, 31)
    forward = combination.make_schedules().forward
    attend = next(action for action in forward.programs[2][::-1] if isinstance(action, Attend))
    shortened = tuple(action for action in forward.programs[2] if action is not attend)
    with pytest.raises(ScheduleError, match="keeps coverage"):
        validate(replace(forward, programs=(*forward.programs[:2], shortened)), combination.make_layout(), MASKS["causal"].make(31))
