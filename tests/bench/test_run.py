"""Graphs are compared again before they are timed, transfers without overlap are awaited, and joules are a counter's."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringspan import run_in_process
from ringspan.bench import Bench, Clock, Grid, Meter, Record, Setting, Timing
from ringspan.bench import clock as clock_room
from ringspan.bench import run as running
from ringspan.bench.energy import joules
from ringspan.bench.overlap import Awaited
from ringspan.bench.passes import weights_for
from ringspan.bench.together import Together
from ringspan.errors import RankFailure, RingspanError
from ringspan.kernels import KERNELS
from ringspan.transport import Parcel, SingleRank

CLOCK = Clock(torch.device("cpu"), SingleRank(), warmup=1, samples=10)


def graphed(monkeypatch: pytest.MonkeyPatch, factor: float) -> list[Record]:
    """What is found where a graph, which there is none of on a CPU, replays `factor` times the work of what it captured."""

    def captured(work):
        results = tuple(result.clone() for result in work())

        def replay():
            for result, again in zip(results, work(), strict=True):
                result.copy_(again * factor)
            return results

        return replay

    monkeypatch.setattr(running, "captured", captured)
    grid = Grid(
        num_ranks=1, tokens=(40,), heads=((4, 2),), head_dims=(16,), dtypes=("float32",), launches=("eager", "graph"), strategies=("ring",)
    )  # fmt: skip
    return Bench(CLOCK, Meter("there is none")).run(grid)


def test_a_graph_is_timed_beside_a_graph(monkeypatch: pytest.MonkeyPatch):
    found = graphed(monkeypatch, 1.0)
    assert [(record.kind, record.launch, record.status) for record in found] == [
        (kind, launch, "timed") for kind in ("one device", "ringspan") for launch in ("eager", "graph")
    ]
    for alone, ours in zip(found[:2], found[2:], strict=True):
        for which in ("forward", "both"):
            kernel, beside = ours.beside[which]
            assert kernel == alone.kernel and len(ours.timings[which].samples_ms) == len(beside.samples_ms) == CLOCK.samples
            assert alone.timings[which].samples_ms[CLOCK.samples // 2 :] == beside.samples_ms, "and half as many before"


def test_layout_weighted_is_by_the_speeds_that_ranks_show_alone():
    grid = Grid(
        num_ranks=1, tokens=(40,), heads=((4, 2),), head_dims=(16,), dtypes=("float32",), strategies=("ring",),
        layouts=("zigzag", "weighted"),
    )  # fmt: skip
    alone, even, weighted = Bench(CLOCK, Meter("there is none")).run(grid)
    assert even.is_timed and weighted.is_timed and (even.reason, weighted.reason) == ("", "weights (1.0,)")
    setting = replace(weighted.setting or Setting(), launch="graph")
    slow = replace(alone, launch="graph", timings={"both": Timing(((9.0, 10.0, 11.0), (20.0, 19.0, 30.0)), 1)})
    fast = replace(slow, timings={"both": Timing(((4.0, 4.0, 6.0), (5.0, 5.0, 4.5)), 1)})
    assert weights_for(setting, [alone, slow, fast]) == (1.0, 0.8), "of the fastest kernel, launched in the same way"
    assert weights_for(replace(setting, layout="zigzag"), [fast]) is None
    with pytest.raises(RingspanError, match="no kernel was timed on one device"):
        weights_for(setting, [alone])


def test_a_share_is_whole_key_heads():
    grid = Grid(num_ranks=4, tokens=(20,), heads=((12, 6),), head_dims=(16,), dtypes=("float32",), share=True)
    with pytest.raises(RingspanError, match=r"--share on 4 devices with --heads 12/6: .*leaves 2.*--heads 8/4, or no --share"):
        grid.check("cpu")
    replace(grid, share=False).check("cpu")


def test_what_is_timed_in_turns_is_called_in_turns(monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    now = 0.0

    def take(name: str, milliseconds: float) -> None:
        nonlocal now
        called.append(name)
        now += milliseconds / 1e3

    monkeypatch.setattr(clock_room, "time", SimpleNamespace(perf_counter=lambda: now))

    clock = Clock(torch.device("cpu"), SingleRank(), warmup=2, samples=3)
    long, short = clock.in_turns(lambda: take("long", 6.0), lambda: take("short", 2.0))
    # Two calls each before; then samples of 5 ms at least.
    assert called[:4] == ["long"] * 2 + ["short"] * 2 and (long.repeats, short.repeats) == (1, 3)
    assert called[4:] == (["long"] + ["short"] * short.repeats) * 3
    assert long.samples_ms == pytest.approx((6.0,) * 3) and short.samples_ms == pytest.approx((2.0,) * 3)
    # A sample of one lasts as long as one of the other.
    assert [each.repeats for each in clock.in_turns(lambda: take("", 800.0), lambda: take("", 207.0))] == [1, 4]
    assert [each.repeats for each in clock.in_turns(lambda: take("", 2.0), lambda: take("", 1.9))] == [3, 3], "and 5 ms at least"
    assert clock.time(lambda: take("", 240.0), 800.0).repeats == 3 and clock.time(lambda: take("", 1e-3), 800.0).repeats == 50


def test_only_kernels_that_nothing_was_timed_beside_have_their_other_half_after_it_all(monkeypatch: pytest.MonkeyPatch):
    slow = KERNELS["reference"].forward

    def slower(*given):
        time.sleep(0.02)
        return slow(*given)

    monkeypatch.setattr(KERNELS["reference"], "forward", slower)
    grid = Grid(
        num_ranks=1, tokens=(40,), heads=((4, 2),), head_dims=(16,), dtypes=("float32",), strategies=("ring",),
        baselines=("torch_cpu", "reference"), kernels=("torch_cpu", "reference"),
    )  # fmt: skip
    found = Bench(CLOCK, Meter("there is none")).run(grid)
    counts = {record.name: len(record.timings["both"].samples_ms) for record in found if record.kind == "one device"}
    assert counts == {"reference": CLOCK.samples, "torch_cpu": CLOCK.samples // 2 + 2 * CLOCK.samples}


def test_what_nothing_is_timed_beside_lasts_as_long_as_one_device_does(monkeypatch: pytest.MonkeyPatch):
    asked: list[float] = []
    right = Clock.time
    monkeypatch.setattr(Clock, "time", lambda self, work, least_ms=5.0: asked.append(least_ms) or right(self, work, least_ms))
    monkeypatch.setattr(running._Problem, "_alone", lambda *_: None)
    grid = Grid(num_ranks=1, tokens=(40,), heads=((4, 2),), head_dims=(16,), dtypes=("float32",), strategies=("ring",))
    found = Bench(CLOCK, Meter("there is none")).run(grid)
    alone = found[0].timings
    assert asked[:2] == [5.0, 5.0], "one device's own, both passes"
    known = [statistics.median(alone[which].samples_ms[: CLOCK.samples // 2]) for which in ("both", "forward")]
    assert asked[2:4] == known, "what was known of it then"


def test_without_the_memory_for_both_they_are_timed_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    whole = running.one_device

    def scarce(kernel, shape, inputs):
        calls.append(kernel)
        if len(calls) in (2, 3):
            raise torch.OutOfMemoryError("out of memory")
        return whole(kernel, shape, inputs)

    monkeypatch.setattr(running, "one_device", scarce)
    grid = Grid(num_ranks=1, tokens=(40,), heads=((4, 2),), head_dims=(16,), dtypes=("float32",), strategies=("ring",))
    alone, ours = Bench(CLOCK, Meter("there is none")).run(grid)
    assert ours.is_timed and not ours.beside and len(calls) == 4
    assert len(alone.timings["both"].samples_ms) == CLOCK.samples


def test_a_graph_that_replays_something_else_is_wrong_on_both_sides(monkeypatch: pytest.MonkeyPatch):
    found = graphed(monkeypatch, 1.01)
    assert [record.status for record in found] == ["timed", "wrong", "timed", "wrong"]
    assert not found[1].timings and not found[3].timings


def test_a_capture_that_fails_leaves_the_rest_timed(monkeypatch: pytest.MonkeyPatch):
    def captured(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(running, "captured", captured)
    grid = Grid(num_ranks=1, tokens=(8,), heads=((2, 2),), head_dims=(8,), dtypes=("float32",), launches=("graph", "eager"))
    found = Bench(CLOCK, Meter("there is none")).run(grid)
    assert [(record.launch, record.status) for record in found] == [("graph", "failed"), ("eager", "timed")] * 2
    assert "not permitted" in found[0].reason


@pytest.mark.parametrize("met", ["CUDA error: an illegal memory access was encountered", ""])
def test_a_lost_rank_is_said_with_what_was_measured_and_what_was_met_before(met: str, monkeypatch: pytest.MonkeyPatch):
    """A broken device cannot tell the others either: then its own error is the first, and the exchange's the second."""

    def lost(together: Any, mine: object) -> list:
        raise RankFailure(
            "rank 0 exchanged with rank 1", "the transfer broke off", "A rank that dies stops the others", "a look at its log"
        )

    def broken(*given: Any) -> Any:
        monkeypatch.setattr(Together, "gather_objects", lost)
        monkeypatch.setattr(Together, "fail", lambda together, *told: lost(together, told))
        if met:
            raise RuntimeError(f"{met}\nCompile with TORCH_USE_CUDA_DSA")
        return whole(*given)

    whole = running.one_device
    monkeypatch.setattr(running, "one_device", broken)
    grid = Grid(num_ranks=1, tokens=(1200,), heads=((2, 2),), head_dims=(8,), dtypes=("float32",))
    with pytest.raises(RankFailure) as failure:
        Bench(CLOCK, Meter("there is none")).run(grid)
    kernel = failure.value.asked.split(", ")[1]
    assert kernel in KERNELS
    assert str(failure.value) == (
        f"while measuring one device, {kernel}, eager, 1,200 tokens a device, causal: rank 0 exchanged with rank 1: "
        f"{f'RuntimeError: {met}; then ' if met else ''}the transfer broke off. A rank that dies stops the others. Try: a look at its log"
    )


def test_without_overlap_what_is_posted_has_arrived():
    def run(group) -> tuple[float, float]:
        peer = 1 - group.rank
        arrived = []
        for transport in (group, Awaited(group)):
            box = torch.zeros(3)
            pending = transport.exchange([Parcel(torch.ones(3), peer)], [Parcel(box, peer)])
            arrived.append(float(box.sum()))
            pending.wait()
            assert float(box.sum()) == 3
        return arrived[0], arrived[1]

    assert run_in_process(2, run) == [(0.0, 3.0)] * 2


def test_joules_are_what_the_counter_went_up_by_for_a_call():
    counter = SimpleNamespace(millijoules=0)

    def work() -> None:
        counter.millijoules += 250

    nvml = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda handle: counter.millijoules)
    assert joules(Meter("", nvml, None), CLOCK, work, 20.0) == pytest.approx(0.25)
    assert counter.millijoules == 20 * 250, "as often as fills 400 ms"
    assert joules(Meter("", nvml, None), CLOCK, lambda: None, 20.0) is None, "a counter that stands still has not answered"
    assert joules(Meter("no NVML"), CLOCK, work, 20.0) is None


def test_a_kernel_is_held_against_its_own_error_on_one_device_also_where_that_is_not_timed():
    def found(baselines: tuple[str, ...]) -> dict[tuple[str, str], Record]:
        grid = Grid(
            num_ranks=1, tokens=(40,), heads=((8, 2),), head_dims=(16,), dtypes=("bfloat16",), strategies=("ring",),
            kernels=("reference", "torch_cpu"), baselines=baselines,
        )  # fmt: skip
        return {(record.kind, record.kernel): record for record in Bench(CLOCK, Meter("there is none")).run(grid)}

    every, one = found(("reference", "torch_cpu")), found(("torch_cpu",))
    assert ("one device", "reference") not in one
    limits = [{name: budget.limit for name, budget in each["ringspan", "reference"].budgets.items()} for each in (every, one)]
    assert limits[0] == limits[1] != {name: budget.limit for name, budget in one["ringspan", "torch_cpu"].budgets.items()}
