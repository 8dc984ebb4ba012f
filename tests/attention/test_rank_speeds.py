"""Weights from speeds: what ranks are timed at, what they agree on, and what is refused before anything is timed."""

from __future__ import annotations

import re
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ringspan
from ringspan.attention import rank_speeds
from ringspan.attention.rank_speeds import measure_weights, weights_of
from ringspan.kernels import KERNELS


def test_a_rank_that_takes_three_times_as_long_has_a_third_of_the_weight(monkeypatch: pytest.MonkeyPatch):
    mine = threading.local()

    def take(milliseconds: int) -> None:
        mine.now += milliseconds

    monkeypatch.setattr(rank_speeds, "time", SimpleNamespace(perf_counter=lambda: mine.now / 1000))
    monkeypatch.setattr(rank_speeds, "_tried", lambda kernel, device: partial(take, mine.pass_takes))

    def run(group: Any) -> tuple[float, ...]:
        mine.now, mine.pass_takes = 0, (10, 30, 10)[group.rank]
        weights = measure_weights(group, seconds=2.0)
        assert 2000 <= mine.now < 2000 + 2 * rank_speeds.AT_A_TIME * mine.pass_takes, "half of it before it is timed"
        return weights

    assert ringspan.run_in_process(3, run) == [(1.0, 0.333, 1.0)] * 3


def test_every_rank_computes_and_is_told_the_same():
    passes: list[int] = []
    right = KERNELS["torch_cpu"].backward

    def run(group: Any) -> tuple[tuple[float, ...], int]:
        weights = measure_weights(group, kernel="torch_cpu", seconds=0.2)
        context = ringspan.ContextParallel(group, layout="weighted", weights=weights)
        return weights, context.sequence(1000).shard_length

    def counted(*given: Any) -> Any:
        passes.append(1)
        assert given[1].shape == (1, 512, 4, 64) and given[1].dtype == torch.float32
        return right(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNELS["torch_cpu"], "backward", counted)
        found = ringspan.run_in_process(2, run)
    assert len(passes) >= 2 * (1 + 2 * rank_speeds.AT_A_TIME), "once to try, and two rounds"
    (weights, first), (others, second) = found
    assert weights == others and max(weights) == 1.0 and all(0 < weight <= 1 for weight in weights)
    assert first + second == 1000 and first == pytest.approx(1000 * weights[0] / sum(weights), abs=2)


def test_weights_are_thousandths_of_the_fastest_and_nobody_is_left_with_nothing():
    assert weights_of([50.0, 49.0, 48.123, 1e-9]) == (1.0, 0.98, 0.962, 0.001)
    assert weights_of([3.0]) == (1.0,)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"seconds": 0}, r"seconds=0\. It takes a time above 0, and 600 seconds at most\. Try: seconds=2\.0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"seconds": "1"}, "seconds='1'"),
        ({"device": "tpu"}, "device 'tpu'. There are cuda and cpu"),
        ({"kernel": "fast"}, "kernel 'fast': the kernels are auto"),
        ({"kernel": "flash4", "device": "cpu"}, "kernel 'flash4': .*cuda"),
    ],
)
def test_what_cannot_be_timed_is_refused_on_every_rank(asked: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_speeds, "_passes_a_second", lambda *_: pytest.fail("something is timed"))

    def run(group: Any) -> str:
        with pytest.raises(ringspan.RingspanError) as error:
            measure_weights(group, **asked)
        return str(error.value)

    for found in ringspan.run_in_process(2, run):
        assert re.search(said, found)


def test_ranks_that_ask_for_different_times_are_told_so():
    def run(group: Any) -> str:
        with pytest.raises(ringspan.RingspanError, match="All ranks of a group ask for the same") as error:
            measure_weights(group, seconds=0.1 + group.rank)
        return str(error.value)

    assert all("rank 1 has" in found for found in ringspan.run_in_process(2, run))


def test_a_kernel_that_breaks_on_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch):
    tries: list[int] = []

    def broken(*given: Any) -> Any:
        tries.append(1)
        if len(tries) == 2:
            raise RuntimeError("no such image")
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(rank_speeds, "kernel_pass", lambda *_: broken)
    monkeypatch.setattr(rank_speeds, "_passes_a_second", lambda *_: pytest.fail("something is timed"))

    def run(group: Any) -> str:
        with pytest.raises(ringspan.RingspanError) as error:
            measure_weights(group)
        return str(error.value)

    assert all("no such image" in found for found in ringspan.run_in_process(2, run))
