"""Heads exchanged and computed in stages: what one stage gives, through whatever carries them."""

from __future__ import annotations

import math
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import ringspan
from ringspan.attention import peer_swapper, planning, swap
from ringspan.attention.landing import Message
from ringspan.attention.reshard import Exchange
from ringspan.attention.tape import Tape, recording, replaying
from ringspan.errors import RingspanError
from ringspan.geometry import HeadShare, head_shares, head_stages
from ringspan.strategies import MACHINES
from ringspan.transport.shared_memory import SharedMemory
from ringspan.transport.symmetric_memory import SymmetricMemory
from tests.support.device import Device, Stream, device

__all__ = ["device"]

LENGTH = 45


def odd_heads_see_less(b, h, q_idx, kv_idx):
    """Allows what a causal mask does, and of odd heads only every other key: a head's number matters."""
    return (q_idx >= kv_idx) & ((h % 2 == 0) | ((q_idx - kv_idx) % 2 == 0))


def attended(group: Any, transport: str, stages: int, heads: int, kv_heads: int, mask: Any = None, sinks: bool = False) -> list[Any]:
    same = torch.Generator().manual_seed(0)
    context = ringspan.ContextParallel(group, transport=transport, kernel="reference", strategy="ulysses", stages=stages)
    sequence = context.sequence(LENGTH, mask or ringspan.causal())

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=same, dtype=torch.float64)

    leaves = [sequence.shard(normal(2, LENGTH, number, 8)).requires_grad_() for number in (heads, kv_heads, kv_heads)]
    sink = normal(heads).requires_grad_() if sinks else None
    out, lse = sequence.attention(*leaves, sinks=sink, return_lse=True)
    loss = (out * sequence.shard(normal(2, LENGTH, heads, 8))).sum() + lse.square().sum()
    return [out, lse, *torch.autograd.grad(loss, [*leaves, *([] if sink is None else [sink])])]


@pytest.mark.parametrize("transport", ["process_group", "peer_memory"])
@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(2, 8, 8), (3, 10, 5), (4, 12, 6), (2, 6, 1), (3, 2, 2)])
def test_any_number_of_stages_gives_what_one_does(transport: str, ranks: int, heads: int, kv_heads: int):
    expected = ringspan.run_in_process(ranks, lambda group: attended(group, "process_group", 1, heads, kv_heads, sinks=True))
    for stages in (2, 3, 8):
        found = ringspan.run_in_process(ranks, lambda group, n=stages: attended(group, transport, n, heads, kv_heads, sinks=True))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


LATE = {"beside the last": 1e-30, "at the end": math.inf}
"""Bytes a second of a link: what leaves together leaves beside the last stage where that saves more, else after it."""


def leaving(monkeypatch: pytest.MonkeyPatch, late: str, rest_seconds: float = 0.0) -> None:
    machine = replace(MACHINES["cpu"], rest_seconds=rest_seconds, rest_saves=0.5, exchange_bytes_per_second=LATE[late])
    monkeypatch.setitem(MACHINES, "cpu", machine)
    monkeypatch.setattr(SharedMemory, "links_rest", True)


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "stages"), [(2, 8, 8, 4), (3, 10, 5, 2), (4, 16, 16, 4), (3, 12, 12, 3), (2, 6, 1, 3)]
)
def test_what_leaves_together_brings_the_same_bits(
    ranks: int, heads: int, kv_heads: int, stages: int, late: str, monkeypatch: pytest.MonkeyPatch
):
    def run(group: Any) -> list[Any]:
        # A second pass begins with nothing of the first.
        return [*attended(group, "peer_memory", stages, heads, kv_heads), *attended(group, "peer_memory", stages, heads, kv_heads)]

    expected = ringspan.run_in_process(ranks, run)
    leaving(monkeypatch, late)
    for found, right in zip(ringspan.run_in_process(ranks, run), expected, strict=True):
        assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("late", ["no", *LATE])
def test_links_rest_until_the_last_stage_begins_or_ends_where_there_is_time_for_that(late: str, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    right_launched, right_beside, mine = planning.Plan.launched, SharedMemory.beside, threading.local()

    def say(what: str) -> None:
        said.extend([what] * hasattr(mine, "here"))

    def launched(self: Any, direction: str, *given: Any) -> Any:
        say(f"{direction} {self.stage}")
        return right_launched(self, direction, *given)

    def beside(self: Any, lane: str, *given: Any, **named: Any) -> Any:
        say(lane) if lane == "arrive" else None
        return right_beside(self, lane, *given, **named)

    def run(group: Any) -> None:
        vars(mine).update(here=True) if group.rank == 0 else None
        sequence = ringspan.ContextParallel(group, transport="peer_memory", kernel="reference", strategy="ulysses", stages=4).sequence(16)
        x = torch.randn(1, 8, 8, 8, requires_grad=True)
        sequence.attention(x, x, x).sum().backward()

    monkeypatch.setattr(planning.Plan, "launched", launched)
    monkeypatch.setattr(SharedMemory, "beside", beside)
    # A rank computes 136 pairs of a query and a key for each of four heads of 8 columns, three of them before the last stage.
    before, all_of_it = (4 * 136 * heads * 8 * MACHINES["cpu"].backward_factor / MACHINES["cpu"].flops_per_second for heads in (3, 4))
    leaving(monkeypatch, late if late in LATE else "at the end", before * 0.999 if late in LATE else all_of_it)
    ringspan.run_in_process(2, run)
    there, stages = ["arrive"] * 3, [f"{{}} {stage}" for stage in range(4)]
    in_turn = [text for stage in stages[:3] for text in (stage, "arrive")] + stages[3:]
    ways = {"no": in_turn, "beside the last": [*stages[:3], "arrive", stages[3]], "at the end": [*stages, "arrive"]}
    assert said[:10] == [*there, *(text.format("forward") for text in in_turn)], "its operations are four for ten of a backward"
    assert said[10:] == [*there, *(text.format("backward") for text in ways[late])]


@pytest.mark.parametrize("transport", ["process_group", "peer_memory"])
@pytest.mark.parametrize("memory", [1.0, 1e30])
def test_whenever_it_is_kept_a_backward_has_what_landed(transport: str, memory: float, monkeypatch: pytest.MonkeyPatch):
    expected = ringspan.run_in_process(3, lambda group: attended(group, "process_group", 1, 12, 6))
    monkeypatch.setitem(MACHINES, "cpu", replace(MACHINES["cpu"], memory_bytes_per_second=memory))
    for stages in (1, 2):
        found = ringspan.run_in_process(3, lambda group, n=stages: attended(group, transport, n, 12, 6))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_mask_that_knows_heads_is_told_the_number_of_each():
    mask = ringspan.mask_mod(odd_heads_see_less)
    expected = ringspan.run_in_process(2, lambda group: attended(group, "process_group", 1, 6, 6, mask))
    found = ringspan.run_in_process(2, lambda group: attended(group, "peer_memory", 3, 6, 6, mask))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_every_stage_is_on_its_way_before_the_first_is_computed_and_leaves_as_soon_as_it_is(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    def tell(owner: Any, name: str, short: str) -> None:
        right = getattr(owner, name)

        def told(self: Any, *given: Any, **named: Any) -> Any:
            if getattr(self, "exchange", self).place == 0:
                stage = self.stage if isinstance(self, planning.Plan) else given[0] if isinstance(given[0], int) else "all"
                said.append(f"{short} {stage}")
            return right(self, *given, **named)

        monkeypatch.setattr(owner, name, told)

    tell(Exchange, "inputs_to_heads", "in")
    tell(Exchange, "outputs_to_positions", "out")
    tell(Exchange, "output_gradients_to_heads", "dout in")
    tell(Exchange, "input_gradients_to_positions", "gradients out")
    tell(planning.Plan, "launched", "compute")
    ringspan.run_in_process(2, lambda group: attended(group, "peer_memory", 2, 8, 4))
    assert said[:5] == ["in all", "compute 0", "out 0", "compute 1", "out 1"]
    assert said[5:] == ["dout in all", "compute 0", "gradients out 0", "compute 1", "gradients out 1"]


def test_a_stage_waits_for_its_own_heads_alone(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    right_forward, right_inputs = planning.Plan.launched, Exchange.inputs_to_heads

    def launched(self: Any, *given: Any) -> Any:
        said.extend([f"compute {self.stage}"] * (self.exchange.place == 0))
        return right_forward(self, *given)

    def to_heads(self: Exchange, *given: Any) -> Any:
        stages = right_inputs(self, *given)

        def tell(stage: int, right_wait: Any) -> Any:
            def wait() -> Any:
                said.extend([f"wait {stage}"] * (self.place == 0))
                return right_wait()

            return wait

        for stage, coming in enumerate(stages):
            coming.wait = tell(stage, coming.wait)  # type: ignore[method-assign]
        return stages

    monkeypatch.setattr(planning.Plan, "launched", launched)
    monkeypatch.setattr(Exchange, "inputs_to_heads", to_heads)
    ringspan.run_in_process(2, lambda group: attended(group, "process_group", 2, 4, 4))
    assert said[:4] == ["wait 0", "compute 0", "wait 1", "compute 1"]


def test_results_are_written_after_what_was_computed_where_they_lie(monkeypatch: pytest.MonkeyPatch):
    """Memory for them was asked for behind the first stage's kernel, which may still compute there when another stream has its own."""
    said, mine = [], threading.local()
    right_copy, right_launched, right_beside = peer_swapper.copy_all, planning.Plan.launched, SharedMemory.beside

    def say(what: str) -> None:
        said.extend([what] * hasattr(mine, "here"))

    def copy_all(*given: Any, **named: Any) -> None:
        say("copy")
        right_copy(*given, **named)

    def launched(self: Any, *given: Any) -> Any:
        say(f"compute {self.stage}")
        return right_launched(self, *given)

    class Told:
        def __init__(self, lane: str) -> None:
            self._lane = lane

        def wait(self) -> None:
            say(f"wait {self._lane}")

    def beside(self: Any, lane: str, *given: Any, **named: Any) -> Any:
        right_beside(self, lane, *given, **named)
        return Told(lane)

    def run(group: Any) -> None:
        vars(mine).update(here=True) if group.rank == 0 else None
        attended(group, "peer_memory", 2, 8, 4)

    monkeypatch.setattr(peer_swapper, "copy_all", copy_all)
    monkeypatch.setattr(planning.Plan, "launched", launched)
    monkeypatch.setattr(SharedMemory, "beside", beside)
    ringspan.run_in_process(2, run)
    ends = [index for index, what in enumerate(said) if what == "compute 1"]
    for end, swaps in zip(ends, (2, 1), strict=True):
        # Forward out and lse, backward the gradients: what the first stage gave has left before the last one's is written.
        assert said[end + 1 : said.index("copy", end)] == ["wait arrive"] * swaps


def test_what_a_rank_gives_itself_is_copied_beside_what_others_get_as_far_as_one_launch_goes(monkeypatch: pytest.MonkeyPatch):
    """Zigzag on three ranks: of a stage two runs of rows of three tensors, for two others and for itself."""
    launches, mine, right = [], threading.local(), peer_swapper.copy_all

    def copy_all(copies: list[Any], few: bool = False) -> None:
        launches.extend([(len(copies), few)] * (hasattr(mine, "here") and bool(copies)))
        right(copies, few)

    def run(group: Any) -> list[torch.Tensor]:
        vars(mine).update(here=True) if group.rank == 0 else None
        return attended(group, "peer_memory", 4, 12, 12)

    expected = ringspan.run_in_process(3, run)
    monkeypatch.setattr(peer_swapper, "copy_all", copy_all)
    found = ringspan.run_in_process(3, run)
    # First the four stages' own beside what others get of the first, then what others get of the rest; what is kept of three stages.
    assert launches[:7] == [(12 + 4 * 6, False)] + [(12, True)] * 3 + [(3, True)] * 3
    # At last what others get of the last stage's out, what is this rank's own of that and of all that left before, and what it keeps.
    assert launches[7] == (4 + 2 + 3 * 4 + 3, False)
    launches.clear()
    monkeypatch.setattr(peer_swapper, "AT_ONCE", 12 + 2 * 6)
    fewer = ringspan.run_in_process(3, run)
    assert launches[:7] == [(12 + 2 * 6, False), (12, True), (12 + 6, True), (12 + 6, True)] + [(3, True)] * 3
    assert max(number for number, few in launches if not few) == 12 + 2 * 6, "on the way back too"
    for each in (found, fewer):
        assert all(torch.equal(*pair) for rank in zip(each, expected, strict=True) for pair in zip(*rank, strict=True))


@pytest.mark.parametrize("third", ["beside", "together"])
def test_what_leaves_together_comes_after_all_that_made_it_on_whichever_stream(third: swap.Leaving, device: Device):
    class Memory(SymmetricMemory):
        def __init__(self) -> None:
            self._index, self._device, self._streams = 0, torch.device("cuda", 0), {}

        def inbox(self, rank: int) -> torch.Tensor:
            return torch.zeros(1 << 12, dtype=torch.uint8)

        def meet(self) -> None:
            device.work(f"meet {len([name for name in device.seen if name.startswith('meet')])}")

        def beside(self, lane: str, work: Any, after: Any = ()) -> Any:
            def told() -> None:
                device.work(f"{lane} {len([name for name in device.seen if name.startswith(lane)])}")
                work()

            return super().beside(lane, told, after)

    swapper = peer_swapper.PeerSwapper(Memory(), Counter(), swap.Group((0, 1), 0))
    message, sides, waits = Message(((1, 1, 1, 8),), torch.float32), (Stream(), Stream()), []
    mail = swap.Mail(
        lambda source, target: [message], lambda target, index, views: [(view, torch.ones(1, 1, 1, 8)) for view in views], list, 0
    )
    for stage, leaves in enumerate(("together", "together", third, "last")):
        with device.stream(sides[stage % 2]) if leaves != "last" else nullcontext():
            device.work(f"stage {stage}")
            waits.append(swapper.swap(mail, lambda found, few: None, torch.device("cpu"), None, leaves))
    made = {"stage 0", "stage 1", "stage 2"}
    if third == "together":
        assert made <= device.seen["meet 0"] and "stage 3" in device.seen["meet 0"], "after all"
        assert "meet 0" in device.seen["arrive 0"] and "meet 1" not in device.seen["arrive 0"], "read while the last is written"
        assert "meet 0" in device.seen["meet 1"] and "meet 2" not in device.seen and "arrive 1" not in device.seen
        device.work("end")
        assert "arrive 0" in device.seen["end"]
    else:
        sent = [name for name in device.seen if name.startswith("carry") and made <= device.seen[name]]
        assert sent == ["carry 2"] and "stage 3" not in device.seen["carry 2"], "two that only keep the order, and one that carries"
        assert "carry 2" in device.seen["meet 0"] and "meet 0" in device.seen["meet 1"], "ranks meet twice, in one order"
    waits[0].wait()
    device.work("read")
    assert "meet 0" in device.seen["read"]


def test_a_tape_keeps_every_stage(monkeypatch: pytest.MonkeyPatch):
    def run(group: Any) -> bool:
        context = ringspan.ContextParallel(group, kernel="reference", strategy="ulysses", stages=2)
        sequence, tape = context.sequence(LENGTH), Tape()
        x = torch.randn(1, sequence.shard_length, 4, 8)
        with recording(tape):
            first = sequence.attention(x, x, x)
        with monkeypatch.context() as patched:
            patched.setattr(planning.Plan, "launched", lambda *given: pytest.fail("computed again"))
            with replaying(tape):
                return torch.equal(sequence.attention(x, x, x), first)

    assert ringspan.run_in_process(1, run) == [True]


def test_stages_part_each_share_by_key_heads():
    assert head_stages(head_shares(8, 4, 2), 2) == (
        (HeadShare(0, 2, 0, 1), HeadShare(4, 6, 2, 3)),
        (HeadShare(2, 4, 1, 2), HeadShare(6, 8, 3, 4)),
    )
    # Three key heads on two ranks: the second has one, and nothing in the second stage.
    assert [share.kv_heads for stage in head_stages(head_shares(6, 3, 2), 2) for share in stage] == [1, 1, 1, 0]
    for stage in head_stages(head_shares(8, 2, 4), 3)[1:]:
        assert all(share.heads == share.kv_heads == 0 for share in stage), "one key head cannot be parted"


@pytest.mark.parametrize(("asked", "kv_heads", "expected"), [(1, 8, 0), (3, 8, 3), (99, 8, 4), (4, 1, 0)])
def test_there_are_at_most_as_many_stages_as_a_rank_has_key_heads(asked: int, kv_heads: int, expected: int):
    def run(group: Any) -> int:
        sequence = ringspan.ContextParallel(group, strategy="ulysses", stages=asked).sequence(16)
        q, kv = torch.randn(1, 8, 8, 8), torch.randn(1, 8, kv_heads, 8)
        sequence.attention(q, kv, kv)
        (plan,) = sequence._plans._values.values()
        return len(plan.stages)

    assert ringspan.run_in_process(2, run) == [expected] * 2


def test_fewer_than_one_stage_is_refused():
    x = torch.randn(1, 8, 2, 8)
    with pytest.raises(RingspanError, match=r"strategy 'ulysses' with stages=0.*stages=1"):
        ringspan.ContextParallel(None, strategy="ulysses", stages=0).sequence(8).attention(x, x, x)
