"""The forecast's cells, reckoned by hand on two ranks, and their agreement with the cost and the mask everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringspan.errors import RingspanError
from ringspan.geometry import Mask, causal, documents, full, make_layout
from ringspan.schedule import Attend, Piece, PieceBytes, ScheduleBuilder
from ringspan.strategies import STRATEGIES, Machine, Prices, cost, forecast, forecast_layer, make_schedules
from ringspan.strategies.cost import rest_saves
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


def test_what_leaves_by_one_port_goes_one_after_the_other_and_so_does_what_enters_by_one():
    layout = make_layout("contiguous", 6, 3)
    found = forecast(make_schedules("all_gather", layout, full()).forward, layout, full(), SIZES, PLAIN)
    for end in ("source", "target"):
        for rank in range(3):
            begun = sorted(part.begins for part in found.transfers if getattr(part, end) == rank)
            assert len(begun) == 2
            assert begun[1] - begun[0] >= 4, "four bytes at a byte a second"
    assert all(part.arrives == part.begins + 4.5 for part in found.transfers)
    assert found.starts[1] == tuple(max(part.arrives for part in found.transfers if part.target == rank) for rank in range(3))


def test_no_port_stands_idle_while_every_rank_has_something_for_every_other():
    layout = make_layout("contiguous", 16, 4)
    found = forecast(make_schedules("all_gather", layout, full()).forward, layout, full(), SIZES, PLAIN)
    assert found.starts[1] == (24.5,) * 4, "three times eight bytes, and the latency"


def test_each_signal_is_given_before_a_rank_computes_and_read_after():
    layout = make_layout("contiguous", 6, 3)
    machine = replace(PLAIN, signal_seconds=0.25)
    found = forecast(make_schedules("all_gather", layout, full()).forward, layout, full(), SIZES, machine)
    assert found.ends[0] == (2 * 0.25 + 4,) * 3
    assert found.starts[1] == (2 * 0.25 + 8.5 + 2 * 0.25,) * 3, "nothing comes before it may, and two are read one after the other"


def test_launched_from_python_a_pass_takes_no_less_than_python():
    layout = make_layout("contiguous", 4, 2)
    schedules = make_schedules("ring", layout, full())
    machine = replace(PLAIN, host_seconds=10)
    predicted = forecast_layer(schedules, layout, full(), SIZES, machine)
    assert predicted.forward.host_seconds == 2 * 10 + 2 * 5, "two calls, something sent, something received"
    assert predicted.seconds == forecast_layer(schedules, layout, full(), SIZES, PLAIN).seconds
    assert predicted.launched_seconds == 30 + max(predicted.backward.host_seconds, predicted.backward.seconds)
    assert cost(schedules, layout, full(), SIZES, machine).launched_seconds == predicted.launched_seconds


def test_a_rank_is_done_when_the_last_thing_that_is_due_to_it_has_come():
    builder = ScheduleBuilder("by hand", "forward", (2, 2))
    builder.transfer(Piece("kv", 0, 0, 2), 0, 1, posted=0, due=1)
    found = forecast(builder.build(), make_layout("contiguous", 4, 2), full(), SIZES, PLAIN)
    assert found.done == (0, 4.5)


def test_every_rank_of_every_context_group_has_its_lane_and_the_exchanges_their_time():
    layout = make_layout("zigzag", 48, 4)
    schedules = make_schedules("two_dimensional", layout, causal(), ulysses=2)
    sizes = PieceBytes(heads=4, kv_heads=2, head_dim=8)
    drawn = predicted_timeline(schedules, layout, causal(), sizes, PLAIN)
    for rank in range(4):
        for direction in ("forward", "backward"):
            events = drawn.of(direction, rank)
            assert any(event.kind == "attend" for event in events)
            assert {event.step for event in events if event.label == "positions for heads"} == {-1, drawn.num_steps[direction]}
    links = {(flight.source, flight.target) for flight in drawn.flights}
    assert {(0, 1), (1, 0), (2, 3), (3, 2)} <= links, "within head groups"
    assert {(0, 2), (2, 0), (1, 3), (3, 1)} <= links, "within context groups"


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


def test_links_that_nobody_uses_for_a_while_save_some_of_the_time():
    layout = make_layout("contiguous", 4, 2)
    rests = replace(PLAIN, rest_seconds=1.0, rest_saves=0.1)
    schedules = make_schedules("ring", layout, full())
    found = forecast(schedules.forward, layout, full(), SIZES, rests)
    assert rest_saves(found, 1, rests) == pytest.approx(0.3), "from 5.5, a second after the last byte, to 8.5"
    assert rest_saves(found, 1, PLAIN) == 0.0
    assert rest_saves(found, 1, replace(rests, rest_seconds=4.0)) == 0.0
    priced, alone = (cost(schedules, layout, full(), SIZES, each) for each in (rests, PLAIN))
    assert alone.forward_seconds - priced.forward_seconds == pytest.approx(0.3)
    assert alone.seconds - priced.seconds == alone.launched_seconds - priced.launched_seconds > 0.3, "in the backward too"
    # Rank 1 waits for a byte that comes when all else is done.
    late = replace(found, transfers=(*found.transfers, replace(found.transfers[0], begins=8.0, arrives=8.5)))
    assert rest_saves(late, 1, rests) == pytest.approx(0.25)
    # Of one rank alone: the one that rests less counts.
    one = replace(found, transfers=(replace(found.transfers[0], target=2),), done=(8.5, 8.5))
    assert rest_saves(one, 1, rests) == pytest.approx(0.3), "rank 1, whose links nobody uses, waits for rank 0"
    nothing = replace(found, transfers=())
    assert rest_saves(nothing, 1, rests) == pytest.approx(0.75)
    assert rest_saves(nothing, 2, rests) == pytest.approx(0.325), "but a second of half of it: then what the first stage gave leaves"
