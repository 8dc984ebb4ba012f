"""The own block in two parts: the same pairs once, the same bytes, and the same gradients, with computing under the last transfers."""

from __future__ import annotations

import importlib

import pytest
import torch

import ringspan
from ringspan.geometry import causal, make_layout
from ringspan.schedule import Attend, PieceBytes, Send
from ringspan.schedule.draw import pairs_between
from ringspan.schedule.validate import validate
from ringspan.strategies import MACHINES, forecast, held_back, make_schedules, pays
from ringspan.transport import InProcessTransport
from tests.strategies.combinations import LAYOUTS, MASKS, VARIANTS, Combination, length_for
from tests.strategies.test_exactness import FEATURES, HEADS, check
from tests.support.poison import poisoned

__all__ = ["poisoned"]

KEPT = ("ring", "all_gather", "direct", "double_ring", "pass_query", "balanced")
SIZES = PieceBytes(batch=1, heads=32, kv_heads=32, head_dim=128, element_bytes=2, accumulator_bytes=4, single_bytes=2)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of tests are too small for it to pay."""
    # `ringspan.attention` is the function by that name.
    monkeypatch.setattr(importlib.import_module("ringspan.attention.planning"), "pays", lambda *arguments: True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_backward_stays_proven_and_sends_what_it_did(variant: str, layout: str):
    for index, mask in enumerate(MASKS):
        ranks = (1, 2, 3, 4, 5, 8)[index % 6]
        combination = Combination(variant, layout, mask, ranks, length_for(ranks, index))
        with combination.unless_refused():
            schedules, wanted = combination.make_schedules(), MASKS[mask].make(combination.length)
            made = schedules.backward
            kept = held_back(made, schedules.layout, wanted)
            validate(kept, schedules.layout, wanted)
            assert list(kept.sends()) == list(made.sends()) and kept.singles == made.singles and kept.num_steps == made.num_steps


@pytest.mark.parametrize("name", ["ring", "all_gather", "direct"])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_each_rank_computes_about_half_of_its_own_block_while_its_last_gradients_travel(name: str, layout: str):
    made_layout, mask = make_layout(layout, 4 * 1021, 4), causal()
    before = make_schedules(name, made_layout, mask).backward
    for rank, program in enumerate(held_back(before, made_layout, mask).programs):
        own = [action for action in program if isinstance(action, Attend) and action.q.owner == action.kvs[0].owner == rank]
        early, late = ((action.step, pairs_between(made_layout, mask, action.q, action.kvs[0])) for action in own)
        assert late[0] == max(action.step for action in before.programs[rank] if isinstance(action, Attend)) + 1
        assert late[0] in {action.step for action in program if isinstance(action, Send) and action.piece.kind == "dkv"}
        # Rounded to 128 of about 1,021 rows.
        assert early[1] / (early[1] + late[1]) == pytest.approx(0.5, abs=0.1)


def test_it_is_predicted_to_end_sooner_where_it_pays_and_is_left_where_launches_cost_more():
    machine, mask = MACHINES["cuda"], causal()
    long, short = (make_layout("zigzag", length, 2) for length in (16384, 512))
    backward = make_schedules("ring", long, mask).backward
    assert pays(backward, SIZES, machine)
    plain, kept = (forecast(each, long, mask, SIZES, machine).seconds for each in (backward, held_back(backward, long, mask)))
    assert kept < 0.97 * plain
    assert not pays(make_schedules("ring", short, mask).backward, SIZES, machine)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if VARIANTS[variant][0] in KEPT])
def test_gradients_are_those_of_dense_attention(variant: str, layout: str):
    place = list(VARIANTS).index(variant) + LAYOUTS.index(layout)
    for turn in range(3):
        index = 7 * turn + place
        ranks = (2, 3, 5)[turn]
        mask = list(MASKS)[index % len(MASKS)] if turn else "causal"
        check(
            Combination(variant, layout, mask, ranks, length_for(ranks, index)), HEADS[index % len(HEADS)], FEATURES[index % len(FEATURES)]
        )


@pytest.mark.usefixtures("always")
def test_a_call_runs_the_schedule_that_keeps_half_back():
    def run(group: InProcessTransport) -> list[Attend]:
        sequence = ringspan.ContextParallel(group, kernel="reference").sequence(24)
        q, k, v = (torch.randn(1, sequence.shard_length, 2, 4) for _ in range(3))
        sequence.attention(q, k, v)
        program = sequence.schedules.backward.programs[group.rank]
        return [action for action in program if isinstance(action, Attend) and action.kvs[0].owner == group.rank]

    for own in ringspan.run_in_process(2, run):
        assert [action.step for action in own] == [0, 2]
