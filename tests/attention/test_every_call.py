"""With TORCH_DISTRIBUTED_DEBUG=DETAIL ranks compare every call: one that makes another known call than the others is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ringspan
from ringspan.errors import RingspanError


@pytest.fixture
def detail() -> Any:
    before = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    yield
    dist.set_debug_level(before)


def tensors(length: int = 4) -> list[torch.Tensor]:
    return [torch.ones(1, length, 2, 8) for _ in range(3)]


class Known:
    """A rank that has made all of these calls."""

    def __init__(self, group: Any) -> None:
        self.context = ringspan.ContextParallel(group)
        self.causal, self.full = (self.context.sequence(12, mask) for mask in (ringspan.causal(), ringspan.full()))
        self.parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))]
        for call in (self.usual, *OTHERS.values()):
            call(self)

    def usual(self, *_: Any) -> None:
        """What the other ranks do."""
        self.context.sequence(12)
        self.causal.attention(*tensors())
        self.causal.loss(torch.zeros(1, 4, 5), torch.zeros(1, 4, dtype=torch.int64))
        self.context.decode(*tensors())
        self.context.sum_gradients(self.parameters)


OTHERS: dict[str, Callable[[Known], Any]] = {
    "sequence": lambda known: known.context.sequence(12, ringspan.full()),
    "mask": lambda known: known.full.attention(*tensors()),
    "scale": lambda known: known.causal.attention(*tensors(), 0.25),
    "softcap": lambda known: known.causal.attention(*tensors(), softcap=3.0),
    "loss": lambda known: known.causal.loss(torch.zeros(1, 4, 7), torch.zeros(1, 4, dtype=torch.int64)),
    "decode": lambda known: known.context.decode(*tensors(), 0.25),
    "sum_gradients": lambda known: known.context.sum_gradients(known.parameters[1:]),
}
INSTEAD_OF: dict[str, Callable[[Known], Any]] = {
    "sequence": lambda known: known.context.sequence(12),
    "loss": lambda known: known.causal.loss(torch.zeros(1, 4, 5), torch.zeros(1, 4, dtype=torch.int64)),
    "decode": lambda known: known.context.decode(*tensors()),
    "sum_gradients": lambda known: known.context.sum_gradients(known.parameters),
}
"""What the others call meanwhile; the usual attention, if nothing is said."""


def test_a_rank_whose_call_is_wrong_is_found_out_where_the_others_know_theirs(detail: None):
    def run(group: Any) -> str:
        known = Known(group)
        rows = 5 if group.rank == 1 else 4
        with pytest.raises(RingspanError) as caught:
            known.causal.attention(*tensors(rows))
        return str(caught.value)

    for said in ringspan.run_in_process(3, run, timeout_seconds=20.0):
        assert "new=False, rank 1 has" in said and said.count("new=True") == 1


def test_what_a_rank_refuses_alone_is_told_to_the_others_too(detail: None):
    def run(group: Any) -> str:
        known = Known(group)
        problem = RingspanError("a model's attention", "it has other tokens")
        with pytest.raises(RingspanError, match="it has other tokens"):
            if group.rank == 1:
                known.causal.refuse_attention(problem, *tensors())
            known.causal.attention(*tensors())
        return "told"

    assert ringspan.run_in_process(3, run, timeout_seconds=20.0) == ["told"] * 3


@pytest.mark.parametrize("name", OTHERS)
def test_a_rank_that_makes_another_known_call_is_found_out_on_every_rank(name: str, detail: None):
    def run(group: Any) -> str:
        known = Known(group)
        sent = sum(group.bytes_sent.values())
        usual = INSTEAD_OF.get(name, lambda known: known.causal.attention(*tensors()))
        with pytest.raises(RingspanError) as caught:
            (OTHERS[name] if group.rank == 1 else usual)(known)
        assert sum(group.bytes_sent.values()) == sent
        # And they go on together.
        known.usual()
        return str(caught.value)

    for said in ringspan.run_in_process(3, run, timeout_seconds=20.0):
        assert "on 3 ranks: rank 0 has" in said and "rank 1 has" in said


def test_without_it_known_calls_say_nothing(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    def run(group: Any) -> None:
        known = Known(group)
        gather = group.gather_objects
        monkeypatch.setattr(group, "gather_objects", lambda mine: said.append(str(mine)) or gather(mine))
        known.usual()

    ringspan.run_in_process(3, run, timeout_seconds=20.0)
    # The sums of a decode and of gradients alone, which in-process ranks make of objects.
    assert said and all(each.startswith("_Copy(") for each in said)
