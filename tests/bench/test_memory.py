"""The memory that a schedule promises: visitors, accumulators, what a call hands over."""

from __future__ import annotations

import torch

import ringspan
from ringspan.attention.landing import make_rooms
from ringspan.attention.reshard import head_group, make_exchange
from ringspan.attention.swap import TransportSwapper
from ringspan.bench.case import Shape
from ringspan.bench.memory import promise, staged
from ringspan.geometry import head_shares, make_layout
from ringspan.strategies import make_schedules
from ringspan.transformer.memory import LiveBytes
from ringspan.transport import SingleRank

SHAPE = Shape(tokens=64, num_ranks=4, heads=8, kv_heads=2, head_dim=16)


def promised(strategy: str, direction: str, rank: int = 0, layout: str = "zigzag"):
    made = make_layout(layout, SHAPE.length, SHAPE.num_ranks)
    return promise(make_schedules(strategy, made, SHAPE.made_mask), made, SHAPE.sizes, rank, direction)


def test_a_ring_holds_visiting_keys_and_one_accumulator():
    kv, q = 2 * 2 * 16 * 2, 8 * 16 * 2  # bytes of a position: k and v of 2 heads, q of 8, in two bytes an element
    found = promised("ring", "forward")
    assert found.accumulators == 64 * 8 * (16 + 1) * 4, "out and lse in float32"
    assert 64 * kv <= found.visitors <= 2 * 64 * kv, "one visitor at work and one on its way"
    assert found.kernel == 64 * (q + 8 * 4), "out and lse of the local block"
    assert found.exchanged == 0
    assert found.total == found.visitors + found.accumulators + found.kernel == found.as_json()["total"]
    assert promised("all_gather", "forward").visitors > found.visitors


def test_the_backward_adds_in_float32():
    found = promised("ring", "backward")
    assert found.accumulators >= 64 * (8 * 16 + 2 * 2 * 16) * 4, "dq, and dk and dv, of its own"
    assert found.kernel == 64 * (8 * 16 + 2 * 2 * 16) * 2


def test_an_exchange_of_positions_for_heads_holds_the_whole_sequence_of_few_heads():
    found = promised("ulysses", "forward", layout="contiguous")
    assert found.visitors == 0 and found.exchanged == 256 * (2 * 2 * 16 + 2 * 16) * 2, "q, out, k and v of 2 query heads and 1 KV head"
    assert promised("ulysses", "backward", layout="contiguous").exchanged == 256 * (3 * 2 * 16 + 2 * 16) * 2, "and dO"


def test_an_exchange_holds_what_it_packs_only_while_it_is_under_way():
    """Beside q, k, v and dO of few heads: what goes to others, and what comes from them, never all of both and the whole at once."""
    rows, heads, kv_heads, width = 512, 8, 2, 64

    layout = make_layout("zigzag", 2 * rows, 2)
    schedules = make_schedules("ulysses", layout, ringspan.causal())
    assert schedules.grid is not None
    q, k, v = (torch.randn(1, rows, number, width) for number in (heads, kv_heads, kv_heads))
    group = head_group(schedules.grid, 0)
    shares = head_shares(heads, kv_heads, 2)
    rooms, _ = make_rooms(schedules.grid, layout, schedules.layout, q, [shares])
    exchange = make_exchange(TransportSwapper(Instant(), group), group, schedules.grid, layout, schedules.layout, (shares,), rooms, {}, ())
    with LiveBytes() as live:
        live.ignore(q, k, v)
        (exchanged,) = exchange.inputs_to_heads(q, k, v, keep=True)
        coming = [x for x in exchanged.wait() if x is not None]
        assert live.now() == sum(x.numel() * x.element_size() for x in coming), "what came has been put together, and is gone"
    assert [x.shape for x in coming] == [(1, 2 * rows, each, width) for each in (heads // 2, kv_heads // 2, kv_heads // 2)]
    # Half is this rank's own: half leaves while half arrives, and then half lies beside the whole.
    assert live.peak <= 1.5 * sum(x.numel() * x.element_size() for x in (q, k, v)) + 4096


def test_heads_that_take_turns_hold_less():
    assert staged(SHAPE.sizes, 1).heads == 4 and staged(SHAPE.sizes, 1).kv_heads == 1
    assert staged(SHAPE.sizes, None) == staged(SHAPE.sizes, 5) == SHAPE.sizes


class Instant(SingleRank):
    """Rank 0 of two, whose transfers are over as soon as they are posted."""

    def exchange(self, sends, receives, lane: int = 0):
        assert sends and receives
        return Done()


class Done:
    def wait(self) -> None:
        pass
