"""What adding up passes through memory, reckoned by hand: a few additions in one pass, others one at a time in the sum's own width."""

from __future__ import annotations

import pytest

from ringspan.attention import accumulate
from ringspan.geometry import Mask, causal, full, make_layout
from ringspan.schedule import Action, Attend, Combine, PieceBytes, Schedule
from ringspan.strategies import Machine, make_schedules, prices_of
from ringspan.strategies.sums import TOGETHER, TOGETHER_MADE

# An element of a result takes 2 bytes and of a wide sum 4; a row of queries has 3 elements, of keys and values 2 x 1.
SIZES = PieceBytes(heads=3, kv_heads=1, head_dim=1, element_bytes=2, accumulator_bytes=4, single_bytes=2)
MACHINE = Machine(
    name="by hand", flops_per_second=1e30, link_bytes_per_second=1e30, latency_seconds=0, launch_seconds=0, memory_bytes_per_second=1
)


def added(strategy: str, num_ranks: int, direction: str, rank: int, mask: Mask | None = None, **options: int | str) -> dict[str, float]:
    """By action of `rank`, as text: bytes that its sums pass through memory. Shards are of two rows."""
    layout, mask = make_layout("contiguous", 2 * num_ranks, num_ranks), full() if mask is None else mask
    schedule = getattr(make_schedules(strategy, layout, mask, **options), direction)
    sums = prices_of(schedule, layout, mask, SIZES, MACHINE).sums
    return {str(action): sums[action] for action in schedule.programs[rank] if action in sums}


def test_as_many_additions_are_summed_at_once_as_the_executor_sums():
    assert (TOGETHER, TOGETHER_MADE) == (accumulate.TOGETHER, accumulate.TOGETHER_MADE)


def test_a_few_partial_outputs_are_each_read_once_and_their_sum_is_read_and_written_once():
    found = added("direct", 3, "forward", 0)
    assert list(found.values()) == [12, 12 + 24], "the first is taken as it is; 2 rows of 3 elements in 2 bytes; the sum twice"
    assert added("all_gather", 3, "forward", 0, mask=causal()) == {}, "there is one"


def test_many_partial_outputs_are_added_one_at_a_time_in_float32():
    assert list(added("direct", TOGETHER + 1, "forward", 0).values()) == [12, 12, 12 + 24]
    found = added("direct", TOGETHER + 2, "forward", 0)
    assert list(found.values()) == [12 + 48] * (TOGETHER + 1), "6 elements, in 2 bytes, to 4 bytes read and 4 written"


def test_of_gradients_that_are_made_here_fewer_are_summed_at_once():
    def of_queries(num_ranks: int) -> list[float]:
        return [size for action, size in added("direct", num_ranks, "backward", 0).items() if action.startswith("q0")]

    assert of_queries(3) == [12, 12 + 24], "of two other ranks' keys: 2 rows of 3 elements in 2 bytes; the sum read and written once"
    assert of_queries(4) == [12 + 48] * 3, "to a sum in 4 bytes, read and written each time"
    # Those of keys lie where they came: 2 rows of 2 elements in 2 bytes from each of three.
    assert [size for action, size in added("all_gather", 4, "backward", 0).items() if action.startswith("+dkv")] == [8, 8, 8 + 16]


def test_gradients_that_come_home_in_one_step_are_summed_at_once_and_else_one_at_a_time():
    # All come in the last step: 2 rows of 2 elements in 2 bytes from each, and the sum read and written.
    together = added("all_gather", 3, "backward", 0)
    assert [size for action, size in together.items() if action.startswith("+dkv")] == [8, 8 + 16]
    # What came is overwritten after its step, so that none waits for another: 2 + 2·4 bytes an element.
    apart = added("direct", 3, "backward", 0)
    assert [size for action, size in apart.items() if action.startswith("+dkv")] == [4 * 10, 4 * 10]


def test_a_sum_that_travels_is_wide_on_the_way():
    found = {action: size for action, size in added("ring", 3, "backward", 0, rotate="keys").items() if action.startswith("+dkv")}
    # What one rank alone has begun comes as its kernel gave it, the whole at the end as it was added up.
    assert list(found.values()) == [4 * (2 + 8), 4 * (4 + 8)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nothing_is_added_where_one_call_gives_all(direction: str):
    assert added("ulysses", 3, direction, 0) == {}


def test_no_two_ranks_do_one_action():
    for strategy in ("ring", "direct", "all_gather", "balanced", "pass_query"):
        layout = make_layout("zigzag", 48, 4)
        schedules = make_schedules(strategy, layout, causal())
        for schedule in (schedules.forward, schedules.backward):
            assert len(set(adding(schedule))) == len(adding(schedule))


def adding(schedule: Schedule) -> list[Action]:
    return [action for program in schedule.programs for action in program if isinstance(action, (Attend, Combine))]
