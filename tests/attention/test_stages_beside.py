"""Stages of heads run beside each other: up to which length, and what is let go and given away after them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.attention import autograd, plan
from ringspan.attention.streams import MOST_ROWS, OneStream
from ringspan.kernels import Kernel


def test_stages_run_beside_each_other_in_a_backward_up_to_the_memory_that_one_of_them_works_in(monkeypatch: pytest.MonkeyPatch):
    asked: list[float] = []

    def streams(q: Tensor, kernel: Kernel, lends: bool, most_rows: float, first: bool = True) -> OneStream:
        asked.extend([] if first else [most_rows])
        return OneStream()

    monkeypatch.setattr(plan, "streams_for", streams)

    def run(group: Any) -> None:
        context = ringspan.ContextParallel(group, kernel="reference", strategy="ulysses", stages=4, transport="peer_memory")
        context.sequence(8).attention(*(torch.randn(1, 8, 4, 4, requires_grad=True) for _ in range(3))).sum().backward()

    ringspan.run_in_process(1, run)
    assert asked == [math.inf, 4 * MOST_ROWS], "a forward's of any length"


def test_stages_beside_are_let_go_and_what_is_kept_of_them_is_given_away(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    given: list[tuple[Tensor, ...]] = []

    class Saying(OneStream):
        def join(self) -> None:
            said.append("join")

        def let_go(self) -> None:
            said.append("let go")

    monkeypatch.setattr(plan, "streams_for", lambda *_, first=True: OneStream() if first else Saying())
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
