"""Ranks as threads: order, lanes, counting, agreement, and how failures end."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import ringspan
from ringspan.errors import RankFailure, RingspanError
from ringspan.transport import InProcessTransport, Parcel, agree, make_transport


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_results_come_in_the_order_of_the_ranks():
    assert ringspan.run_in_process(5, lambda group: (group.rank, group.size)) == [(rank, 5) for rank in range(5)]


def test_what_is_sent_is_as_it_was_when_it_was_sent():
    def run(group: InProcessTransport) -> list[float]:
        mine, theirs = numbers(group.rank), torch.empty(1)
        pending = group.exchange([Parcel(mine, 1 - group.rank)], [Parcel(theirs, 1 - group.rank)])
        mine.fill_(-1.0)
        pending.wait()
        return theirs.tolist()

    assert ringspan.run_in_process(2, run) == [[1.0], [0.0]]


def test_tensors_arrive_in_the_order_of_sending_whichever_is_waited_for_first_and_lanes_are_apart():
    def run(group: InProcessTransport) -> list[list[float]]:
        peer = 1 - group.rank
        buffers = [torch.empty(1) for _ in range(4)]
        receives = [group.exchange([], [Parcel(buffers[index], peer)], lane) for index, lane in enumerate((0, 0, 1, 0))]
        for value, lane in ((10.0, 1), (0.0, 0), (1.0, 0), (2.0, 0)):
            group.exchange([Parcel(numbers(value), peer)], [], lane)
        for receive in reversed(receives):
            receive.wait()
        return [buffer.tolist() for buffer in buffers]

    assert ringspan.run_in_process(2, run) == [[[0.0], [1.0], [10.0], [2.0]]] * 2


def test_bytes_are_counted_by_peer_as_they_are_handed_over():
    def run(group: InProcessTransport) -> dict[int, int]:
        if group.rank == 0:
            group.exchange([Parcel(torch.zeros(3, 5), 1), Parcel(torch.zeros(7, dtype=torch.bfloat16), 2)], [])
            group.exchange([Parcel(torch.zeros(2, dtype=torch.float64), 1)], [], lane=1)
        return dict(group.bytes_sent)

    assert ringspan.run_in_process(3, run) == [{1: 76, 2: 14}, {}, {}]


def test_sums_and_broadcasts_are_the_same_on_every_rank():
    def run(group: InProcessTransport) -> tuple[list[float], list[float]]:
        total, first = numbers(1.0 + group.rank, 0.1), numbers(float(group.rank))
        group.all_reduce(total)
        group.broadcast(first, source=2)
        return total.tolist(), first.tolist()

    results = ringspan.run_in_process(3, run)
    assert results[0][0] == pytest.approx([6.0, 0.3]) and results[0][1] == [2.0]
    assert all(result == results[0] for result in results)


def test_the_first_error_of_any_rank_is_raised_with_its_rank_and_the_others_do_not_wait_for_it():
    def run(group: InProcessTransport) -> None:
        if group.rank == 1:
            raise KeyError("broken on purpose")
        group.exchange([], [Parcel(torch.empty(1), 1)]).wait()

    began = time.monotonic()
    with pytest.raises(KeyError, match="broken on purpose") as caught:
        ringspan.run_in_process(3, run)
    assert caught.value.__notes__ == ["on in-process rank 1 of 3"]
    assert time.monotonic() - began < 5.0


def test_a_rank_that_waits_for_one_that_has_ended_is_told_so():
    def run(group: InProcessTransport) -> None:
        if group.rank == 0:
            group.exchange([], [Parcel(torch.empty(1), 1)]).wait()

    with pytest.raises(RankFailure, match="rank 1 has ended"):
        ringspan.run_in_process(2, run)


def test_a_rank_that_waits_for_what_never_comes_gives_up_in_time():
    begun = threading.Event()

    def run(group: InProcessTransport) -> None:
        if group.rank == 0:
            group.exchange([], [Parcel(torch.empty(1), 1)]).wait()
        else:
            begun.wait(1.0)

    with pytest.raises(RankFailure, match=r"nothing came in 0\.2 s"):
        ringspan.run_in_process(2, run, timeout_seconds=0.2)


def test_a_tensor_of_another_shape_than_was_expected_is_a_failure_and_no_broadcast():
    def run(group: InProcessTransport) -> None:
        group.exchange([Parcel(torch.zeros(group.rank + 1), 1 - group.rank)], [Parcel(torch.empty(1), 1 - group.rank)]).wait()

    with pytest.raises(RankFailure, match="expected"):
        ringspan.run_in_process(2, run)


@pytest.mark.parametrize("count", [0, -1])
def test_no_ranks_are_refused(count: int):
    with pytest.raises(RingspanError, match="at least one rank"):
        ringspan.run_in_process(count, lambda group: None)


# ---- agreement ---------------------------------------------------------------------------------------------------------------------


def outcomes(function: Any, ranks: int = 3) -> list[str]:
    """What each rank's `function(group)` raises as RingspanError, or 'went on'."""

    def run(group: InProcessTransport) -> str:
        try:
            function(group)
        except RingspanError as error:
            return str(error)
        return "went on"

    return ringspan.run_in_process(ranks, run, timeout_seconds=20.0)


def test_ranks_that_say_the_same_go_on():
    assert outcomes(lambda group: agree(group, "a thing", "the same")) == ["went on"] * 3


def test_ranks_that_disagree_are_all_told_who_said_what():
    said = outcomes(lambda group: agree(group, "a thing", "small" if group.rank < 2 else "large"))
    assert len(set(said)) == 1 and "rank 0 has small, rank 2 has large" in said[0]


def test_a_problem_of_one_rank_is_raised_on_all_with_that_ranks_number():
    problem = RingspanError("a length of 0", "", "A length is at least 1")
    said = outcomes(lambda group: agree(group, "a thing", "the same", problem if group.rank == 1 else None))
    assert said[1] == str(problem)
    assert all("rank 1" in message and "a length of 0" in message for message in (said[0], said[2]))


@pytest.mark.parametrize("group", [3, "cuda", object()])
def test_what_is_no_group_is_refused(group: object):
    with pytest.raises(RingspanError, match="no mesh and no group"):
        make_transport(group)  # type: ignore[arg-type]


def test_without_a_group_a_rank_is_alone():
    transport = make_transport(None)
    assert (transport.rank, transport.size) == (0, 1)
    assert transport.gather_objects("me") == ["me"]
