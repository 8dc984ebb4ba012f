"""The forecast's cells, reckoned by hand on two ranks, and their agreement with the cost and the mask everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringspan.errors import RingspanError
from ringspan.geometry import Mask, causal, documents, full, make_layout
from ringspan.schedule import Attend, PieceBytes
from ringspan.strategies import STRATEGIES, Machine, Prices, cost, forecast, forecast_layer, make_schedules
from ringspan.trace import predicted_timeline

# One pair takes a second, a byte too; a position of keys weighs two bytes.
PLAIN = Machine(name="by hand", flops_per_second=4, link_bytes_per_second=1, latency_seconds=0.5, launch_seconds=0)
SIZES = PieceBytes(element_bytes=1)


def test_two_ranks_of_a_ring_by_hand():
    layout = make_layout("contiguous", 4, 2)
    schedules = make_schedules("ring", layout, full())
    found = forecast(schedules.forward, layout, full(), SIZES, PLAIN)
    assert found.starts == ((0, 0), (4.5, 4.5)), "4 pairs take 4 seconds, 4 bytes and the latency 4.5"
    assert found.ends == ((4, 4), (8.5, 8.5))
    assert (found.done, found.seconds, found.busy) == ((8.5, 8.5), 8.5, (8, 8))
    assert {(part.source, part.target, part.ready, part.begins, part.arrives) for part in found.transfers} == {
        (0, 1, 0, 0, 4.5),
        (1, 0, 0, 0, 4.5),
    }


def test_a_light_rank_waits_for_no_one_and_a_heavy_one_for_the_light_ones_keys():
    layout = make_layout("contiguous", 4, 2)
    found = forecast(make_schedules("ring", layout, causal()).forward, layout, causal(), SIZES, PLAIN)
    assert found.ends[0] == (3, 3)
    assert found.starts[1][1] == 4.5
    assert found.done == (3, 8.5)


def test_the_backward_takes_as_much_longer_as_the_machine_says():
    layout = make_layout("contiguous", 4, 2)
    schedules = make_schedules("all_gather", layout, full())
    for factor in (2.5, 4.0):
        machine = replace(PLAIN, backward_factor=factor)
        assert forecast(schedules.backward, layout, full(), SIZES, machine).ends[0] == (4 * factor, 4 * factor)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mask", [causal(), documents([0, 10, 30, 48])], ids=["causal", "documents"])
def test_every_pair_is_priced_once_and_the_cost_is_the_forecasts(strategy: str, mask: Mask):
    layout = make_layout("zigzag", 48, 4)
    try:
        schedules = make_schedules(strategy, layout, mask)
    except RingspanError as error:
        pytest.skip(str(error))
    sizes = PieceBytes(heads=4, kv_heads=2, head_dim=8)
    prices = Prices(schedules.layout, mask, replace(sizes, heads=1), PLAIN, 1.0)
    attends = [action for program in schedules.forward.programs for action in program if isinstance(action, Attend)]
    priced = sum(prices.flops(attend) for attend in attends if attend.kvs[0].kind != "k") / (4 * 8)
    assert priced == sum(pairs_of(region) for region in mask.regions(0, 48, 0, 48))
    layer = forecast_layer(schedules, layout, mask, sizes, PLAIN)
    assert cost(schedules, layout, mask, sizes, PLAIN).seconds == pytest.approx(layer.seconds)
    drawn = predicted_timeline(schedules, layout, mask, sizes, PLAIN)
    assert sum(drawn.seconds.values()) == pytest.approx(layer.seconds), "the timeline ends when the forecast does"


def pairs_of(region) -> int:
    rows, columns = range(region.q_start, region.q_stop), range(region.k_start, region.k_stop)
    inside = ((i - j) for i in rows for j in columns)
    return sum((region.low is None or d >= region.low) and (region.high is None or d <= region.high) for d in inside)
