"""An observer is told every part of the schedule once, in order, and changes nothing."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ringspan.attention import ContextParallel
from ringspan.attention.observe import AFTER, BEFORE, KINDS, Swap, watch
from ringspan.attention.program import Batch
from ringspan.geometry import causal, sliding_window
from ringspan.schedule import Attend, Combine, Receive, Schedule, Send
from ringspan.schedule.draw import pairs_between
from ringspan.strategies import STRATEGIES
from ringspan.transport import run_in_process

LENGTH, RANKS = 61, 4


@dataclass
class Listener:
    """Writes down what it is told, by direction."""

    told: dict[str, list[list]] = field(default_factory=lambda: {"forward": [], "backward": []})
    direction: str = "forward"

    def begin(self, step: int, kind: str, what: object, pending: object = None) -> list:
        token = [step, kind, what, pending, threading.get_ident(), "begun"]
        self.told[self.direction].append(token)
        return token

    def end(self, token: Any) -> None:
        assert token[-1] == "begun", "a part ends once"
        token[-1] = "ended"


def listened(strategy: str, layout: str, mask, **options):
    """(each rank's listener, schedules, each rank's bytes sent, out with and without a listener) over in-process ranks."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))

    def run(group):
        sequence = ContextParallel(group, strategy=strategy, layout=layout, **options).sequence(LENGTH, mask)
        inputs = tuple(sequence.shard(x).requires_grad_() for x in (q, k, v))
        alone = sequence.attention(*inputs)
        before = group.bytes_sent.total()
        listener = sequence.observer = Listener()
        out = sequence.attention(*inputs)
        listener.direction = "backward"
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        return listener, sequence.schedules, group.bytes_sent.total() - before, alone.detach(), out.detach()

    results = run_in_process(RANKS, run, 60.0)
    return [result[0] for result in results], results[0][1], [result[2] for result in results], [result[3:] for result in results]


def parts(listener: Listener, direction: str, kind: str) -> list[tuple[int, Any]]:
    return [(step, what) for step, told, what, *_ in listener.told[direction] if told == kind]


@pytest.mark.parametrize("mask", [causal(), sliding_window(9)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("ulysses", "two_dimensional")])
def test_every_attend_transfer_and_combine_of_the_schedule_is_observed_once_and_in_its_step(strategy: str, layout: str, mask):
    check_observed(strategy, layout, mask)


@pytest.mark.parametrize("strategy", ["ring", "balanced"])
def test_what_goes_through_peer_memory_is_observed_alike(strategy: str):
    check_observed(strategy, "zigzag", causal(), transport="peer_memory")


def check_observed(strategy: str, layout: str, mask, **options):
    """Every action of the schedule, once and in its step."""
    listeners, schedules, _, _ = listened(strategy, layout, mask, **options)
    for direction, schedule in (("forward", schedules.forward), ("backward", schedules.backward)):
        for rank, listener in enumerate(listeners):
            actions = schedule.programs[rank]
            moved = [(step, part) for step, batch in parts(listener, direction, "transfer") for part in (*batch.sends, *batch.receives)]
            expected = [(action.step, action) for action in actions if isinstance(action, (Send, Receive))]
            assert Counter(moved) == Counter(expected)
            # Without an action: what an attend put off.
            combined = [(step, what) for step, what in parts(listener, direction, "merge") if what is not None]
            assert Counter(combined) == Counter((action.step, action) for action in actions if isinstance(action, Combine))
            assert attended(listener, direction) == to_attend(schedule, schedules.layout, mask, rank)


def attended(listener: Listener, direction: str) -> Counter:
    """Pairs by (step, owner of the queries, kind of the keys, their owner)."""
    found: Counter = Counter()
    for step, launch in parts(listener, direction, "attend"):
        for owner, tile in launch.blocks:
            found[(step, launch.q_owner, launch.kind, owner)] += tile.pairs
    return found


def to_attend(schedule: Schedule, layout, mask, rank: int) -> Counter:
    expected: Counter = Counter()
    for action in schedule.programs[rank]:
        if isinstance(action, Attend):
            for kv in action.kvs:
                expected[(action.step, action.q.owner, kv.kind, kv.owner)] += pairs_between(layout, mask, action.q, kv)
    return +expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parts_end_in_order_and_what_is_posted_is_waited_for_by_the_step_in_which_it_is_due(strategy: str):
    listeners, _, _, _ = listened(strategy, "zigzag", causal())
    kinds: set[str] = set()
    for listener in listeners:
        for direction, told in listener.told.items():
            assert all(token[-1] == "ended" for token in told)
            kinds |= {kind for _, kind, *_ in told}
            steps = [step for step, *_ in told if step not in (BEFORE, AFTER)]
            assert steps == sorted(steps)
            for what in [what for _, kind, what, *_ in told if kind == "transfer"]:
                (posted,) = [step for step, kind, other, *_ in told if kind == "post" and other is what]
                (waited,) = [step for step, kind, other, *_ in told if kind == "wait" and other is what]
                assert isinstance(what, Swap) or (waited == what.due - 1 >= posted), direction
            assert all(token[3] is not None for token in told if token[1] == "transfer"), "the observer is given what is under way"
    assert kinds <= set(KINDS)
    assert {"attend", "transfer", "wait", "post"} <= kinds


@pytest.mark.parametrize("strategy", ["ulysses", "two_dimensional"])
def test_the_exchange_of_positions_for_heads_is_observed_to_the_byte(strategy: str):
    options = {"ulysses": 2} if strategy == "two_dimensional" else {}
    listeners, schedules, sent, _ = listened(strategy, "zigzag", causal(), **options)
    assert schedules.grid is not None
    for listener, total in zip(listeners, sent, strict=True):
        swaps = [what for told in listener.told.values() for _, kind, what, *_ in told if kind == "transfer" and isinstance(what, Swap)]
        batches = [what for told in listener.told.values() for _, kind, what, *_ in told if kind == "transfer" and isinstance(what, Batch)]
        assert len(swaps) == 4, "there and back, forward and backward"
        for told in listener.told.values():
            assert [step for step, kind, what, *_ in told if kind == "transfer" and isinstance(what, Swap)] == [BEFORE, AFTER]
        swapped = sum(size for swap in swaps for _, size in swap.sends)
        assert swapped == total if not batches else 0 < swapped < total


def test_an_observer_changes_no_bit_and_without_one_there_is_no_cost_but_a_shared_context():
    _, _, _, outs = listened("ring", "zigzag", causal())
    for alone, observed in outs:
        assert torch.equal(alone, observed)
    assert watch(None, 0, "attend") is watch(None, 3, "wait"), "no object is made where nobody looks on"


def test_the_backward_tells_the_observer_of_its_forward_even_where_another_one_looks_on_by_then():
    def run(group):
        sequence = ContextParallel(group).sequence(16)
        q, k, v = (torch.randn(1, sequence.shard_length, 2, 8, requires_grad=True) for _ in range(3))
        first, second = Listener(), Listener()
        sequence.observer = first
        out = sequence.attention(q, k, v)
        sequence.observer, first.direction = second, "backward"
        out.sum().backward()
        return len(first.told["backward"]), len(second.told["forward"])

    for heard, overheard in run_in_process(2, run, 60.0):
        assert heard and not overheard
