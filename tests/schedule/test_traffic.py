"""Traffic: bytes over each link, beside the formulas of the papers."""

from __future__ import annotations

import pytest

from ringspan.geometry import causal, full, make_layout, sliding_window
from ringspan.schedule import PieceBytes, sent_bytes, traffic
from ringspan.strategies import link_bytes, make_schedules

# Float16 tensors, float32 accumulators; eight query heads and two key heads of 16.
SIZES = PieceBytes(batch=3, heads=8, kv_heads=2, head_dim=16, element_bytes=2, accumulator_bytes=4)
KV = 2 * 3 * 2 * 16 * 2
DKV = 2 * KV


def test_a_ring_forward_sends_every_shard_to_its_neighbour_and_never_the_last_hop():
    schedules = make_schedules("ring", make_layout("contiguous", 40, 4), full())
    assert traffic(schedules.forward, SIZES) == {(rank, (rank + 1) % 4): 3 * 10 * KV for rank in range(4)}
    assert sent_bytes(schedules.forward, SIZES, rank=2) == 3 * 10 * KV


def test_a_ring_backward_sends_the_shards_again_and_their_gradients_once_round_and_home():
    backward = make_schedules("ring", make_layout("contiguous", 40, 4), full()).backward
    # dK and dV of a shard leave three other ranks, the last of them for home.
    assert traffic(backward, SIZES) == {(rank, (rank + 1) % 4): 3 * 10 * (KV + DKV) for rank in range(4)}


def test_zigzag_sends_half_of_what_no_one_ahead_reads_whole():
    whole, half = (make_schedules("ring", make_layout("zigzag", 64, 4), mask).forward for mask in (full(), causal()))
    assert sum(traffic(half, SIZES).values()) < sum(traffic(whole, SIZES).values())


@pytest.mark.parametrize("strategy", ["ring", "direct"])
def test_under_a_window_no_byte_is_sent_that_no_tile_reads(strategy: str):
    forward = make_schedules(strategy, make_layout("contiguous", 64, 4), sliding_window(5)).forward
    assert traffic(forward, SIZES) == {(rank, rank + 1): 5 * KV for rank in range(3)}, "only the neighbours' tails"


def test_key_heads_are_never_expanded_on_the_wire():
    few, many = (PieceBytes(heads=8, kv_heads=kv_heads, head_dim=16) for kv_heads in (2, 8))
    assert many.of("kv") == 4 * few.of("kv") and many.of("q") == few.of("q")


def test_ulysses_sends_queries_and_results_once_whatever_the_mask():
    layout = make_layout("contiguous", 40, 4)
    for mask in (full(), causal()):
        total = link_bytes(make_schedules("ulysses", layout, mask), layout, PieceBytes(heads=8, kv_heads=4, head_dim=16), "forward")
        # Of each rank's ten positions three quarters go elsewhere: a quarter of the eight heads and of the two times four key heads each;
        # and as much of the output comes back.
        assert set(total.values()) == {10 * (2 + 2 * 1) * 16 * 2 + 10 * 2 * 16 * 2}
        assert len(total) == 12
