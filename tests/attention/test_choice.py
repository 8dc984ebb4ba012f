"""The kernel that auto takes is the same on every rank, whatever each would find fastest."""

from __future__ import annotations

import pytest
import torch

import ringspan
from ringspan.attention.choice import choose_kernel
from ringspan.errors import UnsupportedError
from ringspan.kernels import KERNELS, Capabilities, Kernel, Problem, Scores, Speeds
from ringspan.kernels.capabilities import Declared

PROBLEM = Problem(device="cpu", dtype=torch.float32, heads=4, kv_heads=2, head_dim=64)


class Fake(Declared):
    """A kernel in name alone, there or not."""

    def __init__(self, name: str, there: bool = True) -> None:
        self.name, self.can, self._there = name, Capabilities(shapes=frozenset({"band"})), there

    def missing(self) -> str | None:
        return None if self._there else "it is not installed"

    def forward(self, q, k, v, scores: Scores):
        raise AssertionError("a fake computes nothing")

    def backward(self, dout, q, k, v, out, lse, dlse, scores: Scores):
        raise AssertionError("a fake computes nothing")


def test_ranks_that_would_choose_differently_take_what_rank_0_finds_fastest():
    timed: list[int] = []

    def run(group) -> str:
        def timer(kernel: Kernel, problem: Problem, tokens: int) -> float:
            timed.append(group.rank)
            return {"a": 1.0, "b": 2.0, "c": 3.0}[kernel.name] * (1 if group.rank else -1) + 10

        kernels: dict[str, Kernel] = {name: Fake(name) for name in ("a", "b", "c", "reference")}
        return choose_kernel("auto", PROBLEM, 100, group, Speeds(kernels, timer, frozenset({"cpu"}))).name

    assert ringspan.run_in_process(3, run) == ["c", "c", "c"]
    assert set(timed) == {0}, "the others wait, so that nothing disturbs the timing"


def test_a_kernel_that_one_rank_lacks_is_taken_by_none():
    def run(group) -> str:
        kernels: dict[str, Kernel] = {name: Fake(name, (name, group.rank) != ("a", 2)) for name in ("a", "b", "reference")}
        seconds = {"a": 1.0, "b": 2.0}
        speeds = Speeds(kernels, lambda kernel, problem, tokens: seconds[kernel.name], frozenset({"cpu"}))
        return choose_kernel("auto", PROBLEM, 100, group, speeds).name

    assert ringspan.run_in_process(3, run) == ["b", "b", "b"]


def test_a_kernel_that_is_named_is_taken_unmeasured_or_refused():
    def timer(kernel: Kernel, problem: Problem, tokens: int) -> float:
        raise AssertionError("timed")

    speeds = Speeds(KERNELS, timer, frozenset({"cpu"}))

    def run(group) -> str:
        with pytest.raises(UnsupportedError, match="it runs on cuda"):
            choose_kernel("cudnn", PROBLEM, 100, group, speeds)
        return choose_kernel("reference", PROBLEM, 100, group, speeds).name

    assert ringspan.run_in_process(2, run) == ["reference", "reference"]


def test_a_sequence_says_which_kernel_it_runs():
    sequence = ringspan.ContextParallel().sequence(16)
    assert sequence.kernel is None
    x = torch.zeros(1, 16, 2, 8)
    sequence.attention(x, x, x)
    assert sequence.kernel is KERNELS["torch_cpu"]
    sequence.attention(x, x, x, softcap=3.0)
    assert sequence.kernel is KERNELS["reference"]
