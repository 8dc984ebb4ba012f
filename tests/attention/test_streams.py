"""A kernel call may run beside the next one: nothing reads its results, frees its inputs or overwrites them before the calls are joined."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.attention import autograd, executor
from ringspan.attention.program import resolve
from ringspan.attention.streams import OneStream, TwoStreams, streams_for
from ringspan.geometry import make_layout
from ringspan.kernels import KERNELS, Kernel
from ringspan.strategies import make_schedules
from tests.strategies.combinations import MASKS, VARIANTS
from tests.support.device import Device, Event, Stream, device

__all__ = ["device"]


class Late:
    """Computes at `join` what it was given, from what its inputs then are; until then the results are NaN."""

    def __init__(self, q: Tensor, kernel: Kernel) -> None:
        self._forked = False
        self._calls: list[tuple[Callable[[], Any], tuple[Tensor, ...]]] = []

    def fork(self) -> None:
        self._forked = True

    def arrived(self, pending: Any) -> None:
        pending.wait()

    def beside(self, call: Callable[[], Any]) -> Any:
        found = call()
        if not self._forked:
            return found
        for tensor in found:
            tensor.fill_(float("nan"))
        self._calls.append((call, found))
        return found

    def join(self) -> None:
        self._forked = False
        for call, found in self._calls:
            for tensor, result in zip(found, call(), strict=True):
                tensor.copy_(result)
        self._calls.clear()

    def leave(self) -> None:
        self._calls.clear()


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
    ("two_dimensional", 4, "causal", "zigzag"),
]


@pytest.mark.parametrize(("variant", "ranks", "mask", "layout"), CASES)
def test_calls_beside_each_other_give_the_bits_of_calls_in_turn(
    variant: str, ranks: int, mask: str, layout: str, monkeypatch: pytest.MonkeyPatch
):
    for dtype in (torch.bfloat16, torch.float64):
        for transport in ("process_group", "peer_memory"):
            with monkeypatch.context() as patch:
                expected = results(ranks, variant, mask, layout, dtype, transport)
                patch.setattr(autograd, "streams_for", Late)
                found = results(ranks, variant, mask, layout, dtype, transport)
            for ours, right in zip(found, expected, strict=True):
                assert all(map(torch.equal, ours, right)), (dtype, transport)


@pytest.mark.parametrize("sums", ["Partial", "Accumulator"])
def test_what_is_read_before_the_calls_are_joined_is_found(sums: str, monkeypatch: pytest.MonkeyPatch):
    right = getattr(executor, sums)
    monkeypatch.setattr(autograd, "streams_for", Late)
    monkeypatch.setattr(executor, sums, lambda *args, before, **options: right(*args, **options))
    found = results(3, "ring", "window", "zigzag", torch.float64, "process_group")
    assert any(tensor.isnan().any() for each in found for tensor in each)


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


def test_on_a_cpu_calls_run_in_turn():
    streams = streams_for(torch.empty(1, 4, 2, 8), KERNELS["flash4"])
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


@pytest.mark.parametrize("arrival", [Arrival, HandedOver])
def test_a_visitor_waits_for_its_arrival_and_not_for_the_own_block(device: Device, arrival: Any):
    side: Any = Stream()
    side.device = None
    streams = TwoStreams(side)
    device.work("packed")
    streams.fork()
    device.work("own")
    streams.arrived(arrival(device, "came"))
    streams.beside(lambda: device.work("visitor"))
    assert {"packed", "came"} <= device.seen["visitor"]
    assert ("own" in device.seen["visitor"]) == (arrival is HandedOver), "what a thread hands over is on the stream of the own block"
    device.work("sent")
    assert "visitor" not in device.seen["sent"]
    streams.join()
    device.work("sum")
    assert {"own", "visitor"} <= device.seen["sum"]
    streams.beside(lambda: device.work("in turn"))
    assert "sum" in device.seen["in turn"], "without a fork a call is one of the current stream's"
    streams.fork()
    streams.beside(lambda: device.work("again"))
    streams.leave()
    assert {"sum", "in turn"} <= device.seen["again"], "what was freed until a fork is read by nobody any more"
    device.work("later")
    assert "again" in device.seen["later"], "an error leaves nothing apart"
