"""What is counted of a strategy before it is shown."""

from __future__ import annotations

import pytest

from ringspan.errors import RingspanError
from ringspan.schedule import PieceBytes
from ringspan.strategies import STRATEGIES
from ringspan.viz.study import DIRECTIONS, piece_sizes, study

SIZES = PieceBytes(heads=8, kv_heads=2, head_dim=16, element_bytes=2)
KV_BYTES = 2 * 2 * 16 * 2
DKV_BYTES = 2 * 2 * 16 * 4


def test_bytes_of_the_contiguous_ring_are_its_hops_times_the_shard():
    shown = study("ring", layout="contiguous", length=16, num_ranks=4, sizes=SIZES)
    # kv0 makes three hops, kv1 two, kv2 one: every one over the link to the next rank.
    shard = 4 * KV_BYTES
    assert shown.link_bytes["forward"] == {(0, 1): shard, (1, 2): 2 * shard, (2, 3): 3 * shard}
    assert shown.sent_bytes["forward"] == (shard, 2 * shard, 3 * shard, 0)
    gradient = 4 * DKV_BYTES
    assert sum(shown.sent_bytes["backward"]) == 6 * shard + 6 * gradient
    assert [shown.visiting_bytes("forward", rank) for rank in range(4)] == [0, shard, 2 * shard, 2 * shard]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_all_that_is_sent_is_counted_once_for_its_sender(strategy: str):
    shown = study(strategy, length=31, num_ranks=4, sizes=SIZES)
    for direction in DIRECTIONS:
        assert sum(shown.sent_bytes[direction]) == sum(shown.link_bytes[direction].values())
        assert all(source != target and size > 0 for (source, target), size in shown.link_bytes[direction].items())


def test_ulysses_sends_every_position_for_the_heads_of_the_others():
    sizes = PieceBytes(heads=4, kv_heads=4, head_dim=8, element_bytes=2)
    shown = study("ulysses", layout="contiguous", length=12, num_ranks=4, sizes=sizes)
    # DeepSpeed-Ulysses (2309.14509): q, k, v and out, each N/P · h, of which a share of (P − 1)/P leaves the rank.
    elements = 4 * (12 // 4) * (4 * 8) * 3 // 4
    assert shown.sent_bytes["forward"] == (2 * elements,) * 4
    assert shown.sent_bytes["backward"] == (2 * elements,) * 4
    assert (shown.num_lanes, shown.lane_letter, shown.work("forward")) == (1, "g", (78,) * 4)


def test_the_layout_auto_balances_the_mask_that_is_studied():
    shown = study("ring", layout="auto", mask="documents:20,12", length=32, num_ranks=4)
    plain = [study("ring", layout=name, mask="documents:20,12", length=32, num_ranks=4) for name in ("contiguous", "zigzag")]
    assert shown.imbalance("forward") <= min(other.imbalance("forward") for other in plain)


def test_uneven_heads_are_waiting_too():
    shown = study("ulysses", length=12, num_ranks=3, sizes=PieceBytes(heads=8, kv_heads=8))
    assert shown.work("forward") == (3 * 78, 3 * 78, 2 * 78)
    assert shown.imbalance("forward") == pytest.approx(9 / 8, abs=1e-12)
    assert shown.idle_fraction("forward") == pytest.approx(1 / 9, abs=1e-12)


def test_without_head_groups_imbalance_and_idleness_are_those_of_the_pairs():
    shown = study("ring", layout="contiguous", length=16, num_ranks=4, sizes=SIZES)
    timeline = shown.timeline("backward")
    assert shown.imbalance("backward") == pytest.approx(timeline.imbalance, abs=1e-12)
    assert shown.idle_fraction("backward") == pytest.approx(timeline.idle_fraction, abs=1e-12)
    assert shown.imbalance("backward") == pytest.approx(58 / 34, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ranks": 0}, "ranks 0: it lies outside of 1 to 128"),
        ({"num_ranks": 129}, "Try: ranks 128"),
        ({"length": 0}, "length 0"),
        ({"length": 2**40 + 1}, "outside of 1 to 1099511627776"),
        ({"strategy": "rink"}, "the strategies are ring"),
        ({"layout": "zagzig"}, "the layouts are contiguous"),
        ({"mask": "casual"}, "the masks are causal"),
        ({"mask": "documents:3,4"}, "documents"),
        ({"weights": (1.0, 1.0)}, "Only 'weighted' takes weights"),
        ({"layout": "weighted", "weights": (1.0,)}, "one finite weight"),
        ({"layout": "weighted", "weights": (1.0, float("nan"))}, "one finite weight"),
        ({"options": {"stages": 2}}, "its own options alone"),
        ({"strategy": "all_gather", "options": {"stages": "two"}}, "of type int"),
        ({"strategy": "double_ring", "options": {"window": 3}}, "divisors 1, 2"),
    ],
)
def test_what_cannot_be_studied_is_refused_with_what_would_work(arguments: dict, message: str):
    asked = {"strategy": "ring", "length": 16, "num_ranks": 2} | arguments
    with pytest.raises(RingspanError, match=message):
        study(asked.pop("strategy"), **asked)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, None, 8, 2), "heads 0"),
        ((8, 0, 8, 2), "kv-heads 0"),
        ((8, 3, 8, 2), "Try: --kv-heads 2"),
        ((8, 16, 8, 2), "Try: --kv-heads 8"),
        ((8, None, -1, 2), "head-dim -1"),
        ((8, None, 2**21, 2), "outside of 1 to 1048576"),
        ((8, None, 8, 3), "1, 2, 4 or 8 bytes"),
    ],
)
def test_impossible_sizes_are_refused(counts: tuple, message: str):
    with pytest.raises(RingspanError, match=message):
        piece_sizes(*counts)


def test_results_travel_in_float32_and_of_float64_inputs_in_float64():
    assert piece_sizes(8, None, 64, 2) == PieceBytes(heads=8, kv_heads=8, head_dim=64, element_bytes=2, accumulator_bytes=4)
    assert piece_sizes(8, 2, 64, 8).accumulator_bytes == 8
