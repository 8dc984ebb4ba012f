"""Stages of heads run beside each other: up to which length, and what is let go and given away after them."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.attention import autograd, plan
from ringspan.attention.streams import MOST_ROWS, OneStream, TwoStreams
from ringspan.kernels import Kernel
from tests.support.device import Device, Stream, device

__all__ = ["device"]


def test_stages_run_beside_each_other_in_a_backward_up_to_the_memory_that_one_of_them_works_in(monkeypatch: pytest.MonkeyPatch):
    asked: list[float] = []

    def streams(q: Tensor, kernel: Kernel, lends: bool, most_rows: float, side: int = 0) -> OneStream:
        asked.extend([most_rows] if side else [])
        return OneStream()

    monkeypatch.setattr(plan, "streams_for", streams)

    def run(group: Any) -> None:
        context = ringspan.ContextParallel(group, kernel="reference", strategy="ulysses", stages=4, transport="peer_memory")
        context.sequence(8).attention(*(torch.randn(1, 8, 4, 4, requires_grad=True) for _ in range(3))).sum().backward()

    ringspan.run_in_process(1, run)
    assert asked == [math.inf] * 2 + [4 * MOST_ROWS] * 2, "a forward's of any length; on two sides"


@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_stage_begins_when_the_one_before_the_one_before_it_ends_and_the_last_is_on_the_current_stream(
    number: int, device: Device, monkeypatch: pytest.MonkeyPatch
):
    def streams(*_: Any, side: int) -> TwoStreams:
        made: Any = Stream()
        made.device = None
        return TwoStreams(made)

    monkeypatch.setattr(plan, "streams_for", streams)
    some: Any = SimpleNamespace(stages=range(number), replays=None, observer=None, kernel=None, peers=())
    on: list[Stream] = []

    def work(name: str) -> None:
        on.append(device.current)
        device.work(name)

    q: Any = None
    with plan.Plan.in_turns(some, q) as turns:
        device.work("landed")
        for index in range(number):
            turns(index, partial(work, f"stage {index}"))
    device.work("after")
    for index in range(number):
        stages = {name for name in device.seen[f"stage {index}"] if name.startswith("stage")}
        assert stages == {f"stage {before}" for before in range(index - 2, -1, -2)} and "landed" in device.seen[f"stage {index}"]
    assert [stream is device.main for stream in on] == [False] * (number - 1) + [True], "below those before it"
    assert device.seen["after"] >= {f"stage {index}" for index in range(number)}


def test_stages_beside_are_let_go_and_what_is_kept_of_them_is_given_away(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    given: list[tuple[Tensor, ...]] = []

    class Saying(OneStream):
        def join(self) -> None:
            said.append("join")

        def let_go(self) -> None:
            said.append("let go")

    monkeypatch.setattr(plan, "streams_for", lambda *_, side=0: Saying() if side == 1 else OneStream())
    monkeypatch.setattr(autograd, "give_away", lambda *tensors: given.append(tensors))

    def run(group: Any) -> None:
        context = ringspan.ContextParallel(group, kernel="reference", strategy="ulysses", stages=2, transport="peer_memory")
        leaves = [torch.randn(1, 8, 4, 4, requires_grad=True) for _ in range(3)]
        out = context.sequence(8).attention(*leaves)
        assert len(given) == 1, "out and lse of the second stage are kept"
        out.sum().backward()

    ringspan.run_in_process(1, run)
    assert said == ["join", "let go"] * 2
    assert [tuple(tensor.shape) for tensors in given for tensor in tensors] == [(1, 8, 2, 4), (1, 2, 8)]
