"""A kernel call may run beside the next one: nothing reads its results, frees its inputs or overwrites them before the calls are joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import ringspan
from ringspan.attention import executor, plan
from ringspan.attention.program import resolve
from ringspan.attention.streams import MOST_ROWS, OneStream, TwoStreams, streams_for
from ringspan.attention.turns import Turns
from ringspan.geometry import make_layout
from ringspan.kernels import KERNELS, Kernel
from ringspan.strategies import make_schedules
from tests.strategies.combinations import MASKS, VARIANTS
from tests.support.device import Device, Event, Stream, device
from tests.support.rounding import Rounding

__all__ = ["device"]


class Late:
    """Calls beside are computed at `join`, from what their inputs then are; until then their results are NaN but for what is done aside.

    There the results of the calls that were in their turn since the fork are NaN.
    """

    def __init__(self, q: Tensor, kernel: Kernel, lends: bool, most_rows: float) -> None:
        self.forked = False
        self._in_turn: list[tuple[Tensor, ...]] = []
        self._calls: list[tuple[Callable[[], Any], tuple[Tensor, ...]]] = []

    def fork(self, call: Callable[[], Any]) -> Any:
        self.forked = True
        self._in_turn.append(found := call())
        return found

    def arrived(self, pending: Any) -> None:
        pending.wait()

    def beside(self, call: Callable[[], Any]) -> Any:
        found = call()
        if self.forked:
            fill(found)
            self._calls.append((call, found))
        return found

    @contextmanager
    def aside(self) -> Iterator[None]:
        kept = [[tensor.clone() for tensor in found] for found in self._in_turn]
        self._compute()
        for found in self._in_turn:
            fill(found)
        yield
        for found, values in zip(self._in_turn, kept, strict=True):
            restore(found, values)
        for index, (_, found) in enumerate(self._calls):
            # As they are now: something may have been added in place.
            self._calls[index] = (partial(tuple, [tensor.clone() for tensor in found]), found)
            fill(found)

    def join(self) -> None:
        self._compute()
        self.leave()

    def let_go(self) -> None:
        pass

    def outlive(self, *tensors: Tensor) -> None:
        pass

    def leave(self) -> None:
        self.forked = False
        self._calls.clear()
        self._in_turn.clear()

    def _compute(self) -> None:
        for call, found in self._calls:
            restore(found, call())


class Unmapping(Late):
    """Sees whether what calls beside made is freed without having been let go, and whether what is left of it is known to outlive them."""

    passes: ClassVar[list[Unmapping]] = []

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.made: list[StorageWeakRef] = []
        self.let, self.outlived = set[int](), set[int]()
        self.passes.append(self)

    def beside(self, call: Callable[[], Any]) -> Any:
        is_beside, found = self.forked, super().beside(call)
        if is_beside:
            self.made += [StorageWeakRef(tensor.untyped_storage()) for tensor in found]
        return found

    def let_go(self) -> None:
        self.let |= {made.cdata for made in self.made if not made.expired()}

    def outlive(self, *tensors: Tensor) -> None:
        self.outlived |= {tensor.untyped_storage()._cdata for tensor in tensors}


def fill(found: Iterable[Tensor]) -> None:
    for tensor in found:
        tensor.fill_(float("nan"))


def restore(found: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(found, values, strict=True):
        tensor.copy_(value)


def results(ranks: int, variant: str, mask: str, layout: str, dtype: torch.dtype, transport: str) -> list[list[Tensor]]:
    """out, lse and the gradients of every rank, with a sink and a gradient of lse."""
    strategy, options = VARIANTS[variant]
    length = 5 * ranks + 3
    torch.manual_seed(ranks)
    q, dout = torch.randn(2, 1, length, 4, 4, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 1, length, 2, 4, dtype=torch.float64).to(dtype)

    def run(group: Any) -> list[Tensor]:
        names: dict[str, Any] = {"strategy": strategy, "layout": layout, "transport": transport, **options(ranks)}
        sequence = ringspan.ContextParallel(group, kernel="reference", **names).sequence(length, MASKS[mask].make(length))
        leaves = [sequence.shard(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = sequence.attention(*leaves, return_lse=True)
        loss = (out * sequence.shard(dout)).sum() + lse.masked_fill(lse.isneginf(), 0.0).to(dtype).sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    return ringspan.run_in_process(ranks, run, timeout_seconds=60.0)


CASES = [
    ("ring", 2, "causal", "zigzag"),
    ("ring", 5, "documents", "striped"),
    ("ring", 3, "window", "zigzag"),
    ("ring in parts", 3, "causal", "contiguous"),
    ("ring of queries", 4, "full", "zigzag"),
    ("direct", 4, "causal", "zigzag"),
    ("direct, several at once", 4, "causal", "zigzag"),
    ("all_gather", 3, "window", "contiguous"),
    ("pass_query", 3, "causal", "zigzag"),
    ("balanced", 4, "causal", "contiguous"),
    ("tree", 3, "causal", "zigzag"),
    ("tree", 4, "documents", "contiguous"),
    ("two_dimensional", 4, "causal", "zigzag"),
]
BESIDE = [case for case in CASES if case[0] != "ring" or case[2] == "causal"]
"""Of the others none has a call that follows another through peer memory before something is taken in or freed."""


@pytest.mark.parametrize(("variant", "ranks", "mask", "layout"), CASES)
def test_calls_beside_each_other_give_the_bits_of_calls_in_turn(
    variant: str, ranks: int, mask: str, layout: str, monkeypatch: pytest.MonkeyPatch
):
    for dtype in (torch.bfloat16, torch.float64):
        for transport in ("process_group", "peer_memory"):
            with monkeypatch.context() as patch:
                expected = results(ranks, variant, mask, layout, dtype, transport)
                patch.setattr(plan, "streams_for", Late)
                found = results(ranks, variant, mask, layout, dtype, transport)
            for ours, right in zip(found, expected, strict=True):
                assert all(map(torch.equal, ours, right)), (dtype, transport)


@pytest.mark.parametrize(("variant", "ranks", "mask", "layout"), BESIDE)
def test_what_calls_beside_made_is_let_go_before_it_is_freed(
    variant: str, ranks: int, mask: str, layout: str, monkeypatch: pytest.MonkeyPatch
):
    """Expandable segments are unmapped once the stream of their memory is done, whichever stream still reads it."""
    monkeypatch.setattr(plan, "streams_for", Unmapping)
    monkeypatch.setattr(Unmapping, "passes", [])
    left = [results(ranks, variant, mask, layout, dtype, "peer_memory") for dtype in (torch.bfloat16, torch.float64)]
    monkeypatch.setitem(KERNELS, "reference", Rounding())
    left.append(results(ranks, variant, mask, layout, torch.bfloat16, "peer_memory"))
    assert sum(len(each.made) for each in Unmapping.passes), "nothing ran beside"
    for each in Unmapping.passes:
        assert {made.cdata for made in each.made} <= each.let
        assert {made.cdata for made in each.made if not made.expired()} <= each.outlived
    del left


def test_a_result_that_a_call_beside_made_is_known_to_outlive_it(monkeypatch: pytest.MonkeyPatch):
    """The own block has half of the second rank's rows, the visitor all of them: what the visitor gave is the sum."""
    monkeypatch.setattr(plan, "streams_for", Unmapping)
    monkeypatch.setattr(Unmapping, "passes", [])
    # What is narrower than its sum is put off, where it does not cover all rows.
    monkeypatch.setitem(KERNELS, "reference", Rounding())

    def run(group: Any) -> list[Tensor]:
        mask = ringspan.block_sparse(4, [[True] * 4, [True] * 4, [True, True, True, False], [True, True, False, False]])
        context = ringspan.ContextParallel(group, kernel="reference", strategy="direct", layout="contiguous", transport="peer_memory")
        sequence = context.sequence(16, mask)
        leaves = [torch.randn(1, 8, heads, 4, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        out = sequence.attention(*leaves)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    left = ringspan.run_in_process(2, run, timeout_seconds=60.0)
    stay = [{made.cdata for made in each.made if not made.expired()} for each in Unmapping.passes]
    assert any(stay), "nothing of it is left"
    assert all(there <= each.outlived for there, each in zip(stay, Unmapping.passes, strict=True))
    del left


@pytest.mark.parametrize("sums", ["Partial", "Accumulator"])
def test_what_is_read_before_the_calls_are_joined_is_found(sums: str, monkeypatch: pytest.MonkeyPatch):
    right = getattr(executor, sums)
    monkeypatch.setattr(plan, "streams_for", Late)
    monkeypatch.setattr(executor, sums, lambda *args, before, **options: right(*args, **options))
    found = results(3, "ring", "window", "zigzag", torch.float64, "process_group")
    assert any(tensor.isnan().any() for each in found for tensor in each)


def test_results_that_a_call_in_its_turn_has_added_to_do_not_leave_aside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "streams_for", Late)
    monkeypatch.setattr(executor.Pass, "leaves_aside", lambda self, piece: True)
    with pytest.raises(AssertionError, match="is not computed aside"):
        results(4, "tree", "documents", "contiguous", torch.bfloat16, "peer_memory")
    monkeypatch.setattr(Turns, "before", lambda self, found: None if self._is_aside else self.join())
    found = results(4, "tree", "documents", "contiguous", torch.bfloat16, "peer_memory")
    assert any(tensor.isnan().any() for each in found for tensor in each)


@pytest.mark.parametrize(("strategy", "ranks"), [("ring", 2), ("all_gather", 4)])
def test_gradients_of_a_visitor_go_home_while_the_own_block_is_computed(strategy: str, ranks: int, monkeypatch: pytest.MonkeyPatch):
    left: list[bool] = []
    right = Late.aside
    monkeypatch.setattr(Late, "aside", lambda self: left.append(bool(self.forked and self._calls)) or right(self))
    monkeypatch.setattr(plan, "streams_for", Late)
    results(ranks, strategy, "causal", "zigzag", torch.bfloat16, "peer_memory")
    # The reference gives wide results, which are added at once: a third call then waits for the others.
    assert sum(left) >= 2
    left.clear()
    results(ranks, strategy, "causal", "zigzag", torch.bfloat16, "process_group")
    assert not left, "there what has arrived is freed when it has been added"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_own_block_runs_beside_the_first_visitor(direction: str):
    mask, ranks = ringspan.causal(), 4
    layout = make_layout("zigzag", 64, ranks, None, mask)
    schedule = getattr(make_schedules("direct", layout, mask), direction)
    for rank in range(ranks):
        program = resolve(schedule, layout, mask, KERNELS["reference"].shapes, rank)
        launches = [launch for step in program.steps for launch in step.launches]
        assert launches[0] in program.beside
        assert launches[1] not in program.beside, "calls run two and two"
        assert launches[-1] not in program.beside, "nothing follows the last"


@pytest.mark.parametrize("variant", ["ring", "direct", "all_gather in stages", "balanced", "pass_query", "tree"])
@pytest.mark.parametrize("mask", ["causal", "documents", "window"])
def test_between_a_call_and_the_one_beside_it_nothing_is_freed_or_taken_in(variant: str, mask: str):
    ranks, made, (strategy, options) = 4, MASKS[mask].make(64), VARIANTS[variant]
    layout = make_layout("zigzag", 64, ranks, None, made)
    schedules = make_schedules(strategy, layout, made, **options(ranks))
    for schedule in (schedules.forward, schedules.backward):
        for rank in range(ranks):
            program = resolve(schedule, layout, made, KERNELS["reference"].shapes, rank)
            marks = []
            for step in program.steps:
                marks += ["combine"] * len(step.combines) + list(step.launches) + ["release"] * len(step.releases)
            for place, mark in enumerate(marks):
                if mark in program.beside:
                    assert marks[place + 1] not in ("combine", "release") and marks[place + 1] not in program.beside


def test_a_forward_of_any_length_runs_beside_and_a_backward_up_to_the_memory_that_a_second_call_works_in(monkeypatch: pytest.MonkeyPatch):
    asked: list[float] = []
    monkeypatch.setattr(plan, "streams_for", lambda q, kernel, lends, most_rows: asked.append(most_rows) or OneStream())
    results(1, "ring", "causal", "zigzag", torch.float64, "process_group")
    assert asked == [math.inf, MOST_ROWS]


def test_on_a_cpu_calls_run_in_turn():
    streams = streams_for(torch.empty(1, 4, 2, 8), KERNELS["flash4"], True)
    assert isinstance(streams, OneStream)
    assert streams.beside(partial(int, "3")) == 3


class Arrival:
    """Of what is done on streams, for which any other may wait."""

    def __init__(self, device: Device, name: str) -> None:
        self._device, self._event = device, Event()
        self._event.before = {name}

    @property
    def works(self) -> list[Any]:
        return [self]

    def wait(self) -> None:
        self._device.current.wait_event(self._event)


class HandedOver:
    """What a thread puts there when it is waited for, on its own stream."""

    def __init__(self, device: Device, name: str) -> None:
        self._device, self._name = device, name

    def wait(self) -> None:
        self._device.work(self._name)


def test_the_side_comes_after_all_that_has_read_its_memory(device: Device):
    side: Any = Stream()
    side.device = None
    streams = TwoStreams(side)

    def unmapped(name: str) -> set[str]:
        with device.stream(side):
            device.work(name)
        return device.seen[name]

    device.work("before")
    streams.let_go()
    assert not unmapped("nothing is lent")
    streams.fork(lambda: device.work("own"))
    streams.beside(lambda: device.work("visitor"))
    streams.join()
    device.work("merge")
    assert "merge" not in unmapped("too early")
    streams.let_go()
    # The memory of a graph stays, and a stream that is captured may not be left waiting.
    assert ("merge" in unmapped("merged")) == (not device.capturing)
    streams.arrived(Arrival(device, "has left"))
    assert ("has left" in unmapped("sent")) == (not device.capturing)
    device.work("half of a merge")
    streams.leave()
    assert ("half of a merge" in unmapped("given up")) == (not device.capturing)


@pytest.mark.parametrize("arrival", [Arrival, HandedOver])
def test_a_visitor_waits_for_its_arrival_and_not_for_the_own_block(device: Device, arrival: Any):
    side: Any = Stream()
    side.device = None
    streams = TwoStreams(side)
    device.work("packed")
    streams.fork(lambda: device.work("own"))
    streams.arrived(arrival(device, "came"))
    streams.beside(lambda: device.work("visitor"))
    assert {"packed", "came"} <= device.seen["visitor"]
    assert ("own" in device.seen["visitor"]) == (arrival is HandedOver), "what a thread hands over is on the stream of the own block"
    with streams.aside():
        device.work("sent")
    assert "visitor" in device.seen["sent"] and ("own" in device.seen["sent"]) == (arrival is HandedOver)
    device.work("next")
    assert "visitor" not in device.seen["next"] and "own" in device.seen["next"]
    streams.join()
    device.work("sum")
    assert {"own", "visitor"} <= device.seen["sum"]
    streams.beside(lambda: device.work("in turn"))
    assert "sum" in device.seen["in turn"], "without a fork a call is one of the current stream's"
    streams.fork(lambda: device.work("first"))
    streams.beside(lambda: device.work("again"))
    assert "first" not in device.seen["again"]
    streams.leave()
    assert {"sum", "in turn"} <= device.seen["again"], "what was freed until a fork is read by nobody any more"
    device.work("later")
    assert "again" in device.seen["later"], "an error leaves nothing apart"
