"""Passes that come again are replayed: with what a capture is on CPUs stood in for, everything around it is as on GPUs."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ringspan
from ringspan.attention import checks
from ringspan.attention.replay import EAGER_CALLS, Replays
from ringspan.errors import RingspanError
from ringspan.kernels import KERNELS
from ringspan.transport import SingleRank, peer_memory

LENGTH, RANKS = 24, 2


class Recorded:
    """Runs the work when it is captured, as a graph does not, and again into the same memory at each replay, as a graph does."""

    def __init__(self, broken: bool = False) -> None:
        self.captures, self.replays, self.broken, self.others, self.open = 0, 0, broken, False, False

    def __call__(self, work: Any) -> Any:
        self.captures += 1
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        results = work()

        def again() -> None:
            self.replays += 1
            for kept, new in zip(results, work(), strict=True):
                kept.copy_(new)

        for result in results:
            result.fill_(float("nan"))
        return again, results

    def begin(self) -> None:
        assert not self.open, "one at a time"
        self.open = True

    def end(self) -> None:
        self.open = False

    def is_under_way(self) -> bool:
        return self.others


def with_replays(monkeypatch: pytest.MonkeyPatch, group: Any, capture: Recorded, **options: Any) -> ringspan.ContextParallel:
    monkeypatch.setattr(checks, "replay_refusal", lambda *about: None)
    context = ringspan.ContextParallel(group, kernel="reference", **options)
    context.replays = Replays(capture)  # type: ignore[arg-type]
    return context


@pytest.mark.parametrize("options", [{}, {"strategy": "direct"}, {"kv_heads_per_stage": 1}, {"strategy": "ulysses"}], ids=str)
def test_replays_give_what_launches_give_for_new_values_each_time(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    def run(group: Any) -> list[Any]:
        captures = Recorded()
        replayed, plain = (
            with_replays(monkeypatch, group, captures, **options),
            ringspan.ContextParallel(group, kernel="reference", **options),
        )
        torch.manual_seed(group.rank)
        for _ in range(EAGER_CALLS + 3):
            tensors = [torch.randn(1, LENGTH // RANKS, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
            dout = torch.randn_like(tensors[0])
            found = []
            for context in (replayed, plain):
                q, k, v = (x.clone().requires_grad_() for x in tensors)
                out, lse = context.sequence(LENGTH).attention(q, k, v, return_lse=True)
                found.append([out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, torch.ones_like(lse)))])
            for mine, expected in zip(*found, strict=True):
                torch.testing.assert_close(mine, expected, rtol=0, atol=1e-14)
        return [captures.captures, captures.replays, replayed.transport.bytes_sent == plain.transport.bytes_sent]

    for captures, replays, as_many_bytes in ringspan.run_in_process(RANKS, run):
        assert captures == 2, "a forward and a backward"
        assert replays == 2 * 3
        assert as_many_bytes


def test_ranks_of_which_one_alone_uses_lse_capture_together(monkeypatch: pytest.MonkeyPatch):
    def run(group: Any) -> int:
        captures = Recorded()
        context = with_replays(monkeypatch, group, captures, strategy="direct")
        for call in range(EAGER_CALLS + 2):
            q, k, v = (torch.randn(1, LENGTH // RANKS, 2, 8, requires_grad=True) for _ in range(3))
            out, lse = context.sequence(LENGTH).attention(q, k, v, return_lse=True)
            (out.sum() + (lse.sum() if group.rank == call % 2 else 0)).backward()
        return captures.captures

    assert ringspan.run_in_process(RANKS, run) == [2, 2]


def test_a_result_is_not_overwritten_by_the_next_replay():
    replays, one = Replays(Recorded()), SingleRank()  # type: ignore[arg-type]
    owner = object()
    results = [replays.run(owner, "forward", (torch.full((2,), float(call)),), lambda x: (2 * x,), one, None)[0] for call in range(6)]
    assert [float(result[0]) for result in results] == [2.0 * call for call in range(6)]


def test_inputs_of_other_shapes_and_none_are_other_passes():
    capture = Recorded()
    replays, one, owner = Replays(capture), SingleRank(), object()  # type: ignore[arg-type]

    def run(*inputs: Any) -> float:
        return float(replays.run(owner, "forward", inputs, lambda x, y: (x + (0 if y is None else y),), one, None)[0].sum())

    for _ in range(5):
        assert run(torch.ones(2), None) == 2 and run(torch.ones(3), None) == 3 and run(torch.ones(2), torch.ones(2)) == 4
    assert capture.captures == 3


def test_the_last_used_are_kept():
    capture = Recorded()
    replays, one, owners = Replays(capture, most=2), SingleRank(), [object() for _ in range(3)]  # type: ignore[arg-type]
    for owner in owners:
        for _ in range(EAGER_CALLS + 1):
            replays.run(owner, "forward", (torch.ones(1),), lambda x: (x + 1,), one, None)
    assert capture.captures == 3
    replays.run(owners[1], "forward", (torch.ones(1),), lambda x: (x + 1,), one, None)
    assert capture.captures == 3 and capture.replays == 4 and replays.number == 2
    replays.run(owners[0], "forward", (torch.ones(1),), lambda x: (x + 1,), one, None)
    assert capture.replays == 4, "forgotten: launched again"


def test_within_a_capture_of_the_callers_own_all_is_launched():
    capture = Recorded()
    replays, one, owner = Replays(capture), SingleRank(), object()  # type: ignore[arg-type]
    capture.others = True
    for _ in range(5):
        replays.run(owner, "forward", (torch.ones(1),), lambda x: (x + 1,), one, None)
    assert capture.captures == capture.replays == 0


def test_what_is_sent_counts_at_every_replay():
    replays, one, owner = Replays(Once()), SingleRank(), object()  # type: ignore[arg-type]

    def work(x: torch.Tensor) -> tuple[torch.Tensor]:
        one.bytes_sent[0] += 7
        return (x,)

    for call in range(1, 7):
        replays.run(owner, "forward", (torch.ones(1),), work, one, None)
        assert one.bytes_sent == Counter({0: 7 * call})


class Once(Recorded):
    """Runs nothing again: like a graph, it counts nothing when it is replayed."""

    def __call__(self, work: Any) -> Any:
        results = work()
        return lambda: None, results


def test_ranks_are_ordered_through_peer_memory_around_a_replay():
    said: list[str] = []

    class Memory:
        def begin(self) -> None:
            said.append("begin")

        def end(self) -> None:
            said.append("end")

    replays, one, owner = Replays(Once()), SingleRank(), object()  # type: ignore[arg-type]
    for _ in range(EAGER_CALLS + 2):
        replays.run(owner, "forward", (torch.ones(1),), lambda x: (x,), one, Memory())  # type: ignore[arg-type]
    assert said == ["begin", "end"] * 2, "the launches of the others order themselves"


@pytest.mark.parametrize("options", [{}, {"strategy": "ulysses"}, {"strategy": "two_dimensional", "ulysses": 2}], ids=str)
def test_a_rank_that_cannot_capture_ends_all(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    """Those that it exchanges heads with too, which run no program with it: they would wait for it."""

    class Unrun(Recorded):
        """Sends nothing while it captures, as on GPUs."""

        def __call__(self, work: Any) -> Any:
            return super().__call__(work if self.broken else lambda: (torch.empty(0), torch.empty(0)))

    ranks = 4

    def run(group: Any) -> None:
        context = with_replays(monkeypatch, group, Unrun(broken=group.rank == ranks - 1), **options)
        q = torch.randn(1, LENGTH // ranks, 2, 8)
        for _ in range(EAGER_CALLS):
            context.sequence(LENGTH).attention(q, q, q)
        with pytest.raises(RingspanError, match=rf"rank {ranks - 1} could not capture a pass: operation not permitted.*cuda_graphs=False"):
            context.sequence(LENGTH).attention(q, q, q)

    ringspan.run_in_process(ranks, run, timeout_seconds=5.0)


@pytest.mark.parametrize("error", [RuntimeError("not permitted\nand more"), ValueError("not compiled"), AssertionError()], ids=repr)
def test_where_a_capture_breaks_all_ranks_stay_in_step_and_go_on_without(monkeypatch: pytest.MonkeyPatch, error: Exception):
    class Breaks(Recorded):
        """In the middle of the pass, as on GPUs, where nothing of it has run."""

        def __call__(self, work: Any) -> Any:
            peer_memory(group_of[self], torch.device("cpu")).begin()
            if self.broken:
                raise error
            peer_memory(group_of[self], torch.device("cpu")).end()
            return (lambda: None), (torch.empty(0), torch.empty(0))

    group_of: dict[Any, Any] = {}

    def run(group: Any) -> list[str]:
        capture, said = Breaks(broken=group.rank == 1), []
        group_of[capture] = group
        context = with_replays(monkeypatch, group, capture, transport="peer_memory")
        q = torch.randn(1, LENGTH // RANKS, 2, 8)
        for _ in range(EAGER_CALLS):
            context.sequence(LENGTH).attention(q, q, q)
        for _ in range(2):
            with pytest.raises(RingspanError) as refused:
                context.sequence(LENGTH).attention(q, q, q)
            said.append(str(refused.value))
        ringspan.ContextParallel(group, kernel="reference", transport="peer_memory").sequence(LENGTH).attention(q, q, q)
        return said

    for said in ringspan.run_in_process(RANKS, run, timeout_seconds=2.0):
        assert said[0] == said[1] and "rank 1 could not capture a pass" in said[0] and "and more" not in said[0]


def test_it_is_refused_where_nothing_can_be_captured():
    def run(group: Any) -> None:
        context = ringspan.ContextParallel(group, cuda_graphs=True)
        q = torch.randn(1, LENGTH // RANKS, 2, 8)
        context.sequence(LENGTH).attention(q, q, q)

    with pytest.raises(RingspanError, match=r"the tensors are on cpu.*cuda_graphs=False"):
        ringspan.run_in_process(RANKS, run)
    with pytest.raises(RingspanError, match="cuda_graphs=1"):
        ringspan.ContextParallel(cuda_graphs=1)  # type: ignore[arg-type]


def test_what_goes_through_nccl_is_refused_where_anything_is_sent():
    kernel = KERNELS["flash2"]

    def refusal(size: int, through_peers: bool) -> RingspanError | None:
        everyone: Any = SimpleNamespace(size=size)
        return checks.replay_refusal("cuda", kernel, everyone, size, through_peers)

    assert refusal(2, True) is None and refusal(1, False) is None
    assert "destroy_process_group" in str(refusal(2, False))


@pytest.mark.parametrize("options", [{}, {"strategy": "ulysses"}, {"strategy": "two_dimensional", "ulysses": 2}], ids=str)
def test_threads_are_refused_whoever_runs_a_program_together(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    """They wait for each other on the host, and a replay would not."""
    right = checks.replay_refusal
    monkeypatch.setattr(checks, "replay_refusal", lambda device, _, *about: right("cuda", KERNELS["flash2"], *about))

    def run(group: Any) -> None:
        x = torch.randn(1, LENGTH // group.size, 2, 8)
        context = ringspan.ContextParallel(group, transport="peer_memory", cuda_graphs=True, **options)
        with pytest.raises(RingspanError, match=r"in-process ranks are threads.*cuda_graphs=False"):
            context.sequence(LENGTH).attention(x, x, x)

    ringspan.run_in_process(4, run, timeout_seconds=5.0)
