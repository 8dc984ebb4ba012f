"""Which kernel is fastest: fakes with stated speeds, and the real timer on real kernels of the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

from ringspan.kernels import KERNELS, Capabilities, Kernel, Problem, Scores, Speeds, time_kernel
from ringspan.kernels.capabilities import Declared
from ringspan.kernels.speed import shape_class
from ringspan.transformer.chance import refusing_chance

PROBLEM = Problem(device="cpu", dtype=torch.float32, heads=4, kv_heads=2, head_dim=64)


class Fake(Declared):
    """A kernel in name alone."""

    def __init__(self, name: str, features: frozenset[str] = frozenset()) -> None:
        self.name, self.can = name, Capabilities(shapes=frozenset({"band"}), features=features)

    def forward(self, q, k, v, scores: Scores):
        raise AssertionError("a fake computes nothing")

    def backward(self, dout, q, k, v, out, lse, dlse, scores: Scores):
        raise AssertionError("a fake computes nothing")


def speeds(seconds: dict[str, float | Exception], calls: list | None = None) -> Speeds:
    """Fakes by these names, and `reference`; an exception is raised where a number would be returned."""

    def timer(kernel: Kernel, problem: Problem, tokens: int) -> float:
        if calls is not None:
            calls.append((kernel.name, tokens))
        found = seconds[kernel.name]
        if isinstance(found, Exception):
            raise found
        return found

    kernels: dict[str, Kernel] = {name: Fake(name) for name in (*seconds, "reference")}
    return Speeds(kernels, timer, frozenset({"cpu"}))


def compared(found: Speeds, length: int = 1000):
    return found.compare(PROBLEM, length, found.capable(PROBLEM))


def test_the_fastest_is_taken_and_the_reason_says_how_fast_and_beside_what():
    comparison = compared(speeds({"a": 3e-3, "b": 1e-3, "c": 2e-3}))
    assert comparison.taken == "b" and dict(comparison.seconds) == {"a": 3e-3, "b": 1e-3, "c": 2e-3}
    assert comparison.reason == "1.00 ms for 1,024 tokens forward and backward, c 2.00, a 3.00"


def test_of_two_that_are_as_fast_the_one_that_is_declared_first_is_taken():
    assert compared(speeds({"a": 1.015e-3, "b": 1e-3})).taken == "a"
    assert compared(speeds({"a": 1.03e-3, "b": 1e-3})).taken == "b"
    assert compared(speeds({"a": 1e-3, "b": 1e-3})).taken == "a"


def test_a_kernel_that_breaks_when_it_is_timed_is_left_out_and_named():
    comparison = compared(speeds({"a": RuntimeError("no kernel image\nis available"), "b": 5e-3}))
    assert comparison.taken == "b"
    assert dict(comparison.failed) == {"a": "RuntimeError: no kernel image"}


def test_where_all_break_the_reference_is_left_and_the_reason_says_so():
    with pytest.warns(UserWarning, match=r"reference computes, many times slower \(a: RuntimeError: broken; b: ValueError: too\)"):
        comparison = compared(speeds({"a": RuntimeError("broken"), "b": ValueError("too")}))
    assert comparison.taken == "reference" and comparison.reason == "a, b failed when they were timed"


def test_the_reference_is_not_timed_and_neither_is_the_only_one():
    calls: list = []
    alone = speeds({"a": 1.0}, calls)
    assert compared(alone).taken == "a" and not calls
    assert compared(speeds({}, calls)).taken == "reference" and not calls


def test_a_class_of_shapes_is_timed_once():
    calls: list = []
    found = speeds({"a": 1.0, "b": 2.0}, calls)
    first = compared(found, 1000)
    assert compared(found, 1024) is first and calls == [("a", 1024), ("b", 1024)]
    compared(found, 1025)
    assert calls[2:] == [("a", 2048), ("b", 2048)]


def test_what_makes_a_class_of_shapes():
    here = shape_class(PROBLEM, 1000)

    def other(length: int = 1000, **changes: object) -> bool:
        return shape_class(Problem(**{**vars(PROBLEM), **changes}), length) != here  # type: ignore[arg-type]

    assert not other(513) and not other(heads=8, kv_heads=4)
    assert other(512) and other(heads=8) and other(head_dim=128) and other(dtype=torch.bfloat16) and other(device="cuda")
    assert other(features=frozenset({"window"})) and other(deterministic=True)
    assert shape_class(PROBLEM, 0).tokens == shape_class(PROBLEM, 1).tokens == 128 and shape_class(PROBLEM, 10**6).tokens == 8192


def test_on_a_cpu_nothing_is_timed():
    def timer(kernel: Kernel, problem: Problem, tokens: int) -> float:
        raise AssertionError("timed on a CPU")

    found = Speeds(KERNELS, timer)
    assert found.compare(PROBLEM, 100, found.capable(PROBLEM)).taken == "torch_cpu"


@pytest.mark.parametrize("features", [(), ("window",), ("mask_mod",), ("softcap",), ("window", "softcap", "mask_mod")], ids=str)
def test_the_timer_runs_every_form_that_a_kernel_computes(features: tuple[str, ...]):
    problem = Problem(**{**vars(PROBLEM), "features": frozenset(features)})
    timed = [name for name, kernel in KERNELS.items() if kernel.refusal(problem) is None]
    assert "reference" in timed
    for name in timed:
        assert 0 < time_kernel(KERNELS[name], problem, 130, repeats=1) < 60


@pytest.mark.parametrize("mode", [torch.device("meta"), refusing_chance(torch.nn.Identity())], ids=["default device", "no chance"])
def test_the_timer_is_in_no_function_mode_of_its_caller(mode: AbstractContextManager[object]):
    with mode:
        assert 0 < time_kernel(KERNELS["torch_cpu"], PROBLEM, 130, repeats=1) < 60


def test_what_a_kernel_compiles_at_first_use_does_not_count(monkeypatch: pytest.MonkeyPatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("ringspan.kernels.speed.time.perf_counter", lambda: clock["now"])

    class Compiled(Fake):
        calls = 0

        def forward(self, q, k, v, scores):
            Compiled.calls += 1
            clock["now"] += 30.0 if Compiled.calls == 1 else 1.0
            return q, torch.zeros(())

        def backward(self, dout, q, k, v, out, lse, dlse, scores):
            clock["now"] += 2.0

    assert time_kernel(Compiled("compiled"), PROBLEM, 128) == 3.0
