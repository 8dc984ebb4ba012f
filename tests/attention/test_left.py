"""What streams still read or write is there until they are done: after an error, before a join, and where others drop it."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import ringspan
from ringspan.attention import peer_courier, peer_swapper, plan
from ringspan.attention.mail import UnderWay
from ringspan.attention.replay import CudaCapture
from ringspan.attention.streams import OneStream, give_away
from ringspan.kernels import KERNELS
from ringspan.strategies import MACHINES
from ringspan.transport.shared_memory import SharedMemory
from tests.support.device import Device, Stream, device
from tests.support.interruptions import Interrupted

__all__ = ["device"]


class Seen(UnderWay):
    """Known by a weak reference."""

    wanted: ClassVar[list[weakref.ref]] = []

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.wanted.append(weakref.ref(self))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Of all batches and exchanges through peer memory."""
    found: list[weakref.ref] = []
    monkeypatch.setattr(Seen, "wanted", found)
    monkeypatch.setattr(peer_courier, "UnderWay", Seen)
    monkeypatch.setattr(peer_swapper, "UnderWay", Seen)
    return found


def attention(group: Any, strategy: str, heads: int = 4, **options: Any) -> tuple[Any, list[Any]]:
    context = ringspan.ContextParallel(group, kernel="reference", strategy=strategy, transport="peer_memory", **options)
    return context, [torch.randn(1, 8, heads, 4, requires_grad=True) for _ in range(3)]


def leave(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether what stages give leaves at the end, as over long sequences."""
    monkeypatch.setattr(SharedMemory, "links_rest", late)
    rests = replace(MACHINES["cpu"], rest_seconds=0.0, rest_saves=0.5, exchange_bytes_per_second=math.inf)
    monkeypatch.setitem(MACHINES, "cpu", rests)


def interrupting(*_: Any) -> Any:
    raise Interrupted


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_is_on_its_way_in_a_pass_that_an_error_ends_is_kept(direction: str, seen: list[weakref.ref], monkeypatch: pytest.MonkeyPatch):
    def run(group: Any) -> Any:
        context, leaves = attention(group, "ring")
        sequence = context.sequence(16)
        out = sequence.attention(*leaves) if direction == "backward" else None
        group.gather_objects(None)
        seen.clear()
        group.gather_objects(None)
        monkeypatch.setattr(KERNELS["reference"], direction, interrupting)
        with pytest.raises(Interrupted):
            out.sum().backward() if out is not None else sequence.attention(*leaves)
        return context, out

    left = ringspan.run_in_process(2, run)
    gc.collect()
    assert len(seen) == 2 and all(each() is not None for each in seen)
    del left
    gc.collect()
    assert not any(each() is not None for each in seen), "longer than the memory nothing is kept"


@pytest.mark.parametrize("late", [False, True])
def test_what_is_on_its_way_between_an_exchange_and_a_pass_that_an_error_ends_is_kept(
    late: bool, seen: list[weakref.ref], monkeypatch: pytest.MonkeyPatch
):
    calls: Counter[int] = Counter()
    right = KERNELS["reference"].backward

    def first_alone(*given: Any) -> Any:
        calls[threading.get_ident()] += 1
        return right(*given) if calls[threading.get_ident()] == 1 else interrupting()

    leave(late, monkeypatch)

    def run(group: Any) -> Any:
        context, leaves = attention(group, "ulysses", stages=2)
        out = context.sequence(16).attention(*leaves)
        group.gather_objects(None)
        seen.clear()
        group.gather_objects(None)
        monkeypatch.setattr(KERNELS["reference"], "backward", first_alone)
        with pytest.raises(Interrupted):
            out.sum().backward()
        return context

    left = ringspan.run_in_process(2, run)
    gc.collect()
    assert len(seen) == 2 and all(each() is not None for each in seen), "the first stage's gradients"
    del left


@pytest.mark.parametrize("late", [False, True])
def test_what_stages_of_a_backward_send_is_there_until_they_are_joined(
    late: bool, seen: list[weakref.ref], monkeypatch: pytest.MonkeyPatch
):
    leave(late, monkeypatch)
    there: list[list[bool]] = []

    class Saying(OneStream):
        def let_go(self) -> None:
            there.append([each() is not None for each in mine.seen])

    mine = threading.local()
    monkeypatch.setattr(plan, "streams_for", lambda *_, side=0: Saying() if side == 2 else OneStream())
    monkeypatch.setattr(Seen, "__init__", lambda self, *given: UnderWay.__init__(self, *given) or mine.seen.append(weakref.ref(self)))

    def run(group: Any) -> list[weakref.ref]:
        context, leaves = attention(group, "ulysses", heads=8, stages=4)
        mine.seen = []
        out = context.sequence(16).attention(*leaves)
        mine.seen.clear()
        out.sum().backward()
        return mine.seen

    for each in ringspan.run_in_process(2, run):
        assert len(each) == 3 and not any(reference() is not None for reference in each)
    assert there.count([True] * 3) == 2, "both ranks', when the stages of the backward had been joined"


def test_what_is_given_away_is_marked_on_a_gpu_and_not_within_a_graph(device: Device):
    marked: list[Any] = []
    tensors: Any = [SimpleNamespace(is_cuda=is_cuda, device=None, record_stream=marked.append) for is_cuda in (False, True, False, True)]
    with device.stream(other := Stream()):
        give_away(*tensors)
        give_away()
    assert marked == ([] if device.capturing else [other, other])


def test_the_memory_of_graphs_is_not_given_up_before_the_last_replay():
    said: list[str] = []

    class Event:
        def synchronize(self) -> None:
            said.append("waited")

    capture: Any = CudaCapture()
    capture._done = Event()
    del capture
    assert said == ["waited"]
    CudaCapture()
    assert said == ["waited"], "nothing was replayed"
